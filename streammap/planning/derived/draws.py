"""Random numbers by place: a function of a seed and of where they stand, in no order.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011, for generators that
count; Steele, Lea, Flood, OOPSLA 2014, for the mixing function (SplitMix64).
"""

import math
from typing import TYPE_CHECKING

from streammap.common.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def normals(seed: int, rows: Range, columns: Range) -> "Tensor":
    """Numbers of N(0, 1) at these places of an endless table, float64 [rows, columns].

    Two uniform numbers make one: Box, Muller, Annals of Mathematical Statistics 29, 1958.
    """
    import torch

    row = torch.arange(*rows, dtype=torch.int64)[:, None]
    column = torch.arange(*columns, dtype=torch.int64)[None, :]
    place = _mixed(row + _signed(seed * _GOLDEN)) + 2 * column
    radius = _uniform(_mixed(place)).log_().mul_(-2.0).sqrt_()
    return radius.mul_(_uniform(_mixed(place + 1)).mul_(2.0 * math.pi).cos_())


def _uniform(words: "Tensor") -> "Tensor":
    """53 bits of each word as a number above 0, up to 1."""
    return _shifted(words, 11).double().add_(1.0).mul_(2.0**-53)


def _mixed(words: "Tensor") -> "Tensor":
    """Words of 64 bits of which each depends on all bits of its own."""
    words = words * _signed(_GOLDEN)
    for bits, factor in _MIXERS:
        words = (words ^ _shifted(words, bits)) * _signed(factor)
    return words


def _shifted(words: "Tensor", bits: int) -> "Tensor":
    """Shifted to the right, with zeros behind: torch's words have a sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """A word of 64 bits as torch has it."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value
