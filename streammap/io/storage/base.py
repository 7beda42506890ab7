"""Where bytes are: a folder of files, or one file, on this machine or elsewhere.

To read from a new kind of storage, write a module here whose class is a Storage and whose files are
OpenFiles, and name it in resolve.py: local.py is the shortest example, hub.py and remote.py are
others. To write results to one, write a Sink: see remote_sink.py and hub_sink.py.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from streammap.io.storage.mapping import MappedPart


Network = Literal["none", "ranges", "files"]
"""How bytes come over a network: not at all, range by range, or as whole files."""


Reader = Literal["auto", "pread", "mmap"]
"""How files of this machine are read: into buffers, or where they are mapped."""

N_CONNECTIONS = 8
"""How many requests over a network are under way at once."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What identifies the content of a file: it changes when the file is written to."""

    nbytes: int
    mtime_ns: int = 0
    """When it was last written; 0 where there is a `version`."""
    version: str = ""
    """The storage's own name for the content (an etag, a digest); "" on this machine."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is read."""

    how: Literal["mmap", "pread", "ranges", "download"]
    where: str
    """What it lies on: a file system, or "network"."""


class OpenFile(Protocol):
    """One file that is read. Several threads may read at once.

    A class that derives from this one only writes what it needs: without a mapping, connections or
    state, `read_into` is enough.
    """

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `offset` on.

        Args:
            offset: The first byte.
            view: Where the bytes go; all of it is filled.

        Raises:
            CheckpointError: the file ends before, or can't be read.
        """
        ...

    def reading(self, reader: Reader) -> Reading:
        """How it is read."""
        return Reading("ranges", "network")

    def map_into(self, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """Map bytes `start` to `end`; gives False if they are to be read into a buffer instead.

        Raises:
            CheckpointError: it can't be opened, or can't be mapped and has to be.
        """
        return False

    def part(self, start: int, end: int) -> "Tensor":
        """Bytes `start` to `end` as a uint8 tensor. Do not write to it."""
        import torch

        return torch.frombuffer(read_bytes(self, start, end), dtype=torch.uint8)

    def check_unchanged(self) -> None:
        """Compare the file with what it was when its header was read.

        Raises:
            CheckpointError: it was written to since.
        """
        return

    def release(self) -> None:
        """Give back memory that can be had again."""
        return

    def cancel(self) -> None:
        """Let waiting reads end in an error: nobody needs their result."""
        return

    def close(self) -> None:
        """Close the file; it is not used again."""
        return


def read_bytes(file: OpenFile, start: int, end: int) -> bytearray:
    """Bytes of a file, in memory of their own."""
    content = bytearray(end - start)
    file.read_into(start, memoryview(content))
    return content


class Storage(Protocol):
    """A folder or a file. Files have relative names with slashes; folders are not listed."""

    @property
    def name(self) -> str:
        """Its short name: the last part of its path."""
        ...

    @property
    def file(self) -> str | None:
        """Its name if it is a file; None for a folder."""
        ...

    @property
    def address(self) -> str:
        """What opens it again, pinned to its version if it has one."""
        ...

    @property
    def origin(self) -> Mapping[str, str]:
        """Where it is, for the record of a result; {} on this machine."""
        ...

    @property
    def n_at_once(self) -> int:
        """How many files are best opened at once."""
        ...

    @property
    def is_streamed(self) -> bool:
        """Whether each read goes over a network, so that prefetching pays."""
        ...

    def where(self, name: str) -> str:
        """How messages name a file."""
        ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def names(self) -> Collection[str]:
        """All files of the folder; storages elsewhere list subfolders too."""
        ...

    def path(self, name: str) -> Path | None:
        """Where a file is on this machine; None if it is not here (yet)."""
        ...

    def stat(self, name: str) -> Stat:
        """Size and version of a file."""
        ...

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small file.

        Raises:
            CheckpointError: more than `limit` bytes, or it can't be read.
        """
        ...

    def peek(self, name: str) -> OpenFile:
        """A file opened to read a few ranges of it, such as its header."""
        ...

    def open(self, name: str, stat: Stat) -> OpenFile:
        """A file whose tensors will be read; opened on first use."""
        ...

    def expect(self, names: tuple[str, ...]) -> None:
        """Announce the files that will be read, in this order; this also undoes `cancel`."""
        ...


class Sink(Protocol):
    """A folder or file elsewhere that a result is written to. All errors are OutputErrors."""

    @property
    def label(self) -> str:
        """How messages name it; unique."""
        ...

    @property
    def file(self) -> str | None:
        """Its name if it is a file; None for a folder."""
        ...

    def names(self) -> Mapping[str, str]:
        """The files that exist, each with the storage's name for its content."""
        ...

    def is_harmless(self, name: str) -> bool:
        """Whether an existing file may stay beside a new result."""
        ...

    def put(self, name: str, path: Path) -> str:
        """Send a file; it appears when it is complete. Returns its entry in `names`."""
        ...

    def put_all(self, contents: Mapping[str, bytes]) -> None:
        """Send small files, in this order: the last ones complete the result."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, in this order."""
        ...

    def extras(self) -> Iterable[tuple[str, bytes]]:
        """Files that only this kind of storage gets."""
        ...
