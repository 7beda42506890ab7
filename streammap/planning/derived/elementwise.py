"""Derived tensors whose numbers depend on those at the same place of their forms."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from streammap.io.dtypes import DTYPE_BITS, TensorSpec, to_torch
from streammap.planning.derived.statistic import block_of
from streammap.planning.graph import Derived, FormReader, LinearForm

if TYPE_CHECKING:
    from torch import Tensor

_FEW = 128
_EACH_NBYTES = 24
"""Of a number of a form in a block, at most: as it is read, in float64, and in between."""


class Elementwise(Derived):
    """A function of forms of one shape, number by number."""

    n_scratch: int = 4
    """Tensors of a block that `values` holds at once, beside what it is given."""

    @property
    def tensor(self) -> TensorSpec:
        """F32, or F64 where one of the forms is."""
        return spec_of(self.inputs)

    @property
    def each_nbytes(self) -> int:
        """What each number of a block takes: of the forms, and of what is computed."""
        return _EACH_NBYTES * (len(self.inputs) + self.n_scratch)

    @property
    def block(self) -> int:
        """Numbers that are computed at once."""
        return block_of(self.each_nbytes)

    @property
    def scratch_nbytes(self) -> int:
        """A block."""
        return self.block * self.each_nbytes

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """A block at a time."""
        import torch

        out, block = torch.frombuffer(view, dtype=to_torch(self.tensor.dtype)), self.block
        for first in range(0, len(out), block):
            n = min(block, len(out) - first)
            parts = [numbers(form, start + first, n, read) for form in self.inputs]
            out[first : first + n] = self.values(start + first, parts, read)

    @abstractmethod
    def values(self, start: int, parts: Sequence["Tensor"], read: FormReader) -> "Tensor":
        """The numbers from element `start` on.

        Args:
            parts: Of each form the numbers there, float32 or float64 [n], which may be written to.
        """


def numbers(form: LinearForm, start: int, n: int, read: FormReader) -> "Tensor":
    """Of a form `n` numbers from element `start` on, in float32; in float64 if it has them [n]."""
    import torch

    stored = bytearray(n * DTYPE_BITS[form.spec.dtype] // 8)
    read(form, start, memoryview(stored))
    found = torch.frombuffer(stored, dtype=to_torch(form.spec.dtype))
    return found if form.spec.dtype == "F64" else found.to(torch.float32)


def number_nbytes(form: LinearForm) -> int:
    """What `numbers` takes for each."""
    stored = DTYPE_BITS[form.spec.dtype] // 8
    return stored if stored >= 4 else stored + 4


def totals(terms: Iterable["Tensor"]) -> list[float]:
    """The sum of each of some tensors [n], always in the same order.

    Numbers are added in their own dtype until an eighth of them is left, and these in float64.
    """
    import torch

    few = torch.stack([_folded(x, 0, max(_FEW, len(x) // 8)) for x in terms]).double()
    return [math.fsum(row) for row in _folded(few, 1, _FEW).tolist()]


def sums(x: "Tensor", *, dim: int) -> "Tensor":
    """The sums of numbers along a dimension that is not empty, always in the same order."""
    return _folded(x, dim, 1).select(dim, 0)


def _folded(x: "Tensor", dim: int, most: int) -> "Tensor":
    """Halves are added until at most so many numbers are left along a dimension.

    A library's own sum adds in another order for another number of threads. By halves, it is
    nearly exact too.
    """
    n = x.shape[dim]
    while n > most:
        half = n // 2
        folded = x.narrow(dim, 0, half) + x.narrow(dim, half, half)
        if n % 2:
            folded.narrow(dim, 0, 1).add_(x.narrow(dim, n - 1, 1))
        x, n = folded, half
    return x


def spec_of(forms: Sequence[LinearForm]) -> TensorSpec:
    """Of a function of forms, number by number: F32, or F64 where one of the forms is."""
    wide = any(form.spec.dtype == "F64" for form in forms)
    return TensorSpec("F64" if wide else "F32", forms[0].spec.shape)
