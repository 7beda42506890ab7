"""What to do about a checkpoint that is wrong: stop at the first problem, or collect them all."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal, Protocol, final

from streammap.errors import CheckpointError
from streammap.io.storage.base import Storage


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem of a checkpoint, or one thing worth a note."""

    level: Literal["error", "note"]
    check: str
    """file, size, index, key, place, dtype, shape, offset, crc32, config, class, finite, tile, or
    source."""
    message: str
    key: str | None = None
    file: str | None = None
    found: object = None
    expected: object = None

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    @property
    def place(self) -> str:
        """What it is about, before its message: "model.safetensors: lm_head.weight: "."""
        return "".join(f"{part}: " for part in (self.file, self.key) if part is not None)

    def __str__(self) -> str:
        return f"{self.level:<8} {self.place}{self.message}"


class Problems(Protocol):
    """Takes the problems that are found while a checkpoint is opened."""

    def report(self, findings: Sequence[Finding], *, hint: str) -> None:
        """Take problems of one kind; none is fine."""
        ...

    def tolerate(self, findings: Sequence[Finding]) -> None:
        """Take problems of one kind that loaders cope with; none is fine."""
        ...

    def failed(self, check: str, error: CheckpointError, *, file: str) -> None:
        """Take the error that kept a file from being read."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Strict:
    """The first problem is an error, but for those that loaders cope with."""

    storage: Storage
    notes: list[str] = field(default_factory=list)
    """One for each kind of what was tolerated."""

    def report(self, findings: Sequence[Finding], *, hint: str) -> None:
        """See Problems.

        Raises:
            CheckpointError: there are findings.
        """
        if not findings:
            return
        first = findings[0]
        place = str(self.storage) if first.file is None else self.storage.where(first.file)
        where = place if first.key is None else f"{place}: {first.key}"
        raise CheckpointError(f"{where}: {first.message}{_count(findings)}", hint=hint)

    def tolerate(self, findings: Sequence[Finding]) -> None:
        """See Problems."""
        if findings:
            self.notes.append(f"{findings[0].place}{findings[0].message}{_count(findings)}")

    def failed(self, check: str, error: CheckpointError, *, file: str) -> None:
        """See Problems.

        Raises:
            CheckpointError: always.
        """
        raise error


@final
@dataclass(frozen=True, slots=True)
class Collected:
    """All problems are kept, and opening goes on with what is left."""

    findings: list[Finding] = field(default_factory=list)

    def report(self, findings: Sequence[Finding], *, hint: str) -> None:
        """See Problems."""
        self.findings.extend(findings)

    def tolerate(self, findings: Sequence[Finding]) -> None:
        """See Problems."""
        self.findings.extend(findings)

    def failed(self, check: str, error: CheckpointError, *, file: str) -> None:
        """See Problems."""
        message = error.message.removeprefix(f"{file}: ")
        self.findings.append(Finding("error", check, message, file=file))


def _count(findings: Sequence[Finding]) -> str:
    return f" ({len(findings)} such)" if len(findings) > 1 else ""
