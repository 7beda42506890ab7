"""The disk operations of a run behind one interface, so that tests can make any of them fail.

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
"""Errors of file systems that cannot reserve space."""


class Disk(Protocol):
    """Opens, reserves, reads and writes at an offset, syncs, renames and removes files."""

    def open(self, path: Path, flags: int) -> int:
        """Open a file; returns its descriptor."""
        ...

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Extend a file to this length and reserve its blocks, if the file system can."""
        ...

    def pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Fill (a part of) `view`; returns the bytes read, 0 at the end of the file."""
        ...

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """Write (a part of) `view`; returns the bytes written."""
        ...

    def sync(self, descriptor: int) -> None:
        """Wait until the file (or a folder's entries) is on the disk."""
        ...

    def replace(self, old: Path, new: Path) -> None:
        """Rename a file, replacing one of that name."""
        ...

    def remove(self, path: Path) -> None:
        """Remove a file."""
        ...


@final
class LocalDisk:
    """This machine's disks."""

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """See Disk. Makes writes faster, and a full disk shows at once."""
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
    """Linux' fallocate, which returns an errno; None on other systems.

    Not os.posix_fallocate: where the file system cannot reserve, the C library writes every block.
    """
    if not sys.platform.startswith("linux") or sys.maxsize < 2**32:
        return None
    import ctypes

    try:
        fallocate = ctypes.CDLL(None, use_errno=True).fallocate
    except (OSError, AttributeError):
        return None
    fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def call(descriptor: int, nbytes: int) -> int:
        while True:
            code = ctypes.get_errno() if fallocate(descriptor, 0, 0, nbytes) else 0
            if code != errno.EINTR:
                return code

    return call


_used: list[Disk] = [LocalDisk()]


def current() -> Disk:
    """The disk in use."""
    return _used[-1]


@contextlib.contextmanager
def using(other: Disk) -> Iterator[None]:
    """Use another disk in the whole process; for tests."""
    _used.append(other)
    try:
        yield
    finally:
        _used.remove(other)


def sync_folder(disk: Disk, folder: Path) -> None:
    """Wait until the entries of a folder are on the disk."""
    descriptor = disk.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def write_all(disk: Disk, descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view`, in as many writes as it takes."""
    n_done = 0
    while n_done < len(view):
        n_done += disk.pwrite(descriptor, view[n_done:], offset + n_done)
