"""Blocks of a tensor that have a level of their own: what one copy of a weight is.

Each dimension is cut into parts, and a block is a part of each. The noise has its blocks, and the
weight that it is measured on has larger ones: all copies come from one.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, final

from streammap.planning.copies import zero_sum
from streammap.planning.maps import BlockMap

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Parts:
    """How a dimension is cut: the part of each block of so many units."""

    n: int
    of_block: Sequence[int]
    block: int


@final
@dataclass(frozen=True, slots=True)
class Dim:
    """How a dimension of noise is cut, and that of the weight."""

    what: Literal["whole", "copies", "each", "fields", "each field"]
    """Not at all; into the first copies of all units, the second ones and so on; into the units of
    a stack; into kinds of fields (zero_sum.py); into the fields themselves, those of a stack."""
    size: int
    """Of the noise."""
    before: int
    """Of the weight."""
    m: BlockMap | None = None
    """How the result's units come from the weight's; None where they stay."""

    @property
    def most(self) -> int:
        """Parts of the noise or of the weight, at most."""
        if self.what in ("each", "each field"):
            return max(self.size, self.before)
        if self.what == "whole" or self.m is None:
            return 1
        n_copies = set(self.m.uses)
        return 1 + (sum(n_copies) if self.what == "fields" else max(n_copies, default=1))

    @property
    def kinds(self) -> tuple[zero_sum.Kind, ...]:
        """Of each part the kind of its fields; none where it has no fields."""
        if self.m is None or self.what not in ("fields", "each field"):
            return ()
        table, of_field = zero_sum.kinds(self.m)
        return table if self.what == "fields" else tuple(table[i] for i in of_field)

    def parts(self) -> Parts:
        """Of the noise. What is zero in the result is a part behind all others."""
        if self.what in ("each", "each field"):
            return Parts(self.size, range(self.size), 1)
        if self.what == "whole" or self.m is None:
            return Parts(1, (0,), self.size)
        if self.what == "fields":
            return Parts(len(self.kinds), zero_sum.kinds(self.m)[1], self.m.block)
        slots = zero_sum.slots(self.m)
        n = 1 + max(slots)
        return Parts(n + 1, [n if slot < 0 else slot for slot in slots], self.m.block)

    def parts_before(self) -> Parts:
        """Of the weight. What has no copies is a part behind all others."""
        if self.what in ("each", "each field"):
            return Parts(self.before, range(self.before), 1)
        if self.what != "fields" or self.m is None:
            return Parts(1, (0,), self.before)
        n, number = len(self._of_copies), self._of_copies
        of_block = [number.get(len(group), n) for group in zero_sum.copies(self.m)]
        return Parts(n + 1, of_block, self.m.block)

    def origins(self) -> Sequence[int]:
        """For each part of the noise that of the weight; -1 where there is to be none."""
        if self.what == "fields":
            return [self._of_copies[kind.n_copies] for kind in self.kinds]
        if self.what == "each field" and self.m is not None:
            sizes = [len(group) for group in zero_sum.copies(self.m)]
            return [j for j, n in enumerate(sizes) for _ in range(zero_sum.n_fields(n))]
        if self.what == "copies" and self.m is not None:
            return (*(0,) * (self.parts().n - 1), -1)
        if self.what == "each" and self.m is not None:
            rows = (self.m.members(i) for i in range(self.size))
            return [row[0][0] if row else -1 for row in rows]
        return range(self.parts().n)

    @property
    def _of_copies(self) -> dict[int, int]:
        """Numbers of copies -> the part of the weight whose units have so many."""
        return {n: i for i, n in enumerate(dict.fromkeys(kind.n_copies for kind in self.kinds))}


@final
class Cut:
    """A tensor's parts, found out once for many of its numbers."""

    def __init__(self, shape: Sequence[int], parts: Sequence[Parts]) -> None:
        """One of the parts for each dimension."""
        self._shape, self._parts = shape, parts
        self.n_labels = math.prod(one.n for one in parts)

    def labels(self, start: int, n: int) -> "Tensor":
        """The block of each number from element `start` on, int64 [n]."""
        import torch

        found, step, inner = torch.zeros(n, dtype=torch.int64), self.n_labels, 1
        place = torch.arange(start, start + n, dtype=torch.int64)
        step = 1
        for d in reversed(range(len(self._shape))):
            part = self._parts[d]
            if part.n > 1:
                unit = (place // inner) % self._shape[d]
                found += self._tables[d][unit // part.block] * step
            step, inner = step * part.n, inner * self._shape[d]
        return found

    @cached_property
    def _tables(self) -> "list[Tensor]":
        import torch

        return [torch.tensor(list(one.of_block), dtype=torch.int64) for one in self._parts]


@final
class Blocks:
    """Of noise and of the weight that it is measured on."""

    def __init__(self, dims: Sequence[Dim]) -> None:
        """Find them out, once for a tensor."""
        self.noise = Cut([dim.size for dim in dims], [dim.parts() for dim in dims])
        self.weight = Cut([dim.before for dim in dims], [dim.parts_before() for dim in dims])
        own, theirs = [[*dim.origins()] for dim in dims], [dim.parts_before().n for dim in dims]
        self.origins = [_number(at, theirs) for at in itertools.product(*own)]
        """For each block of the noise that of the weight; -1 where there is to be none."""
        none: tuple[zero_sum.Kind | None, ...] = (None,)
        kinds = [dim.kinds or none * len(o) for dim, o in zip(dims, own, strict=True)]
        self.kinds = [next(filter(None, at), None) for at in itertools.product(*kinds)]
        """For each block of the noise the kind of its fields, where it has any."""


def _number(at: Sequence[int], sizes: Sequence[int]) -> int:
    """The number of a place in a table of these sizes; -1 where a part of it is."""
    number = 0
    for i, n in zip(at, sizes, strict=True):
        number = number * n + i
    return -1 if -1 in at else number
