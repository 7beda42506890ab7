"""The mean along one dimension of a form."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from streammap.io.dtypes import TensorSpec, to_torch
from streammap.planning import graph
from streammap.planning.derived.elementwise import numbers, spec_of
from streammap.planning.graph import Derived, FormReader, LinearForm
from streammap.planning.maps import AxisMap, BlockMap

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 2**15
"""Numbers of the form that are read at once, or one row of them."""


@final
class MeanAlong(Derived):
    """Shapes: [before..., n, after...] -> [before..., 1, after...]."""

    def __init__(self, form: LinearForm, dim: int) -> None:
        """Read nothing yet."""
        self._form, self._dim = form, dim
        shape = form.spec.shape
        self._n = shape[dim]
        self._after = math.prod(shape[dim + 1 :])
        self._spec = TensorSpec(spec_of((form,)).dtype, (*shape[:dim], 1, *shape[dim + 1 :]))
        self.inputs = (form,)

    @property
    def name(self) -> str:
        """What it is."""
        return "the mean of the others"

    @property
    def formula(self) -> Mapping[str, object]:
        """The dimension."""
        return {"mean_along": self._dim}

    @property
    def tensor(self) -> TensorSpec:
        """F32, or F64 where the form is."""
        return self._spec

    @property
    def scratch_nbytes(self) -> int:
        """A block as it is read and in float64, a sum, and the means that are kept."""
        row = max(1, self._after)
        return max(_BLOCK, row, self._n) * 24 + 3 * 8 * row

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """One stretch of `after` numbers after the other, as far as they are asked for."""
        import torch

        out = torch.frombuffer(view, dtype=to_torch(self._spec.dtype))
        if self._after == 1:
            self._rows(start, out, read)
            return
        at = 0
        while at < len(out):
            place, column = divmod(start + at, self._after)
            n = min(self._after - column, len(out) - at)
            out[at : at + n] = self._mean(place, read)[column : column + n]
            at += n

    def _rows(self, start: int, out: "Tensor", read: FormReader) -> None:
        """Means of whole rows: those of the last dimension."""
        step = max(1, _BLOCK // self._n)
        for first in range(0, len(out), step):
            n = min(step, len(out) - first)
            rows = numbers(self._form, (start + first) * self._n, n * self._n, read)
            out[first : first + n] = rows.double().view(n, self._n).mean(1)

    def _mean(self, place: int, read: FormReader) -> "Tensor":
        """The means at one place of the dimensions before, float64 [after]."""
        import torch

        if read.kept.get("place") != place:
            total = torch.zeros(self._after, dtype=torch.float64)
            step = max(1, _BLOCK // self._after)
            for first in range(0, self._n, step):
                n = min(step, self._n - first)
                start = (place * self._n + first) * self._after
                rows = numbers(self._form, start, n * self._after, read)
                total += rows.double().view(n, self._after).sum(0)
            read.kept |= {"mean": total / self._n, "place": place}
        mean: Tensor = read.kept["mean"]  # type: ignore[assignment]
        return mean


def spread(form: LinearForm, dim: int, dims: Sequence[AxisMap | None], new: AxisMap) -> LinearForm:
    """The mean along a dimension where a map leaves places empty, and 0 elsewhere.

    Args:
        dims: Maps of all dimensions; the one at `dim` is not looked at.
        new: The map that leaves some of its results empty.
    """
    mean = graph.derive(MeanAlong(form, dim), dtype=form.spec.dtype)
    empty = (() if new.members(i) else ((0, 1.0),) for i in range(new.n_out))
    to = BlockMap(tuple(empty), 1)
    return graph.map_dims(mean, [to if at == dim else m for at, m in enumerate(dims)])
