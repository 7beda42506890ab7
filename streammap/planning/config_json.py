"""config.json of a result: sizes, lists of layers, and further fields of a change.

Each field that gave a size gives the new one; a size that an expression gave ("4 * hidden size") is
written out where it no longer holds; a size that the tensors gave is written where the model's
class looks for it (a spec's [written]); all other fields stay as they are.
"""

import contextlib
import copy
import math
from collections.abc import Mapping, Sequence

from streammap.architectures import axis_sizes, layer_kinds
from streammap.architectures.config_fields import field_value, is_null, set_field
from streammap.architectures.expression import FunctionCall, InexactDivisionError, is_measured
from streammap.architectures.model import Model
from streammap.architectures.schema import Architecture
from streammap.errors import PlanError


def rewritten(
    config: Mapping[str, object],
    model: Model,
    after: Mapping[str, int],
    *,
    sources: Mapping[str, Sequence[int]],
    members: Mapping[str, Sequence[Sequence[int]]],
    fields: Mapping[str, object],
) -> tuple[dict[str, object], tuple[str, ...]]:
    """config.json for new sizes, and notes for the user.

    Args:
        after: Axis -> size in the result.
        sources: Depth axis -> for each layer of the result, the source layer that it takes after.
        members: Depth axis -> for each layer of the result, all source layers that it is made of.
        fields: Further fields to set.

    Raises:
        PlanError: no field holds a size, or a list can't follow.
    """
    changed: dict[str, object] = copy.deepcopy(dict(config))
    spec = model.architecture
    for name, axis in spec.axes.items():
        if after.get(name) == model.sizes.get(name):
            continue
        origin = axis_sizes.axis_origin(axis, config)
        if isinstance(origin, str):
            set_field(changed, origin, after[name])
    for name in spec.axes:
        _write_out(spec, name, config, changed, after)
        if name in after and after[name] != model.sizes.get(name):
            _write_told(spec, name, config, changed, after)
    for field, expression in spec.config.items():
        if field_value(config, field) is None:
            continue
        value = axis_sizes.evaluate_axis(spec, expression, after, {})
        if value != axis_sizes.evaluate_axis(spec, expression, model.sizes, {}):
            set_field(changed, field, value)
    notes: list[str] = []
    for name, layers in sources.items():
        depth = spec.depth.get(name)
        if depth is not None:
            notes += layer_kinds.follow(
                depth,
                changed,
                layers,
                what=name,
                n_before=model.sizes[name],
                members=members[name],
            )
    for field, given in fields.items():
        set_field(changed, field, given)
    return changed, tuple(notes)


def _write_out(
    spec: Architecture,
    name: str,
    config: Mapping[str, object],
    changed: dict[str, object],
    after: Mapping[str, int],
) -> None:
    """Write a size that an expression gave, where the expression no longer gives it."""
    axis = spec.axes[name]
    origin = axis_sizes.axis_origin(axis, config)
    if origin is None or isinstance(origin, str) or is_measured(origin) or name not in after:
        return
    if any(other not in after for other in spec.axes_in(origin)):
        return
    if axis.kind == "group":  # always a quotient of two axes, which are written themselves
        return
    with contextlib.suppress(InexactDivisionError):
        if axis_sizes.evaluate_axis(spec, origin, after, {}) == after[name]:
            return
    if not axis.fields:
        raise PlanError(
            f"config.json can't say that {name} is {after[name]}: it has no field for it",
            hint="change the axes that it is computed from by the same factor",
        )
    # Null stands where the class looks for the size: "as usual".
    null = (field for field in axis.fields if is_null(config, field))
    set_field(changed, next(null, axis.fields[0]), after[name])


def _write_told(
    spec: Architecture,
    name: str,
    config: Mapping[str, object],
    changed: dict[str, object],
    after: Mapping[str, int],
) -> None:
    """Write the fields that say a changed size, where no field of config.json held it."""
    if isinstance(axis_sizes.axis_origin(spec.axes[name], config), str):
        return
    for field, told in spec.written.get(name, {}).items():
        match told:
            case bool():
                set_field(changed, field, told)
            case FunctionCall("ratio", (part, whole)):
                before = field_value(config, field)
                set_field(changed, field, ratio(after[part], after[whole], before))
            case _:
                set_field(changed, field, axis_sizes.evaluate_axis(spec, told, after, {}))


def ratio(part: int, whole: int, before: object) -> int | float:
    """A number whose product with `whole`, cut off, is `part`: the one before if it is one."""
    if isinstance(before, int | float) and int(whole * before) == part:
        return before
    quotient = part / whole
    while int(whole * quotient) < part:
        quotient = math.nextafter(quotient, math.inf)
    return quotient
