"""CRC-32 of whole files, as records have them.

Of weights the CRC of each tensor is known, so that only the bytes between them are read.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from streammap.common.ranges import PIECE_NBYTES
from streammap.engine import crc32
from streammap.errors import CheckpointError
from streammap.io import safe_open
from streammap.io.formats.safetensors_header import Slot

Known = Iterable[tuple[Slot, int]]
"""Tensors of a file, and their CRCs."""


@final
@dataclass(frozen=True, slots=True)
class Written:
    """A file of a result, as it was written."""

    nbytes: int
    crc: int | None = None
    """None where an earlier version wrote it."""


def of_file(path: Path, known: Known = ()) -> Written:
    """Size and CRC of a file.

    Args:
        known: Its tensors in the order of their bytes; these are not read.

    Raises:
        CheckpointError: it can't be read.
    """
    descriptor = safe_open.open_file(path)
    try:
        nbytes = os.fstat(descriptor).st_size
        crc = end = 0
        for slot, tensor_crc in known:
            if slot.start < end or slot.strides is not None or slot.end > nbytes:
                continue  # its bytes are read: tensors may share some, or stand in another order
            crc = _read(descriptor, end, slot.start, crc)
            crc, end = crc32.joined(crc, tensor_crc, slot.spec.nbytes), slot.end
        return Written(nbytes, _read(descriptor, end, nbytes, crc))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the disk") from error
    finally:
        os.close(descriptor)


def _read(descriptor: int, start: int, end: int, crc: int) -> int:
    """`crc` continued by the bytes of a file from `start` to `end`."""
    while start < end:
        piece = os.pread(descriptor, min(PIECE_NBYTES, end - start), start)
        if not piece:
            break
        crc = crc32.crc32(piece, crc)
        start += len(piece)
    return crc


def as_json(files: Mapping[str, Written]) -> dict[str, object]:
    """The entries of a record: sizes, and CRCs where they are known."""
    named = sorted(files.items())
    return {
        "files": {name: file.nbytes for name, file in named},
        "crc32": {name: f"{file.crc:08x}" for name, file in named if file.crc is not None},
    }
