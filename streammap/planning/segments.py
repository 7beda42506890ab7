"""A block map as few regular runs of block moves, each of which is one kernel over views."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

Row = tuple[tuple[int, float], ...]
"""One row of a sparse matrix: (column, coefficient) pairs."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A regular run of block moves: for k < count,
    out[out_start + k*out_step :][:length] gets coefficient * in[in_start + k*in_step :][:length].
    """

    out_start: int
    out_step: int
    in_start: int
    in_step: int
    count: int
    length: int
    coefficient: float
    """0.0 stands for "fill with zeros": nothing is read."""
    adds: bool
    """Whether the places were written before, so that this one adds to them."""

    def clipped(self, start: int, end: int) -> Iterator["Segment"]:
        """The part that writes to [start, end), places counted from `start`."""
        if self.count == 1 or self.out_step == 0:
            low, high = max(start, self.out_start), min(end, self.out_start + self.length)
            if low < high:
                yield self._piece(0, low - self.out_start, high - low, 1, start)
            return
        # Blocks [first, last) lie wholly inside; one at either side may be cut.
        step, length = self.out_step, self.length
        first = max(0, -(-(start - self.out_start) // step))
        last = min(self.count, (end - self.out_start - length) // step + 1)
        if 0 < first <= self.count:
            yield from self._cut(first - 1, start, end)
        if last > first:
            yield self._piece(first, 0, length, last - first, start)
        for k in range(max(first, last), min(self.count, max(first, last) + 1)):
            yield from self._cut(k, start, end)

    def _cut(self, k: int, start: int, end: int) -> Iterator["Segment"]:
        at = self.out_start + k * self.out_step
        low, high = max(start, at), min(end, at + self.length)
        if low < high:
            yield self._piece(k, low - at, high - low, 1, start)

    def _piece(self, k: int, skip: int, length: int, count: int, origin: int) -> "Segment":
        return Segment(
            self.out_start + k * self.out_step + skip - origin,
            self.out_step,
            self.in_start + k * self.in_step + skip,
            self.in_step,
            count,
            length,
            self.coefficient,
            self.adds,
        )


@final
class Segments(tuple[Segment, ...]):
    """Segments in the order in which they are applied; hashed once, as keys of caches are."""

    def __hash__(self) -> int:
        known: int | None = self.__dict__.get("hash")
        if known is None:
            known = self.__dict__["hash"] = super().__hash__()
        return known


MANY = 64
"""Segments of a map that is not regular: they are not kept."""


def shared(found: Segments) -> Segments:
    """The same object for equal segments that were asked for recently, if they are few."""
    return found if len(found) > MANY else _shared(found)


@lru_cache(maxsize=1024)
def _shared(found: Segments) -> Segments:
    return found


def segments(rows: Sequence[Row], block: int) -> Segments:
    """The segments of a map with these rows over blocks of `block` units."""
    return Segments(_segments(rows, block))


def _segments(rows: Sequence[Row], block: int) -> Iterable[Segment]:
    """The runs of a map, in the order of adding.

    Slot s of the map is the s-th member of every row; each slot is cut into regular runs.
    """
    for slot in range(max((len(row) for row in rows), default=0) or 1):
        moves = []
        for i, row in enumerate(rows):
            if slot < len(row):
                moves.append((i, row[slot][0], row[slot][1]))
            elif slot == 0:
                moves.append((i, 0, 0.0))
        along = list(_runs(moves))
        by_use = list(_runs(_by_use(moves)))
        for i, out_step, j, in_step, count, value in min(along, by_use, key=len):
            whole = out_step == 1 and in_step == 1
            yield Segment(
                out_start=i * block,
                out_step=out_step * block,
                in_start=j * block,
                in_step=in_step * block,
                count=1 if whole else count,
                length=block * count if whole else block,
                coefficient=value,
                adds=slot > 0,
            )


def _by_use(moves: Sequence[tuple[int, int, float]]) -> list[tuple[int, int, float]]:
    """The moves sorted by which copy of its source each one is: interleaved copies become runs."""
    seen: dict[int, int] = {}
    ranked = []
    for move in moves:
        use = seen.get(move[1], 0)
        seen[move[1]] = use + 1
        ranked.append((use, move))
    return [move for _, move in sorted(ranked, key=lambda item: (item[0], item[1][0]))]


def _runs(
    moves: Sequence[tuple[int, int, float]],
) -> Iterator[tuple[int, int, int, int, int, float]]:
    """Cut moves (out, in, coefficient) into runs of constant steps and coefficient."""
    at = 0
    while at < len(moves):
        out, source, value = moves[at]
        count, out_step, in_step = 1, 0, 0
        while at + count < len(moves):
            next_out, next_source, next_value = moves[at + count]
            steps = (next_out - moves[at + count - 1][0], next_source - moves[at + count - 1][1])
            if next_value != value or steps[0] <= 0 or steps[1] < 0:
                break
            if count > 1 and steps != (out_step, in_step):
                break
            out_step, in_step = steps
            count += 1
        yield out, out_step, source, in_step, count, value
        at += count


def alike(a: Segment, b: Segment) -> bool:
    """Whether two segments write to the same places, with coefficient 1."""
    return a.coefficient == b.coefficient == 1.0 and (
        (a.out_start, a.out_step, a.count, a.length) == (b.out_start, b.out_step, b.count, b.length)
    )


def units(segment: Segment) -> Iterator[tuple[int, int, float]]:
    """(unit of the result, unit of the source, coefficient) of every move."""
    for k, i in itertools.product(range(segment.count), range(segment.length)):
        to = segment.out_start + k * segment.out_step + i
        yield to, segment.in_start + k * segment.in_step + i, segment.coefficient


def slots(moves: Sequence[Segment]) -> list[list[Segment]]:
    """Segments by the slot of the rows that they are of; a slot writes to no unit twice."""
    found: list[list[Segment]] = [[]]
    taken: set[int] = set()
    for segment in moves:
        places = {to for to, _, _ in units(segment)}
        if found[-1] and (segment.adds != found[-1][0].adds or taken & places):
            found.append([])
            taken = set()
        found[-1].append(segment)
        taken |= places
    return found
