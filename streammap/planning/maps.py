"""Linear maps over one axis, sparse over blocks.

A BlockMap sends n_in blocks to len(rows) blocks of the same length:

    out block i = sum of coefficient * in block j, over the pairs (j, coefficient) of rows[i]

so `kron(S, I_block)` with S given by its non-zeros. A group scheme on heads is one with a block of
head_dim; the same scheme on layers has blocks of 1. Written as matrices F (small x large):

    merging    F = rownorm(groups)          each small unit is the mean of its group
    growing    T = rownorm(F^T)             each large unit copies its group
    in(M)      rownorm(M^T)                 what the reader of a mapped axis applies

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import gcd
from typing import TYPE_CHECKING, final, overload
from weakref import WeakValueDictionary

from streammap.io.dtypes import to_torch
from streammap.planning import segments
from streammap.planning.dense import stored
from streammap.planning.dense.matrix import Changed, Held, Matrix, Place, Placed, Sparse
from streammap.planning.segments import Row, Segments

if TYPE_CHECKING:
    from torch import Tensor

N_IRREGULAR = 4
"""Maps of many segments whose segments are kept: those that a run is at work on."""
_SMALL = 2**16
"""Numbers of a sparse map that is held as a matrix where it stands beside dense ones."""


@final
@dataclass(frozen=True)
class BlockMap:
    """A map that is sparse over blocks of `block` units."""

    rows: tuple[Row, ...]
    n_in_blocks: int
    block: int = 1

    def __post_init__(self) -> None:
        for row in self.rows:
            for j, _ in row:
                if not 0 <= j < self.n_in_blocks:
                    raise IndexError(j)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.rows, self.n_in_blocks, self.block))

    @property
    def n_in(self) -> int:
        """Units read."""
        return self.n_in_blocks * self.block

    @property
    def n_out(self) -> int:
        """Units made."""
        return len(self.rows) * self.block

    @cached_property
    def is_identity(self) -> bool:
        """Whether nothing changes."""
        return len(self.rows) == self.n_in_blocks and all(
            row == ((i, 1.0),) for i, row in enumerate(self.rows)
        )

    @cached_property
    def uses(self) -> tuple[int, ...]:
        """How many rows read each in block."""
        counts = [0] * self.n_in_blocks
        for row in self.rows:
            for j, _ in row:
                counts[j] += 1
        return tuple(counts)

    @cached_property
    def longest(self) -> int:
        """Members of the longest row."""
        return max((len(row) for row in self.rows), default=0)

    @cached_property
    def n_members(self) -> int:
        """Members of each row; 0 where rows differ."""
        return self.longest if all(len(row) == self.longest for row in self.rows) else 0

    @property
    def segments(self) -> Segments:
        """The map as few regular runs of block moves, in the order in which they are added."""
        return _segments_of(self) if self._few_segments is None else self._few_segments

    @cached_property
    def _few_segments(self) -> Segments | None:
        """The segments where they are few; many are not kept: each layer may have its own."""
        found = _segments_of(self)
        return segments.shared(found) if len(found) <= segments.MANY else None

    @property
    def is_regular(self) -> bool:
        """Whether few segments express it."""
        return self._few_segments is not None

    @cached_property
    def common(self) -> float | None:
        """The coefficient of all members, if it is one and not 0."""
        values = {value for row in self.rows for _, value in row}
        value = values.pop() if len(values) == 1 else 0.0
        return value or None

    def members(self, unit: int) -> Row:
        """The (in unit, coefficient) pairs of one out unit."""
        i, rest = divmod(unit, self.block)
        return tuple((j * self.block + rest, value) for j, value in self.rows[i])

    def describe(self) -> str:
        """The map in words: "mean of 2", "sum of 2", "copy x2", "copy / 2"..."""
        return _describe(without_zeros(self))


@lru_cache(maxsize=N_IRREGULAR)
def _segments_of(m: BlockMap) -> Segments:
    return segments.segments(m.rows, m.block)


@final
@dataclass(frozen=True)
class DenseMap:
    """A map given as a matrix (learned, or loaded from a file): n_out x n_in."""

    matrix: Matrix

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DenseMap) and other.matrix is self.matrix

    def __hash__(self) -> int:
        return id(self.matrix)

    @property
    def n_in(self) -> int:
        """Units read."""
        return self.matrix.shape[1]

    @property
    def n_out(self) -> int:
        """Units made."""
        return self.matrix.shape[0]

    @property
    def is_identity(self) -> bool:
        """Whether nothing changes: a matrix is not inspected."""
        return False

    def members(self, unit: int) -> Row:
        """The (in unit, coefficient) pairs of one out unit."""
        row = self.matrix.read((unit, unit + 1), (0, self.n_in))
        values: list[float] = row[0].tolist()
        return tuple((j, value) for j, value in enumerate(values) if value != 0.0)

    def describe(self) -> str:
        """The map in words."""
        return f"dense {self.n_out}x{self.n_in}"


AxisMap = BlockMap | DenseMap


@dataclass(frozen=True, slots=True)
class MapPair:
    """Maps of one axis: `out` for rows of its producers, `into` for columns of its readers."""

    out: AxisMap
    into: AxisMap


def identity(n: int, *, block: int = 1) -> BlockMap:
    """N blocks that stay where they are."""
    return BlockMap(tuple(((i, 1.0),) for i in range(n)), n, block)


def merging(
    groups: Sequence[Sequence[int]],
    n_large: int,
    *,
    block: int = 1,
    weights: Sequence[Sequence[float]] | None = None,
) -> BlockMap:
    """F of a scheme: row i is the (weighted) mean of the blocks in groups[i].

    A member of weight 0 gives nothing to the mean, but belongs to the group on the way back.
    """
    if weights is None:
        rows = tuple(tuple((j, 1.0 / len(group)) for j in group) for group in groups)
    else:
        rows = tuple(
            tuple(zip(group, parts, strict=True))
            for group, parts in zip(groups, weights, strict=True)
        )
    return BlockMap(rows, n_large, block)


def first_of(m: BlockMap) -> BlockMap:
    """The map that takes the first of each group instead of their mean."""
    rows = tuple(tuple((j, 0.0 if at else 1.0) for at, (j, _) in enumerate(row)) for row in m.rows)
    return BlockMap(rows, m.n_in_blocks, m.block)


def transposed(m: AxisMap) -> AxisMap:
    """The transpose."""
    if isinstance(m, DenseMap):
        return DenseMap(m.matrix.transposed())
    rows: list[list[tuple[int, float]]] = [[] for _ in range(m.n_in_blocks)]
    for i, row in enumerate(m.rows):
        for j, value in row:
            rows[j].append((i, value))
    return BlockMap(tuple(tuple(row) for row in rows), len(m.rows), m.block)


def row_normalized(m: AxisMap) -> AxisMap:
    """Each row divided by its sum; members of a row that sums to 0 count alike."""
    if isinstance(m, DenseMap):
        sums = m.matrix.row_sums()
        return DenseMap(Changed(m.matrix, "over", sums.masked_fill(sums == 0, 1.0)))
    rows = []
    for row in m.rows:
        total = sum(value for _, value in row)
        alike = 1.0 / len(row) if row else 0.0
        rows.append(tuple((j, value / total if total else alike) for j, value in row))
    return BlockMap(tuple(rows), m.n_in_blocks, m.block)


def growing(m: AxisMap) -> AxisMap:
    """T = rownorm(F^T) of a merging map F: each large unit copies its group."""
    return row_normalized(transposed(m))


def pair_of(m: AxisMap) -> MapPair:
    """`m` for producers and in(m) for readers.

    in(M) = rownorm(M^T) stands at the right of a weight; seen as a map of the read dimension it is
    the transpose of that.
    """
    return MapPair(without_zeros(m), transposed(row_normalized(transposed(m))))


def pair_of_growth(m: AxisMap) -> MapPair:
    """The maps of a growth by a merging map: copies, which readers share by the weights of a group.

    Any shares that add up to 1 keep what a reader computes; unequal ones tell the copies apart, so
    that training does too. Where a unit is in several groups, all count alike.
    """
    grown = growing(m)
    plain = pair_of(grown)
    if isinstance(m, DenseMap) or not is_uneven(m) or any(use > 1 for use in m.uses):
        return plain
    shares = tuple(
        tuple((j, value / total) for j, value in row) if (total := sum(v for _, v in row)) else row
        for row in m.rows
    )
    return MapPair(plain.out, without_zeros(transposed(BlockMap(shares, m.n_in_blocks, m.block))))


def is_uneven(m: BlockMap) -> bool:
    """Whether members of a group have different weights."""
    return any(value != row[0][1] for row in m.rows for _, value in row)


@overload
def without_zeros(m: BlockMap) -> BlockMap: ...
@overload
def without_zeros(m: AxisMap) -> AxisMap: ...
def without_zeros(m: AxisMap) -> AxisMap:
    """The same map without members of weight 0, which only the way back needs."""
    if isinstance(m, DenseMap) or all(value for row in m.rows for _, value in row):
        return m
    rows = tuple(tuple((j, value) for j, value in row if value) for row in m.rows)
    return BlockMap(rows, m.n_in_blocks, m.block)


def without_signs(m: AxisMap) -> AxisMap:
    """The same map with the size of each coefficient."""
    if isinstance(m, DenseMap):
        return DenseMap(Changed(m.matrix, "abs"))
    rows = tuple(tuple((j, abs(value)) for j, value in row) for row in m.rows)
    return BlockMap(rows, m.n_in_blocks, m.block)


def squared(m: AxisMap) -> AxisMap:
    """The same map with each coefficient squared."""
    if isinstance(m, DenseMap):
        return DenseMap(Changed(m.matrix, "square"))
    rows = tuple(tuple((j, value * value) for j, value in row) for row in m.rows)
    return BlockMap(rows, m.n_in_blocks, m.block)


def scaled(m: AxisMap, factor: float) -> AxisMap:
    """`factor` times m."""
    if isinstance(m, DenseMap):
        import torch

        number = torch.tensor([[factor]], dtype=to_torch(m.matrix.dtype))
        return DenseMap(Changed(m.matrix, "times", number))
    rows = tuple(tuple((j, value * factor) for j, value in row) for row in m.rows)
    return BlockMap(rows, m.n_in_blocks, m.block)


def reblocked(m: BlockMap, block: int) -> BlockMap:
    """The same map over blocks of `block` units, a divisor of m's."""
    if block == m.block:
        return m
    times = m.block // block
    rows = tuple(
        tuple((j * times + r, value) for j, value in row) for row in m.rows for r in range(times)
    )
    return BlockMap(rows, m.n_in_blocks * times, block)


