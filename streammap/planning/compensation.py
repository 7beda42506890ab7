"""What a change of axes asks of other tensors and of config.json, so that the function stays.

Zero units. A hidden size may grow to any size: what whole copies leave over is zero. Norms that see
the zeros need two corrections, with r = (copies, all counted) / new size:

    RMSNorm      new units are 0,             gain * sqrt(r), eps * r
    LayerNorm    new units are the mean,      gain * sqrt(r), eps * r, new gains and biases 0

Why: over n' units, of which r * n' are copies and the rest 0, the mean square is r times that of
the n old ones: the norm divides by sqrt(r) of what it should, and eps weighs 1/r too much. A
LayerNorm subtracts the mean first; a unit that holds the mean of the others becomes 0 there, and
changes neither the mean nor the sum of squares.

Experts: see experts.py.

Source: Wang et al., LEMON, ICLR 2024, arXiv:2310.07999 (zero units).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from streammap.architectures.config_fields import meant
from streammap.architectures.expression import Name
from streammap.architectures.key_pattern import KeyPattern
from streammap.architectures.model import Model
from streammap.architectures.schema import Norm
from streammap.planning import experts, maps
from streammap.planning.experts import TopK
from streammap.planning.maps import AxisMap, BlockMap, MapPair
from streammap.planning.tensor_maps.axis_change import NormCompensation, Rule

FIXED_EPS = 1e-5
"""Of norms whose epsilon config.json doesn't say: torch's own."""


@dataclass(frozen=True, slots=True)
class Compensation:
    """What else changes."""

    pairs: Mapping[str, MapPair] = field(default_factory=dict)
    """Axis -> maps that take the place of plain ones."""
    fills: Mapping[str, NormCompensation] = field(default_factory=dict)
    factors: tuple[tuple[tuple[KeyPattern, ...], float], ...] = ()
    fields: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    eps_errors: Mapping[str, float] = field(default_factory=dict)
    """Axes with zero units whose epsilon is not right for all norms -> the relative error that this
    makes where a mean square is 1."""


def compensate(
    model: Model,
    chosen: Mapping[str, AxisMap],
    plain: Mapping[str, MapPair],
    *,
    grows: bool,
    filled: frozenset[str],
    rule: Rule,
    top_k: TopK | None = None,
) -> Compensation:
    """The compensations that maps of axes need.

    Args:
        chosen: Width and expert axis -> the map of its producers.
        plain: Axis -> its maps without compensation.
        filled: Axes that an earlier growth gave zero units, on the way back down.
    """
    fills: dict[str, NormCompensation] = {}
    fields: dict[str, object] = {}
    notes: list[str] = []
    eps_errors: dict[str, float] = {}
    for axis, m in chosen.items():
        if rule == "exact" and isinstance(m, BlockMap):
            ratio = _ratio(m) if grows else _ratio_down(m) if axis in filled else None
            if ratio is not None and ratio != 1.0 and can_fill(model, axis):
                means = grows and _kinds(model, axis) == {"layer"}
                fills[axis] = NormCompensation(m, math.sqrt(ratio), means=means)
                error = _scale_eps(model, axis, ratio, fields, notes)
                if error:
                    eps_errors[axis] = error
        if axis in model.architecture.experts:
            with_experts = experts.follow(model, axis, m, grows=grows, asked=top_k)
            fields |= with_experts.fields
            notes += with_experts.notes
    return Compensation({}, fills, (), fields, tuple(notes), eps_errors)


def _ratio(m: BlockMap) -> float | None:
    """R of a growth that copies all units equally often and leaves others zero; None for others."""
    if any(len(row) > 1 or any(value != 1.0 for _, value in row) for row in m.rows):
        return None
    if len(set(m.uses)) != 1 or not m.uses[0]:
        return None
    return m.uses[0] * m.n_in_blocks / len(m.rows)


def _ratio_down(m: BlockMap) -> float | None:
    """R of a shrink that undoes such a growth."""
    grown = maps.growing(m)
    ratio = _ratio(grown) if isinstance(grown, BlockMap) else None
    return None if ratio is None else 1.0 / ratio


def _norms(model: Model, axis: str) -> list[Norm]:
    """Each norm over an axis."""
    return [
        family.rule.norm
        for family in model.families
        if family.rule.norm is not None and family.dims[-1].expression == Name(axis)
    ]


def _kinds(model: Model, axis: str) -> set[str]:
    return {norm.kind for norm in _norms(model, axis)}


def can_fill(model: Model, axis: str) -> bool:
    """Whether all norms over an axis can be corrected for zero units."""
    norms, kinds = _norms(model, axis), _kinds(model, axis)
    # A post-norm makes the residual stream itself: its new units are 0, not the mean of the others
    # that the next norm would need.
    if not norms or any(norm.post for norm in norms) or len(kinds) != 1:
        return False
    # Without a gain there is nothing to correct; a norm over (heads, channels) sees sums of units.
    if axis in model.architecture.weightless or _is_normed_with_others(model, axis):
        return False
    if kinds == {"rms"}:
        return True
    # A unit that holds the mean of the others keeps holding it only where nothing but linears and
    # residual additions come between norms, and no layer scale.
    return (
        all(norm.mean for norm in norms)
        and not _has_scales(model, axis)
        and not _is_made_with_others(model, axis)
    )


def _is_normed_with_others(model: Model, axis: str) -> bool:
    """Whether the axis is only a part of what some norm is over."""
    return any(
        family.rule.norm is not None
        and (last := family.dims[-1].expression) is not None
        and last != Name(axis)
        and axis in model.architecture.axes_in(last)
        for family in model.families
    )


def _is_made_with_others(model: Model, axis: str) -> bool:
    """Whether a dimension that makes units of the axis is no plain one: each needs a mean."""
    spec = model.architecture
    return any(
        axis in spec.axes_in(dim.expression) and spec.plain(dim.expression) != axis
        for family in model.families
        for dim in family.dims
        if dim.role == "out" and dim.expression is not None and family.rule.norm is None
    )


def _has_scales(model: Model, axis: str) -> bool:
    """Whether layers multiply each unit by a number of its own (layer scale)."""
    return any(
        family.rule.kind == "tensor"
        and [dim.expression for dim in family.dims] == [Name(axis)]
        and family.indices
        and not family.name.endswith("bias")
        for family in model.families
    )


def eps_words(error: float) -> str:
    """An error by an epsilon, for reasons."""
    return f"about {error:.0e} relative where a mean square is 1"


def eps_error(eps: float, ratio: float) -> float:
    """The relative error of a norm with `ratio` times its epsilon, where the mean square is 1."""
    return abs(ratio - 1.0) * eps / 2.0


def _scale_eps(
    model: Model, axis: str, ratio: float, fields: dict[str, object], notes: list[str]
) -> float:
    """Multiply the epsilon of the norms over `axis`; the relative error that is left, 0 if exact.

    One field may be the epsilon of norms over other axes too (q_norm over a head), which have no
    zero units and should keep it: then neither value is right for all. Such a norm of queries or
    keys minds less than those over the stream, which begins small (embeddings); one whose input may
    be near 0 minds more than all others.
    """
    own = [norm for norm in _norms(model, axis) if norm.eps]
    names = {name for norm in own for name in norm.eps}
    there = {n: v for n in sorted(names) if isinstance(v := meant(model.config, n), float)}
    if not there:
        return eps_error(FIXED_EPS, 1.0 / ratio)
    others = [
        family.rule.norm
        for family in model.families
        if family.rule.norm is not None
        and family.dims[-1].expression != Name(axis)
        and set(family.rule.norm.eps) & names
    ]
    largest = max(there.values())
    if any(norm.near_zero for norm in others):
        notes.append(f"config.json: {', '.join(there)} stays, for norms of what may be near 0")
        return eps_error(largest, 1.0 / ratio)
    for name, value in there.items():
        fields[name] = value * ratio
        notes.append(f"config.json: {name} {value:g} -> {value * ratio:g}, for units that are zero")
    return eps_error(largest, ratio) if others or model.architecture.weightless else 0.0
