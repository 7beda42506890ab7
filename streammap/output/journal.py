"""Which tensors of an unfinished result are durable: a file of JSON lines that only grows.

    {"streammap_journal": 1, "digest": "ab12...", "request": {...}, "crc32": "..."}
    {"tensors": {"h.0.ln_1.weight": "cbf43926", "wte.weight": "414fa339 2 0"}, "crc32": "..."}

A line has the CRC-32 of each tensor's bytes, and ends with its own, of the line before it. Where
rounding lost numbers of a tensor, their counts follow: those that overflowed, and that vanished.

A tensor stands in it once all its bytes are written (and, with fsync, are on the disk). The first
line is bound to the request, see fingerprint.py. Each of several writers has a file of its own,
journal*.jsonl; they are read together. A torn last line is ignored; any other damage is an error,
and no name in a journal is ever used as a path.
"""

import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import final

from streammap.common.losses import NOTHING, Losses
from streammap.errors import OutputError
from streammap.io.storage import disk as disks
from streammap.io.storage.disk import Disk
from streammap.output import bound_json, work_folder
from streammap.output.fingerprint import Fingerprint

FORMAT = 1
NAME = "journal.jsonl"
_ROOM_NBYTES = 1_000_000
_TENSOR = r"([0-9a-f]{8})(?: ([0-9]{1,18}) ([0-9]{1,18}))?"
_LINE_NBYTES = 64
"""More than a tensor takes beside its key."""


def name_of(rank: int, world_size: int) -> str:
    """Name of the journal of one of several processes, or of the only one."""
    return NAME if world_size == 1 else f"journal-{rank}.jsonl"


def read(folder: Path, request: Fingerprint, keys: Collection[str]) -> dict[str, int]:
    """Key -> CRC of each durable tensor, see `read_all`."""
    return {key: crc for key, (crc, _) in read_all(folder, request, keys).items()}


def read_all(
    folder: Path, request: Fingerprint, keys: Collection[str]
) -> dict[str, tuple[int, Losses]]:
    """Key -> CRC of each durable tensor and what rounding lost, by all journals of a work folder.

    Args:
        keys: The tensors of the result that have bytes.

    Raises:
        OutputError: a journal of another request, or one that is damaged.
    """
    limit = _ROOM_NBYTES + 2 * len(first_line(request))
    limit += sum(_LINE_NBYTES + len(json.dumps(key)) for key in keys)
    durable: dict[str, tuple[int, Losses]] = {}
    for path in sorted(folder.glob(work_folder.JOURNALS)):
        for tensors in _lines(path, request, limit):
            for key, text in tensors.items():
                found = _parsed(text)
                if key not in keys or found is None or durable.get(key, found) != found:
                    raise _damaged(
                        path, f"{key[:80]!r} with {str(text)[:80]!r} is not a tensor of this result"
                    )
                durable[key] = found
    return durable


def first_line(request: Fingerprint) -> bytes:
    """The first line of a request's journals."""
    return bound_json.encode(request.head(streammap_journal=FORMAT))


def _lines(path: Path, request: Fingerprint, limit: int) -> Iterator[Mapping[str, object]]:
    """The tensors of each line after the first."""
    content = _content(path, limit)
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
    if not lines:
        return  # killed while the first line was written
    head = bound_json.parse(lines[0])
    if head is None or "streammap_journal" not in head:
        raise _damaged(path, "its first line is not that of a journal")
    if head["streammap_journal"] != FORMAT:
        version = str(head["streammap_journal"])[:20]
        raise _damaged(path, f"format {version}, expected {FORMAT}")
    request.check(head, path)
    for number, line in enumerate(lines[1:], 2):
        entry = bound_json.parse(line)
        if entry is None and number == len(lines):
            return  # torn when the power failed
        tensors = None if entry is None or len(entry) != 1 else entry.get("tensors")
        if not isinstance(tensors, dict):
            raise _damaged(path, f"line {number} is not that of a journal")
        yield tensors


def _content(path: Path, limit: int) -> bytes:
    try:
        descriptor = work_folder.open_file(path)
        with open(descriptor, "rb") as file:  # noqa: PTH123  a descriptor, so that no link is followed
            nbytes = os.fstat(descriptor).st_size
            if nbytes > limit:
                raise _damaged(path, f"{nbytes} bytes, at most {limit} for this result")
            return file.read(limit)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _parsed(text: object) -> tuple[int, Losses] | None:
    found = re.fullmatch(_TENSOR, text) if isinstance(text, str) else None
    if found is None:
        return None
    crc, overflowed, vanished = found.groups(default="0")
    return int(crc, 16), Losses(int(overflowed), int(vanished))


def _text(crc: int, lost: Losses) -> str:
    return f"{crc:08x}" if lost == NOTHING else f"{crc:08x} {lost.overflowed} {lost.vanished}"


def _damaged(path: Path, why: str) -> OutputError:
    return OutputError(f"{path}: a damaged journal: {why}", hint=work_folder.RESTART)


@final
class Journal:
    """A journal that is written. Its file is opened, or created, by the first `add`."""

    def __init__(self, path: Path, request: Fingerprint, *, disk: Disk, fsync: bool) -> None:
        """Continue a file that was read before, or begin a new one."""
        self._path, self._request = path, request
        self._disk, self._fsync = disk, fsync
        self._descriptor: int | None = None
        self._end = 0

    def add(self, tensors: Mapping[str, int], losses: Mapping[str, Losses] | None = None) -> None:
        """Record these tensors as durable, with their CRCs.

        Args:
            losses: Key -> what rounding lost, where it lost something.

        Raises:
            OSError: it can't be written.
        """
        lost = losses or {}
        texts = {key: _text(crc, lost.get(key, NOTHING)) for key, crc in tensors.items()}
        line = bound_json.encode({"tensors": texts})
        descriptor = self._opened()
        disks.write_all(self._disk, descriptor, memoryview(line), self._end)
        self._end += len(line)
        if self._fsync:
            self._disk.sync(descriptor)

    def _opened(self) -> int:
        if self._descriptor is None:
            descriptor = self._disk.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            try:
                self._end = self._begin(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
        return self._descriptor

    def _begin(self, descriptor: int) -> int:
        """Cut off a torn line, and write the first one where it is missing; gives the end."""
        end = _whole_nbytes(descriptor)
        os.ftruncate(descriptor, end)
        if not end:
            line = first_line(self._request)
            disks.write_all(self._disk, descriptor, memoryview(line), 0)
            end = len(line)
        if self._fsync:
            disks.sync_folder(self._disk, self._path.parent)
        return end

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _whole_nbytes(descriptor: int) -> int:
    """Bytes of a journal's whole lines."""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    end = content.rfind(b"\n") + 1
    last = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    return end if bound_json.parse(content[last:end]) is not None else last
