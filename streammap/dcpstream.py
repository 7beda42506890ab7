"""Where the numbers of one chunk are: its stream is what torch.save(tensor) writes, a zip file.

    archive/data.pkl    a pickle: _rebuild_tensor_v2(storage "0", first, shape, strides, ...)
    archive/data/0      the numbers

The pickle is read like the metadata's (dcpmeta.py): nothing is imported, and no code runs.
"""

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from streammap.dcpmeta import DTYPES, Chunk, Unpickler
from streammap.errors import CheckpointError
from streammap.spec import DTYPE_BITS, TensorSpec
from streammap.storage.local import LocalFile

_MAX_PICKLE_NBYTES = 2**20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a chunk's numbers are."""

    start: int
    """First byte, counted from the beginning of the file."""
    order: tuple[int, ...]
    """Its dimensions as they are stored, the slowest first."""


@final
@dataclass(frozen=True, slots=True)
class _Stored:
    """A storage by its dtype (None: bytes of any) and the name of its entry."""

    dtype: str | None
    entry: str


@dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor as its pickle describes it."""

    storage: _Stored
    dtype: str | None
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def _rebuilt(storage: _Stored, first: int, shape: tuple[int, ...], strides: tuple[int, ...],
             *rest: object) -> _Saved:  # fmt: skip
    """torch._utils._rebuild_tensor_v2 and _v3: (requires_grad, hooks) and a dtype may follow."""
    named = [value for value in rest[2:3] if isinstance(value, str)]
    return _Saved(storage, named[0] if named else storage.dtype, first, shape, strides)


def _parameter(saved: _Saved, *rest: object) -> _Saved:
    return saved


_STORAGES = {
    "Double": "F64", "Float": "F32", "Half": "F16", "BFloat16": "BF16", "Long": "I64", "Int": "I32",
    "Short": "I16", "Char": "I8", "Byte": "U8", "Bool": "BOOL", "ComplexFloat": "C64",
}  # fmt: skip
_KNOWN: Mapping[tuple[str, str], object] = {
    **DTYPES,
    **{("torch", f"{name}Storage"): dtype for name, dtype in _STORAGES.items()},
    ("torch", "UntypedStorage"): "",
    ("torch.storage", "UntypedStorage"): "",
    ("torch._utils", "_rebuild_tensor_v2"): _rebuilt,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuilt,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("collections", "OrderedDict"): dict,
}


def _stored(pid: object) -> _Stored:
    kind, dtype, entry, *_ = pid if isinstance(pid, tuple) else ("", "", "")
    if kind != "storage" or not isinstance(dtype, str) or not isinstance(entry, str):
        raise ValueError(f"a reference to {pid!r}")
    return _Stored(dtype or None, entry)


@final
class _Window(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: LocalFile, start: int, nbytes: int) -> None:
        self._file, self._start, self._nbytes, self._at = file, start, nbytes, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._nbytes)[whence])
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._nbytes - self._at)
        found = bytearray(left if size < 0 else min(size, left))
        if found:
            self._file.read_into(self._start + self._at, memoryview(found), mapped=False)
        self._at += len(found)
        return bytes(found)


def find(key: str, chunk: Chunk, spec: TensorSpec, file: LocalFile) -> Place:
    """Where the numbers of a chunk are.

    Raises:
        CheckpointError: its stream is not torch.save's, or holds another tensor.
    """
    where = f"{file.path.name}: {key}"
    if chunk.offset + chunk.nbytes > file.nbytes:
        raise CheckpointError(
            f"{where}: its chunk ends at byte {chunk.offset + chunk.nbytes}, the file has "
            f"{file.nbytes}",
            hint="the file was cut short: copy it again",
        )
    window = _Window(file, chunk.offset, chunk.nbytes)
    try:
        with zipfile.ZipFile(window) as archive:
            return _found(archive, window, chunk, spec)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error.message}", hint=error.hint) from error
    except Exception as error:  # a hostile zip file or pickle can raise anything
        raise CheckpointError(
            f"{where}: its chunk at byte {chunk.offset} is not what torch.save writes: {error}",
            hint="save the checkpoint again, as torch.distributed.checkpoint.save does by default",
        ) from error


def _found(archive: zipfile.ZipFile, window: _Window, chunk: Chunk, spec: TensorSpec) -> Place:
    entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    pickled = entries["data.pkl"]
    if pickled.file_size > _MAX_PICKLE_NBYTES:
        raise CheckpointError(f"a pickle of {pickled.file_size} bytes for one tensor")
    order = entries.get("byteorder")
    if order is not None and archive.read(order) != b"little":
        raise CheckpointError("written on a big-endian machine", hint="save it again")
    saved = Unpickler(io.BytesIO(archive.read(pickled)), _KNOWN, _stored).load()
    shape = tuple(end - start for start, end in chunk.at)
    if not isinstance(saved, _Saved):
        raise CheckpointError(f"its chunk is a {type(saved).__name__}, no tensor")
    found, wanted = (
        TensorSpec(saved.dtype or "?", tuple(saved.shape)),
        TensorSpec(spec.dtype, shape),
    )
    if found != wanted:
        raise CheckpointError(f"its chunk is {found}, the metadata says {wanted}")
    entry = entries[f"data/{saved.storage.entry}"]
    if entry.compress_type != zipfile.ZIP_STORED:
        raise CheckpointError("its numbers are compressed", hint="save it again")
    window.seek(entry.header_offset + 26)
    lengths = window.read(4)
    n_name, n_extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
    item = DTYPE_BITS[spec.dtype] // 8
    at = entry.header_offset + 30 + n_name + n_extra
    end = (saved.first + math.prod(shape)) * item
    if end > entry.file_size or at + end > chunk.nbytes:
        raise CheckpointError(f"its chunk needs {end} bytes, there are {entry.file_size}")
    return Place(chunk.offset + at + saved.first * item, _order(shape, saved.strides))


def _order(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions as they are stored, the slowest first."""
    dims = sorted(range(len(shape)), key=lambda d: (-strides[d], d) if shape[d] > 1 else (0, d))
    expected = 1
    for d in reversed(dims):
        if shape[d] > 1 and strides[d] != expected:
            raise CheckpointError(
                f"stored with strides {list(strides)} for {list(shape)}, expected no gaps",
                hint="save it from a contiguous tensor",
            )
        expected *= shape[d]
    return tuple(dims)
