"""Sums of groups as average pooling: one kernel from the source, as it is read, to the result.

Where each unit of a dimension is the sum of k units, whose runs stand one behind the other, the
dimension is [count, k, length] in memory. A tensor of which two dimensions are so is

    [before, count_a, k_a, length_a, between, count_b, k_b, length_b, behind]

and with N = before * count_a, H = k_a, W = length_a * between * count_b * k_b, and the rest as
channels that stand last, its sums are those of windows of k_a x k_b: the kernel reads each number
once, adds in float32 (float64) from +0.0 on, a's members one after the other and of each those of
b, and rounds once. Several sources (layers that are merged) are read one behind the other: where
count_a is 1, they are members of a. Runs that stand elsewhere are put side by side first. No torch.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from streammap.engine.program import Op, View
from streammap.engine.tile_reads import DimRead, Part
from streammap.planning.segments import Segment


@dataclass(frozen=True, slots=True)
class _Runs:
    """A part of a dimension that is [count, k, length] in memory."""

    out_start: int
    in_start: int
    count: int
    length: int


@dataclass(frozen=True, slots=True)
class _Axis:
    """A dimension whose units are sums."""

    slots: list[list[Segment]]
    """The first members of all units, then the second..."""
    n_in: int
    n_out: int

    @property
    def k(self) -> int:
        """Members of a unit."""
        return len(self.slots)


def ops(
    part: Part,
    n_sources: int,
    held: View,
    out: View,
    divisor: int,
    new: Callable[[str, tuple[int, ...]], View],
) -> Iterator[Op]:
    """The operations for a tile of a form that has a divisor (group_sums.py).

    Args:
        held: What is read: the sources one after the other.
        new: Makes a contiguous view of scratch.
    """
    mapped = [d for d, dim in enumerate(part) if dim.changes]
    first, last = mapped[0], mapped[-1]
    shape = [dim.n_out for dim in part]
    before, behind = math.prod(shape[:first]), math.prod(shape[last + 1 :])
    between, inner = math.prod(shape[first + 1 : last]), _axis(part[last])
    if first < last:
        outer = _axis(part[first])
    else:  # rows that stay as they are
        stays = Segment(0, 0, 0, 0, 1, before, 1.0, adds=False)
        before, outer = 1, _Axis([[stays]], before, before)
    pooled = list(_pooled(n_sources, outer, inner, before, between, behind))
    if not pooled:
        k, width = n_sources * outer.k, outer.n_out * between * inner.k
        read = held.seen((n_sources, before, outer.n_in, between, inner.n_in, behind))
        held = new(out.dtype, (before, k, outer.n_out, between, inner.k, inner.n_out, behind))
        for number in range(n_sources):
            members = held.narrow(1, number * outer.k, (number + 1) * outer.k)
            yield from _gathered(outer, inner, read.at(0, number), members)
        pooled = [(0, 0, (before, k, width, inner.n_out * behind))]
    for at, to, (n, h, w, c) in pooled:
        yield Op(
            "pool",
            out.seen((n, 1, w // inner.k, c), at=to),
            (held.seen((n, h, w, c), at=at),),
            number=divisor,
        )


def _pooled(
    n_sources: int, outer: _Axis, inner: _Axis, before: int, between: int, behind: int
) -> Iterator[tuple[int, int, tuple[int, int, int, int]]]:
    """(first number read, first one made, N H W C), where all runs stand as they should."""
    within, around = _runs(inner), _runs(outer)
    if len(within) != 1 or not around:
        return
    (columns,) = within
    if columns.in_start or columns.count * inner.k * columns.length != inner.n_in:
        return
    is_whole = len(around) == 1 and around[0].count * outer.k * around[0].length == outer.n_in
    if before > 1 and not is_whole:
        return
    if n_sources > 1 and (before > 1 or not is_whole or around[0].count > 1):
        return
    for runs in around:
        width = runs.length * between * columns.count * inner.k
        yield (
            runs.in_start * between * inner.n_in * behind,
            runs.out_start * between * inner.n_out * behind,
            (before * runs.count, n_sources * outer.k, width, columns.length * behind),
        )


def _gathered(outer: _Axis, inner: _Axis, source: View, to: View) -> Iterator[Op]:
    """Puts all members side by side.

    Shapes: [before, n_in, between, n_in, behind] -> [before, k, n_out, between, k, n_out, behind].
    """
    for (i, rows), (j, columns) in itertools.product(
        enumerate(outer.slots), enumerate(inner.slots)
    ):
        place = to.at(4, j).at(1, i)
        for a, b in itertools.product(rows, columns):
            yield Op(
                "copy",
                place.blocks(3, b, source=False).blocks(1, a, source=False),
                (source.blocks(3, b, source=True).blocks(1, a, source=True),),
            )


def _axis(dim: DimRead) -> _Axis:
    slots: list[list[Segment]] = [[]]
    left = dim.n_out
    for segment in dim.pulled.segments or ():
        if not left:
            slots.append([])
            left = dim.n_out
        slots[-1].append(segment)
        left -= segment.count * segment.length
    return _Axis(slots, dim.pulled.n_in, dim.n_out)


def _runs(axis: _Axis) -> Sequence[_Runs]:
    """The parts of a dimension; none where members do not stand one behind the other."""
    if len({len(slot) for slot in axis.slots}) > 1:
        return ()
    found = []
    for members in zip(*axis.slots, strict=True):
        first = members[0]
        for number, member in enumerate(members):
            alike = (first.out_start, first.count, first.length)
            if (member.out_start, member.count, member.length) != alike:
                return ()
            if member.in_start != first.in_start + number * first.length:
                return ()
            steps = (first.length, axis.k * first.length)
            if first.count > 1 and (member.out_step, member.in_step) != steps:
                return ()
        found.append(_Runs(first.out_start, first.in_start, first.count, first.length))
    return found
