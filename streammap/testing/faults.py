"""Disks that fail, to test what happens then.

    with disk.using(faults.fail_at(7, errno.ENOSPC)):     # from streammap.io.storage import disk
        checkpoint.save("out")                            # its 7th change finds the disk full

Each is a Disk (see io/storage/disk.py) that wraps another one. `counted` counts the operations of a
run that change something, so that a test can go through all of them; `kill_at` kills the process at
one.
"""

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, final

from streammap.io.storage import disk
from streammap.io.storage.disk import Disk, LocalDisk

Operation = Literal["open", "allocate", "read", "write", "sync", "rename", "remove"]
CHANGES: frozenset[Operation] = frozenset(("allocate", "write", "sync", "rename", "remove"))


class DiskWrapper(Disk):
    """A disk that passes all operations on to another one; subclasses change some of them."""

    def __init__(self, around: Disk | None = None) -> None:
        """Wrap a disk, by default this machine's."""
        self._disk = LocalDisk() if around is None else around

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        return self._disk.open(path, flags)

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """See Disk."""
        self._disk.allocate(descriptor, nbytes)

    def pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        return self._disk.pread(descriptor, view, offset)

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        return self._disk.pwrite(descriptor, view, offset)

    def sync(self, descriptor: int) -> None:
        """See Disk."""
        self._disk.sync(descriptor)

    def replace(self, old: Path, new: Path) -> None:
        """See Disk."""
        self._disk.replace(old, new)

    def remove(self, path: Path) -> None:
        """See Disk."""
        self._disk.remove(path)


class CountingDisk(DiskWrapper):
    """A disk that counts operations, and calls a function before each: an error prevents it.

    The call is `before(operation, number, path)`; number counts operations of `kinds`, from 0.
    """

    def __init__(
        self,
        before: Callable[[Operation, int, Path], None],
        *,
        kinds: frozenset[Operation] = CHANGES,
        syncs: bool = True,
        around: Disk | None = None,
    ) -> None:
        """Call `before` ahead of operations of these kinds.

        Args:
            syncs: Whether to sync at all: what a killed process wrote survives without.
        """
        super().__init__(around)
        self._before, self._kinds, self._syncs = before, kinds, syncs
        self._paths: dict[int, Path] = {}
        self._lock = threading.Lock()
        self.count = 0
        """How many operations there were so far."""

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        self._ask("open", path)
        descriptor = self._disk.open(path, flags)
        self._paths[descriptor] = path
        return descriptor

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """See Disk."""
        self._ask("allocate", self._path(descriptor))
        self._disk.allocate(descriptor, nbytes)

    def pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        self._ask("read", self._path(descriptor))
        return self._disk.pread(descriptor, view, offset)

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        self._ask("write", self._path(descriptor))
        return self._disk.pwrite(descriptor, view, offset)

    def sync(self, descriptor: int) -> None:
        """See Disk."""
        self._ask("sync", self._path(descriptor))
        if self._syncs:
            self._disk.sync(descriptor)

    def replace(self, old: Path, new: Path) -> None:
        """See Disk."""
        self._ask("rename", new)
        self._disk.replace(old, new)

    def remove(self, path: Path) -> None:
        """See Disk."""
        self._ask("remove", path)
        self._disk.remove(path)

    def _path(self, descriptor: int) -> Path:
        return self._paths.get(descriptor, Path(f"/proc/self/fd/{descriptor}"))

    def _ask(self, operation: Operation, path: Path) -> None:
        if operation not in self._kinds:
            return
        with self._lock:
            number, self.count = self.count, self.count + 1
        self._before(operation, number, path)


def fail_at(
    n: int,
    code: int = errno.EIO,
    *,
    kinds: frozenset[Operation] = CHANGES,
    every: bool = False,
    name: str = "",
    around: Disk | None = None,
) -> CountingDisk:
    """A disk whose n-th operation (from 0) fails; with `every`, each n-th.

    Args:
        code: The system error, see errno.
        kinds: The operations that are counted.
        name: Only files whose path contains this fail.
    """

    def before(_: Operation, number: int, path: Path) -> None:
        hit = number % n == n - 1 if every else number == n
        if hit and name in str(path):
            raise OSError(code, os.strerror(code))

    return CountingDisk(before, kinds=kinds, around=around)


