"""Forms that are sums of groups, of one source or several: pooling.py computes them in one go."""

import math

from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap

MIN_RUN = 32
"""Numbers side by side from which on it pays: the kernel computes all channels at once."""
_DTYPES = ("F64", "F32", "F16", "BF16")
_MAX_DIMS = 2


def divisor_of(form: LinearForm) -> int | None:
    """What the sums of a form are divided by; None where they aren't computed so.

    It is a power of two, so that it does not matter when it is applied, and that of the form: all
    of its tiles are computed alike.
    """
    term = form.terms[0]
    coefficient, first = term.blend[0]
    dtype = form.spec.dtype
    if len(form.terms) > 1 or dtype not in _DTYPES or coefficient == 0.0:
        return None
    if not all(c == coefficient and graph.is_stored(ref, dtype) for c, ref in term.blend):
        return None
    if form.accumulator != ("F64" if dtype == "F64" else "F32"):
        return None
    mapped = [d for d, m in enumerate(term.maps) if m is not None]
    if not 0 < len(mapped) <= _MAX_DIMS:
        return None
    if _run(term.maps[mapped[-1]]) * math.prod(first.spec.shape[mapped[-1] + 1 :]) < MIN_RUN:
        return None
    for d in mapped:
        m = term.maps[d]
        if not isinstance(m, BlockMap) or not m.is_regular or m.common is None or m.n_members < 2:
            return None
        coefficient *= m.common
    mantissa, exponent = math.frexp(coefficient)
    return 2 ** (1 - exponent) if mantissa == 0.5 and -32 < exponent <= 1 else None


def _run(m: AxisMap | None) -> int:
    """Units that move together, at least."""
    if not isinstance(m, BlockMap):
        return 1
    return min((segment.length for segment in m.segments), default=1)


def whole_divisor(factor: float) -> int | None:
    """The whole number that a factor is one part of; None for others, and for powers of two."""
    if not 0.0 < factor < 1.0 or math.frexp(factor)[0] == 0.5:
        return None
    n = round(1.0 / factor)
    return n if 1.0 / n == factor else None
