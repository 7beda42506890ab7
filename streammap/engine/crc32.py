"""CRC-32 of tensors, composed of the CRCs of their parts, in whatever order these are written.

A CRC is linear. Where a tensor of n bytes is cut in parts, and part i ends at byte e_i, then

    crc(tensor)  =  XOR over i of  crc(part i) * x^(8 * (n - e_i))   (mod the CRC's polynomial)

so that one number a tensor is all there is to keep, and it depends on neither the parts nor their
order. Values are zlib's; zlib-ng computes them several times faster where it is installed.
"""

import zlib
from array import array
from collections.abc import Callable, Iterable
from functools import cache
from typing import final

Combine = Callable[[int, int, int], int]
try:
    from zlib_ng import zlib_ng
except ImportError:  # no wheel for this platform
    crc32: Callable[..., int] = zlib.crc32
    _combine: Combine | None = None
else:
    crc32, _combine = zlib_ng.crc32, getattr(zlib_ng, "crc32_combine", None)

_POLYNOMIAL = 0xEDB88320
"""CRC-32's, reflected: the highest bit is the factor of x^0."""
_ONE = 1 << 31
_BYTE = 1 << 23
"""x^8."""
_DIGIT = 256


def shifted(crc: int, nbytes: int) -> int:
    """`crc` times x^(8 * nbytes): what a part's CRC adds to a whole that goes on for `nbytes`."""
    return shifted_here(crc, nbytes) if _combine is None else _combine(crc, 0, nbytes)


def joined(crc: int, other: int, nbytes: int) -> int:
    """The CRC of bytes of CRC `crc`, followed by `nbytes` bytes of CRC `other`."""
    return shifted(crc, nbytes) ^ other


def shifted_here(crc: int, nbytes: int) -> int:
    """The same where zlib-ng is not installed."""
    place = 0
    while nbytes:
        nbytes, digit = divmod(nbytes, _DIGIT)
        if digit:
            crc = _product(_powers(place)[digit], crc)
        place += 1
    return crc


@cache
def _powers(place: int) -> tuple[int, ...]:
    """x^(8 * digit * 256^place) for each digit: 256 numbers for each place of a size."""
    step = _BYTE if place == 0 else _product(_powers(place - 1)[-1], _powers(place - 1)[1])
    powers = [_ONE]
    for _ in range(1, _DIGIT):
        powers.append(_product(step, powers[-1]))
    return tuple(powers)


def _product(a: int, b: int) -> int:
    """Product of two polynomials, modulo the CRC's."""
    product, bit = 0, _ONE
    while a:
        if a & bit:
            product ^= b
            a ^= bit
        bit >>= 1
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@final
class FileDigests:
    """The tensors of one file: how many bytes of each are missing, and the CRC of the others."""

    def __init__(self, sizes: Iterable[int]) -> None:
        """`sizes` are the bytes of each tensor."""
        self._sizes = array("Q", sizes)
        self._left = self._sizes[:]
        self._crcs = array("I", bytes(4 * len(self._sizes)))
        self.left_nbytes = sum(self._sizes)
        """Bytes of all tensors that are missing."""

    def add(self, i: int, offset: int, nbytes: int, crc: int) -> bool:
        """Take note of a part of tensor i, from its byte `offset` on. No byte may come twice.

        Returns:
            Whether the tensor is whole now.
        """
        after = self._sizes[i] - offset - nbytes
        self._crcs[i] ^= shifted(crc, after) if after else crc
        self._left[i] -= nbytes
        self.left_nbytes -= nbytes
        return not self._left[i]

    def restore(self, i: int, crc: int) -> None:
        """Take note of a tensor that an earlier run completed."""
        self.left_nbytes -= self._left[i]
        self._crcs[i], self._left[i] = crc, 0

    def is_whole(self, i: int) -> bool:
        """Whether no byte of a tensor is missing."""
        return not self._left[i]

    def crc(self, i: int) -> int:
        """The CRC of a tensor that is whole."""
        return self._crcs[i]
