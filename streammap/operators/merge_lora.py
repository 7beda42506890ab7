"""Merge LoRA adapters: W + scale * B A, in the same pass as whatever follows.

LoRA, arXiv:2106.09685. The scale is alpha / r, times what is given here.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, final

from streammap.common.kinds import Form, Kind, shown
from streammap.errors import PlanError
from streammap.operators.declare import Input, Operator, PlanLike, argument, declared, option
from streammap.planning.adapters import merging
from streammap.planning.plan import Plan, Step


@final
class Scales(Kind):
    """A number, or one for each of several."""

    form: Form = "many"

    def parse(self, value: Any, name: str) -> tuple[float, ...]:
        """From a number, a text, or several of them."""
        several = value if isinstance(value, list | tuple) else (value,)
        return tuple(_number(one, name) for one in several)

    def encode(self, value: Any) -> object:
        """A list; None for none."""
        return list(value) or None


@declared
class MergeLora(Operator):
    """Merge LoRA adapters into their model: each weight W becomes W + scale * B A.

    MODEL+ADAPTER, wherever a checkpoint is named, is the same without options.
    """

    examples: ClassVar[tuple[str, ...]] = ("merge-lora llama/ adapter/ --output merged/",)

    adapters: PlanLike | Sequence[PlanLike] = argument(
        help="Adapters: folders that peft's save_pretrained wrote.",
        kind=Input(many=True, adapter=True),
        metavar="ADAPTER",
        kw_only=False,
    )
    scale: float | Sequence[float] = option(
        default=(),
        help="What an adapter's own scale is multiplied by: for all, or once for each in turn.",
        group="Merge",
        kind=Scales(),
        metavar="S",
    )

    def plan(self, source: Plan, *, adapters: tuple[Plan, ...]) -> Plan:
        """The model's plan with the adapters merged.

        Raises:
            PlanError: an adapter for another model, or not as many scales as adapters.
            CheckpointError: an adapter that is no LoRA, or one that can't be merged.
        """
        given = (self.scale,) if isinstance(self.scale, float) else tuple(self.scale)
        scales = _for_each(given, len(adapters))
        merged, notes = merging.merge(source, list(zip(adapters, scales, strict=True)))
        names = [adapter.sources[0].name for adapter in adapters]
        n = sum(merged.targets[key] is not source.targets.get(key) for key in merged.targets)
        step = Step(
            self.name,
            {"adapters": names, **({"scale": list(given)} if given else {})},
            "approximate",
            f"the adapter's function, but for rounding once: {n} tensors change",
            notes,
        )
        return replace(merged, steps=(*source.steps, step))


def _for_each(given: tuple[float, ...], n: int) -> tuple[float, ...]:
    """A scale for each of n adapters."""
    if n == 0:
        raise PlanError("merge-lora: no adapter", hint="name one, or several, after the model")
    scales = given or (1.0,)
    if len(scales) not in (1, n):
        raise PlanError(
            f"scale: {len(scales)} numbers for {n} adapters",
            hint="give one for all of them, or one for each",
        )
    return scales * n if len(scales) == 1 else scales


def _number(value: object, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"{name} is {shown(value)}, expected a number", hint="give --scale 1.0")
    return number
