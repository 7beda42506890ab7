"""How alike each two units of two models are: sums of products of all that writes and reads them.

    similarity[i, j]  =  sum over tensors of  <numbers of my unit i, numbers of the other's unit j>

The other's numbers are taken with the orders that all other axes have so far. Matrices are read
by blocks of rows, whose sizes depend on shapes alone: the sums are the same whatever the memory.
All is computed in float64, on one thread.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from streammap.engine.memory import Memory
from streammap.engine.worker import WorkerReader
from streammap.io.buffers import Buffer
from streammap.io.dtypes import DTYPE_BITS, to_torch
from streammap.io.storage.base import Reader
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.ordering.search import HELD, TILE
from streammap.planning.ordering.stacks import Sheet, Side, Stack

if TYPE_CHECKING:
    from streammap.architectures.expression import Expression

_READ = 2**17
"""Numbers that are read at once."""
_INNER_TILE_NBYTES = 2**18


@final
@dataclass(frozen=True, eq=False)
class Places:
    """Where the positions along a side come from, and by which factor."""

    index: Tensor
    sign: Tensor | None

    @cached_property
    def is_identity(self) -> bool:
        """Whether all stay."""
        stays = torch.equal(self.index, torch.arange(len(self.index)))
        return stays and self.sign is None


def places_of(side: Side, map_of: "Callable[[Expression], AxisMap | None]") -> Places:
    """The places along a side, of the maps of its dimensions."""
    index = torch.zeros(1, dtype=torch.long)
    sign = torch.ones(1, dtype=torch.float64)
    for expression, n in side:
        m = None if expression is None else map_of(expression)
        own = torch.arange(n)
        factor = torch.ones(n, dtype=torch.float64)
        if m is not None:
            assert isinstance(m, BlockMap)
            first = torch.tensor([row[0][0] for row in m.rows]) * m.block
            own = (first[:, None] + torch.arange(m.block)).flatten()
            factor = torch.tensor([row[0][1] for row in m.rows], dtype=torch.float64)
            factor = factor.repeat_interleave(m.block)
        index = (index[:, None] * n + own).flatten()
        sign = (sign[:, None] * factor).flatten()
    return Places(index, None if bool((sign == 1.0).all()) else sign)


@final
class Numbers:
    """Reads numbers of forms, as float64."""

    def __init__(self, reader: Reader) -> None:
        tile = _INNER_TILE_NBYTES
        room = Memory(1, 0, tile, None, 0, inner_tile_nbytes=tile, inner_block_nbytes=0)
        self._read = WorkerReader(room, reader=reader)
        self._raw = Buffer(_READ * 8)

    @property
    def n_read(self) -> int:
        """Bytes read so far."""
        return self._read.n_read

    def fill(self, form: LinearForm, start: int, out: Tensor) -> None:
        """Fill `out`, of one dimension, with a form's numbers from its element `start` on."""
        size, dtype = DTYPE_BITS[form.spec.dtype] // 8, to_torch(form.spec.dtype)
        for at in range(0, len(out), _READ):
            n = min(_READ, len(out) - at)
            view = self._raw.view[: n * size]
            self._read(form, start + at, view)
            out[at : at + n] = torch.frombuffer(view, dtype=dtype)

    def rows(self, form: LinearForm, start: int, first: int, last: int, n_columns: int) -> Tensor:
        """Rows of a matrix that begins at element `start`. Shape: [last - first, n_columns]."""
        out = torch.empty((last - first) * n_columns, dtype=torch.float64)
        self.fill(form, start + first * n_columns, out)
        return out.view(last - first, n_columns)

    def chosen(
        self, form: LinearForm, start: int, rows: Places, first: int, last: int, n_columns: int
    ) -> Tensor:
        """The rows that stand at `first` to `last` in an order. Shape as that of `rows`."""
        index = rows.index[first:last]
        low, high = int(index.min()), int(index.max()) + 1
        if last - first < high - low <= TILE // n_columns:
            out = self.rows(form, start, low, high, n_columns)[index - low]
            return out if rows.sign is None else out.mul_(rows.sign[first:last, None])
        out = torch.empty(last - first, n_columns, dtype=torch.float64)
        # What lies in one piece is read in one.
        breaks = (torch.diff(index) != 1).nonzero().flatten().tolist()
        ends = [*(at + 1 for at in breaks), last - first]
        at = 0
        for end in ends:
            self.fill(form, start + int(index[at]) * n_columns, out[at:end].view(-1))
            at = end
        if rows.sign is not None:
            out *= rows.sign[first:last, None]
        return out

    def close(self) -> None:
        """Give back what is mapped."""
        self._read.close()


@final
@dataclass(frozen=True, eq=False)
class Beside:
    """How the other model's matrices of a stack lie in the orders that are known.

    What is being put in order keeps its own order in the dimension that is compared.
    """

    rows: Places
    columns: Places
    sheets: Sequence[int]
    """Number of the other's matrix for each of mine."""


