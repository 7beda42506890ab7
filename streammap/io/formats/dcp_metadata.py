"""What a folder of torch.distributed.checkpoint (DCP) holds: its .metadata, read without its code.

    .metadata        a pickle: for each tensor its dtype, shape and chunks; for each chunk its file,
                     offset and length
    __0_0.distcp     chunks one after the other, each the bytes of torch.save(tensor): a zip file

A pickle may ask for any function of any module. This reader knows the few classes of DCP by name,
makes plain records of them without importing torch, and refuses all else.
"""

import bisect
import io
import math
import pickle
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeGuard, final

from streammap.errors import CheckpointError
from streammap.io import safe_open, weight_files
from streammap.io.formats import safetensors_header
from streammap.io.formats.torch_pickle import DTYPES
from streammap.io.tensor_spec import TensorSpec

METADATA = weight_files.DCP_METADATA
_MAX_NBYTES = 200_000_000
_MAX_CELLS = 1_000_000
Path_ = tuple[str | int, ...]
Range = tuple[int, int]
"""start, end"""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor, and where its stream is."""

    at: tuple[Range, ...]
    """start, end in each dimension of the tensor"""
    file: str
    offset: int
    nbytes: int
    """Of the stream: torch.save's, not the tensor's."""


@dataclass(frozen=True, slots=True)
class Metadata:
    """What a .metadata file says."""

    tensors: Mapping[str, tuple[TensorSpec, tuple[Chunk, ...]]]
    """Flat name -> the tensor, and its chunks that have elements."""
    paths: Mapping[str, Path_]
    """Flat name -> the keys that led to it in the nested state dict, of all entries."""


_INSTRUCTIONS = (
    pickle.PROTO,
    pickle.FRAME,
    pickle.STOP,
    pickle.MARK,
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
    pickle.LONG1,
    pickle.BINFLOAT,
    pickle.BINUNICODE,
    pickle.SHORT_BINUNICODE,
    pickle.BINBYTES,
    pickle.SHORT_BINBYTES,
    pickle.EMPTY_DICT,
    pickle.EMPTY_LIST,
    pickle.EMPTY_TUPLE,
    pickle.TUPLE,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
    pickle.APPEND,
    pickle.APPENDS,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.BINPUT,
    pickle.LONG_BINPUT,
    pickle.BINGET,
    pickle.LONG_BINGET,
    pickle.MEMOIZE,
    pickle.GLOBAL,
    pickle.STACK_GLOBAL,
    pickle.NEWOBJ,
    pickle.REDUCE,
    pickle.BUILD,
)
"""All that a pickle of such records needs."""


class StubObject:
    """An object of a class that is not imported: its fields."""


class Properties(StubObject):
    """Of a tensor: (dtype, layout, requires_grad, memory format, pinned)."""

    dtype: object = None

    def __setstate__(self, state: tuple[object, ...]) -> None:
        self.dtype = state[0]


class _ForeignError(pickle.UnpicklingError):
    """A pickle asks for something that is not in the table."""


@final
class _Unpickler(pickle._Unpickler):
    """Reads a pickle whose classes are all in a table.

    It is the one in Python: that in C takes memory by an index that the pickle names.
    """

    # Without sets, which hash what is put in, and bytearrays, which take memory unread.
    dispatch: ClassVar[dict[int, Callable[[pickle.Unpickler], None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS
    }

    def find_class(self, module: str, name: str) -> object:
        """What stands for a class or function; nothing is imported."""
        found = _KNOWN.get((module, name))
        if found is None:
            raise _ForeignError(f"{module}.{name}")
        return found

    def persistent_load(self, pid: object) -> object:
        """Nothing is outside of it."""
        raise pickle.UnpicklingError(f"a reference to {str(pid)[:80]}")


def _set_items(reader: Any, n: int | None) -> None:
    """SETITEM and SETITEMS: a tuple that holds itself many times takes for ever to hash."""
    items = reader.pop_mark() if n is None else [reader.stack.pop(-2), reader.stack.pop()]
    table = reader.stack[-1]
    if not isinstance(table, dict):
        raise pickle.UnpicklingError(f"{type(table).__name__} where a dict is expected")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | StubObject):
            raise pickle.UnpicklingError(f"a key that is a {type(key).__name__}")
        table[key] = value


def _build(reader: Any) -> None:
    """BUILD: fields of a record; a class or a function of this reader's gets none."""
    state, made = reader.stack.pop(), reader.stack[-1]
    if isinstance(made, Properties) and isinstance(state, tuple) and state:
        made.__setstate__(state)
    elif isinstance(made, StubObject) and isinstance(state, dict):
        vars(made).update({str(k): v for k, v in state.items() if isinstance(k, str)})
    else:
        raise pickle.UnpicklingError(f"state for a {type(made).__name__}")


