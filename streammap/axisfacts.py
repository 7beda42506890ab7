"""What a model says of its axes: which others decide their sizes, which norms see them."""

from streammap import expression as expressions
from streammap import sizes
from streammap.dimmaps import joint_axes
from streammap.expression import Expression
from streammap.model import Family, Model


def must_follow(model: Model, axis: str) -> bool:
    """Whether config.json has no field for an axis, so that others decide its size."""
    found = model.architecture.axes[axis]
    if any(isinstance(source, str) for source in found.sources):
        return False
    origin = sizes.axis_origin(found, model.config)
    return (
        origin is not None
        and not isinstance(origin, str)
        and any(name in model.sizes for name in expressions.names(origin))
    )


def normed_axes(model: Model) -> frozenset[str]:
    """Axes over which a norm takes its mean: their units must be copied alike."""
    found: set[str] = set(model.architecture.weightless)
    joint = {
        (kv, group): heads
        for kv, groups in joint_axes(model.architecture).items()
        for group, heads in groups.items()
    }
    for family in model.families:
        if family.rule.kind != "norm" or family.dims[-1].expression is None:
            continue
        names = expanded(model, family.dims[-1].expression)
        found |= set(names)
        found |= {heads for (kv, group), heads in joint.items() if {kv, group} <= set(names)}
    return frozenset(found)


def expanded(model: Model, expression: Expression) -> list[str]:
    """The axes that stand in an expression, aliases taken apart."""
    found: list[str] = []
    for name in expressions.names(expression):
        alias = model.architecture.aliases.get(name)
        found += expanded(model, alias) if alias is not None else [name]
    return found


def axes_of(model: Model, family: Family) -> frozenset[str]:
    """The axes that a family's dimensions and indices are made of."""
    found = set(family.indices)
    for dim in family.dims:
        if dim.expression is not None:
            found |= set(expanded(model, dim.expression))
    for kv, groups in joint_axes(model.architecture).items():
        found |= {heads for group, heads in groups.items() if {kv, group} <= found}
    return frozenset(found)
