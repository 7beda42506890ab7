"""What is durable of a result that is not whole: a file of JSON lines that only grows.

    {"streammap_journal": 1, "digest": "ab12...", "request": {"sources": [...], ...}}
    {"tensors": {"h.0.ln_1.weight": "cbf43926", ...}}        key -> CRC-32 of its bytes

A tensor stands in it once all its bytes are written (and, with fsync, are on the disk). The digest
is of all that determines the result's bytes; the request says the same for people, so that a run
that asks for something else can be told what differs. Several writers have a file each,
journal*.jsonl: what is read is all of them together. A last line that is torn does not count; any
other thing that is wrong is refused, and no name in a journal is ever used as a path.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from streammap.common import strict_json
from streammap.errors import OutputError
from streammap.io.storage import disk as disks
from streammap.io.storage.disk import Disk
from streammap.output import work_folder

FORMAT = 1
NAME = "journal.jsonl"
RESTART = "pass --restart to begin anew"
_GLOB = "journal*.jsonl"
_MAX_TOLD = 3
_ROOM_NBYTES = 1_000_000
_LINE_NBYTES = 64
"""More than a tensor takes beside its key."""


@final
@dataclass(frozen=True)
class Fingerprint:
    """What determines a result."""

    content: Mapping[str, object]
    """For people, and to be compared with another."""
    formulas: str
    """sha256 of what is computed, tensor by tensor."""

    @property
    def digest(self) -> str:
        """sha256 of all."""
        text = json.dumps([self.content, self.formulas], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def line(self, **first: object) -> bytes:
        """The first line of a file that is bound to this request."""
        return encoded({**first, "digest": self.digest, "request": self.content})

    def check(self, found: Mapping[str, object], where: Path) -> None:
        """Refuse what is bound to another request.

        Raises:
            OutputError: saying what differs.
        """
        told = self.changes(found)
        if told is not None:
            raise OutputError(
                f"{where.parent}: an unfinished run of another request: {told}",
                hint=f"run the earlier command again, or {RESTART}",
            )

    def changes(self, found: Mapping[str, object]) -> str | None:
        """What differs in this request from the one of such a first line; None where nothing."""
        if found.get("digest") == self.digest:
            return None
        plain = json.loads(json.dumps(self.content))
        changes = list(_changes(found.get("request"), plain, ""))
        told = "; ".join(changes[:_MAX_TOLD]) or "the formulas of its tensors differ"
        rest = f" and {len(changes) - _MAX_TOLD} more" if len(changes) > _MAX_TOLD else ""
        return told + rest


def name_of(rank: int, world_size: int) -> str:
    """Name of the journal of one of several processes, or of the only one."""
    return NAME if world_size == 1 else f"journal-{rank}.jsonl"


def is_there(folder: Path) -> bool:
    """Whether a work folder has a journal."""
    return any(folder.glob(_GLOB))


def read(folder: Path, request: Fingerprint, keys: Collection[str]) -> dict[str, int]:
    """Key -> CRC of what is durable, by all journals of a work folder.

    Args:
        keys: The tensors of the result that have bytes.

    Raises:
        OutputError: a journal of another request, or one that is damaged.
    """
    own = len(request.line(streammap_journal=FORMAT))
    most = _ROOM_NBYTES + 2 * own
    most += sum(_LINE_NBYTES + len(json.dumps(key)) for key in keys)
    found: dict[str, int] = {}
    for path in sorted(folder.glob(_GLOB)):
        for tensors in _lines(path, request, most):
            for key, text in tensors.items():
                crc = _crc(text)
                if key not in keys or crc is None or found.get(key, crc) != crc:
                    raise _damaged(path, f"{key[:80]!r} with {str(text)[:80]!r} is no tensor of it")
                found[key] = crc
    return found


def parsed(content: bytes) -> dict[str, object] | None:
    """A line's object, or None where it is none."""
    try:
        found = strict_json.loads(content)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _lines(path: Path, request: Fingerprint, most: int) -> Iterator[Mapping[str, object]]:
    content = _content(path, most)
    lines = content[: content.rfind(b"\n") + 1].split(b"\n")[:-1]
    if not lines:
        return  # killed while it began
    head = parsed(lines[0])
    if head is None or "streammap_journal" not in head:
        raise _damaged(path, "its first line is none of a journal")
    if head["streammap_journal"] != FORMAT:
        version = str(head["streammap_journal"])[:20]
        raise _damaged(path, f"format {version}, expected {FORMAT}")
    request.check(head, path)
    for number, line in enumerate(lines[1:], 2):
        found = parsed(line)
        if found is None and number == len(lines):
            return  # torn when the power failed
        tensors = None if found is None or len(found) != 1 else found.get("tensors")
        if not isinstance(tensors, dict):
            raise _damaged(path, f"line {number} is none of a journal")
        yield tensors


