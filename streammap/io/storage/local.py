"""Files on this machine: opened once, read into memory of the caller's. The simplest Place.

By default bytes are read with pread, which takes no memory of its own and ends in an error where a
file is cut short. A mapping is the other way: shared and read-only, because a private writable one
counts against the overcommit limit, so that a file larger than memory may be refused; its pages
count as resident memory, so that they are given back after each read.
"""

import mmap
import os
import threading
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, final

from streammap.errors import CheckpointError
from streammap.io import safe_open
from streammap.io.storage import disk
from streammap.io.storage.base import OpenFile, Stat

if TYPE_CHECKING:
    from torch import Tensor


@final
class LocalFile(OpenFile):
    """One file, opened on first use, and again when it is used after `close`."""

    def __init__(self, path: Path, nbytes: int, mtime_ns: int) -> None:
        """Remember `path`, and its size and time of writing when its header was read."""
        self.path = path
        self.nbytes = nbytes
        self._mtime_ns = mtime_ns
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None
        self._bytes: Tensor | None = None
        self._lock = threading.Lock()

    @property
    def descriptor(self) -> int:
        """The file's descriptor."""
        with self._lock:
            if self._descriptor is None:
                self._descriptor = safe_open.open_file(self.path)
                try:
                    self.check_unchanged()
                except CheckpointError:
                    os.close(self._descriptor)
                    self._descriptor = None
                    raise
                # Threads read in turn, which the kernel takes for random reads: files that are not
                # in its cache are read several times faster with this.
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._descriptor

    def check_unchanged(self) -> None:
        """Compare the opened file with what it was when its header was read.

        Raises:
            CheckpointError: it was written to since.
        """
        if self._descriptor is None:
            return
        found = os.fstat(self._descriptor)
        if found.st_size != self.nbytes:
            raise CheckpointError(
                f"{self.path}: {found.st_size} bytes, it had {self.nbytes} when it was opened",
                hint="is another program writing it?",
            )
        if found.st_mtime_ns != self._mtime_ns:
            raise CheckpointError(
                f"{self.path}: written to at {found.st_mtime_ns} ns, it was of "
                f"{self._mtime_ns} ns when it was opened",
                hint="is another program writing it?",
            )

    def read_into(self, offset: int, view: memoryview, *, mapped: bool) -> None:
        """Fill `view` with the file's bytes from `offset` on.

        Args:
            mapped: Whether to read through a mapping.

        Raises:
            CheckpointError: the file ends before, or can't be read.
        """
        if mapped:
            self._copy_mapped(offset, view)
            return
        descriptor, at, pread = self.descriptor, 0, disk.current().pread
        while at < len(view):
            try:
                read = pread(descriptor, view[at:], offset + at)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: {error.strerror} at byte {offset + at}",
                    hint="check the disk, or copy the file again",
                ) from error
            if not read:
                raise CheckpointError(
                    f"{self.path}: ended at byte {offset + at}, it had {self.nbytes} bytes when "
                    "it was opened",
                    hint="is another program writing it?",
                )
            at += read

    def _copy_mapped(self, offset: int, view: memoryview) -> None:
        whole = self.mapping()
        self.check_unchanged()  # a page past the end of a file that shrank ends the process
        view[:] = memoryview(whole)[offset : offset + len(view)]
        start = offset // mmap.PAGESIZE * mmap.PAGESIZE
        whole.madvise(mmap.MADV_DONTNEED, start, offset + len(view) - start)

    def mapping(self) -> mmap.mmap:
        """The whole file, mapped for reading."""
        descriptor = self.descriptor
        with self._lock:
            if self._map is None:
                try:
                    self._map = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
                except OSError as error:
                    raise CheckpointError(
                        f"{self.path}: can't be mapped: {error.strerror}", hint="use --reader pread"
                    ) from error
            return self._map

    def part(self, start: int, end: int) -> "Tensor":
        """Bytes `start` to `end` as a tensor over the mapping. Do not write to it."""
        return self.bytes()[start:end]

    def bytes(self) -> "Tensor":
        """The whole file as a uint8 tensor over the mapping. Read only: do not write to it."""
        if self._bytes is None:
            import torch

            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                self._bytes = torch.frombuffer(self.mapping(), dtype=torch.uint8)
        return self._bytes

    def release(self) -> None:
        """Give the mapping's pages back; they are read again when needed."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def close(self) -> None:
        """Close the file; the mapping goes when the last tensor over it does."""
        self._bytes = None
        self._map = None
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


@final
class LocalStorage:
    """A folder of this machine, or a file."""

    is_streamed = False
    n_at_once = 1

    def __init__(self, path: Path) -> None:
        """Look whether `path` is a folder."""
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
        """Paths of this machine mean nothing elsewhere."""
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
        """Its size and time."""
        found = (self.folder / name).stat()
        return Stat(found.st_size, found.st_mtime_ns)

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small file."""
        return safe_open.content(self.folder / name, limit=limit)

    def peek(self, name: str) -> LocalFile:
        """The file."""
        return self.open(name, self.stat(name))

    def open(self, name: str, stat: Stat) -> LocalFile:
        """The file, which must still be what `stat` says when it is first read."""
        return LocalFile(self.folder / name, stat.nbytes, stat.mtime_ns)

    def expect(self, names: tuple[str, ...]) -> None:
        """Nothing to do: they are here."""
