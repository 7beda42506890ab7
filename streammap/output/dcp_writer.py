"""The files of a DCP result: where each tensor lies, and the bytes around its numbers.

A file is the tensors' streams one after the other. A stream is a zip file as torch.save(tensor)
writes one: small entries, the numbers, and then the table of entries. All but the numbers is known
in advance, so tiles are written where they belong. Like the zip files of .pth results it has no
checksum of the numbers; torch does not check it.
"""

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from struct import pack

from streammap.errors import OutputError
from streammap.io import weight_files
from streammap.io.dtypes import TORCH_NAMES, TensorSpec
from streammap.io.formats import pickle_writer
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
from streammap.output import layout
from streammap.output.layout import Shard

SUFFIX = weight_files.DCP_SUFFIX
_ALIGN = 64
_DATA = "archive/data/0"
_MAX_32 = 2**32 - 1
_DAY = 33
"""1 January 1980, as zip files have it."""
_STORAGES = {
    "F64": "Double",
    "F32": "Float",
    "F16": "Half",
    "BF16": "BFloat16",
    "I64": "Long",
    "I32": "Int",
    "I16": "Short",
    "I8": "Char",
    "U8": "Byte",
    "BOOL": "Bool",
    "C64": "ComplexFloat",
}
"""Dtypes with a storage class of their own; others are stored as bytes."""
_META = "torch.distributed.checkpoint.metadata"


def arrange(specs: Mapping[str, TensorSpec], *, max_shard_nbytes: int) -> tuple[Shard, ...]:
    """The files of a result: as many and in the order of a safetensors result.

    Raises:
        OutputError: a dtype that torch lacks.
    """
    for key, spec in specs.items():
        if spec.dtype not in TORCH_NAMES:
            raise OutputError(f"{key}: torch has no dtype {spec.dtype}", hint="write safetensors")
    groups = layout.arrange(specs, max_shard_nbytes=max_shard_nbytes)
    return tuple(_shard(f"__0_{i}{SUFFIX}", group.slots) for i, group in enumerate(groups))


def _shard(name: str, slots: Sequence[Slot]) -> Shard:
    placed, offset, tail = [], 0, 0
    for slot in slots:
        placed.append(Slot(slot.key, slot.spec, offset + len(_head(slot.spec))))
        tail = _stream_end(placed[-1]) - placed[-1].end
        offset = placed[-1].end + tail
        offset += -offset % _ALIGN
    return Shard(name, _head(slots[0].spec) if slots else b"", tuple(placed), tail)


def framing(shard: Shard) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of everything in a file but the tensors' numbers."""
    for slot in shard.slots:
        head = _head(slot.spec)
        yield slot.start - len(head), head
        yield slot.end, _tail(slot.spec, len(head))


def metadata(shards: Sequence[Shard], nest: str | None) -> bytes:
    """.metadata."""
    prefix = tuple(nest.split(".")) if nest else ()
    tensors, paths, places = [], [], []
    for shard in shards:
        for slot in shard.slots:
            name = text(".".join((*prefix, slot.key)))
            zeros = _size((0,) * len(slot.spec.shape))
            tensors.append((name, _tensor(slot.spec, zeros)))
            paths.append((name, tuple_(*map(text, (*prefix, slot.key)))))
            places.append((_index(name, zeros), _place(shard.name, slot)))
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
        named(_META, "TensorProperties"), tuple_(_dtype(spec), strided, FALSE, order, FALSE)
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


def _index(name: bytes, zeros: bytes) -> bytes:
    fields = (("fqn", name), ("offset", zeros), ("index", number(0)))
    return made(named(_META, "MetadataIndex"), dict_((text(n), value) for n, value in fields))


def _place(file: str, slot: Slot) -> bytes:
    start = slot.start - len(_head(slot.spec))
    fields = (
        ("relative_path", text(file)),
        ("offset", number(start)),
        ("length", number(_stream_end(slot) - start)),
    )
    kind = named("torch.distributed.checkpoint.filesystem", "_StorageInfo")
    return made(kind, dict_((text(n), value) for n, value in fields))


def _size(shape: Sequence[int]) -> bytes:
    return call(named("torch", "Size"), tuple_(*map(number, shape)))


def _dtype(spec: TensorSpec) -> bytes:
    return named("torch", TORCH_NAMES[spec.dtype])


