"""The gains of norms, folded into what reads them: y = W (g * n(x)) = (W diag(g)) n(x).

A rotation of the residual stream commutes with an RMS norm whose gains are all 1. So each gain goes
into the weights that read its norm, and is 1 after that. Source: SliceGPT, arXiv:2401.15024.
"""

from collections.abc import Iterator
from dataclasses import replace

from streammap.architectures.expression import Name
from streammap.architectures.key_pattern import first_match
from streammap.architectures.model import Family, Model
from streammap.errors import PlanError, some
from streammap.planning import graph
from streammap.planning.derived.times_gain import TimesGain
from streammap.planning.plan import Plan
from streammap.planning.tensor_maps.remapping import is_gain

_LEAVE = "leave --fold-gains out: the function then changes"


def folded(plan: Plan, axis: str) -> tuple[Plan, str]:
    """The plan with the gains of all norms over an axis folded, and a note that says so.

    Raises:
        PlanError: a norm with a mean or a bias, one that something else than linears reads, or
            a head that is tied to the embedding.
    """
    model = plan.model
    if plan.moment is not None:
        raise PlanError(
            "--fold-gains: an optimizer's state can't be folded",
            hint="leave --optimizer out: the optimizer starts fresh",
        )
    targets = dict(plan.targets)
    where = {key: family for family in model.families for key in family.members.values()}
    norms = [f for f in model.families if f.rule.norm and f.dims[-1].expression == Name(axis)]
    n = 0
    for family in norms:
        assert family.rule.norm is not None
        for key in family.members.values():
            if family.rule.norm.kind != "rms" or not is_gain(key):
                raise PlanError(
                    f"--fold-gains: {key}: a LayerNorm takes the mean off, which the model's class "
                    "has no other place for",
                    hint="rotate models with RMS norms",
                )
            offset = family.rule.norm.offset
            form = plan.targets[key]
            gain = graph.shift(form, offset) if offset else form
            for reader in _readers(model, key):
                dim = _reading(where[reader], axis)
                made = TimesGain(targets[reader], gain, dim)
                targets[reader] = graph.derive(made, dtype=targets[reader].spec.dtype)
            targets[key] = graph.shift(graph.scale(form, 0.0), 1.0 - offset)
            n += 1
    made_plan = replace(plan, targets=targets, request=None)
    return made_plan, f"gains of {n} norms are folded into the weights that read them"


def _readers(model: Model, key: str) -> tuple[str, ...]:
    """The keys of what reads a norm.

    Raises:
        PlanError: nothing does, or what can't take a gain.
    """
    found = tuple(_of_spec(model, key)) or tuple(_of_head(model, key))
    if not found:
        raise PlanError(
            f"--fold-gains: {key}: the spec of {model.name} names nothing that could take its gain",
            hint=f"{_LEAVE}; or name what reads it in [reads] of a spec of your own",
        )
    return found


def _of_spec(model: Model, key: str) -> Iterator[str]:
    for norms, readers in model.architecture.reads:
        values = first_match(norms, key)
        if values is None:
            continue
        for other in _keys(model):
            its = first_match(readers, other)
            if its is not None and values.items() <= its.items() and not other.endswith(".bias"):
                yield other


def _of_head(model: Model, key: str) -> Iterator[str]:
    """What reads the norm before the head."""
    for head in model.architecture.heads:
        if all(first_match(patterns, key) is None for patterns in head.norm):
            continue
        tied = [one for one in model.tied_heads if first_match(one.norm, key) is not None]
        if tied:
            raise PlanError(
                f"--fold-gains: {key}: the head is the embedding, which can't take a gain",
                hint="give the head a tensor of its own first: streammap convert SRC OUT --untie",
            )
        for other in _keys(model):
            if first_match((*head.head, *head.readers), other) is not None:
                yield other


def _keys(model: Model) -> Iterator[str]:
    for family in model.families:
        yield from family.members.values()


def _reading(family: Family, axis: str) -> int:
    """The dimension of a linear that reads an axis."""
    dims = [d for d, x in enumerate(family.dims) if x.role == "in" and x.expression == Name(axis)]
    if len(dims) != 1:
        keys = some(list(family.members.values()))
        raise PlanError(f"--fold-gains: {keys}: no linear that reads {axis}", hint=_LEAVE)
    return dims[0]
