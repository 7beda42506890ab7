"""Files on this machine: opened once, read into the caller's memory. The simplest Storage.

By default bytes are read with pread, which needs no memory of its own and fails cleanly where a
file was cut short. The alternative is a mapping. It is shared and read-only, because a private
writable one counts against the overcommit limit, so that a file larger than memory may be refused.
Its pages count as resident memory, so they are given back after each read.
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
                # Threads read in turn, which looks like random reads to the kernel: files that are
                # not in its cache are read several times faster with this.
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            return self._descriptor

    def check_unchanged(self) -> None:
        """Compare the opened file with what it was when its header was read.

        Raises:
            CheckpointError: it was written to since.
        """
        if self._descriptor is None:
            return
        status = os.fstat(self._descriptor)
        if status.st_size != self.nbytes:
            raise CheckpointError(
                f"{self.path}: {status.st_size} bytes, it had {self.nbytes} when it was opened",
                hint="is another program writing it?",
            )
        if status.st_mtime_ns != self._mtime_ns:
            raise CheckpointError(
                f"{self.path}: written to at {status.st_mtime_ns} ns, it was of "
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
        descriptor, n_done, pread = self.descriptor, 0, disk.current().pread
        while n_done < len(view):
            try:
                n = pread(descriptor, view[n_done:], offset + n_done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: {error.strerror} at byte {offset + n_done}",
                    hint="check the disk, or copy the file again",
                ) from error
            if not n:
                raise CheckpointError(
                    f"{self.path}: ended at byte {offset + n_done}, it had {self.nbytes} bytes "
                    "when it was opened",
                    hint="is another program writing it?",
                )
            n_done += n

    def _copy_mapped(self, offset: int, view: memoryview) -> None:
        whole = self.mapping()
        self.check_unchanged()  # a page past the end of a file that shrank would kill the process
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
        """The whole file as a uint8 tensor over the mapping. Do not write to it."""
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
        """Close the file; the mapping lives as long as tensors over it."""
        self._bytes = None
        self._map = None
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None


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
