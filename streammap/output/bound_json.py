"""Small JSON files of a work folder: replaced all at once, and read as if anybody had written them.

    commit.json, ranks/launch.json, ranks/R.json, and sent.json of an upload

The lines of a journal have the same form. What is bound to a request begins with its
`Fingerprint.head`.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from streammap.common import strict_json
from streammap.io.storage import disk as disks
from streammap.io.storage.disk import Disk
from streammap.output import work_folder

_MAX_NBYTES = 100_000_000


def encode(content: Mapping[str, object]) -> bytes:
    """One line."""
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def parse(text: bytes) -> dict[str, object] | None:
    """The object of a line, or of a file; None where it is not a JSON object."""
    try:
        content = strict_json.loads(text)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def read(path: Path) -> dict[str, object] | None:
    """A file's object; None where it holds anything else, or too much.

    Raises:
        OSError: there is no such file, or it can't be read.
    """
    with open(work_folder.open_file(path), "rb") as file:  # noqa: PTH123  no link is followed
        content = file.read(_MAX_NBYTES + 1)
    return parse(content) if len(content) <= _MAX_NBYTES else None


def write(path: Path, content: Mapping[str, object], *, disk: Disk, fsync: bool) -> None:
    """Give a file this content: whoever reads it sees all of the old one or all of the new one.

    Args:
        fsync: Whether to wait until the disk has the file and its name.

    Raises:
        OSError: it can't be written.
    """
    part = path.with_name(f"{path.name}.partial")
    descriptor = disk.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        disks.write_all(disk, descriptor, memoryview(encode(content)), 0)
        if fsync:
            disk.sync(descriptor)
    finally:
        os.close(descriptor)
    disk.replace(part, path)
    if fsync:
        disks.sync_folder(disk, path.parent)
