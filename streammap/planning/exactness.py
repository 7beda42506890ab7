"""How far a change preserves the model's function, read from its maps and the spec.

bit-exact         the outputs are the same numbers
exact             the same in real arithmetic; floating point rounds a little differently
exact up to eps   the same but for the epsilon of norms
approximate       another function; only training tells how near it is
"""

import math
from collections.abc import Container, Mapping

from streammap.architectures import axis_words, layer_rules
from streammap.architectures.axis_facts import normed_axes
from streammap.architectures.model import Model
from streammap.planning import maps
from streammap.planning.compensation import Compensation, copies_are_exact
from streammap.planning.graph import LinearForm
from streammap.planning.head_dim import HeadSize
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.plan import PROMISES, Plan, Promise

Guarantee = tuple[Promise, str]


def worst(guarantees: Mapping[str, Guarantee]) -> Guarantee:
    """The weakest of several guarantees; the first of its kind."""
    if not guarantees:
        return "bit-exact", "nothing is resized"
    return max(guarantees.values(), key=lambda one: PROMISES.index(one[0]))


def of_axes(
    model: Model,
    chosen: Mapping[str, AxisMap],
    layers: Mapping[str, AxisMap],
    *,
    grows: bool,
    silent: Mapping[str, frozenset[int]],
    fills: Compensation,
    head_size: HeadSize | None,
) -> dict[str, Guarantee]:
    """Axis -> the guarantee of its change, with the reason.

    Args:
        chosen: Width or expert axis -> the map of its producers.
        silent: Depth axis -> zero-initialised layers of the result.
    """
    spec, normed = model.architecture, normed_axes(model)
    guarantees: dict[str, Guarantee] = {}
    for axis, m in layers.items():
        if not m.is_identity:
            guarantees[axis] = _of_layers(model, axis, m, grows=grows, silent=silent.get(axis))
    for axis, m in chosen.items():
        if m.is_identity:
            continue
        caveat, shown = spec.caveats.get(axis), axis_words.shown(spec, axis)
        if caveat is not None:
            guarantees[axis] = "approximate", f"{shown}: {caveat}"
        elif axis in fills.fills and grows:
            if axis in fills.inexact_eps:
                guarantees[axis] = "exact up to eps", f"{shown}: other norms share the epsilon"
            else:
                units = axis_words.units_of(spec, axis)
                guarantees[axis] = "exact", f"new {units} are zero, norms are compensated"
        else:
            guarantees[axis] = _of_units(model, axis, m, grows=grows, normed=axis in normed)
    if head_size is not None:
        guarantees[head_size.axis] = head_size.promise
    return guarantees


def of_all(
    model: Model, by_axis: Mapping[str, Guarantee], *, reference: float | None, untie: bool
) -> Guarantee:
    """The guarantee of the whole change."""
    if reference is not None and by_axis:
        has_embeddings = any(f.rule.kind == "embedding" for f in model.families)
        widths = [axis for axis in by_axis if axis not in model.architecture.depth_axes]
        if has_embeddings and widths:
            why = f"the reference rule multiplies the embeddings by {reference:g}"
            return "approximate", why
    promise, reason = worst(by_axis)
    if not by_axis and untie:
        reason = "the tied head gets a tensor of its own"
    hidden = model.architecture.spaces.get("hidden", ())
    if promise == "exact" and any(axis in by_axis for axis in hidden) and model.tied:
        how = "has a tensor of its own" if untie else "is folded into the norm before it"
        reason = f"{reason}; the tied head {how}"
    return promise, reason


def of_family(plan: Plan, axes: Container[str], form: LinearForm) -> Promise:
    """What a chain of steps keeps of one family of tensors.

    Where its axes keep the function, "bit-exact" says that its numbers are kept too: they are
    copied, or split by powers of two.

    Args:
        axes: Those that the family is made of.
        form: What computes one of its tensors.
    """
    guarantees: dict[str, Guarantee] = {}
    for i, step in enumerate(plan.steps):
        if step.axes:
            guarantees |= {f"{i} {axis}": one for axis, one in step.axes.items() if axis in axes}
        elif form.copied is None:
            # A step that is about no axis (a blend) leaves alone what it copies.
            guarantees[str(i)] = (step.promise, step.reason)
    weakest = worst(guarantees)[0]
    if weakest in ("bit-exact", "exact"):
        return "bit-exact" if _keeps_bits(form) else "exact"
    return weakest


