"""A matrix with some of its rows taken from another one: an embedding with trained tokens."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.planning.graph import Derived, FormReader, LinearForm


@final
@dataclass(frozen=True, eq=False)
class ReplacedRows(Derived):
    """Rows of one form, but for those that another one has."""

    base: LinearForm
    """[rows, columns]."""
    rows: LinearForm
    """[n, columns], of the same dtype."""
    places: tuple[int, ...]
    """Which row of `base` each of `rows` stands for; ascending."""
    inputs: tuple[LinearForm, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", (self.base, self.rows))

    @property
    def name(self) -> str:
        """What it is."""
        return f"{len(self.places)} rows of the adapter's"

    @property
    def formula(self) -> Mapping[str, object]:
        """Which rows are others."""
        return {"replaced rows": list(self.places)}

    @property
    def tensor(self) -> TensorSpec:
        """As the base."""
        return self.base.spec

    @property
    def scratch_nbytes(self) -> int:
        """All is read into its place."""
        return 0

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """Read the base, then the other rows over it."""
        item, width = DTYPE_BITS[self.tensor.dtype] // 8, self.tensor.shape[1]
        end = start + len(view) // item
        read(self.base, start, view)
        i = bisect_left(self.places, start // width)
        while i < len(self.places) and (row := self.places[i] * width) < end:
            first, last = max(start, row), min(end, row + width)
            part = view[(first - start) * item : (last - start) * item]
            read(self.rows, i * width + first - row, part)
            i += 1
