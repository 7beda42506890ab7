"""A tensor whose numbers are stretches of others, one after the other.

Stacked experts, a part of a stack, rows that are left or come behind: in memory each is a stretch
of numbers, whatever the dimensions are called. No number is computed with, so all bits stay.
"""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.planning import graph
from streammap.planning.graph import Derived, FormReader, LinearForm


@dataclass(frozen=True, slots=True)
class Stretch:
    """Numbers of a form, row by row: `n` from element `start` on."""

    form: LinearForm
    start: int
    n: int


@final
class Joined(Derived):
    """Stretches of forms of one dtype, in a shape of its own."""

    only_moves = True
    scratch_nbytes = 0

    def __init__(self, stretches: Sequence[Stretch], shape: tuple[int, ...]) -> None:
        """Shapes: the stretches' lengths add up to the product of `shape`."""
        self._stretches = tuple(stretches)
        self._ends = list(itertools.accumulate(one.n for one in stretches))
        self._spec = TensorSpec(stretches[0].form.spec.dtype, shape)
        assert self._ends[-1] == self._spec.n_elements
        assert all(one.form.spec.dtype == self._spec.dtype for one in stretches)
        self.inputs = tuple(one.form for one in stretches)

    @property
    def name(self) -> str:
        """What it is made of."""
        n = len(self._stretches)
        return "a part, copied" if n == 1 else f"{n} tensors, joined"

    @property
    def formula(self) -> Mapping[str, object]:
        """Where the stretches begin, and how long they are."""
        return {"joined": [[one.start, one.n] for one in self._stretches]}

    @property
    def tensor(self) -> TensorSpec:
        """In the dtype of the forms."""
        return self._spec

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """Read what is asked for of each stretch, in turn."""
        bits = DTYPE_BITS[self._spec.dtype]
        at, end = start, start + len(view) * 8 // bits
        which = bisect.bisect_right(self._ends, start)
        while at < end:
            one, until = self._stretches[which], min(end, self._ends[which])
            first = one.start + at - (self._ends[which] - one.n)
            read(one.form, first, view[(at - start) * bits // 8 : (until - start) * bits // 8])
            at, which = until, which + 1


def joined(stretches: Sequence[Stretch], shape: tuple[int, ...]) -> LinearForm:
    """Stretches of forms as one tensor."""
    return graph.derive(Joined([one for one in stretches if one.n] or stretches, shape))


def whole(form: LinearForm) -> Stretch:
    """All numbers of a form."""
    return Stretch(form, 0, form.spec.n_elements)