def compose(after: AxisMap, before: AxisMap) -> AxisMap:
    """The map that does `before` and then `after`."""
    if isinstance(after, DenseMap) or isinstance(before, DenseMap):
        dtype = _wider([after, before])
        return DenseMap(stored.product(matrix_of(after, dtype), matrix_of(before, dtype)))
    composed = _composed.get((after, before))
    if composed is None:
        composed = _composed[after, before] = _compose_blocks(after, before)
    return composed


_composed: WeakValueDictionary[tuple["BlockMap", "BlockMap"], "BlockMap"] = WeakValueDictionary()
"""Of a plan's tensors most compose the same maps: one object for all, as long as a plan has it."""


def _compose_blocks(after: BlockMap, before: BlockMap) -> BlockMap:
    block = gcd(after.block, before.block)
    a, b = reblocked(after, block), reblocked(before, block)
    rows = []
    for row in a.rows:
        total: dict[int, float] = {}
        for k, outer in row:
            for j, inner in b.rows[k]:
                total[j] = total.get(j, 0.0) + outer * inner
        rows.append(tuple((j, value) for j, value in sorted(total.items()) if value != 0.0))
    return BlockMap(tuple(rows), b.n_in_blocks, block)


def kron(left: AxisMap, right: AxisMap) -> AxisMap:
    """The map of an ordered product of axes, `left` the slower."""
    if isinstance(left, DenseMap) or isinstance(right, DenseMap):
        return DenseMap(_kron_dense(left, right))
    if right.is_identity:
        return BlockMap(left.rows, left.n_in_blocks, left.block * right.n_in)
    outer = reblocked(left, 1)
    rows = tuple(
        tuple((j * right.n_in_blocks + k, a * b) for j, a in row for k, b in inner)
        for row in outer.rows
        for inner in right.rows
    )
    return BlockMap(rows, outer.n_in_blocks * right.n_in_blocks, right.block)


