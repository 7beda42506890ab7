"""Rows of given lengths: what DoRA makes of a weight.

DoRA, arXiv:2402.09353: W' = m * V / |V|, with V = W + s B A, and the norm |V| of each row (all that
one output reads).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from streammap.io.dtypes import TensorSpec, to_torch
from streammap.planning.derived.elementwise import numbers
from streammap.planning.graph import Derived, FormReader, LinearForm

if TYPE_CHECKING:
    from torch import Tensor

_BAND = 2**16
"""Numbers of the rows that are computed at once, unless one row has more."""
_EACH_NBYTES = 40
"""Of such a number: as it is read, its square, and the result, in float64."""


@final
@dataclass(frozen=True, eq=False)
class RowsOfLength(Derived):
    """A matrix with each row scaled to a length."""

    matrix: LinearForm
    """[rows, columns], F32 or F64."""
    lengths: LinearForm
    """[rows], or of as many numbers."""
    inputs: tuple[LinearForm, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", (self.matrix, self.lengths))

    @property
    def name(self) -> str:
        """What it is."""
        return "rows of the adapter's lengths"

    @property
    def formula(self) -> Mapping[str, object]:
        """Its two inputs say it all."""
        return {"rows of length": 1}

    @property
    def tensor(self) -> TensorSpec:
        """As the matrix."""
        return self.matrix.spec

    @property
    def scratch_nbytes(self) -> int:
        """A band of rows, and what is kept of the last one."""
        return self._rows * self._columns * _EACH_NBYTES

    @property
    def _columns(self) -> int:
        return self.matrix.spec.n_elements // self.matrix.spec.shape[0]

    @property
    def _rows(self) -> int:
        return max(1, _BAND // self._columns)

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """From the bands of rows that the numbers are in; the last one is kept."""
        import torch

        out, at = torch.frombuffer(view, dtype=to_torch(self.tensor.dtype)), 0
        while at < len(out):
            number, first = divmod(start + at, self._rows * self._columns)
            part = self._band(number, read)[first : first + len(out) - at]
            out[at : at + len(part)] = part
            at += len(part)

    def _band(self, number: int, read: FormReader) -> "Tensor":
        """A band of rows, one after the other."""
        held = read.kept.get("band")
        if isinstance(held, tuple) and held[0] == number:
            kept: Tensor = held[1]
            return kept
        read.kept.pop("band", None)
        first = number * self._rows
        n, width = min(self._rows, self.matrix.spec.shape[0] - first), self._columns
        rows = numbers(self.matrix, first * width, n * width, read).double().view(n, width)
        wanted = numbers(self.lengths, first, n, read).double()
        norms = (rows * rows).sum(dim=1).sqrt()
        band = (rows * (wanted / norms)[:, None]).to(to_torch(self.tensor.dtype)).view(-1)
        read.kept["band"] = number, band
        return band
