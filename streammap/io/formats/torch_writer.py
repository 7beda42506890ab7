"""The bytes of a torch file around its tensors' numbers, known before any number is.

    small entries    archive/data.pkl, which describes the tensors; byte order and version
    numbers          archive/data/0, /1 ... each behind a header of its own
    table            where each entry is

torch.load reads it, with weights_only and mmap too.
"""

import math
import zlib
from collections.abc import Iterator, Sequence

from streammap.io.dtypes import TORCH_NAMES, TensorSpec
from streammap.io.formats import pickle_writer, zip_frame
from streammap.io.formats.pickle_writer import FALSE, call, dict_, named, number, text, tuple_
from streammap.io.formats.safetensors_header import Slot
from streammap.io.formats.zip_frame import Entry

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


def dtype(spec: TensorSpec) -> bytes:
    """A tensor's dtype, pickled."""
    return named("torch", TORCH_NAMES[spec.dtype])


def tensor(spec: TensorSpec, key: str) -> bytes:
    """A contiguous tensor, pickled; its numbers are the entry archive/data/KEY."""
    kind, n = _STORAGES.get(spec.dtype), spec.n_elements
    storage = named("torch", f"{kind}Storage") if kind else named("torch.storage", "UntypedStorage")
    pid = tuple_(
        text("storage"), storage, text(key), text("cpu"), number(n if kind else spec.nbytes)
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
        arguments.append(dtype(spec))
    return call(named("torch._utils", f"_rebuild_tensor_{version}"), *arguments)


def state(specs: Sequence[tuple[str, TensorSpec]], nest: str | None) -> bytes:
    """A state dict, pickled; under an entry `nest`, if that is not None."""
    items = [(text(key), tensor(spec, str(i))) for i, (key, spec) in enumerate(specs)]
    content = dict_(items)
    return content if nest is None else dict_([(text(nest), content)])


def small_entries(pickled: bytes) -> tuple[bytes, list[Entry]]:
    """The entries before the numbers, and their lines of the table."""
    head, entries = b"", []
    for name, content in (
        ("archive/data.pkl", pickle_writer.BEGIN + pickled + pickle_writer.STOP),
        ("archive/byteorder", b"little"),
        ("archive/version", b"3\n"),
    ):
        crc = zlib.crc32(content)
        entries.append(Entry(name, crc, len(content), len(head)))
        head += zip_frame.local(name, crc, len(content)) + content
    return head, entries


def saved(pickled: bytes) -> bytes:
    """A whole file without tensors, as torch.save writes one."""
    small, entries = small_entries(pickled)
    return small + zip_frame.table(entries, len(small))


def place(specs: Sequence[tuple[str, TensorSpec]], small: bytes) -> tuple[Slot, ...]:
    """Where the numbers of each tensor go, behind the small entries."""
    slots, at = [], len(small)
    for i, (key, spec) in enumerate(specs):
        at += len(_header(i, spec, at))
        slots.append(Slot(key, spec, at))
        at += spec.nbytes
    return tuple(slots)


def around(
    slots: Sequence[Slot], small: bytes, entries: list[Entry]
) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of all that is in the file but the numbers; the table comes last."""
    yield 0, small
    at, lines = len(small), list(entries)
    for i, slot in enumerate(slots):
        header = _header(i, slot.spec, at)
        yield at, header
        lines.append(Entry(_name(i), 0, slot.spec.nbytes, at))
        at = slot.end
    yield at, zip_frame.table(lines, at)


def _header(i: int, spec: TensorSpec, at: int) -> bytes:
    return zip_frame.aligned(_name(i), spec.nbytes, at)


def _name(i: int) -> str:
    return f"archive/data/{i}"
