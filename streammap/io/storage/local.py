"""Files on this machine: opened once, read into the caller's memory or where they are mapped.

pread needs no memory of its own, and works everywhere. A mapping saves a copy: kernels read the
kernel's own pages, and give them back. "auto" maps what lies on a file system of this machine.
"""

import os
from collections.abc import Collection, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

from streammap.common import own
from streammap.errors import CheckpointError, TruncatedError
from streammap.io import safe_open
from streammap.io.storage import disk, mapping
from streammap.io.storage.base import OpenFile, Reader, Reading, Stat
from streammap.io.storage.disk import LocalDisk
from streammap.io.storage.mapping import FileMapping, MappedPart

if TYPE_CHECKING:
    from torch import Tensor

_AGAIN = "is another program writing it?"
_BACK = "put it back as it was, with its time (cp -p, rsync -t), and run the same command again"


@final
class _Descriptor:
    """A descriptor. It is closed with its last user: whoever reads keeps it open that long."""

    def __init__(self, number: int) -> None:
        self.number = number

    @cached_property
    def file_system(self) -> str:
        """What the file lies on."""
        return mapping.file_system(self.number)

    def __del__(self) -> None:
        os.close(self.number)


@final
class LocalFile(OpenFile):
    """One file, opened on first use, and again on use after `close`."""

    def __init__(self, path: Path, nbytes: int, mtime_ns: int) -> None:
        """Open nothing yet.

        Args:
            path: The file.
            nbytes: Its size when its header was read.
            mtime_ns: When it was last written then.
        """
        self.path = path
        self.nbytes = nbytes
        self._mtime_ns = mtime_ns
        self._descriptor: _Descriptor | None = None
        self._mapping: FileMapping | None = None
        self._lock = own.Lock()

    def __reduce__(self) -> tuple[type["LocalFile"], tuple[Path, int, int]]:
        return LocalFile, (self.path, self.nbytes, self._mtime_ns)

    def _opened(self) -> _Descriptor:
        opened = self._descriptor
        if opened is not None:
            return opened
        with self._lock:
            if self._descriptor is None:
                opened = _Descriptor(safe_open.open_file(self.path))
                self._check(opened)
                # Threads read in turn, which looks like random reads to the kernel: files that are
                # not in its cache are read several times faster with this.
                os.posix_fadvise(opened.number, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._descriptor = opened
            return self._descriptor

    def check_unchanged(self) -> None:
        """Compare the opened file with what it was when its header was read.

        Raises:
            CheckpointError: it was written to since.
        """
        opened = self._descriptor
        if opened is not None:
            self._check(opened)
        if self._mapping is not None and self._mapping.is_broken:
            raise CheckpointError(f"{self.path}: can't be read", hint="check the disk")

    def _check(self, opened: _Descriptor) -> None:
        status = os.fstat(opened.number)
        if status.st_size != self.nbytes:
            raise self._resized(f"{status.st_size} bytes", is_shorter=status.st_size < self.nbytes)
        if status.st_mtime_ns != self._mtime_ns:
            raise CheckpointError(
                f"{self.path}: written to at {status.st_mtime_ns} ns, it was of "
                f"{self._mtime_ns} ns when it was opened",
                hint=_AGAIN,
            )

    def _resized(self, what: str, *, is_shorter: bool) -> CheckpointError:
        message = f"{self.path}: {what}, it had {self.nbytes} when it was opened"
        if is_shorter:
            return TruncatedError(message, hint=_BACK)
        return CheckpointError(message, hint=_AGAIN)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `offset` on.

        Raises:
            CheckpointError: the file ends before, was written to, or can't be read.
        """
        opened, n_done, pread = self._opened(), 0, disk.current().pread
        while n_done < len(view):
            try:
                n = pread(opened.number, view[n_done:], offset + n_done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: {error.strerror} at byte {offset + n_done}",
                    hint="check the disk, or copy the file again",
                ) from error
            if not n:
                raise self._resized(f"ended at byte {offset + n_done}", is_shorter=True)
            n_done += n
        self._check(opened)

    def reading(self, reader: Reader) -> Reading:
        """How its bytes are read in place, and what the file system is.

        Raises:
            CheckpointError: it can't be opened.
        """
        how: Literal["mmap", "pread"] = "mmap" if self._maps(reader) else "pread"
        return Reading(how, self._opened().file_system)

    def map_into(self, start: int, end: int, part: MappedPart, reader: Reader) -> bool:
        """Map bytes `start` to `end`, unless pread is to be used.

        Raises:
            CheckpointError: it can't be opened, or can't be mapped and has to be.
        """
        is_small = reader == "auto" and end - start < mapping.MIN_NBYTES
        if is_small or not self._maps(reader):
            return False
        opened = self._opened()
        try:
            part.open(str(self.path), opened.number, start, end, partial(self._check, opened))
        except OSError as error:
            if reader == "auto":
                return False
            raise self._unmappable(error) from error
        return True

    def _unmappable(self, error: Exception) -> CheckpointError:
        return CheckpointError(f"{self.path}: can't be mapped: {error}", hint="use --reader pread")

    def _maps(self, reader: Reader) -> bool:
        if reader != "auto":
            return reader == "mmap"
        # A disk that a test has put in the place of this machine's is to see all reads.
        return isinstance(disk.current(), LocalDisk) and self._opened().file_system in mapping.LOCAL

    def _mapped(self) -> FileMapping:
        opened = self._opened()
        with self._lock:
            if self._mapping is None or self._mapping.is_broken:
                try:
                    self._mapping = FileMapping(opened.number)
                except (OSError, ValueError) as error:
                    raise self._unmappable(error) from error
            return self._mapping

    def part(self, start: int, end: int) -> "Tensor":
        """Bytes `start` to `end` as a tensor over the mapping. Do not write to it."""
        return self._mapped().tensor()[start:end]

    def release(self) -> None:
        """Give the mapping's pages back; they are read again when needed."""
        if self._mapping is not None:
            self._mapping.release()

    def close(self) -> None:
        """Close the file, once nobody reads from it; a mapping lives as long as tensors over it."""
        with self._lock:
            self._descriptor = self._mapping = None


@final
class LocalStorage:
    """A folder or file on this machine."""

    is_streamed = False
    n_at_once = 1

    def __init__(self, path: Path) -> None:
        """Check whether `path` is a folder."""
        self._path = path
        is_folder = path.is_dir()
        self.folder = path if is_folder else path.parent
        self.file = None if is_folder else path.name

    def __str__(self) -> str:
        return str(self._path)

    @property
    def name(self) -> str:
        """The folder's or file's name."""
        return self._path.resolve().name

    @property
    def address(self) -> str:
        """Its absolute path."""
        return str(self._path.absolute())

    @property
    def origin(self) -> Mapping[str, str]:
        """Empty: paths of this machine mean nothing elsewhere."""
        return {}

    def where(self, name: str) -> str:
        """Its path."""
        return str(self.folder / name)

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.folder / name).is_file()

    def names(self) -> Collection[str]:
        """The folder's own files, in no order."""
        return [entry.name for entry in self.folder.iterdir() if entry.is_file()]

    def path(self, name: str) -> Path | None:
        """Where a file is."""
        return self.folder / name

    def stat(self, name: str) -> Stat:
        """Its size and modification time."""
        status = (self.folder / name).stat()
        return Stat(status.st_size, status.st_mtime_ns)

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small file."""
        return safe_open.content(self.folder / name, limit=limit)

    def peek(self, name: str) -> LocalFile:
        """The file."""
        return self.open(name, self.stat(name))

    def open(self, name: str, stat: Stat) -> LocalFile:
        """The file; it must still match `stat` on first use."""
        return LocalFile(self.folder / name, stat.nbytes, stat.mtime_ns)

    def expect(self, names: tuple[str, ...]) -> None:
        """Nothing to fetch."""