def positions(labels: Sequence[int], n: int) -> Tensor | None:
    """The positions of each unit. Shape: [n, positions of one]; None where there are none."""
    units = torch.tensor(labels, dtype=torch.long)
    where = (units >= 0).nonzero().flatten()
    if not len(where):
        return None
    order = torch.argsort(units[where], stable=True)
    return where[order].view(n, -1)


def add_outer(read: Numbers, stack: Stack, beside: Beside, total: Tensor) -> None:
    """Units are whole matrices."""
    n, n_columns = len(stack.sheets), stack.n_columns
    step = max(1, TILE // (n * n_columns))
    for first in range(0, stack.n_rows, step):
        last = min(first + step, stack.n_rows)
        mine = torch.stack(
            [read.rows(s.mine, s.start, first, last, n_columns) for s in stack.sheets]
        )
        others = torch.stack(
            [_other_rows(read, s, stack, beside, first, last) for s in stack.sheets]
        )
        total.addmm_(mine.view(n, -1), others.view(n, -1).T)


def add_rows(read: Numbers, stack: Stack, beside: Beside, places: Tensor, total: Tensor) -> None:
    """Units are rows, or stretches of them; `places` are those of each unit."""
    for mine, other in _pairs(stack, beside):
        for part in _parts(places, stack.n_columns):
            _add_block_rows(read, (mine, other), stack.n_columns, beside, part, total)


def _add_block_rows(
    read: Numbers,
    sheets: tuple[Sheet, Sheet],
    n_columns: int,
    beside: Beside,
    places: Tensor,
    total: Tensor,
) -> None:
    """Blocks of my units are held, while all of the other's pass."""
    n, each = places.shape[0], places.shape[1] * n_columns
    theirs = beside.rows.index[places]
    held, tile = max(1, HELD // each), max(1, TILE // each)
    for i in range(0, n, held):
        mine = _units(read, sheets[0].mine, sheets[0].start, places[i : i + held], n_columns)
        mine = mine.view(len(mine), -1)
        for j in range(0, n, tile):
            other = _units(read, sheets[1].other, sheets[1].start, theirs[j : j + tile], n_columns)
            other = _in_order(other.view(-1, n_columns), beside.columns)
            total[i : i + held, j : j + tile].addmm_(mine, other.reshape(-1, mine.shape[1]).T)


def add_columns(read: Numbers, stack: Stack, beside: Beside, places: Tensor, total: Tensor) -> None:
    """Units are columns; sums go over rows, block after block."""
    n, n_columns = places.shape[0], stack.n_columns
    step = max(1, TILE // n_columns)
    for mine, other in _pairs(stack, beside):
        for first in range(0, stack.n_rows, step):
            last = min(first + step, stack.n_rows)
            left = read.rows(mine.mine, mine.start, first, last, n_columns)
            right = read.chosen(other.other, other.start, beside.rows, first, last, n_columns)
            right = _in_order(right, beside.columns)
            total.addmm_(_side_by_side(left, places, n), _side_by_side(right, places, n).T)


def _side_by_side(x: Tensor, places: Tensor, n: int) -> Tensor:
    """Columns of each unit. Shapes: [rows, columns] -> [n, rows * columns of one]."""
    if places.shape[1] == 1:
        return x[:, places[:, 0]].T
    return x[:, places.flatten()].view(len(x), n, -1).permute(1, 0, 2).reshape(n, -1)


def _pairs(stack: Stack, beside: Beside) -> Iterator[tuple[Sheet, Sheet]]:
    for sheet, number in zip(stack.sheets, beside.sheets, strict=True):
        yield sheet, stack.sheets[number]


def _other_rows(
    read: Numbers, sheet: Sheet, stack: Stack, beside: Beside, first: int, last: int
) -> Tensor:
    rows = read.chosen(sheet.other, sheet.start, beside.rows, first, last, stack.n_columns)
    return _in_order(rows, beside.columns)


def _in_order(x: Tensor, columns: Places) -> Tensor:
    if columns.is_identity:
        return x
    x = x[:, columns.index]
    return x if columns.sign is None else x.mul_(columns.sign)


def _parts(places: Tensor, n_columns: int) -> Iterator[Tensor]:
    """Positions of units in parts that a tile has room for."""
    step = max(1, TILE // n_columns)
    for first in range(0, places.shape[1], step):
        yield places[:, first : first + step]


def _units(read: Numbers, form: LinearForm, start: int, places: Tensor, n_columns: int) -> Tensor:
    """Rows of some units. Shape: [units, rows of one, n_columns]."""
    flat = Places(places.flatten(), None)
    rows = read.chosen(form, start, flat, 0, len(flat.index), n_columns)
    return rows.view(places.shape[0], places.shape[1], n_columns)
