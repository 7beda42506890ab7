"""Sizes as people write and read them: "5GB", "256MiB"."""

import re
from fractions import Fraction

from streammap.errors import OutputError

_MAX_NBYTES = 2**63 - 1
_LEAST_BARE = 2**16
"""Text without a unit is bytes from here on; "5" and "500" are gigabytes or megabytes of somebody
who forgot to say so, and would make shards of one tensor each."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str | int) -> int:
    """Bytes of "5GB" (10^9), "256MiB" (2^20), "300B" or a plain number.

    Raises:
        OutputError: not a size, or a small number as text without a unit.
    """
    if isinstance(text, int):
        nbytes = text
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)(B?)\s*", text, re.IGNORECASE)
        if match is None or (match[3] and not match[2]):
            raise OutputError(f"size {text!r}: expected one such as 5GB, 500MB or 256MiB")
        units = _BINARY_UNITS if match[3] else _UNITS
        nbytes = int(Fraction(match[1]) * units[match[2].upper()])
        if 0 < Fraction(match[1]) < _LEAST_BARE and not (match[2] or match[4]):
            raise OutputError(
                f"size {text!r} has no unit, and would be {match[1]} bytes",
                hint=f"give {match[1]}GB or {match[1]}MB; {match[1]}B if bytes are meant",
            )
    if nbytes > _MAX_NBYTES:
        raise OutputError(f"size {str(text)[:40]!r}: expected one such as 5GB, 500MB or 256MiB")
    if nbytes < 1:
        raise OutputError(f"size {text!r}: expected more than nothing")
    return nbytes


def format_nbytes(nbytes: int) -> str:
    """Bytes for people, three digits: "812 B", "1.46 MB", "141 GB" (of 1000 each)."""
    if nbytes < 1000:
        return f"{nbytes} B"
    value = float(nbytes)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_count(n: int) -> str:
    """A number of parameters for people: "812", "1.46 M", "141 G"."""
    return format_nbytes(n).removesuffix("B").replace("k", "K").strip()
