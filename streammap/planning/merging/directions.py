"""Means of tensors as vectors: what their norms and dot products decide.

Each rule takes the dot products of n vectors and gives n coefficients; the result is the sum of
coefficient * vector. The vectors are the models' tensors, or where there is a base, their
differences from it, and the base is added again. Means on the sphere are sums too: each step of
theirs is a combination of the vectors, and the dot products of combinations are known. So one
reading of the tensors is enough, however many steps follow.

Constants are those of mergekit 0.1.5, so that the same cases are taken for degenerate.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, final

from streammap.errors import PlanError

Dots = Sequence[Sequence[float]]
"""Of n vectors, each with each, in float64."""


class Rule(Protocol):
    """How coefficients follow from dot products."""

    @property
    def name(self) -> str:
        """Its name in recipes."""
        ...

    @property
    def formula(self) -> Mapping[str, object]:
        """All that determines it, as JSON."""
        ...

    def coefficients(self, dots: Dots) -> Sequence[float]:
        """One for each vector.

        Raises:
            PlanError: they have no such mean.
        """
        ...


@final
@dataclass(frozen=True, slots=True)
class Slerp:
    """Spherical interpolation of two tensors (Shoemake, "Animating rotation", SIGGRAPH 1985).

        sin((1-t) a) / sin(a) * x + sin(t a) / sin(a) * y,    a the angle between x and y

    A straight line where the cosine is beyond 0.9995, or -0.9995.
    """

    t: float
    name = "slerp"

    @property
    def formula(self) -> Mapping[str, object]:
        """See Rule."""
        return {"slerp": self.t}

    def coefficients(self, dots: Dots) -> Sequence[float]:
        """See Rule."""
        cosine = _cosine(dots, 0, 1, least=1e-8)
        return _on_arc(cosine, self.t) if abs(cosine) <= 0.9995 else (1.0 - self.t, self.t)


@final
@dataclass(frozen=True, slots=True)
class NuSlerp:
    """The same with weights in place of t, up to where the tensors are parallel in float64."""

    weights: tuple[float, float]
    name = "nuslerp"

    @property
    def formula(self) -> Mapping[str, object]:
        """See Rule."""
        return {"nuslerp": self.weights}

    def coefficients(self, dots: Dots) -> Sequence[float]:
        """See Rule."""
        total = sum(self.weights)
        t = 0.5 if abs(total) < 1e-6 else self.weights[1] / total
        cosine = _cosine(dots, 0, 1, least=1e-7)
        return _on_arc(cosine, t) if 1.0 - cosine**2 > 1e-16 else (1.0 - t, t)


@final
@dataclass(frozen=True, slots=True)
class MultiSlerp:
    """The weighted mean of directions, as long as the tensors are on average.

        sum(w_i |x_i|) * m / |m|,    m = sum(w_i x_i / |x_i|)

    mergekit adds a step along the sphere from there; its direction is the sum of the w_i-fold
    parts of the x_i that are orthogonal to m, which is zero.
    """

    weights: tuple[float, ...]
    normalize: bool = True
    eps: float = 1e-8
    name = "multislerp"

    @property
    def formula(self) -> Mapping[str, object]:
        """See Rule."""
        return {"multislerp": self.weights, "normalize": self.normalize, "eps": self.eps}

    def coefficients(self, dots: Dots) -> Sequence[float]:
        """See Rule."""
        total = sum(self.weights) if self.normalize else 1.0
        weights = [w / total for w in self.weights]
        norms = [math.sqrt(dots[i][i]) for i in range(len(dots))]
        mean = [w / (norm + self.eps) for w, norm in zip(weights, norms, strict=True)]
        length = _length(mean, dots)
        if length < self.eps:
            if len(mean) == 2:
                return weights
            raise PlanError("its directions cancel out with these weights: there is no mean")
        scale = sum(w * norm for w, norm in zip(weights, norms, strict=True)) / length
        return [m * scale for m in mean]


@final
@dataclass(frozen=True, slots=True)
class Karcher:
    """The point of the sphere that is nearest to all directions, as long as the mean length.

    Steps to the mean of the logarithms (Karcher, "Riemannian center of mass and mollifier
    smoothing", 1977), from the mean in a straight line; for models, arXiv:2603.04972.
    """

    max_steps: int = 10
    tolerance: float = 1e-5
    name = "karcher"

    @property
    def formula(self) -> Mapping[str, object]:
        """See Rule."""
        return {"karcher": self.max_steps, "tolerance": self.tolerance}

    def coefficients(self, dots: Dots) -> Sequence[float]:
        """See Rule."""
        if len(dots) == 1:
            return [1.0]
        norms = [math.sqrt(dots[i][i]) for i in range(len(dots))]
        some = [i for i, norm in enumerate(norms) if norm > self.tolerance]
        if not some:
            return [0.0] * len(dots)
        cosines = [[1.0 if i == j else _cosine(dots, i, j, least=0.0) for j in some] for i in some]
        mean = self._mean(cosines)
        length = sum(norms) / len(norms)
        made = [0.0] * len(dots)
        for i, m in zip(some, mean, strict=True):
            made[i] = length * m / norms[i]
        return made

    def _mean(self, cosines: Dots) -> list[float]:
        """In units of the directions themselves."""
        n = len(cosines)
        mean = [1.0 / n] * n
        length = _length(mean, cosines)
        mean = [m / length for m in mean] if length >= self.tolerance else [1.0] + [0.0] * (n - 1)
        for _ in range(self.max_steps):
            step = [0.0] * n
            for i in range(n):
                cosine = _clamped(sum(c * m for c, m in zip(cosines[i], mean, strict=True)))
                angle = math.acos(cosine)
                if angle < self.tolerance:
                    continue
                share = angle / math.sin(angle) / n
                step = [s - share * cosine * m for s, m in zip(step, mean, strict=True)]
                step[i] += share
            length = _length(step, cosines)
            if length < self.tolerance:
                break
            along, across = math.cos(length), math.sin(length) / length
            mean = [along * m + across * s for m, s in zip(mean, step, strict=True)]
            size = _length(mean, cosines)
            mean = [m / size for m in mean] if size > self.tolerance else mean
        return mean


@final
@dataclass(frozen=True, slots=True)
class ModelStock:
    """The mean of n models, drawn to their base the more, the wider they stand (arXiv:2403.19522).

        base + t * mean(x_i - base),    t = n c / (1 + (n-1) c)

    c is the mean cosine between two differences. The base alone where 1 + (n-1) c is below 1e-6.
    """

    name = "model_stock"

    @property
    def formula(self) -> Mapping[str, object]:
        """See Rule."""
        return {"model_stock": None}

    def coefficients(self, dots: Dots) -> Sequence[float]:
        """See Rule."""
        n = len(dots)
        cosines = [
            _clamped(dots[i][j] / max(math.sqrt(dots[i][i]) * math.sqrt(dots[j][j]), 1e-6))
            for i in range(n)
            for j in range(i + 1, n)
        ]
        cosine = math.fsum(cosines) / len(cosines)
        below = 1.0 + (n - 1) * cosine
        return [0.0 if abs(below) < 1e-6 else cosine / below] * n


def _cosine(dots: Dots, i: int, j: int, *, least: float) -> float:
    """Of an angle; 1 and -1 exactly where one vector is a multiple of the other.

    Args:
        least: Norms up to here count as 1.
    """
    a, b = dots[i][i], dots[j][j]
    if min(a, b) > least**2:
        return _clamped(dots[i][j] / a * math.sqrt(a / b))
    a, b = (x if x > least**2 else 1.0 for x in (a, b))
    return _clamped(dots[i][j] / math.sqrt(a) / math.sqrt(b))


def _on_arc(cosine: float, t: float) -> tuple[float, float]:
    angle = math.acos(cosine)
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _length(vector: Sequence[float], dots: Dots) -> float:
    """Of a combination of the vectors whose dot products are given."""
    products = [a * b * dots[i][j] for i, a in enumerate(vector) for j, b in enumerate(vector)]
    return math.sqrt(max(math.fsum(products), 0.0))


def _clamped(cosine: float) -> float:
    return max(-1.0, min(1.0, cosine))
