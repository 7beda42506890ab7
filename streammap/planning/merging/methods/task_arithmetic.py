"""Task arithmetic: base + lambda * sum of w_i (x_i - base), in float64 and rounded once.

Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023, arXiv:2212.04089.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from streammap.planning.graph import LinearForm
from streammap.planning.merging.methods.base import Method, Parameter, Part
from streammap.planning.merging.methods.linear import weighted

_ZERO = 1e-8
"""A sum of weights below it is not divided by: mergekit's rule."""


@final
class TaskArithmetic(Method):
    """What each source has learned beyond a base, added to it."""

    name: ClassVar[str] = "task_arithmetic"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "weight": Parameter("source"),
        "lambda": Parameter(default=1.0),
        "normalize": Parameter(default=0.0, is_flag=True),
    }
    takes_base: ClassVar[bool] = True

    def form(
        self,
        key: str,
        parts: Sequence[Part],
        base: LinearForm | None,
        numbers: Mapping[str, float],
    ) -> LinearForm:
        """The base's tensor with the differences added."""
        assert base is not None
        weights = [part.numbers["weight"] for part in parts]
        factor, total = numbers["lambda"], math.fsum(weights)
        if numbers["normalize"] and abs(total) >= _ZERO:
            factor /= total
        weights = [factor * weight for weight in weights]
        left = 1.0 - math.fsum(weights)
        forms = (part.form for part in parts)
        return weighted([(left, base), *zip(weights, forms, strict=True)])
