"""Random numbers by place: number `i` of a tensor is a function of a seed, a name and `i` alone.

So equal places have equal bits in tiles of any size, by any thread or rank, after any kill, and in
a second reading. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011): a counter is encrypted, and four words come out. All else, normal numbers
included, is made of +, *, / and square roots, which every machine rounds alike.

    key      = BLAKE2b(seed, name), 8 bytes
    block b  = Philox(counter = (b mod 2^32, b div 2^32, 0, 0), key): words 4b to 4b + 3
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EACH_NBYTES = 48
"""Memory that a number takes while it is made, at most."""
_ROUNDS = 10
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def words(seed: int, name: str, start: int, n: int) -> "Tensor":
    """The words `start` to `start + n` of a stream, int64 of 0 to 2^32 - 1 [n]."""
    import torch

    first, end = start // 4, (start + n + 3) // 4
    block = torch.arange(first, end, dtype=torch.int64)
    counter = [block & _LOW, block >> 32, torch.zeros_like(block), torch.zeros_like(block)]
    made = torch.stack(philox(counter, key_of(seed, name)), dim=1).view(-1)
    return made[start - 4 * first :][:n]


def keeps(seed: int, name: str, start: int, n: int, probability: "float | Tensor") -> "Tensor":
    """Whether each of `n` places is chosen, independently, bool [n].

    Args:
        probability: In units of 2^-32, to which it is rounded; one for all, or one each [n].
    """
    import torch

    if isinstance(probability, torch.Tensor):
        limit: Tensor | int = (probability.double() * 2.0**32).round().to(torch.int64)
    else:
        limit = round(probability * 2**32)
    return words(seed, name, start, n) < limit


def uniform(seed: int, name: str, start: int, n: int) -> "Tensor":
    """Numbers of [0, 1), multiples of 2^-53, float64 [n]; each takes two words."""
    import torch

    pairs = words(seed, name, 2 * start, 2 * n).view(n, 2)
    high, low = pairs[:, 0] >> 5, pairs[:, 1] >> 6
    return ((high << 26) + low).to(torch.float64) * 2.0**-53


def normal(seed: int, name: str, start: int, n: int) -> "Tensor":
    """Standard normal numbers, float64 [n]: the quantiles of uniform ones, within 1e-15 of them.

    The quantile is Wichura's PPND16 (algorithm AS 241, 1988).
    """
    import torch

    # The middle of one of 2^52 equal parts of (0, 1), less a half: exact, and never the edge.
    q = (uniform(seed, name, start, n) * 2.0**52).floor_().add_(0.5 - 2.0**51).mul_(2.0**-52)
    r = 0.180625 - q * q
    made = q * _ratio(r, _CENTRE)
    outer = torch.nonzero(r < 0.0).view(-1)
    tail = q[outer]
    r = (-_log(0.5 - tail.abs())).sqrt()
    far = torch.where(r <= 5.0, _ratio(r - 1.6, _TAIL), _ratio(r - 5.0, _FAR))
    made[outer] = torch.where(tail < 0.0, -far, far)
    return made


def key_of(seed: int, name: str) -> tuple[int, int]:
    """Philox's key for a stream: two words."""
    digest = hashlib.blake2b(f"{seed}\n{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox(counter: Sequence["Tensor"], key: tuple[int, int]) -> "list[Tensor]":
    """Philox4x32-10: four words of each counter, int64 of 0 to 2^32 - 1 [n] each.

    Args:
        counter: Four words each, like the result.
    """
    a, b, c, d = counter
    k, m = key
    for _ in range(_ROUNDS):
        # A product of 64 bits wraps around to a negative number: its bits are right all the same.
        left, right = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (right >> 32).bitwise_and_(_LOW).bitwise_xor_(b).bitwise_xor_(k)
        c = (left >> 32).bitwise_and_(_LOW).bitwise_xor_(d).bitwise_xor_(m)
        b, d = right.bitwise_and_(_LOW), left.bitwise_and_(_LOW)
        k, m = (k + _KEY_STEPS[0]) & _LOW, (m + _KEY_STEPS[1]) & _LOW
    return [a, b, c, d]


def _ratio(x: "Tensor", coefficients: Sequence[tuple[float, float]]) -> "Tensor":
    """A polynomial over another, by Horner's rule; a multiply-add would round otherwise."""
    import torch

    above, below = torch.zeros_like(x), torch.zeros_like(x)
    for p, q in coefficients:
        above.mul_(x).add_(p)
        below.mul_(x).add_(q)
    return above.div_(below)


def _log(x: "Tensor") -> "Tensor":
    """The natural logarithm, by 2 artanh((m - 1) / (m + 1)) of the mantissa, float64.

    A library's own has other last bits on another processor.
    """
    import torch

    mantissa, exponent = torch.frexp(x)
    low = mantissa < 0.7071067811865476
    mantissa = torch.where(low, mantissa * 2.0, mantissa)
    power = exponent.to(torch.float64) - low.to(torch.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    square = s * s
    series = torch.zeros_like(s)
    for k in range(21, 0, -2):
        series.mul_(square).add_(1.0 / k)
    return 2.0 * s * series + power * 0.6931471805599453


# Of the highest power first, numerator and denominator.
_CENTRE = (
    (2.5090809287301226727e3, 5.2264952788528545610e3),
    (3.3430575583588128105e4, 2.8729085735721942674e4),
    (6.7265770927008700853e4, 3.9307895800092710610e4),
    (4.5921953931549871457e4, 2.1213794301586595867e4),
    (1.3731693765509461125e4, 5.3941960214247511077e3),
    (1.9715909503065514427e3, 6.8718700749205790830e2),
    (1.3314166789178437745e2, 4.2313330701600911252e1),
    (3.3871328727963666080e0, 1.0),
)
_TAIL = (
    (7.74545014278341407640e-4, 1.05075007164441684324e-9),
    (2.27238449892691845833e-2, 5.47593808499534494600e-4),
    (2.41780725177450611770e-1, 1.51986665636164571966e-2),
    (1.27045825245236838258e0, 1.48103976427480074590e-1),
    (3.64784832476320460504e0, 6.89767334985100004550e-1),
    (5.76949722146069140550e0, 1.67638483018380384940e0),
    (4.63033784615654529590e0, 2.05319162663775882187e0),
    (1.42343711074968357734e0, 1.0),
)
_FAR = (
    (2.01033439929228813265e-7, 2.04426310338993978564e-15),
    (2.71155556874348757815e-5, 1.42151175831644588870e-7),
    (1.24266094738807843860e-3, 1.84631831751005468180e-5),
    (2.65321895265761230930e-2, 7.86869131145613259100e-4),
    (2.96560571828504891230e-1, 1.48753612908506148525e-2),
    (1.78482653991729133580e0, 1.36929880922735805310e-1),
    (5.46378491116411436990e0, 5.99832206555887937690e-1),
    (6.65790464350110377720e0, 1.0),
)
