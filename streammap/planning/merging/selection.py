"""The largest numbers of a tensor, exactly, without holding it.

Numbers are ordered by magnitude, and where magnitudes are equal by place: earlier ones are larger.
So the k largest are one set, whatever the tiles. Where it ends is a Cut. It is found digit by digit
(11 bits of the magnitude's pattern, whose order is that of magnitudes): each reading counts how
many numbers have which digit. Once few numbers are left that begin like a cut, one more reading
collects and sorts these; where many are equal, it finds the place where they are cut instead.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, final

from streammap.planning.derived.statistic import Statistic
from streammap.planning.graph import FormReader

if TYPE_CHECKING:
    from torch import Tensor

_DIGIT_BITS = 11
_MAX_COLLECTED = 2**12
"""Numbers that are sorted, at most."""
Patterns = Callable[[int, int, FormReader], "Sequence[Tensor]"]
"""(first element, number of elements, reader) -> of each tensor the patterns there (`patterns`)."""


_Collected = list[list[tuple[int, int]]]


class Cut(NamedTuple):
    """Where the largest numbers of a tensor end."""

    pattern: int
    """Larger ones are among them."""
    end: int
    """Equal ones are if they stand before this element."""


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
    """Where the largest numbers end, of several tensors at once and for several counts."""

    def __init__(
        self,
        n_elements: int,
        given: Patterns,
        counts: Sequence[Sequence[int]],
        *,
        n_bits: int,
        block: int,
    ) -> None:
        """Find nothing yet.

        Args:
            given: Gives the patterns of the tensors.
            counts: For each tensor, how many are the largest: 1 to `n_elements` each.
            n_bits: Of a pattern: 31 of float32, 63 of float64.
            block: Numbers that are asked for at once.
        """
        self._n_elements, self._given, self._counts = n_elements, given, counts
        self._block = block
        opened = [_Open(i, 0, n, n_elements) for i, each in enumerate(counts) for n in each]
        self._digits: list[_Digit] = []
        shift = n_bits
        while shift:
            width, before = min(_DIGIT_BITS, shift), self._digits[-1] if self._digits else None
            self._digits.append(
                _Digit(n_elements, given, before, opened, shift, shift - width, block)
            )
            shift -= width
        self._cuts = Statistic(n_elements, self._equals, operator.iadd, self._places, block=block)

    def cuts(self, read: FormReader) -> Sequence[Sequence[Cut]]:
        """For each tensor, and each of its counts."""
        found = iter(self._found(read))
        return [[next(found) for _ in each] for each in self._counts]

    def _found(self, read: FormReader) -> Sequence[Cut]:
        if not self._digits:
            return ()
        for digit in self._digits:
            if digit.is_last:
                break
            if all(one.n_equal <= _MAX_COLLECTED for one in digit.found.get(read)):
                return digit.cuts.get(read)
        opened = self._opened(read)
        if any(one.is_cut for one in opened):
            return self._cuts.get(read)
        return [Cut(one.pattern, self._n_elements) for one in opened]

    @property
    def n_passes(self) -> int:
        """How often the tensors are read, at most."""
        return len(self._digits) + 1

    @property
    def scratch_nbytes(self) -> int:
        """In one thread, beside the patterns: counts of digits, and numbers that are counted or
        sorted.
        """
        n_cuts = sum(map(len, self._counts))
        return 8 * (3 * n_cuts * ((1 << _DIGIT_BITS) + _MAX_COLLECTED) + self._block)

    def _opened(self, read: FormReader) -> "Sequence[_Open]":
        return self._digits[-1].found.get(read)

    def _equals(self, start: int, n: int, read: FormReader) -> list[list[int]]:
        """How many numbers of a block are equal to each cut's."""
        given = self._given(start, n, read)
        return [[int((given[one.tensor] == one.pattern).sum()) for one in self._opened(read)]]

    def _places(self, blocks: list[list[int]], read: FormReader) -> Sequence[Cut]:
        found = []
        for one, counts in zip(self._opened(read), zip(*blocks, strict=True), strict=True):
            end = self._n_elements
            if one.is_cut:
                number, left = 0, one.n
                while left > counts[number]:
                    left -= counts[number]
                    number += 1
                start = number * self._block
                given = self._given(start, min(self._block, self._n_elements - start), read)
                equal = (given[one.tensor] == one.pattern).nonzero().view(-1)
                end = start + int(equal[left - 1]) + 1
            found.append(Cut(one.pattern, end))
        return found


