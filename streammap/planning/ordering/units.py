"""Which units of a model may change places while its function stays.

Query heads stay with the kv head that they read, so that groups of them change places, and heads
inside of a group; experts do the same where a router first chooses groups of them. An axis inside
of layers may have another order in each.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import final

from streammap.architectures import axis_facts, config_fields
from streammap.architectures import expression as expressions
from streammap.architectures.axis_facts import Layer
from streammap.architectures.expression import Name
from streammap.architectures.model import Family, Model
from streammap.architectures.schema import Axis
from streammap.planning.by_layer import layered

_PLAIN = ("linear", "embedding", "norm")
"""Kinds of tensors that are known to change their signs with a hidden unit's, or not to."""


@final
@dataclass(frozen=True, slots=True)
class Movable:
    """Units that are put in order together: those of an axis, in one layer or everywhere."""

    axis: str
    layer: Layer | None
    """None for one order in all the model."""
    n: int
    n_groups: int = 1
    """Groups of neighbours that stay together: kv heads with their query heads."""
    kv: tuple[str, ...] = ()
    """Axes that have one unit for each group, and their order."""
    inside: bool = True
    """Whether units change places inside of a group."""
    signed: bool = False
    """Whether a unit may change its sign as well."""

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes that it orders."""
        return (self.axis, *self.kv)


def is_movable(model: Model, axis: Axis) -> bool:
    """Whether the units of an axis may change places."""
    return axis.kind in ("width", "expert") and bool(model.sizes.get(axis.name))


def held(model: Model, axis: str) -> str | None:
    """Why the units of an axis must keep their order; None where they need not."""
    return model.architecture.caveats.get(axis)


def n_groups(model: Model, axis: str) -> int:
    """In how many groups of neighbours the units of an axis are chosen; 1 but for some routers."""
    about = model.architecture.experts.get(axis)
    if about is None or about.groups is None:
        return 1
    value = config_fields.meant(model.config, about.groups)
    is_count = isinstance(value, int) and value > 0 and model.sizes[axis] % value == 0
    return value if is_count and isinstance(value, int) else 1


def sharing(model: Model) -> dict[str, list[str]]:
    """Axis of query heads -> the axes of kv heads that they read."""
    found: dict[str, list[str]] = {}
    for shared in model.architecture.shared_heads:
        found.setdefault(shared.heads, []).append(shared.kv)
    return found


def by_layer(model: Model, axes: Collection[str]) -> dict[str, tuple[Layer, ...]]:
    """Of these axes, those that may have another order in each layer, with their layers."""
    lying = {axis: layered.lies(model, axis) for axis in axes}
    free = {axis for axis, found in lying.items() if found.layers and found.shared is None}
    for shared in model.architecture.shared_heads:
        pair = {shared.heads, shared.kv} & lying.keys()
        if not pair <= free or len({lying[axis].layers for axis in pair}) > 1:
            free -= pair
    return {axis: lying[axis].layers for axis in axes if axis in free}


def movables(model: Model, wanted: Collection[str]) -> tuple[Movable, ...]:
    """What can be put in order by itself, the hidden units first.

    Args:
        wanted: Axes whose units may change places. Query heads take their kv heads along.
    """
    axes = model.architecture.axes
    free = [
        name
        for name, axis in axes.items()
        if name in wanted and is_movable(model, axis) and held(model, name) is None
    ]
    made: list[Movable] = []
    joint: set[str] = set()
    for heads, kvs in sharing(model).items():
        there = tuple(kv for kv in kvs if model.sizes.get(kv))
        if not model.sizes.get(heads) or not there:
            continue
        joint |= {heads, *there}
        alike = len({model.sizes[kv] for kv in there}) == 1
        alike = alike and all(held(model, axis) is None for axis in (heads, *there))
        if alike and {heads, *there} & {*free}:
            inside = heads in free and len(there) == 1
            made.append(
                Movable(heads, None, model.sizes[heads], model.sizes[there[0]], there, inside)
            )
    for name in free:
        if name not in joint:
            signed = takes_signs(model, name)
            groups = n_groups(model, name)
            made.append(Movable(name, None, model.sizes[name], groups, signed=signed))
    layers = by_layer(model, [axis for one in made for axis in one.axes])
    return tuple(_placed(made, layers))


def _placed(made: list[Movable], layers: dict[str, tuple[Layer, ...]]) -> list[Movable]:
    """Those that are one in all the model, then those of each layer."""
    found = [one for one in made if one.axis not in layers]
    every = sorted({layer for one in made for layer in layers.get(one.axis, ())})
    for layer in every:
        found += [
            Movable(one.axis, layer, one.n, one.n_groups, one.kv, one.inside)
            for one in made
            if layer in layers.get(one.axis, ())
        ]
    return found


def takes_signs(model: Model, axis: str) -> bool:
    """Whether a hidden unit may be negated in all that writes and reads it.

    An RMSNorm is odd in each unit; its gain stays as it is. A LayerNorm subtracts the mean, which
    negated units change. Numbers that multiply units (layer scales) would have to stay, and a
    spec does not tell them from those that are added: where there are any, nothing is negated. Nor
    is it where a layer makes hidden units of hidden units: an activation may follow.
    """
    spec = model.architecture
    if axis not in spec.spaces.get("hidden", ()) or axis in spec.weightless:
        return False
    if axis in spec.unsigned or held(model, axis) is not None:
        return False
    own = [family for family in model.families if axis in axis_facts.axes_of(model, family)]
    norms = [family for family in own if family.rule.norm is not None]
    return (
        bool(norms)
        and all(family.rule.kind in _PLAIN for family in own)
        and all(n_along(family, axis) == 1 for family in own)
        and all(
            family.rule.norm is not None
            and family.rule.norm.kind == "rms"
            and [dim.expression for dim in family.dims] == [Name(axis)]
            and not family.name.endswith("bias")
            for family in norms
        )
    )


def n_along(family: Family, axis: str) -> int:
    """How many dimensions of a tensor are made of an axis."""
    return sum(
        dim.expression is not None and axis in expressions.names(dim.expression)
        for dim in family.dims
    )
