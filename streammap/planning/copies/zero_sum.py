"""Noise that a reader of copies doesn't see: over the copies of a unit it adds up to 0.

Copies come in pairs of +N and -N, so that a pair adds nothing to what its reader computes; of an
odd number, the last three get vectors at angles of 120 degrees, of equal length as all others:

    a,    -a / 2 + sqrt(3)/2 b,    -a / 2 - sqrt(3)/2 b        with b as long as a, square to it

N, a and b are fields of noise: a few for each unit that has copies. A map places them.

Source: Samragh et al., HyperCloning, 2024, arXiv:2409.12903, for pairs of column blocks.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from streammap.planning import maps
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.segments import Row

_HALF, _ROOT = -0.5, math.sqrt(3.0) / 2.0


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """Fields that are drawn in the same way."""

    n_copies: int
    number: int
    """Which of the fields of a unit."""
    follows: bool
    """Whether it is made square to the field before it: the b of three."""
    share: float
    """The mean size of the coefficients by which the copies are read."""


def n_fields(n_copies: int) -> int:
    """How many fields of noise a unit with so many copies has."""
    return 0 if n_copies < 2 else n_copies // 2 + n_copies % 2


def follows(n_copies: int, number: int) -> bool:
    """Whether a field is the b of three copies."""
    return n_copies > 1 and n_copies % 2 == 1 and number == n_fields(n_copies) - 1


@functools.cache
def rows(n_copies: int) -> tuple[Row, ...]:
    """For each copy of a unit, its fields with their coefficients."""
    if n_copies < 2:
        return ((),) * n_copies
    n_pairs = n_copies // 2 - n_copies % 2
    made: list[Row] = [((f, sign),) for f in range(n_pairs) for sign in (1.0, -1.0)]
    if n_copies % 2:
        a, b = n_pairs, n_pairs + 1
        made += [((a, 1.0),), ((a, _HALF), (b, _ROOT)), ((a, _HALF), (b, -_ROOT))]
    return tuple(made)


def copies(m: BlockMap) -> list[list[int]]:
    """For each block that a map reads, the blocks that hold it."""
    found: list[list[int]] = [[] for _ in range(m.n_in_blocks)]
    for i, row in enumerate(m.rows):
        for j, value in row:
            if value:
                found[j].append(i)
    return found


def slots(m: BlockMap) -> list[int]:
    """Of each block that a map makes: how many before it hold the same one; -1 where it is zero."""
    seen: dict[int, int] = {}
    found = []
    for row in m.rows:
        if not row:
            found.append(-1)
            continue
        j = row[0][0] if len(row) == 1 else -1
        found.append(seen.get(j, 0) if j >= 0 else 0)
        seen[j] = seen.get(j, 0) + 1
    return found


@functools.lru_cache(maxsize=1)
def kinds(m: BlockMap) -> tuple[tuple[Kind, ...], tuple[int, ...]]:
    """The kinds of fields for the copies that a map makes, and the kind of each field in order."""
    groups = copies(m)
    sizes: dict[int, list[float]] = {}
    for group in groups:
        sizes.setdefault(len(group), []).extend(abs(m.rows[i][0][1]) for i in group)
    table = [
        Kind(n, f, follows(n, f), math.fsum(sizes[n]) / len(sizes[n]))
        for n in sorted(sizes)
        for f in range(n_fields(n))
    ]
    number = {(kind.n_copies, kind.number): i for i, kind in enumerate(table)}
    return tuple(table), tuple(number[len(g), f] for g in groups for f in range(n_fields(len(g))))


def placed(m: BlockMap, stands: AxisMap | None) -> BlockMap | None:
    """The map from fields to the units that a dimension reads; None where none are copies.

    Args:
        m: The map that the dimension has: each unit of the result is one of the source's, times its
            share.
        stands: How the units stand in what is read, where that is known: copies of one unit,
            maybe each times a number of its own; then what adds up to 0 is noise times it.
    """
    if m.longest > 1:
        return None
    weights: Sequence[float] | None = None
    if isinstance(stands, BlockMap) and stands is not m:
        weights = _weights(m, stands)
        if weights is None:
            return None
    made: list[Row] = [()] * len(m.rows)
    first = 0
    for group in copies(m):
        for i, row in zip(group, rows(len(group)), strict=True):
            # Divided by a power of two or not at all, noise stays exactly opposite.
            weight = 1.0 if weights is None else weights[i] / weights[group[0]]
            made[i] = tuple((first + f, value / weight) for f, value in row)
        first += n_fields(len(group))
    return BlockMap(tuple(made), first, m.block) if first else None


def _weights(m: BlockMap, stands: BlockMap) -> Sequence[float] | None:
    """Of each block of `m`, the number that it is multiplied by in what is read.

    None where it is not the same for all of a block, or another unit stands there.
    """
    if stands.block != m.block:
        # Blocks of the coarser map are taken apart; all parts of one must have the same number.
        if stands.block % m.block == 0:
            return _weights(m, maps.reblocked(stands, m.block))
        if m.block % stands.block:
            return None
        times = m.block // stands.block
        fine = [_weights(maps.reblocked(m, stands.block), stands)]
        if fine[0] is None or len(fine[0]) != times * len(m.rows):
            return None
        parts = [set(fine[0][i * times : (i + 1) * times]) for i in range(len(m.rows))]
        return [part.pop() for part in parts] if all(len(p) == 1 for p in parts) else None
    if len(stands.rows) != len(m.rows) or stands.n_in_blocks != m.n_in_blocks:
        return None
    found = []
    for row, there in zip(m.rows, stands.rows, strict=True):
        if row and (len(there) != 1 or there[0][0] != row[0][0] or not there[0][1]):
            return None
        found.append(there[0][1] if row else 1.0)
    return found