def concatenated(parts: Sequence[AxisMap]) -> AxisMap:
    """The map of a sum of axes: each part acts on its own stretch (block diagonal)."""
    if len(parts) == 1:
        return parts[0]
    if any(isinstance(part, DenseMap) for part in parts):
        return DenseMap(_block_diagonal(parts))
    blocks = [part for part in parts if isinstance(part, BlockMap)]
    block = gcd(*(part.block for part in blocks))
    rows: list[Row] = []
    offset = 0
    for part in blocks:
        fine = reblocked(part, block)
        rows += (tuple((j + offset, value) for j, value in row) for row in fine.rows)
        offset += fine.n_in_blocks
    return BlockMap(tuple(rows), offset, block)


def from_matrix(matrix: Matrix) -> AxisMap:
    """A matrix as a BlockMap where it is sparse, else as a DenseMap; values are kept."""
    n_out, n_in = matrix.shape
    rows: list[list[tuple[int, float]]] = [[] for _ in range(n_out)]
    n_left = 4 * max(n_out, n_in)
    for (first, _), (left, _), block in matrix.parts():
        n_left -= int(block.count_nonzero())
        if n_left < 0:
            return DenseMap(matrix)
        places = block.nonzero()
        values: list[float] = block[places[:, 0], places[:, 1]].tolist()
        for (i, j), value in zip(places.tolist(), values, strict=True):
            rows[first + i].append((left + j, value))
    return _coarsest(BlockMap(tuple(map(tuple, rows)), n_in))


