"""Parts of numbers, one for each copy of a unit, that add up to the number itself.

Stored by itself, 0.7 of a weight is rounded, and so is 0.3: they no longer add up to what was
there. So each part but the last is a share of what those before it leave, rounded; and the last is
what is left, which the dtype often has:

    a = round(u r),    r - a    is exact for u of 1/2 to 1 (Sterbenz 1974), for others it depends

Whether it is for given shares and a dtype is found out by trying all significands, once.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, final

from streammap.planning.copies import zero_sum
from streammap.planning.derived.elementwise import Elementwise
from streammap.planning.graph import FormReader, LinearForm
from streammap.planning.maps import BlockMap

if TYPE_CHECKING:
    from torch import Tensor

_DIGITS: Mapping[str, tuple[int, int]] = {"BF16": (8, -133), "F16": (11, -24), "F32": (24, -149)}
"""Dtype -> digits of a significand, and the power of two of its smallest number."""
_MAX_DIGITS = 11
"""Of significands that are tried one by one; for longer ones the theorem has to do."""


@functools.cache
def adds_up(shares: tuple[float, ...], dtype: str) -> bool:
    """Whether parts of every number of a dtype add up to it, and are numbers of the dtype.

    Args:
        shares: Of the parts, the largest first.
    """
    if dtype not in _DIGITS:
        return False
    digits, _ = _DIGITS[dtype]
    steps = _steps(shares)
    if digits > _MAX_DIGITS:
        return all(0.5 <= step <= 1.0 for step in steps)
    for significand in range(2 ** (digits - 1), 2**digits):
        left = float(significand)
        for step in steps:
            left -= _rounded(left * step, digits)
        if left != _rounded(left, digits):
            return False
    return True


def _steps(shares: Sequence[float]) -> list[float]:
    """The share of each part but the last in what those before it leave."""
    left, steps = 1.0, []
    for share in shares[:-1]:
        steps.append(min(share / left, 1.0))
        left -= share
    return steps


def _rounded(x: float, digits: int) -> float:
    """To so many digits, by Veltkamp's splitting: the same +, - and * as for a tensor below."""
    large = x * (2.0 ** (53 - digits) + 1.0)
    return large - (large - x)


@final
class SharedOut(Elementwise):
    """Copies along one dimension, each unit replaced by its part of it."""

    n_scratch = 8
    rounds = False

    def __init__(self, copied: LinearForm, dim: int, m: BlockMap) -> None:
        """Read nothing yet.

        Args:
            copied: The copies, each with all of its unit, in the dtype of the result.
            m: The map of dimension `dim`, with the shares.
        """
        self._dim, self._m, self._dtype = dim, m, copied.spec.dtype
        self.inputs = (copied,)

    @property
    def name(self) -> str:
        """What it is."""
        return "parts that add up"

    @property
    def formula(self) -> Mapping[str, object]:
        """The shares."""
        shares = sorted(shares_of(self._m))
        return {"shared out": [list(one) for one in shares], "dim": self._dim}

    @property
    def scratch_nbytes(self) -> int:
        """What a block takes, and which part each unit is."""
        return super().scratch_nbytes + 200 * len(self._m.rows)

    def values(self, start: int, parts: "Sequence[Tensor]", read: FormReader) -> "Tensor":
        """The parts of the numbers from element `start` on."""
        import torch

        shape = self.inputs[0].spec.shape
        whole = parts[0].double()
        place = torch.arange(start, start + len(whole), dtype=torch.int64)
        unit = (
            place.div_(math.prod(shape[self._dim + 1 :]), rounding_mode="floor") % shape[self._dim]
        )
        vectors, of_block, rank = self._table(read)
        block = unit.div_(self._m.block, rounding_mode="floor")
        vector, rank = of_block[block], rank[block]
        made = whole.clone()
        for number, shares in enumerate(vectors):
            left = whole
            for i, step in enumerate((*_steps(shares), None)):
                part = left if step is None else _rounded_all(left * step, self._dtype)
                made = torch.where((vector == number) & (rank == i), part, made)
                left = left - part
        return torch.where(whole.isfinite(), made, whole)

    def _table(self, read: FormReader) -> "tuple[list[tuple[float, ...]], Tensor, Tensor]":
        """Vectors of shares, and of each block which one is its own and its place in that."""
        import torch

        found = read.kept.get("table")
        if not isinstance(found, tuple):
            vectors: dict[tuple[float, ...], int] = {(1.0,): 0}
            own, rank = [0] * len(self._m.rows), [0] * len(self._m.rows)
            for group in zero_sum.copies(self._m):
                order = sorted(group, key=lambda i: -self._m.rows[i][0][1])
                shares = tuple(self._m.rows[i][0][1] for i in order)
                number = vectors.setdefault(shares, len(vectors)) if shares else 0
                for at, i in enumerate(order):
                    own[i], rank[i] = number, at
            found = read.kept["table"] = list(vectors), torch.tensor(own), torch.tensor(rank)
        return found


def shares_of(m: BlockMap) -> set[tuple[float, ...]]:
    """The vectors of shares that groups of copies have, the largest share first."""
    return {
        tuple(sorted((m.rows[i][0][1] for i in group), reverse=True))
        for group in zero_sum.copies(m)
        if group
    }


def _rounded_all(x: "Tensor", dtype: str) -> "Tensor":
    """Numbers in the digits of a dtype, float64; where they are smallest, to its last place."""
    import torch

    digits, power = _DIGITS[dtype]
    large = x * (2.0 ** (53 - digits) + 1.0)
    rounded = large - (large - x)
    small = (x * 2.0**-power).round_().mul_(2.0**power)
    return torch.where(x.abs() < 2.0 ** (power + digits - 1), small, rounded)
