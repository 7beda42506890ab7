"""How far a change preserves the model's function, read from its maps and the spec.

bit-exact         the outputs are the same numbers
exact             the same in real arithmetic; floating point rounds a little differently
exact up to eps   the same but for the epsilon of norms, by the relative error that the reason says
approximate       another function; only training tells how near it is

All but the first are promises in real arithmetic: factors that are no powers of two, and sums, are
rounded, which counts in 16 bits.
"""

import math
from collections.abc import Container, Iterator, Mapping, Sequence

from streammap.architectures import axis_facts, axis_words, layer_rules
from streammap.architectures.model import Model
from streammap.errors import some
from streammap.planning import experts, graph, maps
from streammap.planning.compensation import Compensation, eps_words
from streammap.planning.depth import fate
from streammap.planning.graph import LinearForm
from streammap.planning.head_dim import HeadSize
from streammap.planning.maps import AxisMap, BlockMap, MapPair
from streammap.planning.plan import PROMISES, Plan, Promise

Guarantee = tuple[Promise, str]
_DTYPES = {"BF16": ("bfloat16", 9), "F16": ("float16", 12)}
"""Dtype -> its name, and n for a usual rounding error of 2^-n."""
_N_SHOWN = 3


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
    spec, normed = model.architecture, axis_facts.normed_axes(model)
    guarantees: dict[str, Guarantee] = {}
    for axis, m in layers.items():
        if not m.is_identity:
            guarantees[axis] = of_depth(model, axis, m, grows=grows, silent=silent.get(axis))
    for axis, m in chosen.items():
        if m.is_identity:
            continue
        caveat, shown = spec.caveats.get(axis), axis_words.shown(spec, axis)
        if caveat is not None:
            guarantees[axis] = "approximate", f"{shown}: {caveat}"
        elif axis in fills.fills and grows:
            error = fills.eps_errors.get(axis)
            if error is not None:
                why = f"{shown}: other norms share the epsilon, {eps_words(error)}"
                guarantees[axis] = "exact up to eps", why
            else:
                units = axis_words.units_of(spec, axis)
                guarantees[axis] = "exact", f"new {units} are zero, norms are compensated"
        elif axis_facts.is_expert(spec, axis) and (torn := _torn(model, axis, m, fills.fields)):
            guarantees[axis] = "approximate", f"{axis}: {torn}"
        elif axis_facts.is_expert(spec, axis) and grows and not _is_permutation(m):
            guarantees[axis] = _of_experts(model, axis, m, fills.fields)
        else:
            guarantees[axis] = _of_units(model, axis, m, grows=grows, normed=axis in normed)
    if head_size is not None:
        guarantees[head_size.axis] = head_size.promise
    return guarantees


def of_layers(found: Sequence[tuple[str, Mapping[str, Guarantee]]]) -> dict[str, Guarantee]:
    """Axis -> the weakest guarantee of its layers; one of them is named where others are better.

    Args:
        found: A layer in words, and its guarantees, for layers of different maps.
    """
    by_axis: dict[str, dict[str, Guarantee]] = {}
    for layer, guarantees in found:
        for axis, guarantee in guarantees.items():
            by_axis.setdefault(axis, {})[layer] = guarantee
    made: dict[str, Guarantee] = {}
    for axis, by_layer in by_axis.items():
        promise, reason = worst(by_layer)
        where = next(layer for layer, one in by_layer.items() if one == (promise, reason))
        alike = len(set(by_layer.values())) == 1
        made[axis] = promise, reason if alike else f"{reason} ({where})"
    return made


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


def of_depth(
    model: Model, axis: str, m: AxisMap, *, grows: bool, silent: frozenset[int] | None
) -> Guarantee:
    """The guarantee of a change of depth, with the reason.

    Args:
        m: Layers of the result from layers of the source.
        silent: Layers of the result that are zero-initialised; None where none is to be.
    """
    layers, spec = axis_words.units_of(model.architecture, axis), model.architecture
    becomes, lost = fate.of_map(m), []
    if becomes.dropped:
        lost.append(f"{len(becomes.dropped)} of {m.n_in} {layers} are dropped")
    if becomes.is_moved:
        lost.append(f"{layers} change places")
    if silent is not None:
        if lost:
            return "approximate", "; ".join(lost)
        if axis in spec.caveats:
            return "approximate", f"{axis_words.shown(spec, axis)}: {spec.caveats[axis]}"
        moved = _moved(model, axis, m, silent)
        if moved is not None:
            i, j = moved
            why = spec.numbered[axis].why
            return "approximate", f"{axis_words.shown(spec, axis)} {j} becomes {i}: {why}"
        if any(axis in spec.axes_in(f.expression) for _, f in spec.forward_scale):
            return (
                "exact",
                f"new {layers} are zero-initialised, the others make up for their number",
            )
        return "bit-exact", f"new {layers} are zero-initialised (identity)"
    if becomes.is_mixed and not grows:
        return "approximate", _merged(layers, m)
    if becomes.new:
        lost.append("copied layers are run twice: depth growth by copying is not exact")
    return "approximate", "; ".join(lost)


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
    # sees the copies: norms that average over the axis.
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


