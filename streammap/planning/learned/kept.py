"""What learned maps keep of the function: C P = I, and what stands between them.

An axis whose units are only added up and read by linears (the residual stream) may take any P with
a reader C for which C P = I. Norms see units one by one: RMS norms commute with a rotation where
their gains are equal, and with a signed permutation if their gains change places. Neurons stand
behind an activation: they may only be copied.

Sources: SliceGPT, arXiv:2401.15024 (rotations); arXiv:2606.31963 (signed permutations).
"""

from streammap.architectures import axis_facts, axis_words
from streammap.architectures.expression import Name
from streammap.architectures.model import Family, Model
from streammap.io.dtypes import to_torch
from streammap.planning.exactness import Guarantee
from streammap.planning.learned.matrices import Pair
from streammap.planning.plan import Plan

_MAX_WHOLE = 4096
"""Units of which C P is computed; of more, what it does to a few vectors."""
_N_VECTORS = 8


def error_of(pair: Pair) -> float:
    """How far C P is from I: its largest number, or that of what it adds to random vectors."""
    import torch

    p, c = (x.to(torch.float64) for x in (pair.matrix, pair.reader))
    n_old = p.shape[1]
    if n_old <= _MAX_WHOLE:
        given = torch.eye(n_old, dtype=torch.float64)
    else:
        source = torch.Generator().manual_seed(0)
        given = torch.randn(n_old, _N_VECTORS, generator=source, dtype=torch.float64)
    return float((c @ (p @ given) - given).abs().max())


def is_rotation(pair: Pair) -> bool:
    """Whether P is square, orthogonal, and read by its transpose."""
    square = pair.matrix.shape[0] == pair.matrix.shape[1]
    return square and pair.reader.equal(pair.matrix.T) and error_of(pair) <= tolerance(pair)


def is_signed(pair: Pair) -> bool:
    """Whether units only change places and signs."""
    return is_rotation(pair) and bool(((pair.matrix != 0).sum(dim=1) == 1).all())


def tolerance(pair: Pair) -> float:
    """What rounding of the matrices allows."""
    import torch

    return 1e-9 if pair.matrix.dtype == torch.float64 else 1e-4


def guarantee(plan: Plan, axis: str, pair: Pair) -> Guarantee:
    """The guarantee of the maps of one axis, with the reason."""
    model = plan.model
    spec, shown = model.architecture, axis_words.shown(model.architecture, axis)
    if _is_identity(pair):
        return "bit-exact", f"{shown}: units stay as they are"
    error = error_of(pair)
    if error > tolerance(pair):
        return "approximate", f"{shown}: C P differs from I by {error:.1e}"
    if axis not in spec.spaces.get("hidden", ()):
        copies = _are_copies(pair)
        if copies and axis in spec.spaces.get("mlp", ()) and axis not in _normed(model):
            return "exact", f"{shown}: units are copied, and C P = I"
        return "approximate", f"{shown}: what stands behind its units is not linear"
    reason = _inexact(plan, axis, pair)
    if reason is not None:
        return "approximate", f"{shown}: {reason}"
    what = "units change places and signs" if is_signed(pair) else "C P = I"
    return "exact", f"{shown}: {what}, to {error:.0e}"


def _inexact(plan: Plan, axis: str, pair: Pair) -> str | None:
    """Why a linear map of the residual stream would change the function; None if it would not."""
    model = plan.model
    if axis in model.architecture.caveats:
        return model.architecture.caveats[axis]
    for family in model.families:
        both = [d.expression for d in family.dims if d.role in ("in", "out")]
        if family.rule.kind == "tensor" and [d.expression for d in family.dims] == [Name(axis)]:
            return f"{family.name} multiplies or adds to each unit"
        if family.rule.kind in ("linear", "conv1d") and both == [Name(axis)] * 2:
            return f"{family.name} may have an activation behind it"
    if axis in model.architecture.weightless:
        return "a norm without weights sees it"
    for family in model.families:
        if family.rule.norm is None or axis not in _axes(family):
            continue
        if not is_rotation(pair) or family.rule.norm.kind != "rms":
            return f"{family.name} normalises it, and P is no rotation under an RMS norm"
        if not is_signed(pair) and not _is_constant(plan, family):
            return f"gains of {family.name} differ: fold them into what reads it first"
    if model.tied and not is_rotation(pair):
        return "the head is tied to the embedding, and reads it by P"
    return None


def _is_constant(plan: Plan, family: Family) -> bool:
    """Whether each norm of a family has one gain for all units. Reads them: a row each."""
    import torch

    for key in family.members.values():
        ref = plan.targets[key].copied
        if ref is None or not ref.spec.is_float:
            return False
        content = bytearray(ref.spec.nbytes)
        ref.source.read_into(ref.key, 0, memoryview(content))
        gains = torch.frombuffer(content, dtype=to_torch(ref.spec.dtype))
        if not bool((gains == gains[0]).all()):
            return False
    return True


def _is_identity(pair: Pair) -> bool:
    """Whether nothing changes, as in a template that is not filled in."""
    import torch

    n_new, n_old = pair.matrix.shape
    if n_new != n_old or int(pair.matrix.count_nonzero()) != n_old:
        return False
    ones = (pair.matrix.diagonal(), pair.reader.diagonal())
    counted = int(pair.reader.count_nonzero()) == n_old
    return counted and all(bool(torch.eq(x, 1).all()) for x in ones)


def _are_copies(pair: Pair) -> bool:
    """Whether each new unit is one of the old, or 0 and not read."""
    p, n_members = pair.matrix, (pair.matrix != 0).sum(dim=1)
    units = bool((n_members <= 1).all() and ((p == 0) | (p == 1)).all())
    return units and bool((pair.reader[:, n_members == 0] == 0).all())


def _normed(model: Model) -> frozenset[str]:
    return axis_facts.normed_axes(model)


def _axes(family: Family) -> set[str]:
    return {d.expression.name for d in family.dims if isinstance(d.expression, Name)}
