"""torch's own checkpoint files (.bin, .pt, .pth in zip form), read without torch.load.

A zip file whose entries are not compressed: one pickle that describes the tensors, and the raw
bytes of each storage. The pickle is read without running it, see torch_pickle.py; storages are
found by their names in the zip file's directory.
"""

import io
import itertools
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeGuard

from streammap.errors import CheckpointError, printable, some
from streammap.io import safe_open
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header, torch_pickle
from streammap.io.formats.safetensors_header import Slot
from streammap.io.formats.torch_pickle import StoredTensor, UnsupportedTensor
from streammap.io.storage import range_reader
from streammap.io.storage.range_reader import RangeReader

NESTS = ("model", "state_dict")
"""Keys under which a training checkpoint keeps its state dict."""
_MAX_DIRECTORY_NBYTES = 100_000_000
_AGAIN = "load it with torch and save it again"


@dataclass(frozen=True, slots=True)
class TorchFile:
    """The contents of a torch file."""

    slots: tuple[Slot, ...]
    nest: str | None
    """The key ("model", ...) that the state dict is nested under."""
    others: tuple[str, ...]
    """The other keys: optimizer, epoch ..."""


def read(path: Path, file: RangeReader | None = None) -> TorchFile:
    """Locate the tensors of a torch file.

    Args:
        path: The file, or its name.
        file: Its bytes, if they are not on this machine.

    Raises:
        CheckpointError: not a zip-form torch file, a pickle that asks for more than tensors and
            plain values, no state dict inside, a tensor that reaches past its file.
    """
    content, entries = contents(path, file)
    state, nest = _state_dict(content, path.name)
    slots = [located(path.name, key, tensor, entries) for key, tensor in state.items()]
    others = (
        tuple(printable(str(k)[:80]) for k in content if k != nest)
        if isinstance(content, dict)
        else ()
    )
    return TorchFile(
        tuple(sorted(slots, key=lambda slot: slot.start)), nest, others if nest else ()
    )


def table(path: Path) -> dict[str, Slot | None]:
    """The entries of a torch file that holds one dict: tensors as slots, other values as None.

    Entries whose value is None are left out. A file that holds something else has no entries.

    Raises:
        CheckpointError: as `read`.
    """
    content, entries = contents(path, None)
    if not isinstance(content, dict):
        return {}
    return {
        key: located(path.name, key, value, entries)
        if isinstance(value, StoredTensor | UnsupportedTensor)
        else None
        for key, value in content.items()
        if isinstance(key, str) and value is not None
    }


def contents(
    path: Path, elsewhere: RangeReader | None
) -> tuple[object, Mapping[str, tuple[int, int]]]:
    """The value of a torch file's pickle, and for each storage its first byte and size.

    Raises:
        CheckpointError: not a zip-form torch file, a pickle that asks for more than tensors and
            plain values.
    """
    if elsewhere is None:
        opened: BinaryIO = os.fdopen(safe_open.open_file(path), "rb")
    else:
        opened = io.BufferedReader(elsewhere, range_reader.PAGE_NBYTES)
    with opened as file:
        entries = entries_of(file, path.name)
        pickle_name = next((name for name in entries if name.endswith("/data.pkl")), None)
        if pickle_name is None:
            raise CheckpointError(
                f"{path.name}: not a torch checkpoint: a zip file without a data.pkl",
                hint="is this a checkpoint?",
            )
        start, nbytes = entries[pickle_name]
        file.seek(start)
        text = file.read(min(nbytes, torch_pickle.MAX_NBYTES + 1))
    prefix = f"{pickle_name.removesuffix('data.pkl')}data/"
    storages = {n.removeprefix(prefix): e for n, e in entries.items() if n.startswith(prefix)}
    return torch_pickle.read(text, file=path.name), storages


def entries_of(file: BinaryIO, name: str) -> dict[str, tuple[int, int]]:
    """Name -> first byte and size, of each entry of a zip file."""
    size = file.seek(0, os.SEEK_END)
    entries: dict[str, tuple[int, int]] = {}
    ends: list[tuple[int, int]] = []
    for entry in _directory(file, name, size):
        if entry.filename in entries:
            raise CheckpointError(f"{name}: two entries {entry.filename}", hint=_AGAIN)
        start = _start(file, entry, name, size)
        entries[entry.filename] = (start, entry.file_size)
        ends.append((entry.header_offset, start + entry.file_size))
        if entry.filename.endswith("/byteorder"):
            file.seek(start)
            if entry.file_size != 6 or file.read(6) != b"little":
                raise CheckpointError(f"{name}: written on a big-endian machine", hint=_AGAIN)
    ends.sort()
    if any(end > after for (_, end), (after, _) in itertools.pairwise(ends)):
        raise CheckpointError(f"{name}: entries that overlap", hint=_AGAIN)
    return entries