def matrix_of(m: AxisMap, dtype: str) -> Matrix:
    """M as a matrix; a sparse one in `dtype`."""
    if isinstance(m, DenseMap):
        return m.matrix
    found = Sparse(m, dtype)
    small = m.n_out * m.n_in <= _SMALL
    return Held(found.read((0, m.n_out), (0, m.n_in))) if small else found


def to_matrix(m: AxisMap, *, like: "Tensor") -> "Tensor":
    """M as a tensor with the dtype of `like`. Shapes: n_out x n_in."""
    matrix = matrix_of(m, "F64" if like.element_size() == 8 else "F32")
    return matrix.read((0, m.n_out), (0, m.n_in)).to(like.dtype)


def _wider(parts: Sequence[AxisMap]) -> str:
    """The dtype of maps of which one is dense."""
    double = any(m.matrix.dtype == "F64" for m in parts if isinstance(m, DenseMap))
    return "F64" if double else "F32"


def _kron_dense(left: AxisMap, right: AxisMap) -> Matrix:
    inner = matrix_of(right, _wider([left, right]))
    height, width = inner.shape
    places = []
    for i in range(left.n_out):
        factors: dict[int, float] = {}
        for j, value in left.members(i):
            factors[j] = factors.get(j, 0.0) + value
        places += [Place(i * height, j * width, value, inner) for j, value in factors.items()]
    return Placed((left.n_out * height, left.n_in * width), tuple(places), inner.dtype)


def _block_diagonal(parts: Sequence[AxisMap]) -> Matrix:
    dtype = _wider(parts)
    places = []
    row = column = 0
    for part in parts:
        places.append(Place(row, column, 1.0, matrix_of(part, dtype)))
        row, column = row + part.n_out, column + part.n_in
    return Placed((row, column), tuple(places), dtype)


def _coarsest(fine: BlockMap) -> BlockMap:
    """The same map with the largest block that expresses it."""
    common = gcd(len(fine.rows), fine.n_in_blocks)
    for block in sorted((d for d in range(2, common + 1) if common % d == 0), reverse=True):
        if all(_fits(fine, i, block) for i in range(len(fine.rows))):
            rows = tuple(
                tuple((j // block, value) for j, value in fine.rows[i])
                for i in range(0, len(fine.rows), block)
            )
            return BlockMap(rows, fine.n_in_blocks // block, block)
    return fine


def _fits(fine: BlockMap, i: int, block: int) -> bool:
    rest = i % block
    first = fine.rows[i - rest]
    return all(j % block == 0 for j, _ in first) and fine.rows[i] == tuple(
        (j + rest, value) for j, value in first
    )


def _describe(m: BlockMap) -> str:
    sizes = {len(row) for row in m.rows}
    values = {value for row in m.rows for _, value in row}
    filled = sorted(sizes - {0})
    if not filled:
        return "zeros"
    span = str(filled[0]) if len(filled) == 1 else f"{filled[0]}-{filled[-1]}"
    copies = sorted({use for use in m.uses if use})
    times = str(copies[0]) if len(copies) == 1 else f"{copies[0]}-{copies[-1]}"
    if filled == [1]:
        words = _describe_copies(m, values, times)
    elif all(_close(value, 1 / len(row)) for row in m.rows for _, value in row):
        words = f"mean of {span}"
    elif values == {1.0}:
        words = f"sum of {span}"
    else:
        words = f"weighted sum of {span}"
    if 0 in sizes:
        words += ", zeros where nothing maps"
    return words


def _describe_copies(m: BlockMap, values: set[float], times: str) -> str:
    if values == {1.0}:
        if times != "1":
            return f"copy x{times}"
        return "permutation" if all(m.uses) else "selection"
    if all(_close(value * m.uses[j], 1.0) for row in m.rows for j, value in row):
        return f"copy / {times}"
    return "scaled copy"


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * abs(b)
