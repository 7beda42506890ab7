"""Tiles: contiguous parts of a result, small enough to compute in bounded memory. No torch here.

A tile is the part of a tensor that has given indices in its leading dimensions, a range in one
dimension, and all of the rest: its bytes are contiguous, and no tensor is too large to be cut.
"""

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from streammap.common.ranges import Tile, tile_at
from streammap.planning.maps import AxisMap, BlockMap

_MAX_CUTS = 4096


@dataclass(frozen=True, slots=True)
class Cut:
    """How a tensor is cut: one index at a time before `dim`, and `rows` at a time in it."""

    dim: int
    rows: int


def bundles(
    shape: tuple[int, ...], terms: Sequence[Sequence[AxisMap | None]], cut: Cut
) -> Iterator[tuple[Tile, ...]]:
    """All tiles of a tensor; those that read the same units of a source come together.

    Args:
        terms: The maps of each term, one a dimension.
    """
    if not shape:
        yield (tile_at(shape, (), 0, 1),)
        return
    if 0 in shape:
        return
    dims = [
        _orbits(_blocks(maps[d] for maps in terms), n, cut.rows if d == cut.dim else 1)
        for d, n in enumerate(shape[: cut.dim + 1])
    ]
    for chosen in itertools.product(*dims[:-1]):
        prefixes = list(itertools.product(*(orbit.starts for orbit in chosen)))
        for orbit in dims[-1]:
            for at in range(0, orbit.length, cut.rows):
                n = min(cut.rows, orbit.length - at)
                yield tuple(
                    tile_at(shape, prefix, start + at, start + at + n)
                    for prefix in prefixes
                    for start in orbit.starts
                )


@dataclass(frozen=True, slots=True)
class _Orbit:
    """Ranges of a dimension, of one length, that are made of the same units of a source."""

    length: int
    starts: tuple[int, ...]


def _blocks(dims: Iterable[AxisMap | None]) -> tuple[BlockMap, ...]:
    """The maps that cut a dimension; matrices do not, and no cache is to hold one."""
    return tuple(m for m in dims if isinstance(m, BlockMap))


@lru_cache(maxsize=256)
def _orbits(blocks: tuple[BlockMap, ...], n: int, rows: int) -> tuple[_Orbit, ...]:
    """A dimension of n units of the result, cut where runs of any of its maps begin or end."""
    places = {0, n} if rows > 1 else set(range(n + 1))
    if rows > 1:
        cuts = {cut for m in blocks if m.is_regular for cut in _cuts(m, rows)}
        places |= cuts if len(cuts) <= _MAX_CUTS else set()
    least = min(blocks, key=lambda m: m.n_in, default=None)
    groups: dict[tuple[int, int], list[int]] = {}
    for start, end in itertools.pairwise(sorted(places)):
        # Ranges that begin with the same unit of the smallest source belong together.
        first = -1 - start
        if least is not None and least.n_in < n and least.members(start):
            first = least.members(start)[0][0]
        groups.setdefault((first, end - start), []).append(start)
    return tuple(_Orbit(length, tuple(starts)) for (_, length), starts in groups.items())


def _cuts(m: BlockMap, rows: int) -> Iterator[int]:
    """Units of the result where a run begins or ends, or where its source is where another's is.

    Blocks that alternate within `rows` units are no runs of their own: tiles hold them together.
    """
    runs = [
        (s.out_start + k * s.out_step, s.in_start + k * s.in_step, s.length)
        for s in m.segments
        if s.coefficient != 0.0 and (s.count == 1 or s.out_step > rows)
        for k in range(s.count)
    ]
    ends = sorted({end for _, at, length in runs for end in (at, at + length)})
    for start, at, length in runs:
        for end in ends[bisect_left(ends, at) : bisect_right(ends, at + length)]:
            yield start + end - at
