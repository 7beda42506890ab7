"""Layouts of a mixture of experts: one by one as published, or stacked as the class keeps them.

    hub       layers.0.mlp.experts.7.gate_proj.weight                [out, in]
    runtime   layers.0.mlp.experts.gate_up_proj                      [experts, gate and up, in]

Which keys belong together is said by the spec's [layout], and told by the keys alone: with square
experts, shapes do not tell them apart.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from streammap.architectures import key_pattern
from streammap.errors import PlanError, StreammapError, some
from streammap.planning.derived.joined import Stretch, joined, whole
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan, Promise

Layout = Literal["hub", "runtime"]
_EXPERT = "{expert}"
Place = tuple[str, str]
"""What is before the end of a key, and the end in the runtime layout."""


def change(plan: Plan, layout: Layout) -> tuple[Plan, tuple[Promise, str], tuple[str, ...]]:
    """The plan in a layout, what that promises, and notes.

    Raises:
        PlanError: a model without experts; experts that lack some tensors, or are of several kinds.
    """
    model = plan.model
    table = model.architecture.layout
    if plan.moment is not None:
        return plan, ("bit-exact", "an optimizer has the layout of the class"), ()
    if not model.architecture.experts:
        raise PlanError(f"{model.name} has no experts", hint="leave --layout out")
    to = {"runtime": _stacked, "hub": _split}[layout]
    targets = to(plan.targets, table)
    if targets.keys() == plan.targets.keys():
        return plan, ("bit-exact", f"the experts are in the {layout} layout already"), ()
    made = replace(plan, targets=_ordered(plan.targets, targets), request=None)
    try:
        made.model  # noqa: B018 (resolving it compares shapes)
    except StreammapError as error:
        raise PlanError(
            f"--layout {layout}: the result would not fit its config.json: {error.message}",
            hint="is this config.json the checkpoint's own?",
        ) from error
    return made, ("bit-exact", f"the experts are in the {layout} layout"), ()


def _stacked(
    targets: Mapping[str, LinearForm], table: Mapping[str, Sequence[str]]
) -> dict[str, LinearForm]:
    """Hub to runtime."""
    ends = [
        (_pattern(hub), (end, number))
        for end, hubs in table.items()
        for number, hub in enumerate(hubs)
    ]
    made: dict[str, LinearForm] = {}
    found: dict[Place, dict[tuple[int, int], str]] = {}
    for key, form in targets.items():
        for pattern, (end, number) in ends:
            match = pattern.fullmatch(key)
            if match is not None:
                expert = int(match["expert"]) if "expert" in pattern.groupindex else -1
                found.setdefault((match["before"] or "", end), {})[expert, number] = key
                break
        else:
            made[key] = form
    for (before, end), parts in found.items():
        key = before + end
        if key in targets:
            raise PlanError(
                f"{key} is there, and so is {next(iter(parts.values()))}: both layouts at once",
                hint="leave one of the two out of the files",
            )
        made[key] = _stack(key, parts, len(table[end]), targets)
    return made


def _stack(
    key: str,
    parts: Mapping[tuple[int, int], str],
    n_parts: int,
    targets: Mapping[str, LinearForm],
) -> LinearForm:
    """Experts' tensors [rows, columns] -> [experts, rows of all parts, columns]."""
    if (-1, 0) in parts:
        return targets[parts[-1, 0]]
    n_experts = 1 + max(expert for expert, _ in parts)
    places = [(expert, number) for expert in range(n_experts) for number in range(n_parts)]
    missing = [place for place in places if place not in parts]
    if missing:
        expert, number = missing[0]
        near = next(iter(parts.values()))
        raise PlanError(
            f"{key}: part {number + 1} of {n_parts} of expert {expert} is missing "
            f"({len(missing)} of {len(places)} tensors, beside {near})",
            hint="download or save the checkpoint again",
        )
    forms = [targets[parts[place]] for place in places]
    kinds = sorted({str(form.spec) for form in forms})
    alike = all(a.spec == b.spec for a, b in zip(forms, forms[n_parts:], strict=False))
    rests = {(form.spec.dtype, form.spec.shape[1:]) for form in forms}
    if len(rests) > 1 or not alike:
        raise PlanError(
            f"{key}: its experts are of several kinds: {some(kinds)}",
            hint="give them one dtype first: streammap convert --dtype",
        )
    rows = sum(form.spec.shape[0] for form in forms[:n_parts])
    return joined([whole(form) for form in forms], (n_experts, rows, *forms[0].spec.shape[1:]))


def _split(
    targets: Mapping[str, LinearForm], table: Mapping[str, Sequence[str]]
) -> dict[str, LinearForm]:
    """Runtime to hub."""
    ends = [(_pattern(end), hubs) for end, hubs in table.items()]
    made: dict[str, LinearForm] = {}
    for key, form in targets.items():
        for pattern, hubs in ends:
            match = pattern.fullmatch(key)
            if match is None:
                continue
            before = match["before"] or ""
            if _EXPERT in hubs[0]:
                made |= {before + end: part for end, part in _parts(key, form, hubs)}
            else:
                made[before + hubs[0]] = form
            break
        else:
            made[key] = form
    return made


def _parts(key: str, form: LinearForm, hubs: Sequence[str]) -> "list[tuple[str, LinearForm]]":
    """[experts, rows of all parts, columns] -> [rows, columns] of each part of each expert."""
    n_experts, n_rows, *rest = form.spec.shape
    rows, uneven = divmod(n_rows, len(hubs))
    if uneven:
        raise PlanError(f"{key}: {n_rows} rows, expected a multiple of {len(hubs)}")
    shape = (rows, *rest)
    n = form.spec.n_elements // (n_experts * len(hubs))
    return [
        (
            end.replace(_EXPERT, str(expert)),
            joined([Stretch(form, (expert * len(hubs) + number) * n, n)], shape),
        )
        for expert in range(n_experts)
        for number, end in enumerate(hubs)
    ]


def _pattern(end: str) -> re.Pattern[str]:
    text = re.escape(end).replace(re.escape(_EXPERT), "(?P<expert>0|[1-9][0-9]{0,8})")
    return re.compile(rf"(?P<before>.*\.)?{text}")


def _ordered(
    before: Mapping[str, LinearForm], after: Mapping[str, LinearForm]
) -> dict[str, LinearForm]:
    """By their text where the source's are, as transformers writes them; else by their numbers."""
    by_dtype: dict[str, list[str]] = {}
    for key, form in before.items():
        by_dtype.setdefault(form.spec.dtype, []).append(key)
    is_plain = all(keys == sorted(keys) for keys in by_dtype.values())
    keys = sorted(after) if is_plain else sorted(after, key=key_pattern.natural)
    return {key: after[key] for key in keys}