_Unpickler.dispatch[pickle.BUILD[0]] = _build
_Unpickler.dispatch[pickle.SETITEM[0]] = lambda reader: _set_items(reader, 1)
_Unpickler.dispatch[pickle.SETITEMS[0]] = lambda reader: _set_items(reader, None)


def _no_items(*items: object) -> dict[object, object]:
    return {}


def _size(values: object = ()) -> tuple[object, ...]:
    return tuple(values) if isinstance(values, tuple | list) else ()


def _path(*parts: object) -> str:
    # Not whatever it is as text: a list that holds itself many times has no end as text.
    return "/".join(part for part in parts if isinstance(part, str))


def _layout(name: object) -> object:
    return name


_META = "torch.distributed.checkpoint.metadata"
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_RECORDS = (
    (_META, "Metadata"),
    (_META, "TensorStorageMetadata"),
    (_META, "BytesStorageMetadata"),
    (_META, "ChunkStorageMetadata"),
    (_META, "MetadataIndex"),
    (_META, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
)
_KNOWN: Mapping[tuple[str, str], object] = {
    **{where: type(where[1], (StubObject,), {}) for where in _RECORDS},
    **{("torch", name): known for name, known in DTYPES.items()},
    (_META, "TensorProperties"): Properties,
    (_OLD, "TensorProperties"): Properties,
    (_META, "_MEM_FORMAT_ENCODING"): int,
    (_OLD, "MEM_FORMAT_ENCODING"): int,
    ("torch", "Size"): _size,
    ("torch.serialization", "_get_layout"): _layout,
    ("collections", "OrderedDict"): _no_items,
    **{
        (module, name): _path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder that DCP wrote."""
    return (path / METADATA).is_file() and bool(list(path.glob("*.distcp")))


def read(folder: Path) -> Metadata:
    """The .metadata of a folder.

    Raises:
        CheckpointError: it asks for more than DCP's own classes, or is not what it should be.
    """
    path = folder / METADATA
    try:
        content = safe_open.content(path, limit=_MAX_NBYTES)
        return _metadata(_Unpickler(io.BytesIO(content)).load())
    except _ForeignError as error:
        raise CheckpointError(
            f"{path}: its pickle asks for {error}, which is no part of a checkpoint's metadata",
            hint="do not use this checkpoint: whoever wrote it could run code in what loads it",
        ) from error
    except CheckpointError as error:
        where = "" if error.message.startswith(str(path)) else f"{path}: "
        raise CheckpointError(f"{where}{error.message}", hint=error.hint) from error
    except Exception as error:  # a hostile pickle can raise anything
        raise CheckpointError(
            f"{path}: not the metadata of torch.distributed.checkpoint: {error}",
            hint="save or copy the checkpoint again",
        ) from error


def _metadata(content: object) -> Metadata:
    table = _table(content, "state_dict_metadata")
    streams: dict[tuple[str, object], StubObject] = {}
    for index, info in _table(content, "storage_data").items():
        name, offset = _field(index, "fqn"), vars(index).get("offset")
        if not isinstance(name, str) or (offset is not None and not _are_sizes(offset)):
            raise CheckpointError("storage_data: a chunk of no tensor")
        streams[name, offset] = info
    tensors = {
        str(name): _tensor(str(name), entry, streams)
        for name, entry in table.items()
        if "chunks" in vars(entry)
    }
    planned = vars(content).get("planner_data")
    paths: dict[str, Path_] = {str(name): (str(name),) for name in table}
    if isinstance(planned, dict):
        if not all(_is_path(path) for path in planned.values()):
            raise CheckpointError("planner_data: a path of anything but names and numbers")
        known = {str(name): tuple(path) for name, path in planned.items()}
        paths |= {name: path for name, path in known.items() if name in paths}
    return Metadata(tensors, paths)


def _tensor(
    name: str, entry: object, streams: Mapping[tuple[str, object], object]
) -> tuple[TensorSpec, tuple[Chunk, ...]]:
    dtype = _field(_field(entry, "properties"), "dtype")
    if not isinstance(dtype, str):
        raise CheckpointError(f"{name}: no dtype")
    shape = _sizes(_field(entry, "size"), name)
    safetensors_header.check_key(METADATA, name)
    safetensors_header.check_rank(METADATA, name, len(shape))
    if math.prod(shape) >= 2**63:
        raise CheckpointError(f"{name}: shape {list(shape)} overflows")
    chunks = _field(entry, "chunks")
    if not isinstance(chunks, list):
        raise CheckpointError(f"{name}: no list of chunks")
    found = []
    for chunk in chunks:
        starts = _sizes(_field(chunk, "offsets"), name)
        lengths = _sizes(_field(chunk, "sizes"), name)
        if 0 in lengths and 0 not in shape:
            continue  # a rank's share of a tensor with fewer rows than ranks
        info = streams.get((name, starts))
        if info is None:
            raise CheckpointError(f"{name}: no file is named for its chunk at {list(starts)}")
        if vars(info).get("transform_descriptors"):
            raise CheckpointError(
                f"{name}: stored through an extension: "
                f"{reprlib.repr(_field(info, 'transform_descriptors'))}",
                hint="save it again without extensions (compression)",
            )
        at = tuple((start, start + n) for start, n in zip(starts, lengths, strict=True))
        file, place = (
            _field(info, "relative_path"),
            _sizes((_field(info, "offset"), _field(info, "length")), name),
        )
        if not isinstance(file, str) or not safe_open.is_plain_name(file):
            raise CheckpointError(
                f"{name} is said to be in {file!r}, expected a file of the same folder",
                hint="do not use this checkpoint: its metadata can point anywhere",
            )
        found.append(Chunk(at, file, *place))
    _check_cover(name, shape, found)
    return TensorSpec(dtype, shape), tuple(sorted(found, key=lambda chunk: chunk.at))


def _check_cover(name: str, shape: tuple[int, ...], chunks: list[Chunk]) -> None:
    """Refuse chunks that leave a hole or overlap: their corners make a grid, each cell once."""
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


def _table(record: object, name: str) -> Mapping[object, StubObject]:
    found = _field(record, name)
    if not isinstance(found, dict):
        raise CheckpointError(f"{name} is a {type(found).__name__}, expected a dict")
    return found


def _field(record: object, name: str) -> object:
    if not isinstance(record, StubObject) or name not in vars(record):
        raise CheckpointError(f"no {name}")
    found: object = vars(record)[name]
    return found


def _is_path(value: object) -> bool:
    return isinstance(value, tuple | list) and all(isinstance(part, str | int) for part in value)


def _are_sizes(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(type(v) is int and v >= 0 for v in values)


def _sizes(values: object, name: str) -> tuple[int, ...]:
    if not _are_sizes(values):
        raise CheckpointError(f"{name}: {reprlib.repr(values)} are no sizes")
    return values
