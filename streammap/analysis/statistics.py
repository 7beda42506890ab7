"""Figures of numbers that come in pieces, in any order: kernels over chunks, and their sums."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

CHUNK = 2**17
"""Numbers that are computed with at once: what a processor's cache holds."""
_F16_MAX = 65504.0


@final
class Scratch:
    """Room of one thread for numbers of wider dtypes, a chunk at a time."""

    def __init__(self) -> None:
        """Nothing is allocated until it is used."""
        self._held: dict[tuple[int, torch.dtype], Tensor] = {}

    def room(self, place: int, n: int, dtype: torch.dtype) -> Tensor:
        """Room for n numbers; another one for each place."""
        tensor = self._held.get((place, dtype))
        if tensor is None:
            tensor = self._held[place, dtype] = torch.empty(CHUNK, dtype=dtype)
        return tensor[:n]

    def single(self, place: int, numbers: Tensor) -> Tensor:
        """The same numbers in float32; of float32 and float64, themselves."""
        if numbers.dtype in (torch.float32, torch.float64):
            return numbers
        return self.room(place, numbers.numel(), torch.float32).copy_(numbers)

    def wide(self, place: int, numbers: Tensor) -> Tensor:
        """The same numbers in float64; of float64, themselves."""
        if numbers.dtype == torch.float64:
            return numbers
        # Not at once: from float16 that takes four times as long.
        held = self.single(place, numbers)
        return self.room(place, numbers.numel(), torch.float64).copy_(held)


@final
class ExactSum:
    """An exact sum of floats: the same in whatever order they come."""

    __slots__ = ("_parts",)

    def __init__(self) -> None:
        """Zero."""
        self._parts: list[float] = []
        """Floats whose digits do not overlap: Shewchuk's expansion of the sum."""

    def add(self, x: float) -> None:
        """Add a finite number, or one that makes the sum no number."""
        kept = []
        for part in self._parts:
            larger, smaller = (x, part) if abs(x) >= abs(part) else (part, x)
            x = larger + smaller
            lost = smaller - (x - larger)
            if lost:
                kept.append(lost)
        self._parts = [*kept, x]

    def add_all(self, other: "ExactSum") -> None:
        """Add what another one holds."""
        for part in other._parts:
            self.add(part)

    @property
    def value(self) -> float:
        """The sum, rounded once."""
        return math.fsum(self._parts)


@final
@dataclass(slots=True)
class TensorStats:
    """Counts and sums so far."""

    n_nan: int = 0
    n_inf: int = 0
    n_zero: int = 0
    n_subnormal: int = 0
    n_over_f16: int = 0
    minimum: float = math.inf
    maximum: float = -math.inf
    total: ExactSum = field(default_factory=ExactSum)
    squares: ExactSum = field(default_factory=ExactSum)
    n_dead_rows: int = 0
    zeros_of: dict[int, int] = field(default_factory=dict)
    """Row that came in parts -> length of those parts that are all zeros."""

    def add(self, other: "TensorStats") -> None:
        """Take in another piece's."""
        for name in _SUMMED:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.total.add_all(other.total)
        self.squares.add_all(other.squares)
        self.minimum = min(self.minimum, other.minimum)
        self.maximum = max(self.maximum, other.maximum)
        for row, n in other.zeros_of.items():
            self.zeros_of[row] = self.zeros_of.get(row, 0) + n

    def dead_rows(self, length: int) -> int:
        """Rows of `length` zeros."""
        return self.n_dead_rows + sum(n == length for n in self.zeros_of.values() if length)


_SUMMED = ("n_nan", "n_inf", "n_zero", "n_subnormal", "n_over_f16", "n_dead_rows")


def counted(numbers: Tensor, start: int, length: int, scratch: Scratch) -> TensorStats:
    """The figures of a piece.

    Args:
        numbers: The piece, flat.
        start: Numbers of the tensor before it.
        length: Numbers of a row; 0 to look for no dead rows.
    """
    stats = TensorStats()
    tiny = torch.finfo(numbers.dtype).tiny
    for first in range(0, numbers.numel(), CHUNK):
        chunk = numbers[first : first + CHUNK]
        held = scratch.single(0, chunk)
        low, high = (float(x) for x in torch.aminmax(held))
        if not (math.isfinite(low) and math.isfinite(high)):
            n_nan, n_inf = not_finite(held)
            stats.n_nan += n_nan
            stats.n_inf += n_inf
            finite = held.isfinite()
            stats.n_zero -= int((~finite).sum())  # they become zeros, for the sums
            kept = held[finite]
            if kept.numel():
                low, high = (float(x) for x in torch.aminmax(kept))
            else:
                low, high = math.inf, -math.inf
            held = torch.where(finite, held, 0.0)
        stats.minimum, stats.maximum = min(stats.minimum, low), max(stats.maximum, high)
        wide = scratch.wide(1, held)
        stats.total.add(float(wide.sum()))
        stats.squares.add(float(torch.dot(wide, wide)))
        sizes = torch.abs(held, out=scratch.room(2, held.numel(), held.dtype))
        if max(-low, high) > _F16_MAX:
            stats.n_over_f16 += int(torch.count_nonzero(sizes > _F16_MAX))
        n_small = int(torch.count_nonzero(sizes < tiny))
        if n_small:
            n_zero = held.numel() - int(torch.count_nonzero(held))
            stats.n_zero += n_zero
            stats.n_subnormal += n_small - n_zero
    if length and stats.n_zero:
        _dead_rows(numbers, start, length, stats)
    return stats


def not_finite(numbers: Tensor) -> tuple[int, int]:
    """Numbers of NaN and of Inf; any float dtype."""
    n_nan = int(torch.count_nonzero(numbers.isnan()))
    return n_nan, int(torch.count_nonzero(numbers.isinf()))


def _dead_rows(numbers: Tensor, start: int, length: int, stats: TensorStats) -> None:
    """Rows of zeros: those that are whole here, and parts of others."""
    end = start + numbers.numel()
    first, last = -(-start // length) * length, end // length * length
    if first >= last:  # no row is whole
        pieces = [(start, end)] if start // length == (end - 1) // length else []
        pieces = pieces or [(start, first), (first, end)]
    else:
        pieces = [(start, first), (last, end)]
        rows = numbers[first - start : last - start].view(-1, length)
        stats.n_dead_rows += sum(_n_dead(part) for part in _candidates(rows))
    for a, b in pieces:
        if b > a and not torch.count_nonzero(numbers[a - start : b - start].float()):
            row = a // length
            stats.zeros_of[row] = stats.zeros_of.get(row, 0) + b - a


def _candidates(rows: Tensor) -> Iterator[Tensor]:
    """Rows that begin with a zero, a few at a time: no other can be all zeros."""
    places = (rows[:, 0].float() == 0).nonzero()[:, 0]
    step = max(1, CHUNK // rows.shape[1])
    for first in range(0, len(places), step):
        yield rows[places[first : first + step]]


def _n_dead(rows: Tensor) -> int:
    return int(torch.count_nonzero(rows.float().abs().amax(dim=1) == 0))
