"""The bytes around the entries of a zip file whose entries are not compressed.

What is written before the entries' own bytes are known has no checksum: 0 stands for it. Readers of
torch do not check it.
"""

from dataclasses import dataclass
from struct import pack

ALIGN = 64
"""Bytes: numbers begin at a multiple of it."""
_MAX_16 = 2**16 - 1
_MAX_32 = 2**32 - 1
_DAY = 33
"""1 January 1980, as zip files have it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the table at the end."""

    name: str
    crc: int
    nbytes: int
    offset: int
    """Of its header."""


def local(name: str, crc: int, nbytes: int, extra: bytes = b"") -> bytes:
    """The header before an entry."""
    version, size = 45 if nbytes >= _MAX_32 else 20, min(nbytes, _MAX_32)
    lengths = (len(name), len(extra))
    head = pack("<4sHHHHHIIIHH", b"PK\3\4", version, 0, 0, 0, _DAY, crc, size, size, *lengths)
    return head + name.encode() + extra


def aligned(name: str, nbytes: int, offset: int) -> bytes:
    """The header before numbers, filled up so that they begin at a multiple of ALIGN.

    Args:
        offset: Where the header begins.
    """
    large = _zip64(nbytes, nbytes) if nbytes >= _MAX_32 else b""
    padding = -(offset + len(local(name, 0, nbytes, large)) + 4) % ALIGN
    extra = large + b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    return local(name, 0, nbytes, extra)


def table(entries: list[Entry], start: int) -> bytes:
    """The table of entries, which ends the file; it begins at byte `start`."""
    lines = b"".join(map(_central, entries))
    n = len(entries)
    end64 = b""
    if start > _MAX_32 or n > _MAX_16:
        sizes = (n, n, len(lines), start)
        end64 = pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *sizes)
        end64 += pack("<4sIQI", b"PK\6\7", 0, start + len(lines), 1)
    counts = (min(n, _MAX_16),) * 2
    sizes = (*counts, len(lines), min(start, _MAX_32))
    return lines + end64 + pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *sizes, 0)


def _central(entry: Entry) -> bytes:
    """An entry's line in the table."""
    large = [entry.nbytes] * 2 if entry.nbytes >= _MAX_32 else []
    large += [entry.offset] if entry.offset >= _MAX_32 else []
    extra = _zip64(*large) if large else b""
    size, offset = min(entry.nbytes, _MAX_32), min(entry.offset, _MAX_32)
    versions = (45, 45 if extra else 20)
    head = pack("<4sHHHHHHIII", b"PK\1\2", *versions, 0, 0, 0, _DAY, entry.crc, size, size)
    lengths = (len(entry.name), len(extra), 0)
    return head + pack("<HHHHHII", *lengths, 0, 0, 0, offset) + entry.name.encode() + extra


def _zip64(*sizes: int) -> bytes:
    """The extra field for what takes more than 32 bits."""
    body = b"".join(n.to_bytes(8, "little") for n in sizes)
    return b"\1\0" + len(body).to_bytes(2, "little") + body
