"""Small JSON files of a work folder: replaced all at once, and read as if anybody had written them.

    commit.json, ranks/launch.json, ranks/R.json, and sent.json of an upload

The lines of a journal have the same form. Each ends with its CRC-32, so that a damaged one is never
believed. What is bound to a request begins with its
`Fingerprint.head`.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from streammap.common import strict_json
from streammap.engine import crc32
from streammap.io.storage import disk as disks
from streammap.io.storage.disk import Disk
from streammap.output import work_folder

_MAX_NBYTES = 100_000_000
_SUM = "crc32"
_SEAL = re.compile(rb',?"crc32":"[0-9a-f]{8}"\}\s*\Z')
_MOST_SEAL = 100
"""Bytes."""


def encode(content: Mapping[str, object]) -> bytes:
    """One line, which ends with the CRC-32 of what stands before it."""
    text = json.dumps(content, separators=(",", ":")).removesuffix("}")
    between = "," if content else ""
    return f'{text}{between}"{_SUM}":"{crc32.crc32(text.encode()):08x}"}}\n'.encode()


def parse(text: bytes) -> dict[str, object] | None:
    """The object of a line, or of a file, without its CRC; None where it is not as it was written.

    Those of version 0.1 have no CRC.
    """
    try:
        content = strict_json.loads(text)
    except ValueError:
        return None
    if not isinstance(content, dict):
        return None
    if _SUM not in content:
        return content
    written, seal = content.pop(_SUM), _SEAL.search(text, max(0, len(text) - _MOST_SEAL))
    if seal is None or written != f"{crc32.crc32(memoryview(text)[: seal.start()]):08x}":
        return None
    return content


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
