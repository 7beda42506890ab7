"""The header of a safetensors file <-> slots.

A file is: 8 bytes, the header's length (little endian); the header, JSON, maybe padded with spaces;
then the tensors' bytes, without a gap, to the end of the file.

    {"__metadata__": {"format": "pt"},
     "wte.weight": {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}}

Offsets count from the end of the header. Everything a header could get wrong is checked here.
"""

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from streammap.common import strict_json
from streammap.errors import CheckpointError
from streammap.io import safe_open
from streammap.io.dtypes import DTYPE_BITS, TensorSpec

MAX_HEADER_NBYTES = 100_000_000
"""The format's own limit."""
FIRST_NBYTES = 2**16
"""What is read of a file before the length of its header is known."""
MAX_KEY_LETTERS = 1024
MAX_DIMS = 64
_MAX_SIZE = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Slot:
    """Where one tensor's bytes are in one file."""

    key: str
    spec: TensorSpec
    start: int
    """First byte, counted from the beginning of the file."""
    strides: tuple[int, ...] | None = None
    """In elements, if the tensor is not stored row by row (torch files only)."""

    @property
    def end(self) -> int:
        """One past the last byte."""
        if self.strides is None or not self.spec.n_elements:
            return self.start + self.spec.nbytes
        steps = zip(self.spec.shape, self.strides, strict=True)
        last = sum((size - 1) * stride for size, stride in steps)
        return self.start + (last + 1) * DTYPE_BITS[self.spec.dtype] // 8


def read(path: Path) -> tuple[tuple[Slot, ...], bytes]:
    """The slots of a safetensors file, in the order of their bytes, and the text of the header.

    Raises:
        CheckpointError: the file is broken, or can't be read.
    """
    with os.fdopen(safe_open.open_file(path), "rb") as file:
        try:
            return read_from(path.name, file, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror or error}") from error


def read_from(
    name: str, file: io.RawIOBase | BinaryIO, size: int
) -> tuple[tuple[Slot, ...], bytes]:
    """The same of a file that is opened, here or elsewhere, and has `size` bytes.

    Raises:
        CheckpointError: the file is broken, or can't be read.
    """
    # One read for most headers. Not beyond the size: a kernel file has size 0, and reading it may
    # wait forever.
    first = file.read(min(size, FIRST_NBYTES)) or b""
    n = _header_nbytes(name, first[:8], size)
    text = first[8 : 8 + n]
    if len(text) < n:
        text += file.read(n - len(text)) or b""
    return decode(text, file=name, file_nbytes=size), text


def decode(text: bytes, *, file: str, file_nbytes: int) -> tuple[Slot, ...]:
    """The slots that a header's bytes declare, in the order of their bytes.

    Raises:
        CheckpointError: not JSON, a duplicate or unprintable key, an unknown dtype, a shape that
            does not fit its bytes, an overlap, a hole, a file that is too short or too long.
    """
    entries = _entries(text, file)
    base = 8 + len(text)
    slots = [_slot(file, key, entry, base) for key, entry in entries.items()]
    slots.sort(key=lambda slot: (slot.start, slot.end))
    end = base
    for slot in slots:
        if slot.start != end:
            what = (
                "overlaps the tensor before it" if slot.start < end else "leaves a hole before it"
            )
            raise CheckpointError(
                f"{file}: {slot.key} begins at byte {slot.start} and {what}, expected {end}",
                hint="download or save the file again",
            )
        end = slot.end
    if end != file_nbytes:
        what = "truncated" if file_nbytes < end else "longer than its header says"
        raise CheckpointError(
            f"{file}: {what}: {file_nbytes} bytes, its header needs {end}",
            hint="download or save the file again",
        )
    return tuple(slots)


def check_key(file: str, key: str) -> None:
    """Refuse a key that no model has: unprintable, or very long.

    Raises:
        CheckpointError: it is; names it.
    """
    if not key.isprintable():
        raise CheckpointError(
            f"{file}: {key!r}: a key with unprintable characters",
            hint="do not use this file, or save it again under plain keys",
        )
    if len(key) > MAX_KEY_LETTERS:
        raise CheckpointError(
            f"{file}: a key of {len(key)} characters, at most {MAX_KEY_LETTERS} are read: "
            f"{key[:40]}...",
            hint="save the file again under shorter keys",
        )


def check_rank(file: str, key: str, rank: int) -> None:
    """Refuse a tensor with more dimensions than torch supports.

    Raises:
        CheckpointError: it is; names it.
    """
    if rank > MAX_DIMS:
        raise CheckpointError(f"{file}: {key}: {rank} dimensions, at most {MAX_DIMS} are read")


def encode(specs: Sequence[tuple[str, TensorSpec]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file that holds `specs` in this order."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key, spec in specs:
        entries[key] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header_nbytes(file: str, prefix: bytes, size: int) -> int:
    if len(prefix) < 8:
        raise CheckpointError(
            f"{file}: {size} bytes, a safetensors file has at least 8",
            hint="download or save the file again",
        )
    n = int.from_bytes(prefix, "little")
    if n > MAX_HEADER_NBYTES:
        raise CheckpointError(
            f"{file}: says its header has {n} bytes, at most {MAX_HEADER_NBYTES} are allowed",
            hint="is this a safetensors file?",
        )
    if 8 + n > size:
        raise CheckpointError(
            f"{file}: truncated: {size} bytes, its header alone needs {8 + n}",
            hint="download or save the file again",
        )
    return n


def _entries(text: bytes, file: str) -> dict[str, object]:
    try:
        entries = strict_json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{file}: its header is not JSON: {error}",
            hint="download or save the file again",
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object")
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(f"{file}: __metadata__ is not a table of strings")
    return entries


def _slot(file: str, key: str, entry: object, base: int) -> Slot:
    check_key(file, key)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{file}: {key}: expected dtype, shape and data_offsets, no more")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{file}: {key}: unknown dtype {dtype!r}", hint=f"known are {', '.join(DTYPE_BITS)}"
        )
    if not _are_sizes(shape):
        raise CheckpointError(f"{file}: {key}: shape {shape!r} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{file}: {key}: data_offsets {offsets!r} are not a range")
    check_rank(file, key, len(shape))
    n_elements = 1
    for size in shape:
        n_elements *= size
        if n_elements > _MAX_SIZE:
            raise CheckpointError(f"{file}: {key}: shape {shape} overflows")
    spec = TensorSpec(dtype, tuple(shape))
    if n_elements * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise CheckpointError(
            f"{file}: {key}: {dtype} {shape} needs {spec.nbytes} bytes, "
            f"its header gives it {offsets[1] - offsets[0]}",
            hint="download or save the file again",
        )
    return Slot(key, spec, base + offsets[0])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _MAX_SIZE for value in values
    )
