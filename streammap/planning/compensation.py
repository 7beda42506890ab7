"""What a change of axes asks of other tensors and of config.json, so that the function stays.

Zero units. A hidden size may grow to any size: what whole copies leave over is zero. Norms that see
the zeros need two corrections, with r = (copies, all counted) / new size:

    RMSNorm      new units are 0,             gain * sqrt(r), eps * r
    LayerNorm    new units are the mean,      gain * sqrt(r), eps * r, new gains and biases 0

Why: over n' units, of which r * n' are copies and the rest 0, the mean square is r times that of
the n old ones: the norm divides by sqrt(r) of what it should, and eps weighs 1/r too much. A
LayerNorm subtracts the mean first; a unit that holds the mean of the others becomes 0 there, and
changes neither the mean nor the sum of squares.

Experts. Copies of all experts change nothing if top_k (and the counts of groups) grow alike.

Source: Wang et al., LEMON, ICLR 2024, arXiv:2310.07999 (zero units).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from streammap.architectures.config_fields import field_value
from streammap.architectures.expression import Name
from streammap.architectures.key_pattern import KeyPattern
from streammap.architectures.model import Model
from streammap.architectures.schema import Norm
from streammap.errors import PlanError
from streammap.planning import maps
from streammap.planning.maps import AxisMap, BlockMap, DenseMap, MapPair
from streammap.planning.tensor_maps import NormCompensation, Rule

_MAX_DENSE = 2**25
"""Elements; 256 MB in float64, while planning and in the run."""


@dataclass(frozen=True, slots=True)
class Compensation:
    """What else changes."""

    pairs: Mapping[str, MapPair] = field(default_factory=dict)
    """Axis -> maps that take the place of plain ones."""
    fills: Mapping[str, NormCompensation] = field(default_factory=dict)
    factors: tuple[tuple[tuple[KeyPattern, ...], float], ...] = ()
    fields: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    inexact_eps: frozenset[str] = frozenset()
    """Axes with zero units whose epsilon could not follow, or is shared with other norms."""


def compensate(
    model: Model,
    chosen: Mapping[str, AxisMap],
    *,
    grows: bool,
    filled: frozenset[str],
    rule: Rule,
) -> Compensation:
    """The compensations that maps of axes need.

    Args:
        chosen: Width and expert axis -> the map of its producers.
        filled: Axes that an earlier growth gave zero units, on the way back down.
    """
    pairs: dict[str, MapPair] = {}
    fills: dict[str, NormCompensation] = {}
    fields: dict[str, object] = {}
    notes: list[str] = []
    inexact: set[str] = set()
    for axis, m in chosen.items():
        if rule == "exact" and isinstance(m, BlockMap):
            ratio = _ratio(m) if grows else _ratio_down(m) if axis in filled else None
            if ratio is not None and ratio != 1.0 and _can_fill(model, axis, m, grows=grows):
                fills[axis] = NormCompensation(m, math.sqrt(ratio))
                if grows and _kinds(model, axis) == {"layer"}:
                    pairs[axis] = _mean_filled(m)
                if not _scale_eps(model, axis, ratio, fields, notes):
                    inexact.add(axis)
        if axis in model.architecture.experts:
            _follow_experts(model, axis, m, grows, fields, notes)
    return Compensation(pairs, fills, (), fields, tuple(notes), frozenset(inexact))


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


def _can_fill(model: Model, axis: str, m: BlockMap, *, grows: bool) -> bool:
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
    # A unit that holds the mean of the others takes a dense map. It keeps holding it only where
    # nothing but linears and residual additions come between norms, and no layer scale.
    alike = all(norm.mean for norm in norms) and not _has_scales(model, axis)
    return alike and (not grows or m.n_out * m.n_in <= _MAX_DENSE)


def _is_normed_with_others(model: Model, axis: str) -> bool:
    """Whether the axis is only a part of what some norm is over."""
    return any(
        family.rule.norm is not None
        and (last := family.dims[-1].expression) is not None
        and last != Name(axis)
        and axis in model.architecture.axes_in(last)
        for family in model.families
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


def _mean_filled(m: BlockMap) -> MapPair:
    """Maps of a growth whose new units hold the mean of the others; readers still skip them."""
    import torch

    matrix = maps.to_matrix(m, like=torch.zeros(0, dtype=torch.float64))
    empty = [i * m.block + k for i, row in enumerate(m.rows) if not row for k in range(m.block)]
    matrix[empty] = 1.0 / m.n_in
    return MapPair(DenseMap(matrix), maps.pair_of(m).into)


def _scale_eps(
    model: Model, axis: str, ratio: float, fields: dict[str, object], notes: list[str]
) -> bool:
    """Multiply the epsilon of the norms over `axis`; whether that makes the change exact."""
    names = {name for norm in _norms(model, axis) for name in norm.eps}
    there = [n for n in sorted(names) if isinstance(field_value(model.config, n), float)]
    for name in there:
        value = field_value(model.config, name)
        assert isinstance(value, float)
        fields[name] = value * ratio
        notes.append(f"config.json: {name} {value:g} -> {value * ratio:g}, for units that are zero")
    # One field may be the epsilon of norms over other axes too (q_norm over a head), which have no
    # zero units and should keep it: then neither value is right for all.
    shared = any(
        family.rule.norm is not None
        and family.dims[-1].expression != Name(axis)
        and set(family.rule.norm.eps) & names
        for family in model.families
    )
    return bool(there) and not shared and not model.architecture.weightless


def _follow_experts(
    model: Model,
    axis: str,
    m: AxisMap,
    grows: bool,
    fields: dict[str, object],
    notes: list[str],
) -> None:
    """Let top_k and the counts of groups grow or shrink with the experts.

    Of k-fold copies the k * top_k best are all copies of the old top_k; once renormalised, the
    gate of each is 1/k of the old one.
    """
    large, small = (m.n_out, m.n_in) if grows else (m.n_in, m.n_out)
    about = model.architecture.experts[axis]
    for name in about.multiply:
        value = field_value(model.config, name)
        if not isinstance(value, int) or isinstance(value, bool) or large == small:
            continue
        if large % small == 0 and (grows or value % (large // small) == 0):
            times = large // small
            fields[name] = value * times if grows else value // times
        elif not grows:
            fields[name] = min(value, small)
        if fields.get(name, value) == value:
            fields.pop(name, None)
            notes.append(f"config.json: {name} stays {value}")
        else:
            notes.append(f"config.json: {name} {value} -> {fields[name]}, with the experts")
    n_groups = (
        fields.get(about.groups, field_value(model.config, about.groups)) if about.groups else 1
    )
    if isinstance(n_groups, int) and n_groups > 0 and m.n_out % n_groups:
        raise PlanError(
            f"{axis}: {m.n_out} experts do not divide into {n_groups} groups ({about.groups})",
            hint=f"take a multiple of {n_groups}",
        )


def copies_are_exact(model: Model, axis: str, m: AxisMap) -> str | None:
    """Why copies of experts change the function; None where they don't."""
    about = model.architecture.experts.get(axis)
    if about is None:
        return "the spec doesn't say how experts are chosen"
    if about.inexact is not None:
        return about.inexact
    if not isinstance(m, BlockMap):
        return "experts are mapped by a dense matrix"
    if not about.multiply:
        return None  # One of equal experts is chosen, whichever it is.
    if len(set(m.uses)) != 1:
        return "experts are copied unevenly"
    # A router that first chooses groups scores each by its best experts (the best two in DeepSeek):
    # a group of the result must be a copy of one old group, not hold an expert twice.
    n_groups = field_value(model.config, about.groups) if about.groups else 1
    if isinstance(n_groups, int) and n_groups > 1:
        size = m.n_in // n_groups
        for start in range(0, m.n_out, size):
            sources = {j // size for i in range(start, start + size) for j, _ in m.members(i)}
            distinct = {j for i in range(start, start + size) for j, _ in m.members(i)}
            if len(sources) != 1 or len(distinct) != size:
                return f"copies of experts inside one of the {n_groups} groups change its score"
    return None