def _keeps_bits(form: LinearForm) -> bool:
    """Whether each number of the result is one of the source's times a power of two, or 0."""
    if len(form.terms) != 1 or len(form.terms[0].blend) != 1:
        return False
    values = [form.terms[0].blend[0][0]]
    for m in form.terms[0].maps:
        if isinstance(m, BlockMap):
            if m.longest > 1:
                return False
            values += (value for row in m.rows for _, value in row)
        elif m is not None:
            return False
    return all(math.frexp(abs(value))[0] in (0.0, 0.5) for value in set(values))


def _of_layers(
    model: Model, axis: str, m: AxisMap, *, grows: bool, silent: frozenset[int] | None
) -> Guarantee:
    layers, spec = axis_words.units_of(model.architecture, axis), model.architecture
    if silent is not None:
        if axis in spec.caveats:
            return "approximate", f"{axis_words.shown(spec, axis)}: {spec.caveats[axis]}"
        moved = _moved(model, axis, m, silent)
        if moved is not None:
            i, j = moved
            why = spec.numbered[axis].why
            return "approximate", f"{axis_words.shown(spec, axis)} {j} becomes {i}: {why}"
        return "bit-exact", f"new {layers} are zero-initialised (identity)"
    if grows:
        return "approximate", "copied layers are run twice: depth growth by copying is not exact"
    return "approximate", _merged(layers, m)


def _moved(model: Model, axis: str, m: AxisMap, silent: frozenset[int]) -> tuple[int, int] | None:
    """The first layer that computes by its number and gets another: (new, old)."""
    numbered = model.architecture.numbered.get(axis)
    first = None if numbered is None else layer_rules.number(numbered.first, model.config)
    for i in range(m.n_out if first else 0):
        for j, _ in () if i in silent else m.members(i):
            if i != j < (first or 0):
                return i, j
    return None


def _merged(units: str, m: AxisMap) -> str:
    """How a shrink makes units: by merging them, by dropping some, or in another order."""
    if not isinstance(m, BlockMap):
        return f"{units} are mapped by a dense matrix"
    kept = maps.without_zeros(m)
    if kept.longest > 1 or kept.common != 1.0:
        return f"{units} are merged ({m.describe()})"
    n_dropped = kept.uses.count(0) * kept.block
    if n_dropped:
        return f"{n_dropped} of {m.n_in} {units} are dropped"
    return f"{units} change places"


def _of_units(model: Model, axis: str, m: AxisMap, *, grows: bool, normed: bool) -> Guarantee:
    units = axis_words.units_of(model.architecture, axis)
    if not isinstance(m, BlockMap):
        return "approximate", f"{units} are mapped by a dense matrix"
    if _is_permutation(m):
        return "exact", f"{units} change places"
    uses = set(m.uses)
    if any(len(row) > 1 or (row and row[0][1] != 1.0) for row in m.rows):
        if grows:
            return "approximate", f"some {units} are in several groups ({m.describe()})"
        return "approximate", _merged(units, m)
    if 0 in uses:
        return "approximate", _merged(units, m)
    # From here on each unit is copied at least once, and the weights that read the copies are
    # divided by their number: the sums that readers compute stay. What is left to ask is who else
    # sees the copies: routers that choose among experts, norms that average over the axis.
    axes = model.architecture.axes
    if axis in axes and axes[axis].kind == "expert":
        why = copies_are_exact(model, axis, m)
        if why is not None:
            return "approximate", f"{axis}: {why}"
        return "exact", "experts are copied, and the router picks as many more"
    empty = any(not row for row in m.rows)
    if normed and (len(uses) != 1 or empty):
        shown = axis_words.shown(model.architecture, axis)
        what = (
            f"some {units} are zero"
            if empty
            else f"{units} are copied unevenly ({min(uses)} to {max(uses)} times)"
        )
        return "approximate", f"{what}, which a norm over {shown} sees"
    if len(uses) != 1:
        return "exact", f"{units} are copied, the weights that read them divided; no norm sees it"
    # The same for all axes that grow by a factor, so that it speaks for all of them together.
    return "exact", "each unit is copied equally often, the weights that read it are divided"


def _is_permutation(m: BlockMap) -> bool:
    """Whether units only change places."""
    return len(m.rows) == m.n_in_blocks and sorted(
        (row[0] if len(row) == 1 else (-1, 0.0)) for row in m.rows
    ) == [(i, 1.0) for i in range(m.n_in_blocks)]


def is_even(m: BlockMap) -> bool:
    """Whether every unit is copied, and as often as the others."""
    return len(set(m.uses)) == 1 and all(m.rows)
