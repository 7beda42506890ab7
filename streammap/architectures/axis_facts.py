"""Facts about a model's axes: which others decide their sizes, which norms see them."""

from collections.abc import Iterable

from streammap.architectures import axis_sizes
from streammap.architectures import expression as expressions
from streammap.architectures.model import Family, Model
from streammap.architectures.schema import Architecture


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
    axes = set(family.indices)
    for dim in family.dims:
        if dim.expression is not None:
            axes |= set(model.architecture.axes_in(dim.expression))
    return frozenset(_with_heads(model, axes))


def _with_heads(model: Model, axes: Iterable[str]) -> set[str]:
    """These axes, and query heads where kv heads and their group stand for them."""
    names = set(axes)
    shared = model.architecture.shared_heads
    return names | {one.heads for one in shared if {one.kv, one.group} <= names}
