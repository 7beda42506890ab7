"""Permute: put the units of every width axis in a random order.

The function stays only where the spec is right: if it labelled a dimension or its layout wrongly,
units would no longer meet their own weights. That makes it the hardest test of a spec.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from streammap.architectures.axis_facts import Layer
from streammap.architectures.model import Model
from streammap.architectures.schema import Axis
from streammap.common.kinds import Names
from streammap.errors import PlanError
from streammap.operators.declare import Operator, declared, option
from streammap.planning import maps, planner
from streammap.planning.by_layer import layered
from streammap.planning.maps import BlockMap, MapPair
from streammap.planning.ordering import units
from streammap.planning.plan import Plan, Step
from streammap.planning.tensor_maps.axis_change import AxisChange


@declared
class Permute(Operator):
    """Put the units of every width in a random order; the function stays."""

    examples: ClassVar[tuple[str, ...]] = ("permute llama/ shuffled/ --seed 1 --only mlp",)

    seed: int = option(default=0, help="Which random order.", metavar="N")
    without: tuple[str, ...] = option(
        default=(), help="Axis that keeps its order.", kind=Names(), metavar="AXIS"
    )
    only: tuple[str, ...] = option(
        default=(),
        help="Axis to permute, instead of all; may be repeated.",
        kind=Names(),
        metavar="AXIS",
    )
    each_layer: bool = option(
        default=False, help="Another order in each layer, for what lies inside of layers."
    )
    signed: bool = option(
        default=False, help="Negate hidden units too, at random, where all norms allow it."
    )

    def plan(self, source: Plan) -> Plan:
        """The permuted plan.

        Raises:
            PlanError: no width axis has one of these names.
        """
        model = source.model
        self._check_axes(model)
        chosen = dict(self._maps(model, random.Random(self.seed)))
        by_axis = self._by_layer(model, chosen) if self.each_layer else {}
        negated = self._negated(model, chosen) if self.signed else {}
        pairs = {name: maps.pair_of(m) for name, m in chosen.items() if name not in by_axis}
        pairs |= {name: MapPair(m, m) for name, m in negated.items()}
        options: dict[str, object] = {"seed": self.seed}
        options |= {name: True for name in ("each_layer", "signed") if getattr(self, name)}
        step = Step(self.name, options, "exact", "units change places")
        by_layer = layered.change(model, by_axis)
        change = AxisChange(pairs, {}, {}, "exact", 1.0, by_layer=by_layer, signed=self.signed)
        return planner.remap(source, change, step)

    def _by_layer(
        self, model: Model, chosen: Mapping[str, BlockMap]
    ) -> dict[str, dict[Layer, BlockMap]]:
        """Axis -> layer -> its order, for the axes that may differ and all that goes with them."""
        lying = units.by_layer(model, chosen)
        layers = sorted({layer for there in lying.values() for layer in there})
        found: dict[str, dict[Layer, BlockMap]] = {axis: {} for axis in lying}
        for depth, number in layers:
            source = random.Random(f"{self.seed} {depth} {number}")
            for axis, m in self._maps(model, source):
                if (depth, number) in lying.get(axis, ()):
                    found[axis][depth, number] = m
        return found

    def _negated(self, model: Model, chosen: Mapping[str, BlockMap]) -> dict[str, BlockMap]:
        """Axis -> its order with a random sign of each unit, for those that may have one.

        Raises:
            PlanError: no chosen axis may.
        """
        source = random.Random(f"{self.seed} signs")
        found = {
            axis: BlockMap(
                tuple(((row[0][0], source.choice((1.0, -1.0))),) for row in m.rows), m.n_in
            )
            for axis, m in chosen.items()
            if units.takes_signs(model, axis)
        }
        if not found:
            raise PlanError(
                f"--signed: no units of {model.name} may be negated",
                hint="hidden units may, where all their norms are RMSNorms; leave --signed out",
            )
        return found

    def _check_axes(self, model: Model) -> None:
        for name in self.only:
            if name not in model.architecture.axes:
                raise PlanError(
                    f"{model.name} has no axis {name!r}",
                    hint=f"its axes are {', '.join(model.sizes)}",
                )

    def _maps(self, model: Model, source: random.Random) -> Iterable[tuple[str, BlockMap]]:
        of_heads = units.sharing(model)
        made: dict[str, list[int]] = {}
        for axis in model.architecture.axes.values():
            if not self._is_free(model, axis) or axis.name in of_heads:
                continue
            made[axis.name] = self._places(model, axis, source)
        for heads, kvs in of_heads.items():
            there = [kv for kv in kvs if kv in model.sizes]
            if heads in model.sizes and there:
                made |= self._heads(model, heads, there, made, source)
        for name, places in made.items():
            yield name, BlockMap(tuple(((j, 1.0),) for j in places), len(places))

    def _heads(
        self,
        model: Model,
        heads: str,
        kvs: Sequence[str],
        made: Mapping[str, list[int]],
        source: random.Random,
    ) -> dict[str, list[int]]:
        """Places of query heads: kv heads change places, and heads inside each group do."""
        kv = kvs[0]
        n_kv, group = model.sizes[kv], model.sizes[heads] // model.sizes[kv]
        order = made.get(kv, list(range(n_kv)))
        if not self._is_free(model, model.architecture.axes[heads]) or len(kvs) > 1:
            group_orders = [list(range(group)) for _ in range(n_kv)]
        else:
            group_orders = [source.sample(range(group), group) for _ in range(n_kv)]
        found = {heads: [k * group + j for k in order for j in group_orders[k]]}
        for other in kvs[1:]:
            alike = model.sizes[other] == n_kv
            found[other] = order if alike else list(range(model.sizes[other]))
            if not alike:
                found[kv], found[heads] = list(range(n_kv)), list(range(model.sizes[heads]))
        return found

    def _places(self, model: Model, axis: Axis, source: random.Random) -> list[int]:
        size = model.sizes[axis.name]
        n_groups = units.n_groups(model, axis.name)
        inside = size // n_groups
        order = source.sample(range(n_groups), n_groups)
        return [g * inside + j for g in order for j in source.sample(range(inside), inside)]

    def _is_free(self, model: Model, axis: Axis) -> bool:
        if not units.is_movable(model, axis):
            return False
        return axis.name not in self.without and (not self.only or axis.name in self.only)
