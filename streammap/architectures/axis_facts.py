"""What a model says of its axes: which others decide their sizes, which norms see them."""

from collections.abc import Iterable

from streammap.architectures import axis_sizes
from streammap.architectures import expression as expressions
from streammap.architectures.model import Family, Model


def must_follow(model: Model, axis: str) -> bool:
    """Whether config.json has no field for an axis, so that others decide its size."""
    found = model.architecture.axes[axis]
    if found.fields:
        return False
    origin = axis_sizes.axis_origin(found, model.config)
    return (
        origin is not None
        and not isinstance(origin, str)
        and any(name in model.sizes for name in expressions.names(origin))
    )


def normed_axes(model: Model) -> frozenset[str]:
    """Axes over which a norm takes its mean: their units must be copied alike."""
    spec = model.architecture
    found: set[str] = set(spec.weightless)
    for family in model.families:
        if family.rule.kind == "norm" and family.dims[-1].expression is not None:
            found |= _with_heads(model, spec.axes_in(family.dims[-1].expression))
    return frozenset(found)


def axes_of(model: Model, family: Family) -> frozenset[str]:
    """The axes that a family's dimensions and indices are made of."""
    found = set(family.indices)
    for dim in family.dims:
        if dim.expression is not None:
            found |= set(model.architecture.axes_in(dim.expression))
    return frozenset(_with_heads(model, found))


def _with_heads(model: Model, axes: Iterable[str]) -> set[str]:
    """These axes, and query heads where kv heads and their group stand for them."""
    found = set(axes)
    shared = model.architecture.shared_heads
    return found | {one.heads for one in shared if {one.kv, one.group} <= found}
