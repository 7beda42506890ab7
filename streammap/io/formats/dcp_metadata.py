"""Reads the .metadata of a torch.distributed.checkpoint (DCP) folder without running its code.

    .metadata        a pickle: for each tensor its dtype, shape and chunks; for each chunk its file,
                     offset and length
    __0_0.distcp     chunks one after the other, each the bytes of torch.save(tensor): a zip file

The pickle is read by safe_pickle.py: its table has the few classes of DCP, which become plain
records, without importing torch; any other name is an error.
"""

import bisect
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from streammap.errors import CheckpointError
from streammap.io import safe_open, weight_files
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safe_pickle, safetensors_header
from streammap.io.formats.safe_pickle import Name, Record
from streammap.io.formats.torch_pickle import DTYPE_NAMES, Dtype

METADATA = weight_files.DCP_METADATA
_MAX_NBYTES = 200_000_000
_MAX_CELLS = 1_000_000
Path_ = tuple[str | int, ...]
Range = tuple[int, int]
"""start, end"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and the file and range of its stream."""

    at: tuple[Range, ...]
    """start, end in each dimension of the tensor."""
    file: str
    offset: int
    nbytes: int
    """Of the stream, which is more than the tensor's."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """The content of a .metadata file."""

    tensors: Mapping[str, tuple[TensorSpec, tuple[Chunk, ...]]]
    """Flat name -> the tensor, and its non-empty chunks."""
    paths: Mapping[str, Path_]
    """Flat name -> the keys of the nested state dict that lead to it, for all entries."""
    objects: Mapping[str, Chunk]
    """Flat name -> the stream of an entry that is no tensor."""


def _size(values: object = ()) -> tuple[object, ...]:
    return tuple(values) if isinstance(values, tuple | list) else ()


_META = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_RECORDS = (
    f"{_META}.Metadata",
    f"{_META}.TensorStorageMetadata",
    f"{_META}.BytesStorageMetadata",
    f"{_META}.ChunkStorageMetadata",
    f"{_META}.MetadataIndex",
    f"{_META}.StorageMeta",
    f"{_META}.TensorProperties",
    f"{_OLD}.TensorProperties",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
)
_SKIPPED = (
    f"{_META}._MEM_FORMAT_ENCODING",
    f"{_OLD}.MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    *(
        f"{module}.{kind}"
        for module in ("pathlib", "pathlib._local")
        for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    ),
)
_NAMES: Mapping[str, Name] = {
    **DTYPE_NAMES,
    **{name: Name(Record) for name in _RECORDS},
    **{name: Name() for name in _SKIPPED},
    "torch.Size": Name(_size),
    "collections.OrderedDict": Name(safe_pickle.ordered_dict),
}


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder written by DCP."""
    return (path / METADATA).is_file() and bool(list(path.glob("*.distcp")))


