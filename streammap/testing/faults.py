"""Disks that fail, for tests of what happens then.

    with disk.using(faults.fail_at(7, errno.ENOSPC)):     # from streammap.io.storage import disk
        checkpoint.save("out")                            # its 7th change finds the disk full

Each is a Disk (see storage/disk.py) around another one. `counted` counts the operations of a run
that change something, so that a test can go through all of them; `kill_at` ends the process at one.
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


class Around(Disk):
    """A disk that does what another one does: the others here change some of it."""

    def __init__(self, around: Disk | None = None) -> None:
        """Around this machine's disk, if no other is given."""
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


class Watched(Around):
    """A disk that asks before each operation, and does it if nothing is raised.

    It asks `before(operation, number, path)`: number counts operations of `kinds`, from 0.
    """

    def __init__(
        self,
        before: Callable[[Operation, int, Path], None],
        *,
        kinds: frozenset[Operation] = CHANGES,
        syncs: bool = True,
        around: Disk | None = None,
    ) -> None:
        """Ask `before` operations of these kinds.

        Args:
            syncs: Whether to sync really: what a killed process wrote is there without.
        """
        super().__init__(around)
        self._before, self._kinds, self._syncs = before, kinds, syncs
        self._paths: dict[int, Path] = {}
        self._lock = threading.Lock()
        self.count = 0
        """Operations so far."""

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
) -> Watched:
    """A disk whose n-th operation (from 0) fails, or with `every` each n-th.

    Args:
        code: The system's error, of errno.
        kinds: Operations that count.
        name: Only files with this in their path fail.
    """

    def before(_: Operation, number: int, path: Path) -> None:
        hit = number % n == n - 1 if every else number == n
        if hit and name in str(path):
            raise OSError(code, os.strerror(code))

    return Watched(before, kinds=kinds, around=around)


def slow(seconds: float, *, kinds: frozenset[Operation] = CHANGES) -> Watched:
    """A disk that takes this long for each operation."""
    return Watched(lambda *_: time.sleep(seconds), kinds=kinds)


def watched() -> Watched:
    """A disk that does all it should: its `count` says how many points a run has."""
    return Watched(lambda *_: None, syncs=False)


def kill_at(n: int, how: signal.Signals = signal.SIGKILL) -> Watched:
    """A disk that ends this process (or signals it otherwise) before its n-th change, from 0."""

    def before(_: Operation, number: int, __: Path) -> None:
        if number == n:
            os.kill(os.getpid(), how)
            if how == signal.SIGKILL:
                time.sleep(60)  # it is delivered to another thread first

    return Watched(before, syncs=False)


@final
class ShortDisk(Around):
    """A disk that reads and writes a part of what it is asked for, of a random length."""

    def __init__(self, *, seed: int = 0, around: Disk | None = None) -> None:
        """Lengths depend on `seed`."""
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
class FullDisk(Around):
    """A disk with room for so many bytes: the write that needs more is short, the next fails."""

    def __init__(self, nbytes: int, *, around: Disk | None = None) -> None:
        """Bytes that are written twice count twice."""
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
class PowerCut(Around):
    """A disk that loses what was not synced, when `cut` is called: the power fails.

    Data that a file was given since it was last synced become zeros, as on a file system that
    writes names before data. Names are kept, synced or not: that is the harder case.
    """

    def __init__(self, around: Disk | None = None) -> None:
        """Watch all writes."""
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
        """Lose all that is not synced of the files of a folder; gives the bytes lost."""
        lost = 0
        for path in folder.rglob("*"):
            found = path.lstat()
            for offset, nbytes in self._unsynced.get((found.st_dev, found.st_ino), []):
                with path.open("r+b") as file:
                    file.seek(offset)
                    file.write(bytes(nbytes))
                lost += nbytes
        return lost


def _file(descriptor: int) -> tuple[int, int]:
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def killed(act: Callable[[], object], n: int) -> bool:
    """Do something in a child of this process that is killed at its n-th change of the disk.

    Returns:
        Whether it was: False where it had fewer.

    Raises:
        AssertionError: it ended otherwise.
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
def counted() -> Iterator[Watched]:
    """A disk that counts the changes that runs make meanwhile."""
    found = watched()
    with disk.using(found):
        yield found
