"""A matrix that gives any part of itself: what a dense map multiplies by, however large.

What is done to a matrix (transposed, scaled, set beside others) is done to each part as it is read,
so that no more than a few blocks are ever in memory. A block is some rows as a whole; or columns,
where these lie together in the file. Which blocks there are depends on nothing but the matrix.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, final

from streammap.common.ranges import Range
from streammap.common.torch_threads import torch_threads
from streammap.io.dtypes import DTYPE_BITS, to_torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 2**20
"""Numbers of a block, where a row has no more."""
PART = 2**18
"""The same where a matrix is looked at, not multiplied with."""
Change = Literal["abs", "square", "times", "over"]


class Matrix(ABC):
    """Numbers in rows and columns, in float32 or float64."""

    by_columns: bool = False
    """Whether columns lie together, not rows."""
    n_rooms: int = 1
    """How many times the numbers of a part `part` needs room for."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """F32 or F64."""

    @abstractmethod
    def part(self, rows: Range, columns: Range, room: "Tensor") -> "Tensor":
        """Some rows and columns, in `room` or where they are held: not to be written to.

        Args:
            room: One dimension of the matrix's dtype, for `n_rooms` times the numbers of the part.

        Raises:
            CheckpointError: its file can't be read, or was written to.
        """

    def held(self) -> "Iterator[Tensor]":
        """What it keeps in memory."""
        yield from ()

    def block(self, n: int | None = None) -> tuple[int, int]:
        """Rows and columns of a block of about `n` numbers."""
        n = BLOCK if n is None else n
        n_rows, n_columns = self.shape
        if self.by_columns:
            return n_rows, min(n_columns, max(1, n // max(1, n_rows)))
        return min(n_rows, max(1, n // max(1, n_columns))), n_columns

    def blocks(self, n: int | None = None) -> Iterator[tuple[Range, Range]]:
        """All blocks, in their order."""
        n_rows, n_columns = self.shape
        row_step, column_step = self.block(n)
        for i in range(0, n_rows, row_step or 1):
            for j in range(0, n_columns, column_step or 1):
                yield (i, min(i + row_step, n_rows)), (j, min(j + column_step, n_columns))

    def read(self, rows: Range, columns: Range) -> "Tensor":
        """Some rows and columns, in memory that is taken for them. Do not write to it."""
        import torch

        n = math.prod(end - start for start, end in (rows, columns))
        return self.part(rows, columns, torch.empty(n * self.n_rooms, dtype=to_torch(self.dtype)))

    def parts(self) -> Iterator[tuple[Range, Range, "Tensor"]]:
        """All numbers in smaller blocks, each valid until the next."""
        import torch

        n = math.prod(self.block(PART))
        room = torch.empty(n * self.n_rooms, dtype=to_torch(self.dtype))
        for rows, columns in self.blocks(PART):
            yield rows, columns, self.part(rows, columns, room)

    def pieces(self) -> Iterator[bytes]:
        """The bytes of all numbers, row by row."""
        import ctypes

        n_rows, n_columns = self.shape
        step = max(1, PART // max(1, n_columns))
        for start in range(0, n_rows, step):
            rows = self.read((start, min(start + step, n_rows)), (0, n_columns)).contiguous()
            yield ctypes.string_at(rows.data_ptr(), rows.nbytes)

    def transposed(self) -> "Matrix":
        """The transpose."""
        return self.base if isinstance(self, Transposed) else Transposed(self)

    def is_finite(self) -> bool:
        """Whether it has no infinite number and no NaN."""
        with torch_threads():
            return all(bool(block.isfinite().all()) for _, _, block in self.parts())

    def row_sums(self) -> "Tensor":
        """The sum of each row. Shapes: rows x 1."""
        import torch

        sums = torch.zeros(self.shape[0], 1, dtype=to_torch(self.dtype))
        for rows, _, block in self.parts():
            sums[slice(*rows)] += block.sum(dim=1, keepdim=True)
        return sums

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


@final
class Held(Matrix):
    """A tensor."""

    n_rooms = 0

    def __init__(self, tensor: "Tensor") -> None:
        """In float64 or, whatever other floats it has, in float32."""
        import torch

        is_double = tensor.dtype == torch.float64
        self.tensor = tensor if is_double else tensor.to(torch.float32)

    @property
    def shape(self) -> tuple[int, int]:
        """See Matrix."""
        n_rows, n_columns = self.tensor.shape
        return int(n_rows), int(n_columns)

    @property
    def dtype(self) -> str:
        """See Matrix."""
        return "F64" if self.tensor.element_size() == 8 else "F32"

    def held(self) -> "Iterator[Tensor]":
        """See Matrix."""
        yield self.tensor

    def part(self, rows: Range, columns: Range, room: "Tensor") -> "Tensor":
        """See Matrix."""
        return self.tensor[slice(*rows), slice(*columns)]


@final
@dataclass(frozen=True, eq=False)
class Transposed(Matrix):
    """The transpose of a matrix."""

    base: Matrix

    @property
    def shape(self) -> tuple[int, int]:
        """See Matrix."""
        n_rows, n_columns = self.base.shape
        return n_columns, n_rows

    @property
    def dtype(self) -> str:
        """See Matrix."""
        return self.base.dtype

    @property
    def by_columns(self) -> bool:  # type: ignore[override]
        """See Matrix."""
        return not self.base.by_columns

    def held(self) -> "Iterator[Tensor]":
        """See Matrix."""
        yield from self.base.held()

    @property
    def n_rooms(self) -> int:  # type: ignore[override]
        """See Matrix."""
        return self.base.n_rooms

    def part(self, rows: Range, columns: Range, room: "Tensor") -> "Tensor":
        """See Matrix."""
        return self.base.part(columns, rows, room).T


@final
@dataclass(frozen=True, eq=False)
class Changed(Matrix):
    """A matrix whose numbers are changed one by one."""

    base: Matrix
    change: Change
    numbers: "Tensor | None" = None
    """Of "times" and "over": one number for each row, or for all."""

    @property
    def shape(self) -> tuple[int, int]:
        """See Matrix."""
        return self.base.shape

    @property
    def dtype(self) -> str:
        """See Matrix."""
        return self.base.dtype

    @property
    def by_columns(self) -> bool:  # type: ignore[override]
        """See Matrix."""
        return self.base.by_columns

    def held(self) -> "Iterator[Tensor]":
        """See Matrix."""
        yield from self.base.held()

    @property
    def n_rooms(self) -> int:  # type: ignore[override]
        """See Matrix."""
        return self.base.n_rooms + 1

    def part(self, rows: Range, columns: Range, room: "Tensor") -> "Tensor":
        """See Matrix."""
        import torch

        n = (rows[1] - rows[0]) * (columns[1] - columns[0])
        found = self.base.part(rows, columns, room[n:])
        own = room[:n].view(found.shape)
        if self.by_columns:  # so that both are gone through in one order
            own = room[:n].view(found.T.shape).T
        if self.change == "abs":
            return torch.abs(found, out=own)
        if self.numbers is None:
            return torch.mul(found, found, out=own)
        many = self.numbers.numel() > 1
        numbers = self.numbers[slice(*rows)] if many else self.numbers
        by = torch.mul if self.change == "times" else torch.div
        return by(found, numbers, out=own)


class Entries(Protocol):
    """A sparse map: what `Sparse` needs of one."""

    @property
    def n_out(self) -> int:
        """Rows."""
        ...

    @property
    def n_in(self) -> int:
        """Columns."""
        ...

    def members(self, unit: int) -> Sequence[tuple[int, float]]:
        """(column, number) of what a row has beside zeros."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Sparse(Matrix):
    """The matrix of a sparse map, beside others that are dense."""

    entries: Entries
    kind: str
    """Its dtype."""

    @property
    def shape(self) -> tuple[int, int]:
        """See Matrix."""
        return self.entries.n_out, self.entries.n_in

    @property
    def dtype(self) -> str:
        """See Matrix."""
        return self.kind

    def part(self, rows: Range, columns: Range, room: "Tensor") -> "Tensor":
        """See Matrix."""
        n_rows, n_columns = rows[1] - rows[0], columns[1] - columns[0]
        found = room[: n_rows * n_columns].view(n_rows, n_columns).zero_()
        for i in range(n_rows):
            for j, value in self.entries.members(rows[0] + i):
                if columns[0] <= j < columns[1]:
                    found[i, j - columns[0]] += value
        return found


