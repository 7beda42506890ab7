"""Reads a checkpoint's quantised tensors as plain ones, and the others as they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, final

from streammap.io.codecs.coded import Coded
from streammap.io.dtypes import to_torch
from streammap.io.tensor_readers import TensorReader

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class DecodedTensors:
    """Tensors of another reader, those in `coded` decoded."""

    inner: TensorReader
    coded: Mapping[str, Coded]

    def read_into(self, key: str, start: int, view: memoryview, *, mapped: bool) -> None:
        """See TensorReader."""
        coded = self.coded.get(key)
        if coded is None:
            self.inner.read_into(key, start, view, mapped=mapped)
            return
        if not len(view):
            return
        import torch

        dtype = to_torch(coded.spec.dtype)
        out = torch.frombuffer(view, dtype=dtype)
        read = partial(self.inner.read_into, mapped=mapped)
        coded.fill(read, start // dtype.itemsize, out)

    def tensor(self, key: str) -> "Tensor":
        """A whole tensor; a decoded one is a copy in memory."""
        coded = self.coded.get(key)
        if coded is None:
            return self.inner.tensor(key)
        import torch

        out = torch.empty(coded.spec.n_elements, dtype=to_torch(coded.spec.dtype))
        coded.fill(partial(self.inner.read_into, mapped=False), 0, out)
        return out.view(coded.spec.shape)
