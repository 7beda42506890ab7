"""A place of bytes: a folder of files, or one file, wherever it is.

To add a kind of place, write one module here whose class is a Place and whose files are OpenFiles,
and name it in resolve.py. local.py is the shortest example, hub.py and remote.py are others.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor


Network = Literal["none", "ranges", "files"]
"""How bytes come over a network: not at all, part by part, or as whole files."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What tells a file from another one, and from itself when it was written to."""

    nbytes: int
    mtime_ns: int = 0
    """When it was written; 0 where `version` tells."""
    version: str = ""
    """What its place calls its content (an etag, a digest); "" on this machine."""


class OpenFile(Protocol):
    """One file that is read. Several threads may read at once."""

    def read_into(self, offset: int, view: memoryview, *, mapped: bool) -> None:
        """Fill `view` with the file's bytes from `offset` on.

        Args:
            mapped: Whether to read through a mapping, where there can be one.

        Raises:
            CheckpointError: the file ends before, or can't be read.
        """
        ...

    def part(self, start: int, end: int) -> "Tensor":
        """Bytes `start` to `end` as a uint8 tensor. Do not write to it."""
        ...

    def check_unchanged(self) -> None:
        """Compare the file with what it was when its header was read.

        Raises:
            CheckpointError: it was written to since.
        """
        ...

    def release(self) -> None:
        """Give back memory that can be had again."""
        ...

    def cancel(self) -> None:
        """Let reads that wait for something end in an error: nobody waits for them any more."""
        ...

    def close(self) -> None:
        """Not to be used any more."""
        ...


class Storage(Protocol):
    """A folder or a file. Its files have relative names with slashes; folders have none."""

    @property
    def name(self) -> str:
        """What people call it: the last part of its path."""
        ...

    @property
    def file(self) -> str | None:
        """The name of the file that it is; None for a folder."""
        ...

    @property
    def address(self) -> str:
        """What opens it again, with all that is known of its version."""
        ...

    @property
    def origin(self) -> Mapping[str, str]:
        """Where it is, for the record that is kept with results; {} on this machine."""
        ...

    @property
    def n_at_once(self) -> int:
        """How many files are best looked at together."""
        ...

    @property
    def is_streamed(self) -> bool:
        """Whether each read goes over a network, so that it is better asked for in advance."""
        ...

    def where(self, name: str) -> str:
        """What a message calls a file."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def names(self) -> Collection[str]:
        """All files of the folder, and for places elsewhere also those in folders inside."""
        ...

    def path(self, name: str) -> Path | None:
        """Where a file is on this machine; None where it isn't yet, or never will be."""
        ...

    def stat(self, name: str) -> Stat:
        """What a file is."""
        ...

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small file.

        Raises:
            CheckpointError: more than `limit` bytes, or it can't be read.
        """
        ...

    def peek(self, name: str) -> OpenFile:
        """A file for a look at its beginning and end: only what is asked for is fetched."""
        ...

    def open(self, name: str, stat: Stat) -> OpenFile:
        """A file whose bytes will be used; opened when they first are."""
        ...

    def expect(self, names: tuple[str, ...]) -> None:
        """Be told that these files will be read, in this order; what was cancelled may go on."""
        ...
