"""Interpolate: (1 - alpha) * target + alpha * source, every tensor.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

import math
from dataclasses import dataclass

from streammap import planner
from streammap.errors import ArchitectureError, CheckpointError, PlanError
from streammap.plan import Plan, Step


@dataclass(frozen=True, slots=True)
class Interpolate:
    """How much of the source the result has."""

    alpha: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha) or not 0.0 <= self.alpha <= 1.0:
            raise PlanError(f"alpha is {self.alpha}, expected 0 to 1", hint="give --alpha 0.5")

    def plan(self, source: Plan, target: Plan) -> Plan:
        """The blended plan, in the frame of `target`.

        Raises:
            PlanError: two checkpoints that are not of one model.
        """
        _check_sizes(source, target)
        options: dict[str, object] = {"alpha": self.alpha}
        notes = []
        mixed = {
            (other.spec.dtype, form.spec.dtype)
            for key, form in target.targets.items()
            if (other := source.targets.get(key)) is not None
            and other.spec.dtype != form.spec.dtype
        }
        for mine, theirs in sorted(mixed):
            notes.append(f"source {mine} and target {theirs}: the result is {theirs}")
        if self.alpha == 0.0:
            step = Step("interpolate", options, "bit-exact", "alpha 0 is the target", tuple(notes))
        elif self.alpha == 1.0:
            step = Step("interpolate", options, "bit-exact", "alpha 1 is the source", tuple(notes))
        else:
            reason = "the mean of two models' weights is a third model"
            step = Step("interpolate", options, "approximate", reason, tuple(notes))
        return planner.blend(source, target, self.alpha, step)


def _check_sizes(source: Plan, target: Plan) -> None:
    """Equal shapes can hide another number of heads; where a spec is known, sizes must agree."""
    try:
        mine, theirs = source.model.sizes, target.model.sizes
    except (ArchitectureError, CheckpointError):
        return
    for axis, size in theirs.items():
        if axis in mine and mine[axis] != size:
            raise PlanError(
                f"{axis}: source {mine[axis]}, target {size}",
                hint="blend two checkpoints of the same size",
            )
