"""Interpolate: (1 - alpha) * target + alpha * source, every tensor.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from streammap.errors import PlanError
from streammap.operators.declare import (
    Apply,
    Input,
    Operator,
    PlanLike,
    argument,
    declared,
    option,
)
from streammap.operators.numbers import Alpha, SettingLike
from streammap.operators.ordering.align import AlignLike, Axes, aligned
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.matching import frame
from streammap.planning.matching.config_difference import FieldDifference
from streammap.planning.matching.frame import Match, Words
from streammap.planning.merging import places
from streammap.planning.plan import Plan, Promise, Step

if TYPE_CHECKING:
    from streammap.planning.merging.settings import Setting


@declared
class Interpolate(Operator):
    """Blend two checkpoints of one model: (1 - alpha) * TGT + alpha * SRC."""

    examples: ClassVar[tuple[str, ...]] = (
        "interpolate grown/ big/ out/ --alpha 0.5",
        "interpolate grown/ big/ out/ --alpha '[0.2, 0.8]'",
    )

    target: PlanLike = argument(
        help="The other checkpoint; the result has its names, dtypes, config.json and files.",
        kind=Input(),
        metavar="TGT",
        kw_only=False,
    )
    alpha: SettingLike = option(
        help="Weight of SRC in the result, 0 to 1; a list over depth or rules, as JSON or a file.",
        group="Blend",
        kind=Alpha(),
        metavar="A",
    )
    untie: bool = option(
        default=False,
        help="Give a tied head a tensor of its own, where only one of the two has that.",
        group="Blend",
    )

    align: AlignLike = option(
        default=None,
        help="Put the units of TGT in the order of SRC first: all, or those of some axes.",
        group="Blend",
        kind=Axes(),
        metavar="[AXES]",
    )

    def arranged(  # type: ignore[override]
        self, apply: Apply, source: Plan, *, target: Plan
    ) -> tuple[Operator, Plan, Mapping[str, Plan]]:
        """With the target's units in the source's order, where that is asked for."""
        if self.align is None:
            return self, source, {"target": target}
        made = aligned(apply, self.align, source, {"the target": target})
        return replace(self, align=None), source, {"target": made["the target"]}

    def plan(self, source: Plan, *, target: Plan) -> Plan:
        """The blended plan, in the frame of `target`: its names, dtypes, config.json and files.

        Raises:
            PlanError: two checkpoints that are not of one model.
        """
        words = Words()
        notes: list[str] = []
        if self.untie:
            (source, target), told = frame.untied({words.source: source, words.target: target})
            notes += told
        match = frame.match(source, target, words)
        targets = _blend(target, match, self._alpha)
        added = {name: source.targets[key] for key, name in match.added.items()}
        return replace(
            target,
            targets=targets | added,
            config=frame.config_of(source, target, match),
            sources=tuple(dict.fromkeys((*source.sources, *target.sources))),
            steps=(*source.steps, *target.steps, self._step(match.fields, (*notes, *match.notes))),
            levels=source.levels or target.levels,
            request=None,
        )

    @property
    def _alpha(self) -> "Setting":
        return Alpha().setting(self.alpha)

    def _step(self, fields: Sequence[FieldDifference], notes: Sequence[str]) -> Step:
        promise: Promise = "bit-exact"
        numbers = set(self._alpha.numbers)
        if numbers == {0.0}:
            reason = "alpha 0 is the target"
        elif numbers == {1.0} and self._alpha.number is not None and fields:
            promise, reason = "approximate", f"the source has another {fields[0].name}"
        elif numbers == {1.0} and self._alpha.number is not None:
            reason = "alpha 1 is the source"
        else:
            promise, reason = "approximate", "the mean of two models' weights is a third model"
        options = {"alpha": Alpha().encode(self.alpha), **({"untie": True} if self.untie else {})}
        blends = numbers != {1.0}
        return Step(self.name, options, promise, reason, tuple(notes), parts_twins=blends)


def _blend(target: Plan, match: Match, alpha: "Setting") -> dict[str, LinearForm]:
    """(1 - alpha) * target + alpha * source, everywhere; dtypes are the target's.

    Raises:
        PlanError: a tensor that no rule of alpha takes.
    """
    at = places.places_of(target, [alpha])
    targets = dict(target.targets)
    for key, other in match.forms.items():
        weight = alpha.at(at[key])
        if weight is None:
            raise PlanError(
                f"alpha: no rule takes {key}",
                hint="end the list with a number, which all other tensors get",
            )
        form = targets[key]
        parts = [(1.0 - weight, form), (weight, other)]
        targets[key] = graph.combine(parts, dtype=form.spec.dtype)
    return targets
