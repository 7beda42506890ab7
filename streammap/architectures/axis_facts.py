"""Facts about a model's axes: which others decide their sizes, which norms and layers see them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

from streammap.architectures import axis_sizes
from streammap.architectures import expression as expressions
from streammap.architectures.expression import Name
from streammap.architectures.model import Family, Model
from streammap.architectures.schema import Architecture, Depth

Layer = tuple[str, int]
"""A depth axis, and the number of one of its layers."""


def must_follow(model: Model, axis: str) -> bool:
    """Whether config.json has no field for an axis, so that others decide its size."""
    about = model.architecture.axes[axis]
    if about.fields:
        return False
    origin = axis_sizes.axis_origin(about, model.config)
    return (
        origin is not None
        and not isinstance(origin, str)
        and any(name in model.sizes for name in expressions.names(origin))
    )


def is_expert(spec: Architecture, axis: str) -> bool:
    """Whether an axis counts experts."""
    return axis in spec.axes and spec.axes[axis].kind == "expert"


def is_read_by_shares(spec: Architecture, axis: str) -> bool:
    """Whether those who read copies of its units have a share in each: kv heads are used whole."""
    kv = {shared.kv for shared in spec.shared_heads}
    return axis in spec.axes and spec.axes[axis].kind == "width" and axis not in kv


def expert_layout(model: Model, axis: str) -> str:
    """How a checkpoint has its experts: "one by one", "stacked"; "" where the axis has none.

    transformers stacks in memory what published files mostly have one by one. The keys tell.
    """
    own = [family for family in model.families if axis in axes_of(model, family)]
    if any(axis in family.indices for family in own):
        return "one by one"
    if any(_is_stack(model, family, axis) for family in own):
        return "stacked"
    return ""


def normed_axes(model: Model) -> frozenset[str]:
    """Axes over which a norm takes its mean: their units must be copied equally often."""
    spec = model.architecture
    normed: set[str] = set(spec.weightless)
    for family in model.families:
        if family.rule.kind == "norm" and family.dims[-1].expression is not None:
            normed |= _with_heads(model, spec.axes_in(family.dims[-1].expression))
    return frozenset(normed)


def axes_of(model: Model, family: Family) -> frozenset[str]:
    """The axes that a family's dimensions and indices are made of."""
    spans = [family.index_expression(index) for index in family.indices]
    spans += [dim.expression for dim in family.dims if dim.expression is not None]
    axes = {name for span in spans for name in model.architecture.axes_in(span)}
    return frozenset(_with_heads(model, axes))


@final
@dataclass(frozen=True, slots=True)
class Lying:
    """Where the tensors of an axis are."""

    layers: tuple[Layer, ...]
    """The layers that have any, in order."""
    shared: str | None
    """What keeps the axis from being another one in each layer; None where each has its own."""


def lying(model: Model, axis: str) -> Lying:
    """The layers that an axis lies in: each may put its units in an order of its own.

    Not so where a tensor along it belongs to no layer (embeddings make the hidden units that all
    layers read), or where that of layer 0 serves all (T5's relative positions).
    """
    found: set[Layer] = set()
    shared = None
    depths = model.architecture.depth_axes
    for family in model.families:
        if axis not in axes_of(model, family) or family.rule.kind == "drop":
            continue
        at = next((n for n, index in enumerate(family.indices) if index in depths), None)
        if at is None:
            shared = shared or f"{family.name} belongs to no layer"
            continue
        depth = family.indices[at]
        there = {values[at] for values in family.members}
        about = model.architecture.depth.get(depth, Depth())
        if about.first and there == {0} and model.sizes[depth] > 1:
            shared = shared or f"all layers read {family.key(min(family.members))}"
        found |= {(depth, layer) for layer in there}
    return Lying(tuple(sorted(found)), shared)


def _is_stack(model: Model, family: Family, axis: str) -> bool:
    """Whether tensors hold weights of all experts: a router has their number alone."""
    spec = model.architecture
    there = [spec.axes_in(dim.expression) for dim in family.dims if dim.expression is not None]
    return len(family.dims) > 2 or any(axis in axes and len(axes) > 1 for axes in there)


def _with_heads(model: Model, axes: Iterable[str]) -> set[str]:
    """These axes, and query heads where kv heads and their group stand for them."""
    names = set(axes)
    shared = model.architecture.shared_heads
    return names | {one.heads for one in shared if {one.kv, one.group} <= names}


def names_of(model: Model, axes: tuple[str, ...]) -> tuple[str, ...]:
    """These axes, and the aliases that stand for one of them alone."""
    aliases = model.architecture.aliases
    names = list(axes)
    for _ in aliases:  # an alias may stand for another alias
        names += (
            alias
            for alias, value in aliases.items()
            if isinstance(value, Name) and value.name in names and alias not in names
        )
    return tuple(names)


def writes(family: Family, hidden: tuple[str, ...]) -> bool:
    """Whether a family writes to the residual stream: where all that do are 0, a layer is identity.

    These are weights that make the hidden size from something, and their biases. Norms and
    embeddings make it too, but do not add to the stream.
    """
    spans = [dim.expression for dim in family.dims if dim.role == "out"]
    makes = any(isinstance(e, Name) and e.name in hidden for e in spans)
    is_bias = family.name.endswith("bias") and family.rule.kind != "norm"
    # What a linear reads may be of no axis.
    is_linear = family.rule.kind in ("linear", "conv1d", "conv")
    reads = is_linear or any(dim.role == "in" for dim in family.dims)
    return makes and family.rule.kind != "embedding" and (reads or is_bias)


def output_axes(model: Model) -> tuple[str, ...]:
    """Hidden sizes that nothing turns into something else: the model gives the units themselves.

    What does is a head, which reads them outside the layers that add to them; or a linear that
    makes another hidden size of them.
    """
    if model.tied:
        return ()
    hidden = model.architecture.spaces.get("hidden", ())
    return tuple(axis for axis in hidden if _is_output(model, axis, hidden))


def _is_output(model: Model, axis: str, hidden: tuple[str, ...]) -> bool:
    adding = [one for one in model.families if writes(one, (axis,))]
    stacks = {index for one in adding for index in one.indices}
    for family in model.families:
        sides: dict[str, set[str]] = {"in": set(), "out": set()}
        for dim in family.dims:
            if dim.role in sides and dim.expression is not None:
                sides[dim.role].update(model.architecture.axes_in(dim.expression))
        is_read = axis in sides["in"] and axis not in sides["out"]
        if is_read and (stacks.isdisjoint(family.indices) or not sides["out"].isdisjoint(hidden)):
            return False
    return bool(adding)
