"""Weighted sums: sum of w_i x_i, divided by the sum of w_i where that is asked for.

Computed in float64 and rounded once. Equal weights are one sum and one division, so that the mean
is the one in float64, rounded. An average of 16-bit tensors with unequal weights is computed in
float32, which has 2**15 times their digits, and rounded once.

Source: Wortsman et al., Model soups, ICML 2022, arXiv:2203.05482.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from streammap.errors import PlanError
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.merging.methods.base import Method, Parameter, Part


@final
class Linear(Method):
    """The weighted sum, or mean."""

    name: ClassVar[str] = "linear"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "weight": Parameter("source"),
        "normalize": Parameter(default=0.0, is_flag=True),
    }

    def form(
        self,
        key: str,
        parts: Sequence[Part],
        base: LinearForm | None,
        numbers: Mapping[str, float],
    ) -> LinearForm:
        """The sum.

        Raises:
            PlanError: weights that add up to 0, to be divided by that.
        """
        weights = [part.numbers["weight"] for part in parts]
        if numbers["normalize"]:
            weights = normalized(key, weights)
        return weighted(list(zip(weights, (part.form for part in parts), strict=True)))


def normalized(key: str, weights: Sequence[float]) -> list[float]:
    """Weights divided by their sum; of equal ones exactly one part of their number.

    Raises:
        PlanError: the sum is 0.
    """
    if len(set(weights)) == 1 and weights[0] != 0.0:
        return [1.0 / len(weights)] * len(weights)
    total = math.fsum(weights)
    if total == 0.0:
        told = " + ".join(f"{weight:g}" for weight in weights)
        raise PlanError(
            f"{key}: the weights add up to 0 ({told}) and can't be divided by that",
            hint="leave --normalize out (normalize: false in a recipe), or give other weights",
        )
    return [weight / total for weight in weights]


def weighted(parts: Sequence[tuple[float, LinearForm]]) -> LinearForm:
    """A sum in float64; one source alone, times 1, is that source's bytes."""
    counted = [(weight, form) for weight, form in parts if weight != 0.0]
    if len(counted) == 1 and counted[0][0] == 1.0:
        return counted[0][1]
    return graph.combine(parts, wide=True)
