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

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part is not None)
        return f"{self.level:<8} {where}{': ' if where else ''}{self.message}"


class Problems(Protocol):
    """Takes the problems that are found while a checkpoint is opened."""

    def report(self, findings: Sequence[Finding], *, hint: str) -> None:
        """Take problems of one kind; none is fine."""
        ...

    def failed(self, check: str, error: CheckpointError, *, file: str) -> None:
        """Take the error that kept a file from being read."""
        ...


@final
@dataclass(frozen=True, slots=True)
class Strict:
    """The first problem is an error."""

    storage: Storage

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
        count = f" ({len(findings)} such)" if len(findings) > 1 else ""
        raise CheckpointError(f"{where}: {first.message}{count}", hint=hint)

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

    def failed(self, check: str, error: CheckpointError, *, file: str) -> None:
        """See Problems."""
        message = error.message.removeprefix(f"{file}: ")
        self.findings.append(Finding("error", check, message, file=file))
