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
from streammap.planning import graph
from streammap.planning.exactness import Guarantee
from streammap.planning.learned.pair import Pair
from streammap.planning.plan import Plan


def guarantee(plan: Plan, axis: str, pair: Pair) -> Guarantee:
    """The guarantee of the maps of one axis, with the reason."""
    model = plan.model
    spec, shown = model.architecture, axis_words.shown(model.architecture, axis)
    if pair.is_identity:
        return "bit-exact", f"{shown}: units stay as they are"
    error = pair.error
    if error > pair.tolerance:
        return "approximate", f"{shown}: C P differs from I by {error:.1e}"
    if axis not in spec.spaces.get("hidden", ()):
        copies = pair.are_copies
        if copies and axis in spec.spaces.get("mlp", ()) and axis not in _normed(model):
            return "exact", f"{shown}: units are copied, and C P = I"
        return "approximate", f"{shown}: what stands behind its units is not linear"
    reason = _inexact(plan, axis, pair)
    if reason is not None:
        return "approximate", f"{shown}: {reason}"
    what = "units change places and signs" if pair.is_signed else "C P = I"
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
        if not pair.is_rotation or family.rule.norm.kind != "rms":
            return f"{family.name} normalises it, and P is no rotation under an RMS norm"
        if not pair.is_signed and not _is_constant(plan, family):
            return f"gains of {family.name} differ: fold them into what reads it (--fold-gains)"
    if model.tied and not pair.is_rotation:
        return "the head is tied to the embedding, and reads it by P"
    return None


def _is_constant(plan: Plan, family: Family) -> bool:
    """Whether each norm of a family has one gain for all units. Reads them: a row each."""
    import torch

    for key in family.members.values():
        form = plan.targets[key]
        if graph.is_zero(form) or all(graph.is_constant(load) for load in form.loads()):
            continue
        ref = form.copied
        if ref is None or not ref.spec.is_float:
            return False
        content = bytearray(ref.spec.nbytes)
        ref.source.read_into(ref.key, 0, memoryview(content))
        gains = torch.frombuffer(content, dtype=to_torch(ref.spec.dtype))
        if not bool((gains == gains[0]).all()):
            return False
    return True


def _normed(model: Model) -> frozenset[str]:
    return axis_facts.normed_axes(model)


def _axes(family: Family) -> set[str]:
    return {d.expression.name for d in family.dims if isinstance(d.expression, Name)}
