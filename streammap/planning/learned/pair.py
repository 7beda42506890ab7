"""The matrices of one axis, and what they are: a rotation, copies, one inverse to the other."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

from streammap.common.torch_threads import torch_threads
from streammap.planning.dense import stored
from streammap.planning.dense.matrix import PART, Matrix

if TYPE_CHECKING:
    from torch import Tensor

_MAX_WHOLE = 256
"""Units of which C P is computed; of more, what it does to a few vectors."""
_N_VECTORS = 8


@final
@dataclass(frozen=True, eq=False)
class Pair:
    """The matrices of one axis; what they are is worked out once."""

    matrix: Matrix
    """P [new, old]."""
    reader: Matrix
    """C [old, new]."""

    @cached_property
    def error(self) -> float:
        """How far C P is from I: its largest number, or that of what it adds to random vectors."""
        with torch_threads():
            return self._error()

    def _error(self) -> float:
        import torch

        (n_new, n_old), most = self.matrix.shape, 0.0
        if n_old > _MAX_WHOLE:
            source = torch.Generator().manual_seed(0)
            given = torch.randn(n_old, _N_VECTORS, generator=source, dtype=torch.float64)
            made = _times(self.reader, _times(self.matrix, given))
            return float((made - given).abs().max())
        step = max(1, PART // max(n_new, n_old))
        for start in range(0, n_old, step):
            end = min(start + step, n_old)
            # P of unit vectors are its columns.
            columns = self.matrix.read((0, n_new), (start, end)).to(torch.float64)
            made = _times(self.reader, columns)
            made[start:end].diagonal().sub_(1.0)
            most = max(most, float(made.abs().max()))
        return most

    @property
    def tolerance(self) -> float:
        """What rounding of the matrices allows."""
        return 1e-9 if self.matrix.dtype == "F64" else 1e-4

    @cached_property
    def is_transposed(self) -> bool:
        """Whether C is the transpose of P."""
        return stored.same(self.reader, self.matrix.transposed())

    @cached_property
    def is_rotation(self) -> bool:
        """Whether P is square, orthogonal, and read by its transpose."""
        n_new, n_old = self.matrix.shape
        return n_new == n_old and self.is_transposed and self.error <= self.tolerance

    @cached_property
    def is_signed(self) -> bool:
        """Whether units only change places and signs."""
        return self.is_rotation and bool((self._n_members == 1).all())

    @cached_property
    def is_identity(self) -> bool:
        """Whether nothing changes, as in a template that is not filled in."""
        n_new, n_old = self.matrix.shape
        return n_new == n_old and _is_identity(self.matrix) and _is_identity(self.reader)

    @cached_property
    def are_copies(self) -> bool:
        """Whether each new unit is one of the old, or 0 and not read."""
        empty = self._n_members == 0
        return (
            bool((self._n_members <= 1).all())
            and all(bool(((x == 0) | (x == 1)).all()) for _, _, x in self.matrix.parts())
            and all(
                not bool(x[:, empty[slice(*columns)]].any())
                for _, columns, x in self.reader.parts()
            )
        )

    @cached_property
    def _n_members(self) -> "Tensor":
        """How many old units each new one is made of."""
        import torch

        counts = torch.zeros(self.matrix.shape[0], dtype=torch.int64)
        for rows, _, x in self.matrix.parts():
            counts[slice(*rows)] += (x != 0).sum(dim=1)
        return counts


def _times(matrix: Matrix, vectors: "Tensor") -> "Tensor":
    """The matrix times a few vectors. Shapes: [n_out, n_in], [n_in, n] -> [n_out, n]."""
    made = vectors.new_zeros(matrix.shape[0], vectors.shape[1])
    for rows, columns, x in matrix.parts():
        made[slice(*rows)] += x.to(vectors.dtype) @ vectors[slice(*columns)]
    return made


def _is_identity(matrix: Matrix) -> bool:
    import torch

    for (top, bottom), (left, right), x in matrix.parts():
        expected = torch.zeros_like(x)
        for i in range(max(top, left), min(bottom, right)):
            expected[i - top, i - left] = 1.0
        if not x.equal(expected):
            return False
    return True