def read(folder: Path) -> Metadata:
    """The .metadata of a folder.

    Raises:
        CheckpointError: it names other classes than DCP's own, or is broken.
    """
    path = folder / METADATA
    content = safe_open.content(path, limit=_MAX_NBYTES)
    try:
        # As many steps as it has bytes: a large run has a million chunks, of 60 steps each.
        return _metadata(safe_pickle.read(content, _NAMES, max_steps=len(content)))
    except safe_pickle.UnknownNameError as error:
        raise CheckpointError(
            f"{path}: its pickle asks for {error}, which is no part of a checkpoint's metadata",
            hint="do not use this checkpoint: whoever wrote it could run code in what loads it",
        ) from error
    except safe_pickle.BrokenPickleError as error:
        raise CheckpointError(
            f"{path}: not the metadata of torch.distributed.checkpoint: {error}",
            hint="save or copy the checkpoint again",
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", hint=error.hint) from error


def _metadata(content: object) -> Metadata:
    table = _table(content, "state_dict_metadata")
    streams: dict[tuple[str, object], object] = {}
    for index, info in _table(content, "storage_data").items():
        name, offset = _field(index, "fqn"), _optional(index, "offset")
        if not isinstance(name, str) or (offset is not None and not _are_sizes(offset)):
            raise CheckpointError("storage_data: a chunk without a tensor")
        streams[name, offset] = info
    tensors: dict[str, tuple[TensorSpec, tuple[Chunk, ...]]] = {}
    paths: dict[str, Path_] = {}
    objects: dict[str, Chunk] = {}
    for name, entry in table.items():
        if not isinstance(name, str):
            raise CheckpointError("state_dict_metadata: a name that is not text")
        paths[name] = (name,)
        if _optional(entry, "chunks") is not None:
            tensors[name] = _tensor(name, entry, streams)
        elif (name, None) in streams:
            objects[name] = _chunk(name, (), streams[name, None])
    planned = _optional(content, "planner_data")
    if isinstance(planned, dict):
        if not all(_is_path(path) for path in planned.values()):
            raise CheckpointError("planner_data: a path of anything but names and numbers")
        paths |= {name: tuple(path) for name, path in planned.items() if name in paths}
    return Metadata(tensors, paths, objects)


def _tensor(
    name: str, entry: object, streams: Mapping[tuple[str, object], object]
) -> tuple[TensorSpec, tuple[Chunk, ...]]:
    dtype = _dtype(name, _field(entry, "properties"))
    shape = _sizes(_field(entry, "size"), name)
    safetensors_header.check_key(METADATA, name)
    safetensors_header.check_rank(METADATA, name, len(shape))
    if math.prod(shape) >= 2**63:
        raise CheckpointError(f"{name}: shape {list(shape)} overflows")
    entries = _field(entry, "chunks")
    if not isinstance(entries, list):
        raise CheckpointError(f"{name}: no list of chunks")
    chunks = []
    for chunk in entries:
        starts = _sizes(_field(chunk, "offsets"), name)
        lengths = _sizes(_field(chunk, "sizes"), name)
        if len(starts) != len(shape) or len(lengths) != len(shape):
            raise CheckpointError(f"{name}: a chunk of other dimensions than {list(shape)}")
        if 0 in lengths and 0 not in shape:
            continue  # a rank's share of a tensor with fewer rows than ranks
        if (name, starts) not in streams:
            raise CheckpointError(f"{name}: no file is listed for its chunk at {list(starts)}")
        at = tuple((start, start + n) for start, n in zip(starts, lengths, strict=True))
        chunks.append(_chunk(name, at, streams[name, starts]))
    _check_cover(name, shape, chunks)
    return TensorSpec(dtype, shape), tuple(sorted(chunks, key=lambda chunk: chunk.at))


def _dtype(name: str, properties: object) -> str:
    values = properties.values if isinstance(properties, Record) else ()
    dtype = values[0] if values else _optional(properties, "dtype")
    if not isinstance(dtype, Name) or not isinstance(dtype.value, Dtype):
        raise CheckpointError(f"{name}: no dtype")
    if dtype.value.name not in DTYPE_BITS:
        raise CheckpointError(f"{name}: safetensors has no dtype for {dtype.value.name}")
    return dtype.value.name


def _chunk(name: str, at: tuple[Range, ...], info: object) -> Chunk:
    extension = _optional(info, "transform_descriptors")
    if extension:
        raise CheckpointError(
            f"{name}: stored through an extension: {reprlib.repr(extension)}",
            hint="save it again without extensions (compression)",
        )
    file = _field(info, "relative_path")
    offset, nbytes = _sizes((_field(info, "offset"), _field(info, "length")), name)
    if not isinstance(file, str) or not safe_open.is_plain_name(file):
        raise CheckpointError(
            # Not its repr: a tuple that holds itself many times has no end as text.
            f"{name} is said to be in {reprlib.repr(file)}, expected a file of the same folder",
            hint="do not use this checkpoint: its metadata can point anywhere",
        )
    return Chunk(at, file, offset, nbytes)


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Refuse chunks that overlap or leave a hole: together they fill each cell of a grid once."""
    cuts = [sorted({i for c in chunks for i in c.at[d]} | {0, n}) for d, n in enumerate(shape)]
    cells: set[tuple[int, ...]] = set()
    n_wanted = 1
    for dim, n in zip(cuts, shape, strict=True):
        n_wanted *= len(dim) - 1 if n else 0
        if dim[-1] > n:
            raise CheckpointError(f"{name}: a chunk ends at {dim[-1]}, the dimension has {n}")
    if n_wanted > _MAX_CELLS:
        raise CheckpointError(f"{name}: chunks that make {n_wanted} pieces, at most {_MAX_CELLS}")
    for chunk in chunks:
        spans = [
            dim[bisect.bisect_left(dim, a) : bisect.bisect_left(dim, b)]
            for dim, (a, b) in zip(cuts, chunk.at, strict=True)
        ]
        inside: list[tuple[int, ...]] = [()]
        for span in spans:
            inside = [(*cell, i) for cell in inside for i in span]
        if not cells.isdisjoint(inside):
            raise CheckpointError(f"{name}: its chunk at {list(inside[0])} overlaps another")
        cells.update(inside)
    if len(cells) != n_wanted:
        raise CheckpointError(
            f"{name}: {len(chunks)} chunks do not fill {list(shape)}",
            hint="was it saved by all ranks? copy all of its files",
        )


def _table(record: object, name: str) -> Mapping[object, object]:
    table = _field(record, name)
    if not isinstance(table, dict):
        raise CheckpointError(f"{name} is a {type(table).__name__}, expected a dict")
    return table


def _field(record: object, name: str) -> object:
    if not isinstance(record, Record) or name not in record.fields:
        raise CheckpointError(f"no {name}")
    return record.fields[name]


def _optional(record: object, name: str) -> object:
    return record.fields.get(name) if isinstance(record, Record) else None


def _is_path(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(part, str | int) for part in value)


def _are_sizes(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


def _sizes(values: object, name: str) -> tuple[int, ...]:
    if not _are_sizes(values):
        raise CheckpointError(f"{name}: {reprlib.repr(values)} are not sizes")
    return values
