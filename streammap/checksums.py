"""CRC-32 of a whole from those of its parts, in any order.

The CRC of a whole is the XOR of its parts' CRCs, each carried over the bytes that come after the
part. Carrying over n bytes is linear: a matrix of 32 x 32 bits, the n-th power of that of one byte.
"""

import zlib
from functools import cache

crc32 = zlib.crc32
_POLYNOMIAL = 0xEDB88320
Matrix = tuple[int, ...]
"""Where each bit of a CRC goes."""


def carried(crc: int, nbytes: int) -> int:
    """What a part's CRC adds to that of a whole which goes on for `nbytes` after it."""
    power = 0
    while nbytes:
        if nbytes & 1:
            crc = _times(_power(power), crc)
        nbytes >>= 1
        power += 1
    return crc


@cache
def _power(power: int) -> Matrix:
    """The matrix of 2^power bytes."""
    if power:
        half = _power(power - 1)
        return tuple(_times(half, column) for column in half)
    found = []
    for bit in range(32):
        value = 1 << bit
        for _ in range(8):
            value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
        found.append(value)
    return tuple(found)


def _times(matrix: Matrix, bits: int) -> int:
    found = 0
    for column in matrix:
        if not bits:
            break
        if bits & 1:
            found ^= column
        bits >>= 1
    return found