# A stream: torch.save(tensor).


def _stream_end(slot: Slot) -> int:
    return slot.end + len(_tail(slot.spec, len(_head(slot.spec))))


def _saved(spec: TensorSpec) -> bytes:
    """data.pkl: the tensor as torch pickles it."""
    kind, n = _STORAGES.get(spec.dtype), spec.n_elements
    storage = named("torch", f"{kind}Storage") if kind else named("torch.storage", "UntypedStorage")
    pid = tuple_(
        text("storage"), storage, text("0"), text("cpu"), number(n if kind else spec.nbytes)
    )
    strides = [math.prod(spec.shape[d + 1 :]) for d in range(len(spec.shape))]
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = [
        pickle_writer.referred(pid),
        number(0),
        tuple_(*map(number, spec.shape)),
        tuple_(*map(number, strides)),
        FALSE,
        hooks,
    ]
    version = "v2" if kind else "v3"
    if not kind:
        arguments.append(_dtype(spec))
    made_by = named("torch._utils", f"_rebuild_tensor_{version}")
    return pickle_writer.BEGIN + call(made_by, *arguments) + pickle_writer.STOP


def _entries(spec: TensorSpec) -> tuple[tuple[str, bytes], ...]:
    """Names and contents of the small entries."""
    return (
        ("archive/data.pkl", _saved(spec)),
        ("archive/byteorder", b"little"),
        ("archive/version", b"3\n"),
    )


def _head(spec: TensorSpec) -> bytes:
    """Everything before the numbers, which begin at a multiple of 64 bytes."""
    small = b"".join(
        _local(name, zlib.crc32(content), len(content), b"") + content
        for name, content in _entries(spec)
    )
    large = _zip64(spec.nbytes, spec.nbytes)
    bare = len(small) + len(_local(_DATA, 0, spec.nbytes, large)) + 4
    padding = -bare % _ALIGN
    extra = large + b"FB" + padding.to_bytes(2, "little") + bytes(padding)
    return small + _local(_DATA, 0, spec.nbytes, extra)


def _tail(spec: TensorSpec, n_head: int) -> bytes:
    """The table of entries; `n_head` bytes are before the numbers."""
    table, offset, entries = b"", 0, _entries(spec)
    for name, content in entries:
        table += _central(name, zlib.crc32(content), len(content), offset)
        offset += len(_local(name, 0, 0, b"")) + len(content)
    table += _central(_DATA, 0, spec.nbytes, offset)
    n, start = len(entries) + 1, n_head + spec.nbytes
    end64 = b""
    if start > _MAX_32:
        sizes = (n, n, len(table), start)
        end64 = pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, *sizes)
        end64 += pack("<4sIQI", b"PK\6\7", 0, start + len(table), 1)
    sizes = (n, n, len(table), min(start, _MAX_32))
    return table + end64 + pack("<4sHHHHIIH", b"PK\5\6", 0, 0, *sizes, 0)


def _local(name: str, crc: int, nbytes: int, extra: bytes) -> bytes:
    """The header of an entry."""
    version, size = 45 if nbytes >= _MAX_32 else 20, min(nbytes, _MAX_32)
    lengths = (len(name), len(extra))
    head = pack("<4sHHHHHIIIHH", b"PK\3\4", version, 0, 0, 0, _DAY, crc, size, size, *lengths)
    return head + name.encode() + extra


def _central(name: str, crc: int, nbytes: int, offset: int) -> bytes:
    """An entry's line in the table."""
    size, extra = min(nbytes, _MAX_32), _zip64(nbytes, nbytes)
    versions = (45, 45 if extra else 20)
    head = pack("<4sHHHHHHIII", b"PK\1\2", *versions, 0, 0, 0, _DAY, crc, size, size)
    lengths = (len(name), len(extra), 0)
    return head + pack("<HHHHHII", *lengths, 0, 0, 0, offset) + name.encode() + extra


def _zip64(*sizes: int) -> bytes:
    """The extra field for sizes of 4 GiB and more; empty for smaller ones."""
    if max(sizes) < _MAX_32:
        return b""
    body = b"".join(n.to_bytes(8, "little") for n in sizes)
    return b"\1\0" + len(body).to_bytes(2, "little") + body
