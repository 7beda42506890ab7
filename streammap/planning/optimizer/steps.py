"""What the options of a step become, so that a result's steps are those of its source.

AdamW moves a weight by lr m / (sqrt(v) + eps), and takes lr decay W off it. Where a weight of the
result is c times the source's, and its gradient d times,

    m' = d m, sqrt(v') = d sqrt(v), eps' = d eps    ->    the same quotient
    lr' = c lr                                      ->    a step that is c times the source's
    decay' = decay / c                              ->    the same share taken off

Twofold width gives c = 1/2 for the weights that read hidden units, and 1 for embeddings, norms and
biases: the rates of muP (Yang et al., arXiv:2203.03466). Without the new rates a wider model takes
larger steps in function space; with them its first step is the growth of the source's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from streammap.errors import some
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap


@final
@dataclass(frozen=True, slots=True)
class StepFactors:
    """What the options of one parameter are multiplied by."""

    lr: float = 1.0
    eps: float = 1.0
    weight_decay: float = 1.0


def factors(forms: Mapping[str, tuple[LinearForm, LinearForm]]) -> dict[str, StepFactors]:
    """Parameter -> the factors with which the steps stay, for each that has them.

    Args:
        forms: Parameter -> how it is computed, and how its mean gradient is.
    """
    found = {}
    for name, (weight, gradient) in forms.items():
        of_weight, of_gradient = _scale(weight), _scale(gradient)
        if of_weight and of_gradient:
            found[name] = StepFactors(of_weight, of_gradient, 1.0 / of_weight)
    return found


def notes(found: Mapping[str, StepFactors], n: int, n_models: int) -> list[str]:
    """What the factors are, for people.

    Args:
        n: Parameters of the result.
        n_models: Models that it is made of.
    """
    if n_models > 1 and not found:
        return ["which learning rate keeps the steps is not known: several models are added up"]
    by_factors: dict[StepFactors, list[str]] = {}
    for name, one in found.items():
        by_factors.setdefault(one, []).append(name)
    told = []
    for one, names in by_factors.items():
        parts = [
            f"{word} x {value:.6g}"
            for word, value in (
                ("learning rate", one.lr),
                ("eps", one.eps),
                ("weight decay", one.weight_decay),
            )
            if not math.isclose(value, 1.0)
        ]
        if parts:
            told.append(
                f"to go on with the source's steps: {', '.join(parts)} for {len(names)} parameters "
                f"({some(names, limit=2)})"
            )
    if len(found) < n:
        told.append(f"{n - len(found)} parameters have no one learning rate that keeps the steps")
    return told


def _scale(form: LinearForm) -> float | None:
    """What all numbers of a form are multiplied by, where units of a group are equal.

    None where it differs from number to number, or is 0.
    """
    scales = set()
    for term in form.terms:
        stored = [c for c, ref in term.blend if not graph.is_constant(ref)]
        if not stored:
            continue
        product = abs(math.fsum(stored))
        for m in term.maps:
            factor = 1.0 if m is None else _scale_of(m)
            if factor is None:
                return None
            product *= factor
        scales.add(product)
    return scales.pop() or None if len(scales) == 1 else None


def _scale_of(m: AxisMap) -> float | None:
    if not isinstance(m, BlockMap):
        return None
    sums = [abs(math.fsum(value for _, value in row)) for row in m.rows if row]
    return sums[0] if sums and all(math.isclose(one, sums[0]) for one in sums) else None
