"""The shares that the readers of copies have in each.

    0.7              each copy takes this share of what those before it leave: 0.7, 0.21, 0.09
    (0.5, 0.3, 0.2)  of each copy, for groups of three
    None             as groups have them: even, or their weights

Unequal shares tell copies apart in training, as noise does.
"""

import math
from dataclasses import dataclass
from typing import final

from streammap.common.kinds import shown
from streammap.errors import PlanError
from streammap.planning import maps
from streammap.planning.maps import BlockMap

REMAINDER = "remainder"
"""Shares as groups have them."""
_NEAR_ONE = 1e-6
"""Of a sum of shares, as people round them."""


@final
@dataclass(frozen=True, slots=True)
class Split:
    """How what reads the copies of a unit is shared out."""

    shares: float | tuple[float, ...] | None = None

    def as_json(self) -> object:
        """As it was asked for."""
        if self.shares is None:
            return REMAINDER
        return list(self.shares) if isinstance(self.shares, tuple) else self.shares

    def of(self, n_copies: int) -> tuple[float, ...] | None:
        """The shares of so many copies; None where there is not one for each."""
        if n_copies == 1:
            return (1.0,)
        if isinstance(self.shares, float):
            first = [self.shares * (1.0 - self.shares) ** i for i in range(n_copies - 1)]
            return (*first, 1.0 - math.fsum(first))
        if self.shares is None:
            return (1.0 / n_copies,) * n_copies
        total = math.fsum(self.shares)
        return tuple(s / total for s in self.shares) if len(self.shares) == n_copies else None

    def weighted(self, m: BlockMap, units: str) -> BlockMap:
        """A merging map with these weights; one that has weights of its own keeps them.

        Args:
            units: What it maps, for messages.

        Raises:
            PlanError: a list of another number of shares than there are copies.
        """
        if self.shares is None or maps.is_uneven(m) or any(use > 1 for use in m.uses):
            return m
        rows = []
        for row in m.rows:
            shares = self.of(len(row)) if row else ()
            if shares is None:
                assert isinstance(self.shares, tuple)
                raise PlanError(
                    f"--split has {len(self.shares)} shares, but some {units} have {len(row)} "
                    "copies",
                    hint="give one number, such as --split 0.7: each copy takes this share of what "
                    "those before it leave",
                )
            rows.append(tuple((j, s) for (j, _), s in zip(row, shares, strict=True)))
        return BlockMap(tuple(rows), m.n_in_blocks, m.block)


def parse(value: object, name: str) -> Split:
    """Shares as a user wrote them: 0.7, "0.5,0.3,0.2", a list, or "remainder".

    Raises:
        PlanError: what is none of these.
    """
    if isinstance(value, Split):
        return value
    if value == REMAINDER:
        return Split()
    several = value.split(",") if isinstance(value, str) else value
    if not isinstance(several, list | tuple):
        several = [several]
    try:
        shares = tuple(float(str(one)) for one in several if not isinstance(one, bool))
    except (TypeError, ValueError, OverflowError):
        shares = ()
    if len(shares) == len(several) and all(0.0 < s < math.inf for s in shares):
        if len(shares) == 1 and shares[0] < 1.0:
            return Split(shares[0])
        if len(shares) > 1 and abs(math.fsum(shares) - 1.0) < _NEAR_ONE:
            return Split(shares)
    raise PlanError(
        f"{name} is {shown(value)}, expected a share between 0 and 1, shares that add up to 1, or "
        f"{REMAINDER}",
        hint="give --split 0.7, or --split 0.5,0.3,0.2 for groups of three",
    )
