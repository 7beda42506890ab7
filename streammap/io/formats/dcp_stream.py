"""Locates the numbers of one chunk: its stream is a zip file, as torch.save(tensor) writes it.

    archive/data.pkl    a pickle: _rebuild_tensor_v2(storage "0", first, shape, strides, ...)
    archive/data/0      the numbers

The pickle is read like that of any torch file (torch_pickle.py).
"""

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from streammap.errors import CheckpointError
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import torch_pickle, torch_zip
from streammap.io.formats.dcp_metadata import Chunk
from streammap.io.formats.torch_pickle import StoredTensor
from streammap.io.storage import range_reader
from streammap.io.storage.local import LocalFile
from streammap.io.storage.range_reader import RangeReader

_MAX_PICKLE_NBYTES = 2**20


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """Where a chunk's numbers are."""

    start: int
    """First byte, counted from the beginning of the file."""
    order: tuple[int, ...]
    """Its dimensions in storage order, the slowest first."""


def find(key: str, chunk: Chunk, spec: TensorSpec, file: LocalFile) -> ChunkLocation:
    """Locate the numbers of a chunk.

    Raises:
        CheckpointError: the stream was not written by torch.save, or holds another tensor.
    """
    where = f"{file.path.name}: {key}"
    reader = RangeReader(file, chunk.nbytes, start=chunk.offset)
    stream = io.BufferedReader(reader, range_reader.PAGE_NBYTES)
    entries = torch_zip.entries_of(stream, where)
    prefix, tensor = _described(stream, entries, where)
    shape = tuple(end - start for start, end in chunk.at)
    stored = TensorSpec(tensor.dtype, tensor.shape)
    if stored != TensorSpec(spec.dtype, shape):
        raise CheckpointError(
            f"{where}: its chunk is {stored}, the metadata says {TensorSpec(spec.dtype, shape)}",
            hint="copy the checkpoint again",
        )
    item = DTYPE_BITS[spec.dtype] // 8
    start, nbytes = entries.get(f"{prefix}data/{tensor.storage.key}", (0, 0))
    end = (tensor.offset + math.prod(shape)) * item
    if end > nbytes:
        raise CheckpointError(
            f"{where}: its chunk needs {end} bytes, there are {nbytes}",
            hint="copy the checkpoint again",
        )
    order = _order(where, shape, tensor.strides)
    return ChunkLocation(chunk.offset + start + tensor.offset * item, order)


def value(key: str, chunk: Chunk, file: LocalFile) -> object:
    """An entry that is no tensor: plain values, and tensors as what describes them.

    Raises:
        CheckpointError: the stream was not written by torch.save, or asks for more than that.
    """
    where = f"{file.path.name}: {key}"
    if chunk.offset + chunk.nbytes > file.nbytes:
        raise CheckpointError(
            f"{where}: ends at byte {chunk.offset + chunk.nbytes}, the file has {file.nbytes}",
            hint="the file was cut short: copy it again",
        )
    reader = RangeReader(file, chunk.nbytes, start=chunk.offset)
    stream = io.BufferedReader(reader, range_reader.PAGE_NBYTES)
    return _pickled(stream, torch_zip.entries_of(stream, where), where)[1]


def _pickled(
    stream: BinaryIO, entries: Mapping[str, tuple[int, int]], where: str
) -> tuple[str, object]:
    """The name of a stream's pickle, and its value."""
    name = next((name for name in entries if name.endswith("/data.pkl")), "")
    start, nbytes = entries.get(name, (0, 0))
    stream.seek(start)
    return name, torch_pickle.read(stream.read(min(nbytes, _MAX_PICKLE_NBYTES)), file=where)


def _described(
    stream: BinaryIO, entries: Mapping[str, tuple[int, int]], where: str
) -> tuple[str, StoredTensor]:
    """The prefix of the names of entries, and the tensor."""
    name, tensor = _pickled(stream, entries, where)
    if not isinstance(tensor, StoredTensor):
        raise CheckpointError(
            f"{where}: its chunk holds a {type(tensor).__name__}, not a plain tensor",
            hint="save it as a plain one: tensor.to_dense(), .dequantize(), .resolve_conj()",
        )
    return name.removesuffix("data.pkl"), tensor


def _order(where: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """The dimensions in storage order, the slowest first."""
    dims = sorted(range(len(shape)), key=lambda d: (-strides[d], d) if shape[d] > 1 else (0, d))
    expected = 1
    for d in reversed(dims):
        if shape[d] > 1 and strides[d] != expected:
            raise CheckpointError(
                f"{where}: stored with strides {list(strides)} for {list(shape)}, expected no gaps",
                hint="save it from a contiguous tensor",
            )
        expected *= shape[d]
    return tuple(dims)