def _content(path: Path, most: int) -> bytes:
    try:
        descriptor = work_folder.opened(path)
        with open(descriptor, "rb") as file:  # noqa: PTH123  a descriptor, so that no link is followed
            nbytes = os.fstat(descriptor).st_size
            if nbytes > most:
                raise _damaged(path, f"{nbytes} bytes, at most {most} for this result")
            return file.read(most)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _crc(text: object) -> int | None:
    if isinstance(text, str) and re.fullmatch(r"[0-9a-f]{8}", text):
        return int(text, 16)
    return None


def _damaged(path: Path, why: str) -> OutputError:
    return OutputError(f"{path}: a damaged journal: {why}", hint=RESTART)


def encoded(content: Mapping[str, object]) -> bytes:
    """A line."""
    return (json.dumps(content, separators=(",", ":")) + "\n").encode()


def _changes(old: object, new: object, path: str) -> Iterator[str]:
    """Where two JSON values differ, in words."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**new, **old}:
            if name not in old or name not in new:
                yield f"{path}{name} {_told(old.get(name))} is now {_told(new.get(name))}"
            else:
                yield from _changes(old[name], new[name], f"{path}{name} ")
    elif old != new or type(old) is not type(new):
        yield f"{path}{_told(old)} is now {_told(new)}"


def _told(value: object) -> str:
    text = "nothing" if value is None else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@final
class Journal:
    """A journal that is being written; begun with its first line of tensors."""

    def __init__(self, path: Path, request: Fingerprint, *, disk: Disk, fsync: bool) -> None:
        """Go on with a file that was read before, or begin it when there is something to say."""
        self._path, self._request = path, request
        self._disk, self._fsync = disk, fsync
        self._descriptor: int | None = None
        self._at = 0

    def add(self, tensors: Mapping[str, int]) -> None:
        """Say that these are durable, with their CRCs.

        Raises:
            OSError: it can't be written.
        """
        line = encoded({"tensors": {key: f"{crc:08x}" for key, crc in tensors.items()}})
        descriptor = self._opened()
        disks.write_all(self._disk, descriptor, memoryview(line), self._at)
        self._at += len(line)
        if self._fsync:
            self._disk.sync(descriptor)

    def _opened(self) -> int:
        if self._descriptor is None:
            descriptor = self._disk.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            try:
                self._at = self._begun(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            self._descriptor = descriptor
        return self._descriptor

    def _begun(self, descriptor: int) -> int:
        """Where the next line goes: after the lines that are whole, the first one among them."""
        at = _good_nbytes(descriptor)
        os.ftruncate(descriptor, at)
        if not at:
            line = self._request.line(streammap_journal=FORMAT)
            disks.write_all(self._disk, descriptor, memoryview(line), 0)
            at = len(line)
        if self._fsync:
            disks.sync_folder(self._disk, self._path.parent)
        return at

    def close(self) -> None:
        """Close the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _good_nbytes(descriptor: int) -> int:
    """Bytes of the lines of a journal that are whole."""
    content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    end = content.rfind(b"\n") + 1
    last = content.rfind(b"\n", 0, max(end - 1, 0)) + 1
    return end if parsed(content[last:end]) is not None else last
