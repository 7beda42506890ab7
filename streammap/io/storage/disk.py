"""What a run does to a disk, as one small seam: so that tests can let any of it fail.

    with disk.using(faults.fail_at(7)):      # see streammap.testing.faults
        checkpoint.save("out")

Errors are the system's (OSError). Descriptors are numbers, as the system's are.
"""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Protocol, final

_CANNOT = frozenset((errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV, errno.EPERM))
"""Errors of file systems that reserve nothing."""


class Disk(Protocol):
    """Files: opened, given room, read and written at a place, synced, renamed, removed."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor of a file."""
        ...

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Make a file this long and reserve its room; nothing where that can't be done."""
        ...

    def pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Fill (a part of) `view`; gives the bytes read, 0 at the file's end."""
        ...

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Write (a part of) `view`; gives the bytes written."""
        ...

    def sync(self, descriptor: int) -> None:
        """Wait until the disk has the file (or a folder's entries)."""
        ...

    def replace(self, old: Path, new: Path) -> None:
        """Rename a file; one of that name is replaced."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file."""
        ...


@final
class LocalDisk:
    """This machine's."""

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """See Disk. Writes are faster then, and a full disk is known at once."""
        reserve = _fallocate()
        code = reserve(descriptor, nbytes) if reserve is not None and nbytes else 0
        if code and code not in _CANNOT:
            raise OSError(code, os.strerror(code))

    def pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        return os.preadv(descriptor, [view], offset)

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        return os.pwrite(descriptor, view, offset)

    def sync(self, descriptor: int) -> None:
        """See Disk."""
        os.fsync(descriptor)

    def replace(self, old: Path, new: Path) -> None:
        """See Disk."""
        os.replace(old, new)  # noqa: PTH105  the path's own method is this one

    def remove(self, path: Path) -> None:
        """See Disk."""
        os.unlink(path)  # noqa: PTH108


@cache
def _fallocate() -> Callable[[int, int], int] | None:
    """The system's call, which gives an error's number; None where there is none.

    Not os.posix_fallocate: where a file system can't, the C library writes to each of its blocks.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None
    import ctypes

    try:
        found = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return None
    found.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def call(descriptor: int, nbytes: int) -> int:
        while True:
            code = ctypes.get_errno() if found(descriptor, 0, 0, nbytes) else 0
            if code != errno.EINTR:
                return code

    return call


_used: list[Disk] = [LocalDisk()]


def current() -> Disk:
    """The disk that runs use."""
    return _used[-1]


@contextlib.contextmanager
def using(other: Disk) -> Iterator[None]:
    """Let all runs of this process use another one; for tests."""
    _used.append(other)
    try:
        yield
    finally:
        _used.remove(other)


def sync_folder(disk: Disk, folder: Path) -> None:
    """Wait until the disk has the entries of a folder."""
    descriptor = disk.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def write_all(disk: Disk, descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view`, however short the single writes are."""
    at = 0
    while at < len(view):
        at += disk.pwrite(descriptor, view[at:], offset + at)
