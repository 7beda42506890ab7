"""The folder in which a result is made, beside its place, until it is whole.

    OUT/.streammap-run/            of a folder
    .NAME.streammap-run/           beside a single file NAME
        lock                       held by the run at work (flock: released by a crash)
        *.found.map.safetensors    orders that a search found, see engine/searching/settle.py
        journal.jsonl              which tensors are durable, see journal.py
        ranks/                     messages between the processes of a launch, see coordination.py
        files/                     shards and side files, under their final names
        commit.json                there while the files are put in place, see commit.py

A run that fails keeps the folder if anything durable is in it, else removes it.
"""

import contextlib
import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import final

from streammap.errors import OutputError
from streammap.io import filenames

SUFFIX, MARK = filenames.WORK_SUFFIX, filenames.COMMIT_MARK
FILES, LOCK, RANKS = "files", "lock", "ranks"
JOURNALS = "journal*.jsonl"
FOUND = "*.found.map.safetensors"
RESTART = "pass --restart to start over"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""
_N_TRIES = 10


def path_for(output: Path, *, is_file: bool) -> Path:
    """The work folder of an output."""
    return output.with_name(f".{output.name}{SUFFIX}") if is_file else output / SUFFIX


@final
class WorkFolder:
    """A work folder. Use as a context: inside, this run holds its lock."""

    def __init__(self, path: Path) -> None:
        """Folders above it are made when needed."""
        self.path = path
        self.files = path / FILES
        self.keep_on_exit = False
        """Whether it stays when the context is left; on entry, whether an earlier run left it."""
        self._made: list[Path] = []
        self._lock: int | None = None

    def __enter__(self) -> "WorkFolder":
        try:
            while self._lock is None:
                make(self.path, self._made)
                self._lock = self._locked()
            self.keep_on_exit = self.is_resumable
            make(self.files, [])
        except BaseException as error:
            if self._lock is not None:
                self.__exit__(type(error), error, None)
            self._remove_folders()
            raise
        return self

    @property
    def is_marked(self) -> bool:
        """Whether it holds a whole result that a run was putting in place when it ended."""
        return (self.path / MARK).is_file()

    @property
    def is_resumable(self) -> bool:
        """Whether an earlier run left something durable."""
        return self.is_marked or any(self.path.glob(JOURNALS))

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._lock not in _held:
            return  # a forked child that ends: the folder is its parent's
        if not self.keep_on_exit:
            self._clear(LOCK)
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
            with contextlib.suppress(OSError):
                self.path.rmdir()
        self._release()
        if kind is not None:
            self._remove_folders()

    def _clear(self, *kept: str) -> None:
        """Remove everything but `kept`; the mark of a commit last."""
        entries = sorted(self.path.iterdir(), key=lambda entry: entry.name == MARK)
        for entry in entries:
            if entry.name in kept:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    entry.unlink()

    def start_over(self) -> None:
        """Discard what an earlier run left, but for what it found out before it began."""
        self._clear(LOCK, RANKS, *(path.name for path in self.path.glob(FOUND)))
        make(self.files, [])
        self.keep_on_exit = False

    def _locked(self) -> int | None:
        """The lock's descriptor; None if the run that held it has just removed the folder."""
        path = self.path / LOCK
        try:
            descriptor = take(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint="check the path") from error
        if descriptor is None:
            raise OutputError(
                f"{self.path.parent}: {_holder(path)} is writing {self._result()}",
                hint="wait until it is done, or stop it",
            )
        if not is_at(descriptor, path):
            release(descriptor)
            return None
        with contextlib.suppress(OSError):  # of a full disk: the number is for people
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        return descriptor

    def _result(self) -> str:
        name = self.path.name.removesuffix(SUFFIX).removeprefix(".")
        return name or "a result there"

    def _release(self) -> None:
        if self._lock is not None:
            release(self._lock)
            self._lock = None

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _holder(path: Path) -> str:
    """The process that holds a lock, by the number that it wrote there."""
    with contextlib.suppress(OSError, ValueError):
        return f"process {int(path.read_text())}"
    return "another process"


_held: set[int] = set()
"""Descriptors that hold locks."""


def _forget() -> None:
    """Close the descriptors in a forked child: it shares the locks, and may outlive the run."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def release(descriptor: int) -> bool:
    """Give a lock back; gives False in a forked child, which does not have it."""
    if descriptor not in _held:
        return False
    _held.discard(descriptor)
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # whoever else has the descriptor
    os.close(descriptor)
    return True


def take(path: Path) -> int | None:
    """A descriptor that holds the lock of a file, created if need be; None if another has it.

    On a file system without locks, everyone gets it.

    Raises:
        OSError: the file can't be opened.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    _held.add(descriptor)
    return descriptor


def open_file(path: Path) -> int:
    """A descriptor for reading a file of a work folder; follows no link, waits for no pipe.

    Raises:
        OSError: it can't be opened.
    """
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock of a file, as far as the file system knows."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def make(folder: Path, made: list[Path], *, n_tries: int = _N_TRIES) -> None:
    """Make a folder and the missing ones above it, and append each to `made`.

    Args:
        n_tries: How often it is tried again where others remove folders.

    Raises:
        OutputError: it can't be made, or something else has its name.
    """
    missing = []
    above = folder
    while not above.exists():
        missing.append(above)
        above = above.parent
    for path in reversed(missing):
        try:
            path.mkdir()
        except FileExistsError:
            if not path.is_dir() or path.is_symlink():
                raise OutputError(f"{path}: not a folder", hint="remove it") from None
        except FileNotFoundError as error:
            # Another run removed the one above; or nothing can be made there: in /proc, or in a
            # folder that is removed and still is the current one.
            if not n_tries:
                raise OutputError(f"{path}: {error.strerror}", hint="write elsewhere") from error
            make(folder, made, n_tries=n_tries - 1)
            return
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint="check the path") from error
        else:
            made.append(path)
    is_own = folder.name == FILES or folder.name.endswith(SUFFIX)
    if is_own and (folder.is_symlink() or not folder.is_dir()):
        raise OutputError(f"{folder}: not a folder", hint="remove it")


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        named, own = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino)
