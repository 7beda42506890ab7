"""What a run does to a disk, as one small seam: so that tests can let any of it fail.

    with disk.using(faults.FailAt(7)):      # see streammap.testing.faults
        checkpoint.save("out")

Errors are the system's (OSError). Descriptors are numbers, as the system's are.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, final


class Disk(Protocol):
    """Files: opened, read and written at a place, synced, renamed, removed."""

    def open(self, path: Path, flags: int) -> int:
        """A descriptor of a file."""
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
