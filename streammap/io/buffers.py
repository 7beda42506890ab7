"""Reusable memory: bytes for reads and writes, tensors for kernels."""

import mmap
from typing import TYPE_CHECKING, final

from streammap.io.dtypes import to_torch

if TYPE_CHECKING:
    from torch import Tensor


@final
class Buffer:
    """Bytes in memory; a page becomes resident on first use."""

    def __init__(self, nbytes: int) -> None:
        """Map at least `nbytes`."""
        pages = max(1, -(-nbytes // mmap.PAGESIZE))
        self._map = mmap.mmap(-1, pages * mmap.PAGESIZE)
        self.view = memoryview(self._map)
        self._typed: dict[str, Tensor] = {}

    def typed(self, dtype: str) -> "Tensor":
        """All of it as a one-dimensional tensor."""
        tensor = self._typed.get(dtype)
        if tensor is None:
            import torch

            tensor = self._typed[dtype] = torch.frombuffer(self._map, dtype=to_torch(dtype))
        return tensor
