"""Reads a checkpoint's quantised tensors as plain ones, and the others as they are."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from streammap.io.codecs.coded import Coded
from streammap.io.dtypes import to_torch
from streammap.io.storage.base import OpenFile, Reader
from streammap.io.tensor_readers import TensorReader

if TYPE_CHECKING:
    from torch import Tensor

    from streammap.io.storage.mapping import MappedPart


@final
@dataclass(frozen=True, slots=True)
class DecodedTensors(TensorReader):
    """Tensors of another reader, those in `coded` decoded."""

    inner: TensorReader
    coded: Mapping[str, Coded]

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """See TensorReader."""
        coded = self.coded.get(key)
        if coded is None:
            self.inner.read_into(key, start, view)
            return
        if not len(view):
            return
        import torch

        dtype = to_torch(coded.spec.dtype)
        item = dtype.itemsize
        first, last = start // item, -(-(start + len(view)) // item)
        if (last - first) * item == len(view):
            coded.fill(self.inner.read_into, first, torch.frombuffer(view, dtype=dtype))
            return
        whole = bytearray((last - first) * item)  # a part that begins or ends within a number
        coded.fill(self.inner.read_into, first, torch.frombuffer(whole, dtype=dtype))
        skipped = start - first * item
        view[:] = memoryview(whole)[skipped : skipped + len(view)]

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """See TensorReader. What is decoded lies nowhere."""
        return key not in self.coded and self.inner.map_into(key, start, end, part, reader)

    def tensor(self, key: str) -> "Tensor":
        """A whole tensor; a decoded one is in memory of its own."""
        coded = self.coded.get(key)
        if coded is None:
            return self.inner.tensor(key)
        import torch

        out = torch.empty(coded.spec.n_elements, dtype=to_torch(coded.spec.dtype))
        coded.fill(self.inner.read_into, 0, out)
        return out.view(coded.spec.shape)

    def stretches(self, key: str, start: int, end: int) -> Iterator[tuple[OpenFile, int, int]]:
        """See TensorReader: of a decoded tensor, those of all its parts."""
        coded = self.coded.get(key)
        if coded is None:
            yield from self.inner.stretches(key, start, end)
            return
        item = to_torch(coded.spec.dtype).itemsize
        for stored, first, last in coded.stretches(start // item, -(-end // item)):
            yield from self.inner.stretches(stored, first, last)