def _directory(file: BinaryIO, name: str, size: int) -> list[zipfile.ZipInfo]:
    try:
        if zipfile.is_zipfile(file):
            _check_directory(file, name, size)
            entries = zipfile.ZipFile(file).infolist()
            raw = getattr(file, "raw", None)
            if isinstance(raw, RangeReader):
                raw.fetch(entry.header_offset for entry in entries)
            return entries
    except CheckpointError:
        raise
    except Exception as error:  # a hostile zip file can make zipfile raise anything
        raise CheckpointError(
            f"{name}: a broken zip file: {error}", hint="download or save the file again"
        ) from error
    raise CheckpointError(
        f"{name}: not a torch file in the zip form (torch 1.6 and later)",
        hint=f"{_AGAIN}, or convert it to safetensors",
    )


def _start(file: BinaryIO, entry: zipfile.ZipInfo, name: str, size: int) -> int:
    """Where an entry's bytes begin, by its own header, which must agree with the directory."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise CheckpointError(
            f"{name}: {entry.filename} is compressed; torch does not compress entries", hint=_AGAIN
        )
    is_there = 0 <= entry.header_offset < size
    file.seek(entry.header_offset if is_there else 0)
    local = file.read(30)
    n_name, n_extra = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    start = entry.header_offset + 30 + n_name + n_extra
    is_there = is_there and local[:4] == b"PK\x03\x04" and start + entry.file_size <= size
    if not is_there or entry.file_size != entry.compress_size:
        raise CheckpointError(
            f"{name}: {entry.filename} is not where the file's directory says, bytes "
            f"{start} to {start + entry.file_size} of {size}",
            hint="download or save the file again",
        )
    return start


def _check_directory(file: BinaryIO, name: str, size: int) -> None:
    """Refuse a zip file whose directory would fill the memory: each entry becomes an object."""
    file.seek(max(0, size - 66_000))
    tail = file.read()
    end = tail.rfind(b"PK\x05\x06")
    nbytes = int.from_bytes(tail[end + 12 : end + 16], "little")
    end64 = tail.rfind(b"PK\x06\x06", 0, end)
    if end64 >= 0:
        nbytes = max(nbytes % (2**32 - 1), int.from_bytes(tail[end64 + 40 : end64 + 48], "little"))
    if nbytes > _MAX_DIRECTORY_NBYTES:
        raise CheckpointError(
            f"{name}: a directory of {nbytes} bytes, at most {_MAX_DIRECTORY_NBYTES} are read",
            hint=_AGAIN,
        )


def _state_dict(
    content: object, file: str
) -> tuple[Mapping[str, StoredTensor | UnsupportedTensor], str | None]:
    if isinstance(content, dict):
        for nest in (None, *NESTS):
            state = content if nest is None else content.get(nest)
            if _is_state_dict(state):
                return state, nest
    kind = type(content).__name__
    if isinstance(content, dict):
        kind = some([k if isinstance(k, str) else repr(k) for k in content], limit=5)
    raise CheckpointError(
        f"{file}: no state dict in it or under 'model' or 'state_dict', found {kind or 'nothing'}",
        hint='save {"model": model.state_dict()}',
    )


def _is_state_dict(table: object) -> TypeGuard[dict[str, StoredTensor | UnsupportedTensor]]:
    return (
        isinstance(table, dict)
        and bool(table)
        and all(
            isinstance(k, str) and isinstance(v, StoredTensor | UnsupportedTensor)
            for k, v in table.items()
        )
    )


def located(
    file: str,
    key: str,
    tensor: StoredTensor | UnsupportedTensor,
    storages: Mapping[str, tuple[int, int]],
) -> Slot:
    """Where a tensor of a torch file lies in it.

    Raises:
        CheckpointError: a tensor that is not its bytes, or reaches past its file.
    """
    safetensors_header.check_key(file, key)
    if isinstance(tensor, UnsupportedTensor):
        raise CheckpointError(
            f"{file}: {key}: a sparse, quantised, conjugate or negated tensor",
            hint="save it as a plain one: tensor.to_dense(), .dequantize(), .resolve_conj()",
        )
    if tensor.dtype not in DTYPE_BITS:
        raise CheckpointError(f"{file}: {key}: safetensors has no dtype for {tensor.dtype}")
    safetensors_header.check_rank(file, key, len(tensor.shape))
    n_elements = math.prod(tensor.shape)
    if n_elements >= 2**63:
        raise CheckpointError(f"{file}: {key}: shape {list(tensor.shape)} overflows")
    item = DTYPE_BITS[tensor.dtype] // 8
    start, nbytes = storages.get(tensor.storage.key, (0, 0))
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    end = (tensor.offset + last + 1) * item if n_elements else 0
    if end > nbytes or tensor.storage.key not in storages:
        raise CheckpointError(
            f"{file}: {key} needs {end} bytes of storage {tensor.storage.key}, there are {nbytes}",
            hint=f"the file was cut short, or not written by torch: {_AGAIN}",
        )
    spec = TensorSpec(tensor.dtype, tensor.shape)
    if not n_elements:
        return Slot(key, spec, start)
    strides = None if _is_contiguous(tensor) else tensor.strides
    return Slot(key, spec, start + tensor.offset * item, strides)


def _is_contiguous(tensor: StoredTensor) -> bool:
    expected = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
