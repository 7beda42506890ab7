"""Files on this machine, memory-mapped for reading.

The mapping is shared and read-only: a private writable one counts against the overcommit limit, so
that a file larger than memory may be refused. Pages are given back by `release`, because
mapped pages count as resident memory until then.
"""

import mmap
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, final

from streammap.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@final
class MappedFile:
    """One file, opened and mapped on first use. Not to be used after `close`."""

    def __init__(self, path: Path, nbytes: int, mtime_ns: int) -> None:
        """Remember `path`, and its size and time of writing when its header was read."""
        self.path = path
        self.nbytes = nbytes
        self._mtime_ns = mtime_ns
        self._descriptor: int | None = None
        self._map: mmap.mmap | None = None
        self._bytes: Tensor | None = None

    @property
    def descriptor(self) -> int:
        """The file's descriptor."""
        if self._descriptor is None:
            try:
                self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{self.path}: {error.strerror}") from error
            try:
                self.check_unchanged()
            except CheckpointError:
                self.close()
                raise
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

    def bytes(self) -> "Tensor":
        """The whole file as a uint8 tensor over the mapping. Read only: do not write to it."""
        if self._bytes is None:
            import torch

            self._map = mmap.mmap(self.descriptor, 0, prot=mmap.PROT_READ, flags=mmap.MAP_SHARED)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="The given buffer is not writable")
                self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        return self._bytes

    def release(self) -> None:
        """Give the mapping's pages back; they are read again when needed."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Close the file; the mapping goes when the last tensor over it does."""
        self._bytes = None
        self._map = None
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
