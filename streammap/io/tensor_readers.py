"""How a checkpoint's tensors are read: each from one file, or out of chunks (dcp_chunks.py)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, final

from streammap.io.dtypes import DTYPE_BITS, to_torch
from streammap.io.formats.safetensors_header import Slot
from streammap.io.storage.base import OpenFile, Reader

if TYPE_CHECKING:
    from torch import Tensor

    from streammap.io.storage.mapping import MappedPart

_STRIP = 64


class TensorReader(Protocol):
    """Reads the tensors of a checkpoint. Several threads may read at once."""

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """Fill `view` with a tensor's bytes, row by row, from its byte `start` on.

        Raises:
            CheckpointError: the file ends before, or can't be read.
        """
        ...

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """Map bytes `start` to `end` of a tensor; gives False if they are to be read instead.

        Raises:
            CheckpointError: the file can't be opened, or can't be mapped and has to be.
        """
        return False

    def tensor(self, key: str) -> "Tensor":
        """A whole tensor. Do not write to it."""
        ...

    def stretches(self, key: str, start: int, end: int) -> Iterator[tuple[OpenFile, int, int]]:
        """Where in files bytes `start` to `end` of a tensor are, as far as that is known."""
        yield from ()


@final
@dataclass(frozen=True, slots=True)
class FileTensors(TensorReader):
    """Tensors that lie in one file each, row by row or with strides."""

    slots: Mapping[str, Slot]
    file_of: Mapping[str, str]
    files: Mapping[str, OpenFile]

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """See TensorReader."""
        slot, file = self.slots[key], self.files[self.file_of[key]]
        if slot.strides is None:
            file.read_into(slot.start + start, view)
        else:
            _gather(self.tensor(key), start, view, file.release)
            file.check_unchanged()

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """See TensorReader. A kernel needs numbers aligned, row by row."""
        slot, file = self.slots[key], self.files[self.file_of[key]]
        if slot.strides is not None or slot.start % (DTYPE_BITS[slot.spec.dtype] // 8 or 1):
            return False
        return file.map_into(slot.start + start, slot.start + end, part, reader)

    def stretches(self, key: str, start: int, end: int) -> Iterator[tuple[OpenFile, int, int]]:
        """See TensorReader."""
        slot = self.slots[key]
        if slot.strides is None:
            yield self.files[self.file_of[key]], slot.start + start, slot.start + end

    def tensor(self, key: str) -> "Tensor":
        """A view of the file's mapping; nothing is read until it is used.

        A copy where its bytes are not aligned to its dtype.
        """
        slot, file = self.slots[key], self.files[self.file_of[key]]
        dtype = to_torch(slot.spec.dtype)
        if slot.spec.n_elements == 0:
            import torch

            return torch.empty(slot.spec.shape, dtype=dtype)
        part = file.part(slot.start, slot.end)
        if slot.start % dtype.itemsize:
            part = part.clone()
        typed = part.view(dtype)
        if slot.strides is not None:
            return typed.as_strided(slot.spec.shape, slot.strides)
        return typed.view(slot.spec.shape)


def _gather(tensor: "Tensor", start: int, view: memoryview, release: Callable[[], None]) -> None:
    """Copy a part of a tensor that is stored in another order than row by row.

    Args:
        tensor: A view of a mapping.
        start: The first byte, counted row by row.
        view: Where the bytes go.
        release: Gives the mapping's pages back.
    """
    import torch

    out = torch.frombuffer(view, dtype=tensor.dtype)
    inner = tensor[0].numel() if tensor.dim() else 1
    offset = start // tensor.element_size()
    while len(out):
        row, column = divmod(offset, inner)
        n = min(len(out), inner - column)
        if n == inner and tensor.dim() > 1:
            n = len(out) // inner * inner  # whole rows, all at once
            _copy_strips(tensor[row : row + n // inner], out[:n], release)
        else:
            flat = tensor[row].reshape(-1) if tensor.dim() else tensor.reshape(-1)
            out[:n].copy_(flat[column : column + n])
            release()
        out, offset = out[n:], offset + n


def _copy_strips(rows: "Tensor", out: "Tensor", release: Callable[[], None]) -> None:
    """Copy rows, a few columns at a time: of a transposed tensor each column is a page or more."""
    target = out.view(rows.shape)
    for start in range(0, rows.shape[1], _STRIP):
        target[:, start : start + _STRIP].copy_(rows[:, start : start + _STRIP])
        release()
