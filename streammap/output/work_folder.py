"""The folder in which a result is made, beside its place, until it is whole.

    OUT/.streammap-run/            of a folder
    .NAME.streammap-run/           beside a single file NAME
        lock                       held by the run that is at work (flock: a crash gives it back)
        journal.jsonl              what is durable, see journal.py
        ranks/                     what several processes say to each other, see coordination.py
        files/                     shards and all else, under their final names
        commit.json                there while all that is put in place, see commit.py

A run that can't go on keeps it where something durable is in it, else removes it.
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
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that have no locks."""


def place_of(output: Path, *, is_file: bool) -> Path:
    """Where the work folder of an output is."""
    return output.with_name(f".{output.name}{SUFFIX}") if is_file else output / SUFFIX


@final
class WorkFolder:
    """A work folder that this run holds the lock of. Use as a context."""

    def __init__(self, path: Path) -> None:
        """Folders above it are made when needed."""
        self.path = path
        self.files = path / FILES
        self.keeps = False
        """Whether it stays when the context is left."""
        self._made: list[Path] = []
        self._lock: int | None = None

    def __enter__(self) -> "WorkFolder":
        try:
            while self._lock is None:
                make(self.path, self._made)
                self._lock = self._locked()
            make(self.files, [])
        except BaseException as error:
            if self._lock is not None:
                self.__exit__(type(error), error, None)
            self._remove_folders()
            raise
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if not self.keeps:
            self._clear(LOCK)
            with contextlib.suppress(OSError):
                (self.path / LOCK).unlink()
            with contextlib.suppress(OSError):
                self.path.rmdir()
        self._release()
        if kind is not None:
            self._remove_folders()

    def _clear(self, *kept: str) -> None:
        """Remove all else that is in it; the mark of a commit last."""
        entries = sorted(self.path.iterdir(), key=lambda found: found.name == MARK)
        for entry in entries:
            if entry.name in kept:
                continue
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    entry.unlink()

    def begin_anew(self) -> None:
        """Forget an earlier run."""
        self._clear(LOCK, RANKS)
        make(self.files, [])

    def _locked(self) -> int | None:
        """The lock's descriptor; None where the run that had it has just removed the folder."""
        path = self.path / LOCK
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint="check the path") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not is_at(descriptor, path):
                os.close(descriptor)
                return None
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
        except BlockingIOError as error:
            holder = os.pread(descriptor, 20, 0).decode("ascii", "replace")
            os.close(descriptor)
            told = f"process {holder}" if holder.isdecimal() else "another process"
            raise OutputError(
                f"{self.path.parent}: {told} is writing {self._named()}",
                hint="wait until it is done, or stop it",
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS and error.errno not in (errno.ENOSPC, errno.EDQUOT):
                os.close(descriptor)
                raise OutputError(f"{path}: {error.strerror}", hint="check the disk") from error
        return descriptor

    def _named(self) -> str:
        name = self.path.name.removesuffix(SUFFIX).removeprefix(".")
        return name or "a result there"

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def take(path: Path) -> int | None:
    """A descriptor that holds the lock of a file, which is made; None where another has it.

    Where a file system has no locks, everyone gets it.

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
    return descriptor


def opened(path: Path) -> int:
    """A descriptor for reading a file of a work folder: no link is followed, no pipe waited for.

    Raises:
        OSError: it can't be opened.
    """
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def is_free(path: Path) -> bool:
    """Whether nobody holds the lock of a file, as far as the file system can tell."""
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


def make(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it that are missing; what is made is noted in `made`.

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
                raise OutputError(f"{path}: is no folder", hint="remove it") from None
        except FileNotFoundError:
            make(folder, made)  # another run removed the one above
            return
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint="check the path") from error
        else:
            made.append(path)
    is_own = folder.name in (FILES,) or folder.name.endswith(SUFFIX)
    if is_own and (folder.is_symlink() or not folder.is_dir()):
        raise OutputError(f"{folder}: is no folder", hint="remove it")


def is_at(descriptor: int, path: Path) -> bool:
    """Whether a file that is open still has its name."""
    try:
        found, own = path.stat(), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)