@final
@dataclass(frozen=True, eq=False)
class Place:
    """Where a matrix stands in a larger one."""

    row: int
    column: int
    factor: float
    matrix: Matrix


@final
@dataclass(frozen=True, eq=False)
class Placed(Matrix):
    """Matrices that stand in a larger one, zeros around them."""

    whole: tuple[int, int]
    """Its shape."""
    places: tuple[Place, ...]
    kind: str
    """Its dtype, the widest of theirs."""

    @property
    def shape(self) -> tuple[int, int]:
        """See Matrix."""
        return self.whole

    @property
    def dtype(self) -> str:
        """See Matrix."""
        return self.kind

    def held(self) -> "Iterator[Tensor]":
        """See Matrix."""
        for matrix in {id(place.matrix): place.matrix for place in self.places}.values():
            yield from matrix.held()

    @property
    def n_rooms(self) -> int:  # type: ignore[override]
        """See Matrix."""
        return 1 + max((place.matrix.n_rooms for place in self.places), default=0)

    def part(self, rows: Range, columns: Range, room: "Tensor") -> "Tensor":
        """See Matrix."""
        n_rows, n_columns = rows[1] - rows[0], columns[1] - columns[0]
        n = n_rows * n_columns
        found = room[:n].view(n_rows, n_columns).zero_()
        for place in self.places:
            height, width = place.matrix.shape
            top, bottom = max(rows[0], place.row), min(rows[1], place.row + height)
            left, right = max(columns[0], place.column), min(columns[1], place.column + width)
            if top >= bottom or left >= right:
                continue
            inner = (
                (top - place.row, bottom - place.row),
                (left - place.column, right - place.column),
            )
            to = found[top - rows[0] : bottom - rows[0], left - columns[0] : right - columns[0]]
            to.copy_(place.matrix.part(*inner, room[n:].view(to_torch(place.matrix.dtype))))
            if place.factor != 1.0:
                to.mul_(place.factor)
        return found
