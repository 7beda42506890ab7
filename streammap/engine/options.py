"""What a run may use: memory, threads, a device, a reader. Defaults are here."""

import re
from typing import Any, final

from streammap.common.declare import check, declared, option
from streammap.common.events import Listener, nobody
from streammap.common.kinds import Anything, Kind, Whole, shown
from streammap.common.units import parse_size
from streammap.errors import OutputError, PlanError
from streammap.io.storage.base import Reader

MEMORY = "auto"
RESOURCES = "Resources"
"""Heading of these options in help."""


@final
class Size(Kind):
    """A number of bytes, or text such as "256MiB" (2^20) or "1GB" (10^9)."""

    def parse(self, value: Any, name: str) -> int:
        """Bytes."""
        return parse_size(value)


@final
class _Memory(Kind):
    """A size, or "auto"."""

    def parse(self, value: Any, name: str) -> int | None:
        """Bytes; None for "auto"."""
        return None if value == MEMORY else parse_size(value)


@final
class _Device(Kind):
    def parse(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or re.fullmatch(r"auto|cpu|cuda(:\d+)?", value) is None:
            raise OutputError(f"device {shown(value)}: expected auto, cpu, cuda or cuda:N")
        return value


@declared
class Engine:
    """What a run may use."""

    memory: str | int = option(
        default=MEMORY,
        help="Memory that a run may add to the process, on top of the torch import; auto is "
        "256MiB, or what very many tensors or dense maps need.",
        group=RESOURCES,
        kind=_Memory(),
        metavar="SIZE",
    )
    threads: int | None = option(
        default=None,
        help="Threads that read, compute and write.  [default: one a processor, 2 to 8; one for "
        "slerp, ties and their kin]",
        group=RESOURCES,
        kind=Whole(least=1),
        metavar="N",
    )
    device: str = option(
        default="auto",
        help="auto, cpu, cuda or cuda:1; auto takes a GPU where the plan gains by it.",
        group=RESOURCES,
        kind=_Device(),
        metavar="NAME",
    )
    reader: Reader = option(
        default="auto",
        help="How files of this machine are read: auto maps them where the file system is local.",
        group=RESOURCES,
    )

    def __post_init__(self) -> None:
        """Read the values; a wrong one is an error of the run, not of the plan."""
        try:
            check(self)
        except PlanError as error:
            raise OutputError(error.message, hint=error.hint) from error

    @property
    def memory_nbytes(self) -> int | None:
        """The memory, in bytes; None for "auto"."""
        return _Memory().parse(self.memory, "memory")

    @property
    def n_threads(self) -> int | None:
        """Threads; None for the default."""
        return self.threads


@declared
class RunOptions(Engine):
    """What a run may use, and who hears of its progress."""

    progress: Listener = option(
        default=nobody, help="Called with each progress event.", kind=Anything()
    )
