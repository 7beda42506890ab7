"""Interpolate: (1 - alpha) * target + alpha * source, every tensor.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from dataclasses import replace
from typing import ClassVar

from streammap.common.declare import Real
from streammap.errors import ArchitectureError, CheckpointError, PlanError, some
from streammap.operators.declare import Input, Operator, PlanLike, argument, declared, option
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan, Promise, Step


@declared
class Interpolate(Operator):
    """Blend two checkpoints of one model: (1 - alpha) * TGT + alpha * SRC."""

    examples: ClassVar[tuple[str, ...]] = ("interpolate grown/ big/ out/ --alpha 0.5",)

    target: PlanLike = argument(
        help="The other checkpoint; files and dtypes of the result are its own.",
        kind=Input(),
        metavar="TGT",
        kw_only=False,
    )
    alpha: float = option(
        help="Weight of SRC in the result, 0 to 1.",
        group="Blend",
        kind=Real(0.0, 1.0, hint="give --alpha 0.5"),
        metavar="A",
    )

    def plan(self, source: Plan, *, target: Plan) -> Plan:
        """The blended plan, in the frame of `target`.

        Raises:
            PlanError: two checkpoints that are not of one model.
        """
        _check_sizes(source, target)
        promise, reason = self._promise()
        mixed = {
            (other.spec.dtype, form.spec.dtype)
            for key, form in target.targets.items()
            if (other := source.targets.get(key)) is not None
            and other.spec.dtype != form.spec.dtype
        }
        notes = [f"source {a} and target {b}: the result is {b}" for a, b in sorted(mixed)]
        step = Step(self.name, {"alpha": self.alpha}, promise, reason, tuple(notes))
        return _blend(source, target, self.alpha, step)

    def _promise(self) -> tuple[Promise, str]:
        if self.alpha == 0.0:
            return "bit-exact", "alpha 0 is the target"
        if self.alpha == 1.0:
            return "bit-exact", "alpha 1 is the source"
        return "approximate", "the mean of two models' weights is a third model"


def _check_sizes(source: Plan, target: Plan) -> None:
    """Equal shapes can hide another number of heads; where a spec is known, sizes must agree."""
    if (source.config, source.architecture) == (target.config, target.architecture):
        return  # no spec has to be loaded for it: shapes are checked anyway
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


def _blend(source: Plan, target: Plan, alpha: float, step: Step) -> Plan:
    """(1 - alpha) * target + alpha * source, everywhere; the frame (files, dtypes) is target's.

    Raises:
        PlanError: tensors that only one of them has, or whose shapes differ.
    """
    _check_alike(source, target)
    targets: dict[str, LinearForm] = {}
    for key, form in target.targets.items():
        other = source.targets.get(key)
        if other is None or not form.spec.is_float:
            targets[key] = form
        else:
            parts = [(1.0 - alpha, form), (alpha, other)]
            targets[key] = graph.combine(parts, dtype=form.spec.dtype)
    sources = tuple(dict.fromkeys((*source.sources, *target.sources)))
    levels = source.levels or target.levels
    return replace(
        target,
        targets=targets,
        sources=sources,
        steps=(*source.steps, *target.steps, step),
        levels=levels,
        request=None,
    )


def _check_alike(source: Plan, target: Plan) -> None:
    buffers: set[str] = set()
    if source.specs != target.specs:
        buffers = _buffers(target) | _buffers(source)
    missing = [k for k in target.targets if k not in source.targets and k not in buffers]
    surplus = [k for k in source.targets if k not in target.targets and k not in buffers]
    if missing or surplus:
        difference = (
            f"lacks {some(missing)}" if missing else f"has {some(surplus)}, which the target lacks"
        )
        raise PlanError(
            f"the source {difference} ({len(missing)} missing, {len(surplus)} surplus of "
            f"{len(target.targets)} tensors)",
            hint="blend two checkpoints of the same model",
        )
    for key, form in target.targets.items():
        other = source.targets.get(key)
        if other is not None and other.spec.shape != form.spec.shape and key not in buffers:
            raise PlanError(
                f"{key}: source shape {list(other.spec.shape)}, "
                f"target shape {list(form.spec.shape)}",
                hint="blend two checkpoints of the same size",
            )
        if other is not None and form.spec.is_float and not other.spec.is_float:
            raise PlanError(f"{key}: source dtype {other.spec.dtype}, target {form.spec.dtype}")


def _buffers(plan: Plan) -> set[str]:
    """Keys that the spec calls buffers; none where no spec is known."""
    try:
        model = plan.model
    except (ArchitectureError, CheckpointError):
        return set()
    return {
        key
        for f in model.families
        if f.rule.kind in ("buffer", "drop")
        for key in f.members.values()
    }
