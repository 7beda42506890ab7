"""Figures of pairs of numbers that come in pieces: kernels over chunks, and their sums."""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from streammap.analysis.scan import MEASURED, ScannedPiece
from streammap.analysis.statistics import CHUNK, ExactSum, Scratch
from streammap.io.dtypes import DTYPE_BITS

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@final
@dataclass(slots=True)
class PairStats:
    """What is known of a pair of tensors so far."""

    is_equal: bool = True
    """Bit by bit."""
    n_different: int = 0
    n_odd: int = 0
    n_compared: int = 0
    """Pairs of finite numbers."""
    max: float = 0.0
    total: ExactSum = field(default_factory=ExactSum)
    """Of |a - b|."""
    squares: ExactSum = field(default_factory=ExactSum)
    """Of a - b."""
    squares_of_a: ExactSum = field(default_factory=ExactSum)

    def add(self, other: "PairStats") -> None:
        """Take in another piece's."""
        self.is_equal &= other.is_equal
        self.n_different += other.n_different
        self.n_odd += other.n_odd
        self.n_compared += other.n_compared
        self.max = max(self.max, other.max)
        self.total.add_all(other.total)
        self.squares.add_all(other.squares)
        self.squares_of_a.add_all(other.squares_of_a)

    @property
    def relative(self) -> float:
        """The norm of the difference, in norms of a."""
        of_a, of_both = math.sqrt(self.squares_of_a.value), math.sqrt(self.squares.value)
        if of_a == 0.0:
            return math.inf if of_both else 0.0
        return of_both / of_a


def compared(piece: ScannedPiece, scratch: Scratch, *, swapped: bool) -> PairStats:
    """The sums of a piece; `swapped` where the first of the two is b."""
    stats = PairStats()
    if piece.spec.dtype not in MEASURED:
        a, b = (torch.frombuffer(view, dtype=torch.uint8) for view in (piece.view, piece.other))
        stats.n_different = 0 if torch.equal(a, b) else int(torch.count_nonzero(a != b))
        stats.is_equal = not stats.n_different
        return stats
    alike = piece.spec.dtype == piece.other_spec.dtype
    a, b = piece.numbers(), piece.other_numbers()
    for start in range(0, a.numel(), CHUNK):
        x, y = a[start : start + CHUNK], b[start : start + CHUNK]
        bits = _WHOLE[DTYPE_BITS[piece.spec.dtype] // 8] if alike else None
        if bits is None or not torch.equal(x.view(bits), y.view(bits)):
            stats.is_equal = False
        _add(stats, x, y, scratch, swapped=swapped, bits=bits)
    return stats


def _add(
    stats: PairStats,
    x: Tensor,
    y: Tensor,
    scratch: Scratch,
    *,
    swapped: bool,
    bits: torch.dtype | None,
) -> None:
    """Take in a chunk of both."""
    a, b = scratch.wide(0, x), scratch.wide(1, y)
    room = scratch.room(2, a.numel(), torch.float64)
    gap = torch.sub(a, b, out=room)
    squares = float(torch.dot(gap, gap))
    n_compared = a.numel()
    if not math.isfinite(squares):
        finite = a.isfinite() & b.isfinite()
        same = x.view(bits) == y.view(bits) if bits else (a == b) | (a.isnan() & b.isnan())
        n_odd = int(torch.count_nonzero(~finite & ~same))
        stats.n_odd += n_odd
        stats.n_different += n_odd
        n_compared = int(torch.count_nonzero(finite))
        a, b = torch.where(finite, a, 0.0), torch.where(finite, b, 0.0)
        gap = torch.sub(a, b, out=room)
        squares = float(torch.dot(gap, gap))
    stats.n_compared += n_compared
    own = b if swapped else a
    stats.squares_of_a.add(float(torch.dot(own, own)))
    if squares or not stats.is_equal:
        gap.abs_()
        largest = float(gap.max())
        if largest:
            stats.max = max(stats.max, largest)
            stats.n_different += int(torch.count_nonzero(gap))
            stats.total.add(float(gap.sum()))
            stats.squares.add(squares)
