"""Permute: put the units of every width axis in a random order.

The function stays only where the spec is right: if it labelled a dimension or its layout wrongly,
units would no longer meet their own weights. That makes it the hardest test of a spec.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from streammap.architectures import config_fields
from streammap.architectures.axis_facts import Layer
from streammap.architectures.model import Model
from streammap.architectures.schema import Axis
from streammap.common.declare import Names
from streammap.errors import PlanError
from streammap.operators.declare import Operator, declared, option
from streammap.planning import maps, planner
from streammap.planning.by_layer import layered
from streammap.planning.maps import BlockMap
from streammap.planning.plan import Plan, Step
from streammap.planning.tensor_maps import AxisChange


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

    def plan(self, source: Plan) -> Plan:
        """The permuted plan.

        Raises:
            PlanError: no width axis has one of these names.
        """
        model = source.model
        self._check_axes(model)
        chosen = dict(self._maps(model, random.Random(self.seed)))
        by_axis = self._by_layer(model, chosen) if self.each_layer else {}
        pairs = {name: maps.pair_of(m) for name, m in chosen.items() if name not in by_axis}
        options = {"seed": self.seed, **({"each_layer": True} if self.each_layer else {})}
        step = Step(self.name, options, "exact", "units change places")
        by_layer = layered.change(model, by_axis)
        change = AxisChange(pairs, {}, {}, "exact", 1.0, by_layer=by_layer)
        return planner.remap(source, change, step)

    def _by_layer(
        self, model: Model, chosen: Mapping[str, BlockMap]
    ) -> dict[str, dict[Layer, BlockMap]]:
        """Axis -> layer -> its order, for the axes that may differ and all that goes with them."""
        lying = {axis: layered.lies(model, axis) for axis in chosen}
        free = {axis for axis, found in lying.items() if found.layers and found.shared is None}
        for shared in model.architecture.shared_heads:
            pair = {shared.heads, shared.kv} & chosen.keys()
            if not pair <= free or len({lying[axis].layers for axis in pair}) > 1:
                free -= pair
        layers = sorted({layer for axis in free for layer in lying[axis].layers})
        found: dict[str, dict[Layer, BlockMap]] = {axis: {} for axis in free}
        for depth, number in layers:
            source = random.Random(f"{self.seed} {depth} {number}")
            for axis, m in self._maps(model, source):
                if axis in free and (depth, number) in lying[axis].layers:
                    found[axis][depth, number] = m
        return found

    def _check_axes(self, model: Model) -> None:
        for name in self.only:
            if name not in model.architecture.axes:
                raise PlanError(
                    f"{model.name} has no axis {name!r}",
                    hint=f"its axes are {', '.join(model.sizes)}",
                )

    def _maps(self, model: Model, source: random.Random) -> Iterable[tuple[str, BlockMap]]:
        of_heads: dict[str, list[str]] = {}
        for shared in model.architecture.shared_heads:
            of_heads.setdefault(shared.heads, []).append(shared.kv)
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
        about = model.architecture.experts.get(axis.name)
        n_groups = 1
        if about is not None and about.groups is not None:
            value = config_fields.field_value(model.config, about.groups)
            n_groups = value if isinstance(value, int) and value and size % value == 0 else 1
        inside = size // n_groups
        order = source.sample(range(n_groups), n_groups)
        return [g * inside + j for g in order for j in source.sample(range(inside), inside)]

    def _is_free(self, model: Model, axis: Axis) -> bool:
        if axis.kind not in ("width", "expert") or not model.sizes.get(axis.name):
            return False
        return axis.name not in self.without and (not self.only or axis.name in self.only)
