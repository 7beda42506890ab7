"""Opens files that others made: regular files only, and not more bytes than expected.

A name in a checkpoint's folder may be a link to anything. Opening a pipe would wait for its other
end, reading a device would never end; both are refused before a byte is read.
"""

import os
import stat
from pathlib import Path

from streammap.errors import CheckpointError
from streammap.io.storage import disk

_MOST_NAME_NBYTES = 255
"""Of a file name, on Linux."""


def open_file(path: Path) -> int:
    """A descriptor for reading a regular file; links are followed.

    Raises:
        CheckpointError: it can't be opened, or is a folder, a pipe, a socket or a device.
    """
    try:
        # Without O_NONBLOCK, opening a pipe that nobody writes to waits forever.
        descriptor = disk.current().open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}", hint="check the path") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise CheckpointError(
            f"{path}: {_kind(mode)}, expected a regular file",
            hint="do not use this checkpoint, or put a copy of the file there",
        )
    return descriptor


def content(path: Path, *, limit: int) -> bytes:
    """The bytes of a regular file; not more than it had when it was opened.

    Raises:
        CheckpointError: as `open_file`, or more than `limit` bytes.
    """
    descriptor = open_file(path)
    with os.fdopen(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise CheckpointError(
                f"{path}: {size} bytes, at most {limit} are read", hint="is this the right file?"
            )
        try:
            # A kernel file has size 0 and may have no end: nothing of it is read.
            return file.read(size)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}", hint="check the disk") from error


def is_plain_name(name: str) -> bool:
    """Whether a name in an index is a plain file name, without a path."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        return False
    return len(name.encode()) <= _MOST_NAME_NBYTES


def is_own(root: Path, entry: Path) -> bool:
    """Whether a file, links followed, is inside a folder, or a blob of its Hub cache."""
    real = Path(os.path.realpath(entry))
    if real.is_relative_to(os.path.realpath(root)):
        return True
    parts = Path(os.path.realpath(root)).parts
    if len(parts) < 3 or parts[-2] != "snapshots":
        return False
    return real.parent == Path(*parts[:-2]) / "blobs"


def _kind(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "Is a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((word for test, word in kinds if test(mode)), "of an unknown kind")