@final
@dataclass(frozen=True, slots=True)
class _Open:
    """A cut of which some digits are known."""

    tensor: int
    pattern: int
    """These digits."""
    n: int
    """How many of the numbers that begin with them are among the largest."""
    n_equal: int
    """How many begin with them."""

    @property
    def is_cut(self) -> bool:
        """Whether some of them are, and others are not; of zeros it makes no difference."""
        return self.n < self.n_equal and self.pattern > 0


@final
class _Digit:
    """One more digit of each cut, by a count of the digits there are."""

    def __init__(
        self,
        n_elements: int,
        given: Patterns,
        before: "_Digit | None",
        opened: Sequence[_Open],
        known: int,
        shift: int,
        block: int,
    ) -> None:
        """Find nothing yet.

        Args:
            opened: Cuts of which nothing is known.
            known: The lowest bit of what the digits before this one say.
            shift: The lowest bit of this digit.
        """
        self._given, self._before, self._opened = given, before, opened
        self._known, self._shift = known, shift
        self.found: Statistic[Tensor, list[_Open]] = Statistic(
            n_elements, self._count, _add, self._next, in_order=False, block=block
        )
        self.cuts = Statistic(
            n_elements, self._collect, _joined, self._sorted, in_order=False, block=block
        )
        """Where few numbers begin like each cut: all that is left to know."""

    @property
    def is_last(self) -> bool:
        """Whether no bit of a pattern is unknown after it."""
        return self._shift == 0

    def _count(self, start: int, n: int, read: FormReader) -> "Tensor":
        """Of each cut, how many numbers that begin like it have which digit [cuts, digits]."""
        import torch

        given, opened = self._given(start, n, read), self._cuts(read)
        size = 1 << (self._known - self._shift)
        made = torch.empty((len(opened), size), dtype=torch.int64)
        for i, one in enumerate(opened):
            like = given[one.tensor]
            if self._before is not None:
                like = like[(like >> self._known) == one.pattern]
            elif i and one.tensor == opened[i - 1].tensor:
                made[i] = made[i - 1]
                continue
            digit = like >> self._shift if self._shift else like
            if self._before is not None:
                digit = digit & (size - 1)
            made[i] = torch.bincount(digit, minlength=size)
        return made

    def _next(self, counts: "Tensor", read: FormReader) -> list[_Open]:
        found = []
        for one, of_digit in zip(self._cuts(read), counts, strict=True):
            larger = of_digit.flip(0).cumsum(0)
            back = int((larger < one.n).sum())
            digit = len(of_digit) - 1 - back
            n_equal = int(of_digit[digit])
            left = one.n - (int(larger[back]) - n_equal)
            pattern = (one.pattern << (self._known - self._shift)) + digit
            found.append(_Open(one.tensor, pattern, left, n_equal))
        return found

    def _collect(self, start: int, n: int, read: FormReader) -> _Collected:
        """Of each cut, the numbers that begin like it: (pattern, place)."""
        given, made = self._given(start, n, read), []
        for one in self.found.get(read):
            places = ((given[one.tensor] >> self._shift) == one.pattern).nonzero().view(-1)
            # As Python's: small tensors that stay would lie scattered over the heap, and what is
            # between them would be lost to blocks.
            found = given[one.tensor][places].tolist()
            made.append([(x, start + at) for x, at in zip(found, places.tolist(), strict=True)])
        return made

    def _sorted(self, collected: _Collected, read: FormReader) -> list[Cut]:
        found = []
        for one, numbers in zip(self.found.get(read), collected, strict=True):
            pattern, place = sorted(numbers, key=lambda x: (-x[0], x[1]))[one.n - 1]
            found.append(Cut(pattern, place + 1))
        return found

    def _cuts(self, read: FormReader) -> Sequence[_Open]:
        return self._opened if self._before is None else self._before.found.get(read)


def _joined(total: _Collected, block: _Collected) -> _Collected:
    for ours, theirs in zip(total, block, strict=True):
        ours += theirs
    return total


def _add(total: "Tensor", block: "Tensor") -> "Tensor":
    return total.add_(block)
