"""Ranges, regions and contiguous parts of tensors: arithmetic of indices, nothing else.

A range is half-open. A region is one range for each dimension. A tile has given indices in the
leading dimensions, a range in the next one, and all of the rest: it is contiguous in memory.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

Range = tuple[int, int]
"""start, end"""
Region = tuple[Range, ...]
"""start, end of each dimension"""

PIECE_NBYTES = 256 * 1024
"""One write at most, from one multiple of it in a file to the next: larger ones are slower on some
kernels, and so are those that share a page."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A contiguous part of a tensor."""

    prefix: tuple[int, ...]
    """Indices of the leading dimensions."""
    start: int
    end: int
    """Range in the dimension after the prefix (0 to 1 for a scalar)."""
    offset: int
    """Elements before the tile."""
    shape: tuple[int, ...]
    """[end - start, rest...]; () for a scalar."""

    @property
    def n_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    def halves(self) -> tuple["Tile", "Tile"] | None:
        """The same part as two tiles, a single row cut across; None for one number."""
        n = self.end - self.start
        if n < 2 and len(self.shape) < 2:
            return None
        if n < 2:
            prefix = (*self.prefix, self.start)
            return Tile(prefix, 0, self.shape[1], self.offset, self.shape[1:]).halves()
        middle = self.start + n // 2
        row = self.n_elements // n
        rest = self.shape[1:]
        return (
            Tile(self.prefix, self.start, middle, self.offset, (n // 2, *rest)),
            Tile(self.prefix, middle, self.end, self.offset + n // 2 * row, (n - n // 2, *rest)),
        )

    def region(self, shape: tuple[int, ...]) -> Region:
        """The tile as a region of a tensor of this shape."""
        if not shape:
            return ()
        leading = ((i, i + 1) for i in self.prefix)
        rest = ((0, n) for n in shape[len(self.prefix) + 1 :])
        return (*leading, (self.start, self.end), *rest)


def tile_at(shape: tuple[int, ...], prefix: tuple[int, ...], start: int, end: int) -> Tile:
    """The tile with these indices."""
    if not shape:
        return Tile((), 0, 1, 0, ())
    offset = 0
    for n, i in zip(shape, (*prefix, start), strict=False):
        offset = offset * n + i
    rest = shape[len(prefix) + 1 :]
    return Tile(prefix, start, end, offset * math.prod(rest), (end - start, *rest))


def clipped(tile: Tile, shape: tuple[int, ...], start: int, end: int) -> Tile | None:
    """The tile's part in the rows [start, end) of the first dimension; None where it has none."""
    if tile.prefix:
        return tile if start <= tile.prefix[0] < end else None
    low, high = max(start, tile.start), min(end, tile.end)
    return tile_at(shape, (), low, high) if low < high else None


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[Tile]:
    """The elements [start, end) of a tensor, in their order, as a few tiles."""
    if start >= end:
        return
    if not shape:
        yield tile_at(shape, (), 0, 1)
        return
    yield from _boxes(shape, (), start, end)


def _boxes(shape: tuple[int, ...], prefix: tuple[int, ...], start: int, end: int) -> Iterator[Tile]:
    row = math.prod(shape[len(prefix) + 1 :])
    (first, skipped), (last, rest) = divmod(start, row), divmod(end, row)
    if skipped:
        yield from _boxes(shape, (*prefix, first), skipped, min(row, end - first * row))
        first += 1
    if first < last:
        yield tile_at(shape, prefix, first, last)
    if rest and first <= last:
        yield from _boxes(shape, (*prefix, last), 0, rest)


def whole(shape: Iterable[int]) -> Region:
    """All of a tensor."""
    return tuple((0, n) for n in shape)


def intersect(a: Sequence[Range], b: Sequence[Range]) -> Region | None:
    """What two regions have in common; None for nothing."""
    both = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(a, b, strict=True)]
    return tuple(both) if all(start < end for start, end in both) else None


def relative(region: Sequence[Range], origin: Sequence[Range]) -> Region:
    """A region, counted from the start of another one."""
    return tuple((a - start, b - start) for (a, b), (start, _) in zip(region, origin, strict=True))


def pieces(offset: int, nbytes: int, step: int = PIECE_NBYTES) -> Iterator[Range]:
    """Cut bytes that begin at `offset` on a grid of `step`: (start, end), counted from 0.

    All but the first begin at multiples of `step` when `offset` is added.
    """
    start = 0
    while start < nbytes:
        end = min(nbytes, start + step - (offset + start) % step)
        yield start, end
        start = end
