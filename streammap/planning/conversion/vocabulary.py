"""Another size of the vocabulary: rows of embedding and head that go, or that come behind."""

import math
from collections.abc import Iterator
from dataclasses import replace

from streammap.architectures.expression import Name
from streammap.architectures.model import Model
from streammap.errors import PlanError, StreammapError, some
from streammap.planning import config_json, graph
from streammap.planning.derived.joined import Stretch, joined, whole
from streammap.planning.derived.new_rows import Fill, NewRows
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan, Promise

AXIS = "vocab"
_MOST = 2**31
_WORDS = {"mean": "the mean of all", "zero": "0", "normal": "drawn around the mean of all"}


def resize(
    plan: Plan, size: int | None, multiple: int | None, fill: Fill, seed: int
) -> tuple[Plan, tuple[Promise, str], tuple[str, ...]]:
    """The plan with another number of tokens, what that promises, and notes.

    Args:
        size: Rows of the result; None for as many as there are.
        multiple: What the number is rounded up to a multiple of.
        fill: What new rows are.

    Raises:
        PlanError: no vocabulary, or several; tokens that config.json names would go; a tensor that
            does not have its tokens as rows.
    """
    model = plan.model
    axis, old = _axis(model)
    new = math.ceil((size or old) / (multiple or 1)) * (multiple or 1)
    if new >= _MOST:
        raise PlanError(f"--vocab: {new} tokens, expected fewer than {_MOST}")
    if new == old:
        return plan, ("bit-exact", f"there are {old} tokens already"), ()
    if new < old:
        _check_named(plan, new)
    targets = dict(plan.targets)
    fill = fill if plan.moment is None else "zero"
    changed = []
    for family in model.families:
        at = [d for d, dim in enumerate(family.dims) if dim.expression == Name(axis)]
        uses = any(
            dim.expression is not None and axis in model.architecture.axes_in(dim.expression)
            for dim in family.dims
        )
        if uses and at != [0]:
            raise PlanError(f"{family.name}: its tokens are not its rows, --vocab can't resize it")
        if at:
            for key in family.members.values():
                targets[key] = _resized(plan.targets[key], new, fill, seed)
                changed.append(key)
    config, _ = config_json.rewritten(
        plan.config or {}, model, {**model.sizes, axis: new}, sources={}, members={}, fields={}
    )
    result = replace(
        plan, targets=targets, config=config if plan.config is not None else None, request=None
    )
    _check(result, axis, new)
    if new < old:
        reason = f"the last {old - new} of {old} tokens are gone"
        return result, ("approximate", reason), (f"{reason}: {some(changed)}",)
    rows = f"{new - old} new rows of {some(changed)} are {_WORDS[fill]}"
    return result, ("exact", f"the {old} tokens keep their scores; {rows}"), ()


def _axis(model: Model) -> tuple[str, int]:
    """The axis of the vocabulary, and its size."""
    found = [name for name in model.sizes if name.rpartition(".")[2] == AXIS]
    if len(found) != 1:
        told = f"several vocabularies: {some(found)}" if found else "no vocabulary"
        raise PlanError(f"{model.name} has {told}, --vocab needs one", hint="leave --vocab out")
    return found[0], model.sizes[found[0]]


def _resized(form: LinearForm, new: int, fill: Fill, seed: int) -> LinearForm:
    """Rows [old, ...] -> [new, ...]."""
    old, *rest = form.spec.shape
    shape, row = (new, *rest), math.prod(rest)
    if new < old:
        return joined([Stretch(form, 0, new * row)], shape)
    if not form.spec.is_float:
        raise PlanError(
            f"new rows of dtype {form.spec.dtype} can't be made", hint="convert it first"
        )
    rows = graph.derive(NewRows(form, new - old, fill, seed), dtype=form.spec.dtype)
    return joined([whole(form), whole(rows)], shape)


def _check_named(plan: Plan, new: int) -> None:
    """Refuse to remove a token that config.json names."""
    named = {name: number for name, number in _token_ids(plan.config or {}) if number >= new}
    if named:
        told = ", ".join(f"{name} {number}" for name, number in sorted(named.items()))
        raise PlanError(
            f"--vocab {new}: config.json names tokens behind it: {told}",
            hint=f"keep {max(named.values()) + 1} tokens or more",
        )


def _token_ids(config: object, path: str = "") -> Iterator[tuple[str, int]]:
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from _token_ids(value, f"{path}{name}.")
        elif name.endswith(("_token_id", "_token_index")):
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int) and not isinstance(number, bool):
                    yield f"{path}{name}", number


def _check(result: Plan, axis: str, new: int) -> None:
    """The rewritten config.json must lead to the new size, and fit each tensor."""
    try:
        found = result.model.sizes.get(axis)
    except StreammapError as error:
        raise PlanError(
            f"--vocab {new}: the result would not fit its config.json: {error.message}",
            hint="this model's class has other tensors of tokens",
        ) from error
    if found != new:
        raise PlanError(f"--vocab {new}: config.json would say {found}")