def _of_experts(model: Model, axis: str, m: AxisMap, fields: Mapping[str, object]) -> Guarantee:
    why = experts.inexact(model, axis, m, fields)
    if why is not None:
        return "approximate", f"{axis}: {why}"
    if experts.takes_one(model, axis, fields):
        return "exact", "experts are copied, and the router takes one of them"
    return "exact", "experts are copied, and the router picks as many more"


def _torn(model: Model, axis: str, m: AxisMap, fields: Mapping[str, object]) -> str | None:
    """Why experts in another order change the function: routers may choose groups of them first."""
    about = model.architecture.experts.get(axis)
    if about is None or not isinstance(m, BlockMap) or not _is_permutation(m):
        return None
    return experts.why_regrouped(model, about, m, fields)


def _is_permutation(m: AxisMap) -> bool:
    """Whether units only change places."""
    return (
        isinstance(m, BlockMap)
        and len(m.rows) == m.n_in_blocks
        and sorted((row[0] if len(row) == 1 else (-1, 0.0)) for row in m.rows)
        == [(i, 1.0) for i in range(m.n_in_blocks)]
    )


def is_even(m: BlockMap) -> bool:
    """Whether every unit is copied, and as often as the others."""
    return len(set(m.uses)) == 1 and all(m.rows)


def twins(
    model: Model, chosen: Mapping[str, AxisMap], pairs: Mapping[str, MapPair]
) -> dict[str, str]:
    """Axes that are copied so that training can't tell copies apart, with their units in words.

    Copies have equal gradients where those who read them have equal shares in each. Not so kv
    heads: their copies are read by other query heads.
    """
    spec = model.architecture
    kv = {shared.kv for shared in spec.shared_heads}
    return {
        axis: axis_words.units_of(spec, axis)
        for axis, m in chosen.items()
        if isinstance(m, BlockMap)
        and axis in spec.axes
        and axis not in kv
        and max(m.uses, default=0) > 1
        and not (isinstance(into := pairs[axis].into, BlockMap) and _tells_apart(m, into))
    }


def _tells_apart(m: BlockMap, into: BlockMap) -> bool:
    """Whether no two copies of a unit have equal shares in their readers."""
    shares = [dict(row) for row in maps.reblocked(into, m.block).rows] if m.block else []
    seen: set[tuple[int, float]] = set()
    for i, row in enumerate(m.rows):
        for j, _ in row:
            share = shares[i].get(j, 0.0)
            if (j, share) in seen:
                return False
            seen.add((j, share))
    return True


def _keeps_bits(form: LinearForm) -> bool:
    """Whether each number of the result is one of the source's times a power of two, or 0."""
    return not any(_rounded_by(form)) and not any(True for _ in form.derived())


def rounding(targets: Mapping[str, LinearForm]) -> str | None:
    """What rounding to 16 bits does to a result, in a line; None where nothing is in 16 bits."""
    by_dtype: dict[str, list[LinearForm]] = {}
    for form in targets.values():
        if form.spec.dtype in _DTYPES:
            by_dtype.setdefault(form.spec.dtype, []).append(form)
    lines = []
    for dtype, forms in by_dtype.items():
        name, digits = _DTYPES[dtype]
        causes = [tuple(_rounded_by(form)) for form in forms]
        n_rounded = sum(map(bool, causes))
        if not n_rounded:
            has_parts = any(not made.rounds for form in forms for made in form.derived())
            parts = ", or the parts of copies add up to the bit" if has_parts else ""
            lines.append(f"{name}: no weight is rounded, all factors are powers of two{parts}")
            continue
        shown = some(list(dict.fromkeys(c for one in causes for c in one)), limit=_N_SHOWN)
        lines.append(
            f"{name}: {n_rounded} of {len(forms)} tensors are rounded, a weight by about "
            f"2^-{digits} of itself: {shown}"
        )
    return "; ".join(lines) or None


def _rounded_by(form: LinearForm) -> Iterator[str]:
    """Why numbers of a form are rounded."""
    for made in form.derived():
        if made.rounds:
            yield made.name
    if any(map(graph.is_constant, form.loads())):
        yield "norms store their gain less a constant"
    elif len(form.terms) > 1 or any(len(term.blend) > 1 for term in form.terms):
        yield "several tensors are added up"
    for term in form.terms:
        factors = {value for value, ref in term.blend if not graph.is_constant(ref)}
        for m in term.maps:
            if isinstance(m, BlockMap):
                if m.longest > 1:
                    yield "several units are added up"
                factors |= {value for row in m.rows for _, value in row}
            elif m is not None:
                yield "a dense matrix"
        for factor in sorted(factors):
            if math.frexp(abs(factor))[0] not in (0.0, 0.5):
                yield f"factor {factor:.4g}"
