"""Codes -> float32: what one stored code of a quantised tensor means, before its scale.

Each decoder takes the bytes of codes that stand in a row and gives their values. torch's own
conversions of 8-bit floats take four times as long on a CPU; those below look at the same bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

if TYPE_CHECKING:
    from torch import Tensor

Decoder = Callable[["Tensor"], "Tensor"]
"""Bytes, uint8 [n] -> float32 [n * codes in a byte]."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def e4m3(codes: "Tensor") -> "Tensor":
    """float8_e4m3fn: sign, 4 bits of exponent (bias 7), 3 of mantissa.

    The same bits, moved to where float16 has them, are the value / 2**8: both have the hidden bit
    and the same subnormals, and their biases differ by 8.
    """
    import torch

    # As int8 the sign fills the upper byte: after the shift it is bit 15, and the mask leaves it.
    bits = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(-0x4080)
    values = bits.view(torch.float16).to(torch.float32).mul_(256.0)
    # The format's only NaNs, 0x7F and 0xFF, come out as 480; what is finite ends at 448.
    if len(values) and torch.bitwise_and(codes, 0x7F).amax() == 0x7F:
        values.masked_fill_(values.abs() == 480.0, float("nan"))
    return values


def e5m2(codes: "Tensor") -> "Tensor":
    """float8_e5m2: the upper byte of a float16."""
    import torch

    return codes.to(torch.int16).bitwise_left_shift_(8).view(torch.float16).to(torch.float32)


def e8m0(codes: "Tensor") -> "Tensor":
    """float8_e8m0fnu: 2**(code - 127), the exponent byte of a float32; 255 is NaN."""
    import torch

    return codes.view(torch.float8_e8m0fnu).to(torch.float32)


def exponents(codes: "Tensor") -> "Tensor":
    """2**(code - 127) of bytes that are no float8_e8m0fnu by name (MXFP4's scales); 255 is inf."""
    import torch

    return torch.exp2(codes.to(torch.float32).sub_(127.0))


def int8(codes: "Tensor") -> "Tensor":
    """Signed bytes."""
    import torch

    return codes.view(torch.int8).to(torch.float32)


@final
@dataclass(frozen=True)
class Halves:
    """A decoder of two codes a byte, the lower half first."""

    meant: tuple[float, ...]
    """What each of 16 codes means."""

    def __call__(self, codes: "Tensor") -> "Tensor":
        """Look them up by pairs."""
        import torch

        pairs = torch.index_select(self._pairs, 0, codes.to(torch.int32))
        return pairs.view(torch.float32)

    @cached_property
    def tables(self) -> "Tensor":
        """What each byte's lower and upper half mean, float32 [2, 256]."""
        import torch

        values, byte = torch.tensor(self.meant), torch.arange(256)
        return torch.stack([values[byte & 15], values[byte >> 4]])

    @cached_property
    def _pairs(self) -> "Tensor":
        """Byte -> its two values, as one int64 of two float32."""
        import torch

        return self.tables.t().contiguous().view(torch.int64).flatten()


fp4 = Halves((*_E2M1, *(-value for value in _E2M1)))
"""e2m1: sign, 2 bits of exponent, 1 of mantissa."""


def packed(*, bits: int, less: int = 0, more: int = 0, order: Sequence[int] = ()) -> Decoder:
    """A decoder of integers of `bits` bits in int32 words.

    Args:
        bits: 1 to 8; words hold whole codes only if 32 is a multiple of it.
        less: What is subtracted from each.
        more: What is added to each before it is cut to its bits.
        order: Place in its word of each code; by default the lowest bits are the first one.
    """
    largest = (1 << bits) - 1
    if bits == 4 and not order:
        return Halves(tuple(float(((code + more) & largest) - less) for code in range(16)))

    def decode(codes: "Tensor") -> "Tensor":
        import torch

        values = unpacked(codes.view(torch.int32).unsqueeze(-1), bits, -1, order).flatten()
        if more:
            values = values.add_(more).bitwise_and_(largest)
        numbers = values.to(torch.float32)
        return numbers.sub_(float(less)) if less else numbers

    return decode


def unpacked(words: "Tensor", bits: int, dim: int, order: Sequence[int] = ()) -> "Tensor":
    """Unsigned integers of int32 words, along a dimension of size 1."""
    import torch

    places = torch.tensor([*(order or range(32 // bits))], dtype=torch.int32)
    shape = [1] * words.dim()
    shape[dim] = len(places)
    return (words >> (places * bits).view(shape)).bitwise_and_((1 << bits) - 1)
