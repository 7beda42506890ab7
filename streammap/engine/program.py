"""What is done to compute one tile: a short list of operations on views of a few buffers.

    READ    request k -> its place              bytes of the source, as they are stored
    others  views -> view                       one kernel each; none needs memory of its own

No torch here: kernels.py makes calls of it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from streammap.common.ranges import Range
from streammap.planning.dense import matrix as matrices
from streammap.planning.maps import DenseMap
from streammap.planning.segments import Segment

OpKind = Literal[
    "read",
    "copy",
    "round",
    "mul",
    "div",
    "add",
    "blend",
    "pool",
    "fill",
    "matmul",
    "take",
    "scale",
    "put",
    "clear",
]
OUT, WORK = -1, -2
"""Places of views beside those of requests, which count from 0."""


@dataclass(frozen=True, slots=True)
class View:
    """Elements of a buffer, strided."""

    place: int
    """OUT, WORK, or the number of a request."""
    dtype: str
    offset: int
    """In elements of the dtype, as the strides."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def blocks(self, dim: int, segment: Segment, *, source: bool) -> "View":
        """The blocks of a segment. Shapes: [.., n, ..] -> [.., count, length, ..]."""
        start, step = (
            (segment.in_start, segment.in_step) if source else (segment.out_start, segment.out_step)
        )
        stride = self.strides[dim]
        return View(
            self.place,
            self.dtype,
            self.offset + start * stride,
            (*self.shape[:dim], segment.count, segment.length, *self.shape[dim + 1 :]),
            (*self.strides[:dim], step * stride, stride, *self.strides[dim + 1 :]),
        )

    def narrow(self, dim: int, start: int, end: int) -> "View":
        """The units [start, end) of a dimension."""
        return View(
            self.place,
            self.dtype,
            self.offset + start * self.strides[dim],
            (*self.shape[:dim], end - start, *self.shape[dim + 1 :]),
            self.strides,
        )

    def at(self, dim: int, i: int) -> "View":
        """Unit i of a dimension, which is gone."""
        return View(
            self.place,
            self.dtype,
            self.offset + i * self.strides[dim],
            (*self.shape[:dim], *self.shape[dim + 1 :]),
            (*self.strides[:dim], *self.strides[dim + 1 :]),
        )

    def seen(self, shape: tuple[int, ...], *, at: int = 0) -> "View":
        """Elements of a contiguous view, from its element `at` on, in another shape."""
        return contiguous(self.place, self.dtype, self.offset + at, shape)

    def folded(self, dim: int) -> "View":
        """The same elements of a contiguous view as [before, n, after]."""
        before, after = math.prod(self.shape[:dim]), math.prod(self.shape[dim + 1 :])
        return self.seen((before, self.shape[dim], after))


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel."""

    kind: OpKind
    out: View
    sources: tuple[View, ...] = ()
    number: float = 0.0
    """The factor of "mul", the divisor of "div" and "pool", the value of "fill", the second
    source's weight in "blend"; 1 where "matmul" adds to what is there."""
    indices: tuple[int, ...] = ()
    """Of "take", "put" (adds to them) and "clear": units of dimension 1 of a folded view."""
    numbers: tuple[float, ...] = ()
    """Of "scale": a factor for each unit of dimension 1 of a folded view."""
    matrix: "Strip | None" = None
    """Of "matmul", over dimension 1 of a folded view."""


@dataclass(frozen=True, slots=True)
class Strip:
    """Part of a dense map."""

    dense: DenseMap
    rows: Range
    columns: Range

    def blocks(self) -> Iterator[tuple[Range, Range]]:
        """Rows and columns that are multiplied with at once, in their order."""
        n_rows, n_columns = self.dense.matrix.shape
        if self.rows == (0, n_rows) and self.columns == (0, n_columns):
            yield from self.dense.matrix.blocks()
            return
        step = max(1, matrices.BLOCK // (self.columns[1] - self.columns[0]))
        for start in range(*self.rows, step):
            yield (start, min(start + step, self.rows[1])), self.columns


@dataclass(frozen=True, slots=True)
class Program:
    """How one tile is computed."""

    ops: tuple[Op, ...]
    work_nbytes: int
    """Scratch that the operations need."""
    read_nbytes: int
    """The largest request."""

    @property
    def counts(self) -> bool:
        """Whether it tells what rounding loses."""
        return any(op.kind == "round" for op in self.ops)


def contiguous(place: int, dtype: str, offset: int, shape: tuple[int, ...]) -> View:
    """A view of elements that stand in order, row by row."""
    strides = tuple(math.prod(shape[d + 1 :]) for d in range(len(shape)))
    return View(place, dtype, offset, shape, strides)
