"""The files of a DCP result: where each tensor lies, and the bytes around its numbers.

A file is the tensors' streams one after the other. A stream is a zip file as torch.save(tensor)
writes one: small entries, the numbers, and then the table of entries. All but the numbers is known
in advance, so tiles are written where they belong. Like the zip files of .pth results it has no
checksum of the numbers; torch does not check it.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from streammap.io import weight_files
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import pickle_writer, torch_writer, zip_frame
from streammap.io.formats.pickle_writer import (
    FALSE,
    NONE,
    call,
    dict_,
    list_,
    made,
    named,
    number,
    text,
    tuple_,
)
from streammap.io.formats.safetensors_header import Slot
from streammap.io.formats.zip_frame import ALIGN, Entry
from streammap.output import layout
from streammap.output.forms import optimizer_files, torch_files
from streammap.output.layout import Shard
from streammap.planning.optimizer.state import OptimizerState

SUFFIX = weight_files.DCP_SUFFIX
_DATA = "archive/data/0"
OBJECTS = f"__1_0{SUFFIX}"
"""The file of an optimizer's groups."""
_Path = tuple[str | int, ...]
_META = "torch.distributed.checkpoint.metadata"


def arrange(specs: Mapping[str, TensorSpec], *, max_shard_nbytes: int) -> tuple[Shard, ...]:
    """The files of a result: as many and in the order of a safetensors result.

    Raises:
        OutputError: a dtype that torch lacks.
    """
    torch_files.check(specs)
    groups = layout.arrange(specs, max_shard_nbytes=max_shard_nbytes)
    return tuple(_shard(f"__0_{i}{SUFFIX}", group.slots) for i, group in enumerate(groups))


def _shard(name: str, slots: Sequence[Slot]) -> Shard:
    placed, offset, tail = [], 0, 0
    for slot in slots:
        placed.append(Slot(slot.key, slot.spec, offset + len(_head(slot.spec))))
        tail = _stream_end(placed[-1]) - placed[-1].end
        offset = placed[-1].end + tail
        offset += -offset % ALIGN
    head = _head(slots[0].spec) if slots else b""
    return Shard(name, head, tuple(placed), tail, partial(_around, placed))


def _around(slots: Sequence[Slot]) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of everything in a file but the tensors' numbers."""
    for slot in slots:
        head = _head(slot.spec)
        yield slot.start - len(head), head
        yield slot.end, _tail(slot.spec)


def metadata(
    shards: Sequence[Shard], nest: str | None, optimizer: OptimizerState | None = None
) -> bytes:
    """.metadata."""
    prefix: _Path = tuple(nest.split(".")) if nest else ()
    state = {} if optimizer is None else optimizer.entries
    tensors, paths, places = [], [], []
    for shard in shards:
        for slot in shard.slots:
            path: _Path = (*prefix, slot.key)
            if optimizer is not None and slot.key in state:
                path = optimizer_files.dcp_path(optimizer, *state[slot.key])
            name, zeros = _flat(path), _size((0,) * len(slot.spec.shape))
            tensors.append((name, _tensor(slot.spec, zeros)))
            paths.append((name, _keys(path)))
            place = _place(shard.name, slot.start - len(_head(slot.spec)), _stream_end(slot))
            places.append((_index(name, zeros), place))
    at = 0
    for one in () if optimizer is None else optimizer_files.dcp_objects(optimizer):
        name, end = _flat(one.path), at + len(one.stream)
        tensors.append((name, made(named(_META, "BytesStorageMetadata"), dict_(()))))
        paths.append((name, _keys(one.path)))
        places.append((_index(name, None), _place(OBJECTS, at, end)))
        at = end
    content = made(
        named(_META, "Metadata"),
        dict_(
            (
                (text("state_dict_metadata"), dict_(tensors)),
                (text("planner_data"), dict_(paths)),
                (text("storage_data"), dict_(places)),
                (text("storage_meta"), NONE),
                (text("version"), text("1.0.0")),
            )
        ),
    )
    return pickle_writer.BEGIN + content + pickle_writer.STOP


def _tensor(spec: TensorSpec, zeros: bytes) -> bytes:
    strided = call(named("torch.serialization", "_get_layout"), text("torch.strided"))
    order = call(named(_META, "_MEM_FORMAT_ENCODING"), number(0))
    properties = made(
        named(_META, "TensorProperties"),
        tuple_(torch_writer.dtype(spec), strided, FALSE, order, FALSE),
    )
    size = _size(spec.shape)
    chunk = made(
        named(_META, "ChunkStorageMetadata"),
        dict_(((text("offsets"), zeros), (text("sizes"), size))),
    )
    fields = (("properties", properties), ("size", size), ("chunks", list_(chunk)))
    return made(
        named(_META, "TensorStorageMetadata"), dict_((text(name), value) for name, value in fields)
    )


def objects(optimizer: OptimizerState) -> bytes:
    """The file of all entries that are no tensors."""
    return b"".join(one.stream for one in optimizer_files.dcp_objects(optimizer))


def _flat(path: _Path) -> bytes:
    return text(".".join(map(str, path)))


def _keys(path: _Path) -> bytes:
    return tuple_(*map(pickle_writer.value, path))


def _index(name: bytes, zeros: bytes | None) -> bytes:
    if zeros is None:
        fields = (("fqn", name), ("offset", NONE), ("index", NONE))
    else:
        fields = (("fqn", name), ("offset", zeros), ("index", number(0)))
    return made(named(_META, "MetadataIndex"), dict_((text(n), value) for n, value in fields))


def _place(file: str, start: int, end: int) -> bytes:
    fields = (
        ("relative_path", text(file)),
        ("offset", number(start)),
        ("length", number(end - start)),
    )
    kind = named("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    return made(kind, dict_((text(n), value) for n, value in fields))


def _size(shape: Sequence[int]) -> bytes:
    return call(named("torch", "Size"), tuple_(*map(number, shape)))


# A stream: torch.save(tensor).


def _stream_end(slot: Slot) -> int:
    return slot.end + len(_tail(slot.spec))


def _head(spec: TensorSpec) -> bytes:
    """Everything before the numbers, which begin at a multiple of 64 bytes."""
    small, _ = torch_writer.small_entries(torch_writer.tensor(spec, "0"))
    return small + zip_frame.aligned(_DATA, spec.nbytes, len(small))


def _tail(spec: TensorSpec) -> bytes:
    """The table of entries."""
    small, entries = torch_writer.small_entries(torch_writer.tensor(spec, "0"))
    lines = [*entries, Entry(_DATA, 0, spec.nbytes, len(small))]
    return zip_frame.table(lines, len(_head(spec)) + spec.nbytes)