def slow(seconds: float, *, kinds: frozenset[Operation] = CHANGES) -> CountingDisk:
    """A disk that takes this much longer for each operation."""
    return CountingDisk(lambda *_: time.sleep(seconds), kinds=kinds)


def watched() -> CountingDisk:
    """A disk that works: its `count` says at how many points a run can fail."""
    return CountingDisk(lambda *_: None, syncs=False)


def kill_at(n: int, how: signal.Signals = signal.SIGKILL) -> CountingDisk:
    """A disk that kills this process (or sends another signal) before its n-th change, from 0."""

    def before(_: Operation, number: int, __: Path) -> None:
        if number == n:
            os.kill(os.getpid(), how)
            if how == signal.SIGKILL:
                time.sleep(60)  # the signal may reach another thread first

    return CountingDisk(before, syncs=False)


@final
class ShortDisk(DiskWrapper):
    """A disk whose reads and writes are cut short at a random length."""

    def __init__(self, *, seed: int = 0, around: Disk | None = None) -> None:
        """Draw lengths from `seed`."""
        super().__init__(around)
        self._random = random.Random(seed)

    def pread(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        return self._disk.pread(descriptor, self._part(view), offset)

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        return self._disk.pwrite(descriptor, self._part(view), offset)

    def _part(self, view: memoryview) -> memoryview:
        return view[: self._random.randint(1, max(1, len(view)))]


@final
class FullDisk(DiskWrapper):
    """A disk with limited room: the write that needs more is short, the next one fails."""

    def __init__(self, nbytes: int, *, around: Disk | None = None) -> None:
        """Leave room for `nbytes` of writes; overwriting counts again."""
        super().__init__(around)
        self._lock = threading.Lock()
        self.free_nbytes = nbytes

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        with self._lock:
            if view and not self.free_nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            n = self._disk.pwrite(descriptor, view[: self.free_nbytes], offset)
            self.free_nbytes -= n
        return n


@final
class PowerCut(DiskWrapper):
    """A disk that loses unsynced data when `cut` is called, as in a power failure.

    What was written to a file since its last sync becomes zeros, as on a file system that writes
    names before data. Names are kept, synced or not: that is the harder case.
    """

    def __init__(self, around: Disk | None = None) -> None:
        """Remember all writes."""
        super().__init__(around)
        self._paths: dict[int, Path] = {}
        self._unsynced: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def open(self, path: Path, flags: int) -> int:
        """See Disk."""
        descriptor = self._disk.open(path, flags)
        self._paths[descriptor] = path
        return descriptor

    def pwrite(self, descriptor: int, view: memoryview, offset: int) -> int:
        """See Disk."""
        with self._lock:
            self._unsynced.setdefault(_file(descriptor), []).append((offset, len(view)))
        return self._disk.pwrite(descriptor, view, offset)

    def sync(self, descriptor: int) -> None:
        """See Disk."""
        with self._lock:
            self._unsynced.pop(_file(descriptor), None)
        self._disk.sync(descriptor)

    def cut(self, folder: Path) -> int:
        """Lose the unsynced data of all files in a folder; returns the bytes lost."""
        lost = 0
        for path in folder.rglob("*"):
            status = path.lstat()
            for offset, nbytes in self._unsynced.get((status.st_dev, status.st_ino), []):
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(bytes(nbytes))
                lost += nbytes
        return lost


def _file(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def killed(act: Callable[[], object], n: int) -> bool:
    """Call `act` in a forked child that is killed at its n-th change of the disk.

    Returns:
        Whether it was killed: False if it made fewer changes.

    Raises:
        AssertionError: it ended in another way.
    """
    child = os.fork()
    if not child:
        code = 1
        try:
            with disk.using(kill_at(n)):
                act()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"killed by {os.WTERMSIG(status)}"
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return False


@contextmanager
def counted() -> Iterator[CountingDisk]:
    """Count the changes that runs inside make to the disk."""
    counting = watched()
    with disk.using(counting):
        yield counting
