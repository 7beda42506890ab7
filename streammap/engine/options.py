"""What a run may use: memory, threads, a device, a way to read. Defaults are here."""

import re
from dataclasses import dataclass
from typing import Literal, TypedDict

from streammap.errors import OutputError

MEMORY = "256MiB"
Reader = Literal["pread", "mmap"]
READERS: tuple[Reader, ...] = ("pread", "mmap")


class EngineOptions(TypedDict, total=False):
    """What a run may use; see Engine."""

    memory: str | int
    """What it may add to the process: "256MiB" (2^20), "1GB" (10^9) or a number of bytes."""
    threads: int | None
    """Threads that read and compute, beside one that writes; None: one a processor, at most 8."""
    device: str
    """"auto", "cpu", "cuda" or "cuda:1"."""
    reader: Reader
    """"pread" into memory of the run's own, or "mmap"."""


@dataclass(frozen=True, slots=True)
class Engine:
    """What a run may use."""

    memory_nbytes: int
    n_threads: int | None
    device: str
    reader: Reader


def engine(options: EngineOptions) -> Engine:
    """Options, checked, with the defaults.

    Raises:
        OutputError: one that makes no sense.
    """
    threads, device = options.get("threads"), options.get("device", "auto")
    if threads is not None and threads < 1:
        raise OutputError(f"{threads} threads: expected at least 1", hint="pass --threads 1")
    if re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) is None:
        raise OutputError(f"device {device!r}: expected auto, cpu, cuda or cuda:N")
    reader = options.get("reader", "pread")
    if reader not in READERS:
        raise OutputError(f"reader {reader!r}: expected one of {', '.join(READERS)}")
    from streammap.output import shards  # `streammap --help` needs the defaults alone

    return Engine(shards.parse_size(options.get("memory", MEMORY)), threads, device, reader)
