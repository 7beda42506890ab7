"""The largest numbers of a tensor, exactly, without holding it.

Numbers are ordered by magnitude, and where magnitudes are equal by place: earlier ones are larger.
So the k largest are one set, whatever the tiles. Where it ends is a Cut. It is found digit by digit
(16 bits of the magnitude's pattern, whose order is that of magnitudes): each reading counts how
many numbers have which digit. One more reading finds the place where equal magnitudes are cut.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from streammap.planning.derived.statistic import BLOCK, Statistic
from streammap.planning.graph import FormReader

if TYPE_CHECKING:
    from torch import Tensor

_DIGIT_BITS = 16
Patterns = Callable[[int, int, FormReader], "Sequence[Tensor]"]
"""(first element, number of elements, reader) -> of each tensor the patterns there (`patterns`)."""


class Cut(NamedTuple):
    """Where the largest numbers of a tensor end."""

    pattern: int
    """Larger ones are among them."""
    end: int
    """Equal ones are if they stand before this element."""


@final
@dataclass(frozen=True, slots=True)
class _Open:
    """A cut that is being found."""

    tensor: int
    pattern: int
    """The digits that are known."""
    n: int
    """How many of the numbers that begin with these are among the largest."""


def patterns(x: "Tensor") -> "Tensor":
    """Of float32 or float64 numbers the bits of their magnitudes, int32 or int64."""
    import torch

    return x.abs().view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def chosen(pattern: "Tensor", cut: Cut, start: int) -> "Tensor":
    """Which numbers, from element `start` on, are among the largest, bool [n]."""
    made = pattern > cut.pattern
    if start >= cut.end:
        return made
    if start + len(pattern) <= cut.end:
        return pattern >= cut.pattern
    before = cut.end - start
    made[:before] = pattern[:before] >= cut.pattern
    return made


@final
class Selection:
    """Where the largest numbers end, for some tensors at once, and some counts of each."""

    def __init__(
        self, n_elements: int, given: Patterns, counts: Sequence[Sequence[int]], *, n_bits: int
    ) -> None:
        """Find nothing yet.

        Args:
            given: Gives the patterns of the tensors.
            counts: For each tensor, how many are the largest: 1 to `n_elements`.
            n_bits: Of a pattern: 31 of float32, 63 of float64.
        """
        self._n_elements, self._given, self._counts = n_elements, given, counts
        self._shifts = [*range(n_bits - _DIGIT_BITS, 0, -_DIGIT_BITS), 0]
        self._rounds: list[Statistic[list[Tensor], list[_Open]]] = []
        for i in range(len(self._shifts)):
            self._rounds.append(
                Statistic(
                    n_elements,
                    _Counter(self, i).count,
                    _added,
                    _Counter(self, i).next_digit,
                    in_order=False,
                )
            )
        self._cuts = Statistic(n_elements, self._equal, _joined, self._cut)

    @property
    def n_passes(self) -> int:
        """How often the tensors are read, at most."""
        return len(self._shifts) + 1

    def scratch_nbytes(self) -> int:
        """In one thread, beside the patterns."""
        n_cuts = sum(map(len, self._counts))
        return 3 * n_cuts * 2**_DIGIT_BITS * 8 + 4 * BLOCK * 8
