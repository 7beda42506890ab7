"""Which units of a dimension a range of a map's result is made of, and how.

A tile needs only some of its source: the ranges named here are read, put side by side, and the
segments move them to their places. Units are counted from the first range's start onwards.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from streammap.common.ranges import Range
from streammap.common.weighed_cache import WeighedCache
from streammap.engine.memory import MAX_SEGMENTS
from streammap.planning import segments
from streammap.planning.maps import BlockMap
from streammap.planning.segments import Segment, Segments

_MAX_GAP_NBYTES = 32 * 2**10
"""Blocks this close are read in one go, with what lies between them."""


@dataclass(frozen=True)
class Pullback:
    """What a range of a map's result is made of."""

    ranges: tuple[Range, ...]
    """Units of the source that are read, in their order."""
    segments: Segments | None
    """From the units of `ranges`, side by side, to the range; None where they stay as they are."""

    @cached_property
    def n_in(self) -> int:
        """Units read."""
        return sum(end - start for start, end in self.ranges)


def _weight(pulled: Pullback) -> int:
    return len(pulled.ranges) + len(pulled.segments or ())


_pulled = WeighedCache[Pullback](most=1024, heaviest=MAX_SEGMENTS, weight=_weight)


def pull(m: BlockMap | None, start: int, end: int, unit_nbytes: int) -> Pullback:
    """What the units [start, end) of a result are made of; a unit has `unit_nbytes` bytes."""
    if m is None:
        return Pullback(((start, end),), None)
    key = m, start, end, unit_nbytes
    return _pulled.of(key, lambda: _compact(tuple(_moves(m, start, end, unit_nbytes))))


def within(pulled: Pullback, start: int, end: int) -> Pullback:
    """A part of a range, made of the units that were pulled for all of it."""
    if pulled.segments is None:
        return Pullback(((start, end),), None)
    return _compact(clipped(pulled.segments, start, end))


def clipped(found: Segments, start: int, end: int) -> Segments:
    """The segments' parts that write to [start, end), places counted from `start`."""
    return Segments(piece for segment in found for piece in segment.clipped(start, end))


def _compact(found: Sequence[Segment]) -> Pullback:
    ranges = _merged(_reads(found))
    if not ranges:
        ranges = ((0, 1),)  # nothing but zeros: a tile still has a source, of one unit
    begins = [first for first, _ in ranges]
    places = [0, *accumulate(last - first for first, last in ranges)]
    moved = []
    for segment in found:
        at = 0
        if segment.coefficient != 0.0:
            i = bisect_right(begins, segment.in_start) - 1
            at = places[i] + segment.in_start - begins[i]
        moved.append(
            Segment(
                segment.out_start,
                segment.out_step,
                at,
                segment.in_step,
                segment.count,
                segment.length,
                segment.coefficient,
                segment.adds,
            )
        )
    return Pullback(ranges, segments.shared(Segments(moved)))


def whole(m: BlockMap | None, n: int) -> Pullback:
    """All of a dimension of n source units: nothing is left out, so that it is read in one go."""
    return _pulled.of((m, n), lambda: Pullback(((0, n),), None if m is None else m.segments))


def _moves(m: BlockMap, start: int, end: int, unit_nbytes: int) -> Iterable[Segment]:
    if m.is_regular:
        for segment in m.segments:
            for piece in segment.clipped(start, end):
                yield from _cut(piece, unit_nbytes)
        return
    first, last = start // m.block, -(-end // m.block)
    skipped = start - first * m.block
    for segment in segments.segments(m.rows[first:last], m.block):
        for piece in segment.clipped(skipped, end - first * m.block):
            yield from _cut(piece, unit_nbytes)


def _cut(piece: Segment, unit_nbytes: int) -> Iterable[Segment]:
    """The piece, or its blocks one by one where they lie far apart in the source."""
    near = (piece.in_step - piece.length) * unit_nbytes <= _MAX_GAP_NBYTES
    if near or piece.count == 1 or piece.coefficient == 0.0:
        yield piece
        return
    for k in range(piece.count):
        yield Segment(
            piece.out_start + k * piece.out_step,
            0,
            piece.in_start + k * piece.in_step,
            0,
            1,
            piece.length,
            piece.coefficient,
            piece.adds,
        )


def _reads(found: Sequence[Segment]) -> Iterable[Range]:
    for segment in found:
        if segment.coefficient != 0.0:
            reach = (segment.count - 1) * segment.in_step + segment.length
            yield segment.in_start, segment.in_start + reach


def _merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return tuple(merged)
