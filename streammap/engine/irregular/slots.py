"""An irregular map as tables of units: which are taken, and where they go.

The s-th members of all rows are one slot: one kernel takes them by number, and writes or adds them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from streammap.common.weighed_cache import WeighedCache
from streammap.planning.maps import N_IRREGULAR
from streammap.planning.segments import Segment, Segments


@final
@dataclass(frozen=True)
class Slot:
    """One member of rows: where it is in the source, and where it goes."""

    indices: tuple[int, ...]
    """Units of the source."""
    numbers: tuple[float, ...]
    """Their coefficients."""
    into: tuple[int, ...]
    """Units of the result that they are added to; empty where it is all of them, in order."""
    empty: tuple[int, ...]
    """Units of the result that are 0."""
    adds: bool

    @cached_property
    def is_scaled(self) -> bool:
        """Whether a coefficient is not 1."""
        return any(number != 1.0 for number in self.numbers)


_known = WeighedCache[tuple[Slot, ...]](most=N_IRREGULAR, heaviest=2**62, weight=len)
"""Of the maps that a run is at work on: all chunks of all tiles of a tensor have the same."""


def slots_of(found: Segments, n_out: int, *, shared: bool) -> tuple[Slot, ...]:
    """The slots of a map's segments, in the order of adding.

    Args:
        n_out: Units that the map makes.
        shared: Whether the same will be asked for again.
    """
    if not shared:
        return _made(found, n_out)
    return _known.of((found, n_out), lambda: _made(found, n_out))


def _made(found: Segments, n_out: int) -> tuple[Slot, ...]:
    return tuple(_slot(parts, n_out) for parts in _split(found))


def _split(found: Segments) -> list[list[Segment]]:
    """Segments by the slot of the rows that they are of; a slot writes to no unit twice."""
    parts: list[list[Segment]] = [[]]
    taken: set[int] = set()
    for segment in found:
        units = _places(segment.out_start, segment.out_step, segment)
        if parts[-1] and (segment.adds != parts[-1][0].adds or not taken.isdisjoint(units)):
            parts.append([])
            taken = set()
        parts[-1].append(segment)
        taken.update(units)
    return parts


def _slot(parts: Sequence[Segment], n_out: int) -> Slot:
    adds = parts[0].adds
    # What nothing is said of, or 0, takes any unit by 1: it is cleared.
    table: dict[int, tuple[int, float]] = {} if adds else dict.fromkeys(range(n_out), (0, 1.0))
    empty: list[int] = []
    for segment in parts:
        to, coefficient = _places(segment.out_start, segment.out_step, segment), segment.coefficient
        if coefficient == 0.0:
            empty += to
            continue
        taken = _places(segment.in_start, segment.in_step, segment)
        table.update((i, (at, coefficient)) for i, at in zip(to, taken, strict=True))
    into = tuple(sorted(table))
    return Slot(
        tuple(table[i][0] for i in into),
        tuple(table[i][1] for i in into),
        into if adds and len(into) < n_out else (),
        tuple(empty),
        adds,
    )


def _places(start: int, step: int, segment: Segment) -> Sequence[int]:
    """The units of a segment at one side."""
    if segment.count == 1:
        return range(start, start + segment.length)
    if segment.length == 1 and step:
        return range(start, start + segment.count * step, step)
    return [start + k * step + i for k in range(segment.count) for i in range(segment.length)]
