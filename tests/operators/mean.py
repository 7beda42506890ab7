"""An operator with any number of inputs, and one that may be left out."""

from dataclasses import replace
from typing import ClassVar

from streammap.operators.declare import Input, Operator, PlanLike, argument, declared, option
from streammap.planning import graph
from streammap.planning.plan import Plan, Step


@declared
class MeanOf(Operator):
    """The mean of any number of checkpoints."""

    examples: ClassVar[tuple[str, ...]] = ("mean-of a/ b/ c/ --output mean/",)

    others: tuple[PlanLike, ...] = argument(
        default=(), help="Further checkpoints.", kind=Input(many=True), kw_only=False
    )
    less: PlanLike | None = option(
        default=None, help="A checkpoint to subtract.", kind=Input(), metavar="CHECKPOINT"
    )

    def plan(
        self, source: Plan, *, others: tuple[Plan, ...] = (), less: Plan | None = None
    ) -> Plan:
        """The mean."""
        plans = (source, *others)
        targets = {}
        for key, form in source.targets.items():
            parts = [(1.0 / len(plans), one.targets[key]) for one in plans]
            if less is not None:
                parts.append((-1.0, less.targets[key]))
            targets[key] = graph.combine(parts, dtype=form.spec.dtype)
        sources = tuple(dict.fromkeys(s for one in plans for s in one.sources))
        sources += () if less is None else less.sources
        step = Step(self.name, {"n": len(plans)}, "approximate", "a mean")
        return replace(source, targets=targets, sources=sources, steps=(step,), request=None)
