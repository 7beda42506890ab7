"""What config.json says of experts when their number changes, and when copies keep the function.

Of m-fold copies of all experts, the m * k with the best scores are the copies of the k best. What
the gates of these are is the router's way:

    renormalised   the gates of the chosen add up to 1: a copy has 1/m of the old gate
    softmax        a gate is a share among all experts: a copy has 1/m of the old gate
    own            a gate is a function of the expert's own score: m copies count m times

So top_k times m is exact for the first two. A top_k of 1 may also stay, as one of equal copies is
as good as another: exact where its gate does not depend on their number (renormalised, own).

A selection of experts keeps top_k, as published recipes do; merging m into one divides it by m.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from streammap.architectures.config_fields import meant
from streammap.architectures.model import Model
from streammap.architectures.schema import Experts
from streammap.errors import PlanError
from streammap.planning import maps
from streammap.planning.maps import AxisMap, BlockMap

TopK = Literal["keep", "scale"] | int
"""What becomes of the number of experts that a token takes; an int is the number itself."""


@dataclass(frozen=True, slots=True)
class ExpertFields:
    """Fields of config.json that go with a number of experts."""

    fields: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def follow(model: Model, axis: str, m: AxisMap, *, grows: bool, asked: TopK | None) -> ExpertFields:
    """The number of experts that a token takes, and the groups that they lie in.

    Args:
        m: The map of the experts that is applied.
        asked: What a user wants of top_k; None for what keeps the function, or a recipe's habit.

    Raises:
        PlanError: a top_k that can't be had, experts that don't divide into their groups.
    """
    about = model.architecture.experts[axis]
    groups = _groups(model, about, m, grows=grows)
    available = _available(model, about, groups, m.n_out)
    chosen = {
        name: value if isinstance(value, int) else list(value)
        for name, old in _top_k(model, about).items()
        for value in (
            [_changed(about, m, one, grows=grows, asked=asked, most=available) for one in old]
            if isinstance(old, list)
            else _changed(about, m, old, grows=grows, asked=asked, most=available),
        )
    }
    if asked is not None and not chosen:
        raise PlanError(
            f"--top-k, but config.json of {model.name} doesn't say how many experts a token takes",
            hint="leave it out",
        )
    fields: dict[str, object] = {**groups, **chosen}
    before = {name: meant(model.config, name) for name in fields}
    notes = [
        f"config.json: {name} stays {value}"
        if value == before[name]
        else f"config.json: {name} {before[name]} -> {value}, with the experts"
        for name, value in fields.items()
    ]
    if grows and asked is None and any(fields[name] != before[name] for name in chosen):
        notes.append("--top-k keep leaves the number of experts that a token takes as it is")
    changed = {name: value for name, value in fields.items() if value != before[name]}
    return ExpertFields(changed, tuple(notes))


def inexact(model: Model, axis: str, m: AxisMap, fields: Mapping[str, object]) -> str | None:
    """Why copies of experts change the function; None where they don't.

    Args:
        m: The growth of the experts.
        fields: New values of fields of config.json.
    """
    about = model.architecture.experts.get(axis)
    if about is None:
        return "the spec doesn't say how experts are chosen"
    if about.inexact is not None:
        return about.inexact
    if not isinstance(m, BlockMap):
        return "experts are mapped by a dense matrix"
    top_k = _top_k(model, about)
    if not top_k:
        return "config.json doesn't say how many experts a token takes"
    for name, old in top_k.items():
        new = fields.get(name, old)
        pairs = zip(old, new, strict=True) if isinstance(old, list) else ((old, new),)  # type: ignore[call-overload]
        for k, after in pairs:
            why = _why_inexact(about, m, name, k, after)
            if why is not None:
                return why
    return why_regrouped(model, about, m, fields)


def takes_one(model: Model, axis: str, fields: Mapping[str, object]) -> bool:
    """Whether a token of the result takes a single expert."""
    top_k = _top_k(model, model.architecture.experts[axis])
    return all(fields.get(name, old) == 1 for name, old in top_k.items())


def takes_all_copies(model: Model, axis: str, m: AxisMap, fields: Mapping[str, object]) -> bool:
    """Whether a token takes all copies of each expert that it takes, with equal gates.

    Then what they write may differ by what adds up to 0.
    """
    if not isinstance(m, BlockMap) or inexact(model, axis, m, fields) is not None:
        return False
    n_copies = set(m.uses)
    if len(n_copies) != 1 or any(len(row) != 1 for row in m.rows):
        return False
    (n,) = n_copies
    return all(
        fields.get(name, old) == ([n * k for k in old] if isinstance(old, list) else n * old)
        for name, old in _top_k(model, model.architecture.experts[axis]).items()
    )


def _top_k_fields(about: Experts) -> tuple[str, ...]:
    # Specs from before `top_k` have its fields under `multiply`.
    return about.top_k or tuple(name for name in about.multiply if "group" not in name)


def _top_k(model: Model, about: Experts) -> dict[str, int | list[int]]:
    """Field -> how many experts a token takes, or for each layer how many."""
    values = {name: meant(model.config, name) for name in _top_k_fields(about)}
    return {name: v for name, v in values.items() if _is_count(v)}  # type: ignore[misc]


def _is_count(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_count, value))
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _times(m: AxisMap, *, grows: bool) -> int | None:
    """How many copies of each expert there are, or how many make one; None where that differs."""
    large, small = (m.n_out, m.n_in) if grows else (m.n_in, m.n_out)
    return None if large % small else large // small


def _is_selection(m: AxisMap) -> bool:
    return isinstance(m, BlockMap) and maps.without_zeros(m).longest <= 1


def _changed(
    about: Experts, m: AxisMap, k: int, *, grows: bool, asked: TopK | None, most: int
) -> int:
    """A new top_k."""
    if isinstance(asked, int):
        if asked > most:
            raise PlanError(
                f"--top-k {asked}: a token can take {most} of the result's experts at most",
                hint=f"take 1 to {most}",
            )
        return asked
    times = _times(m, grows=grows)
    fits = times is not None and (grows or k % times == 0)
    if asked == "scale" and not fits:
        raise PlanError(
            f"--top-k scale: {m.n_in} -> {m.n_out} experts, and {k} for each token, do not change "
            "by one whole factor",
            hint="give --top-k keep, or a number",
        )
    usual = "keep" if (about.gates == "own" if grows else _is_selection(m)) else "scale"
    if not fits or (asked or usual) == "keep":
        return min(k, most)
    assert times is not None
    return min(k * times if grows else k // times, most)


def _groups(model: Model, about: Experts, m: AxisMap, *, grows: bool) -> dict[str, int]:
    """Counts of groups of experts for the result."""
    names = [name for name in about.multiply if name not in _top_k_fields(about)]
    counts = {name: meant(model.config, name) for name in names}
    old = {name: v for name, v in counts.items() if isinstance(v, int) and _is_count(v)}
    times = _times(m, grows=grows)
    new = dict(old)
    if times is not None and not _is_selection(m) and not grows:
        new = {name: v // times if v % times == 0 else min(v, m.n_out) for name, v in old.items()}
    elif times is not None and grows:
        new = {name: v * times for name, v in old.items()}
    n_groups = new.get(about.groups or "", 1)
    if m.n_out % n_groups:
        raise PlanError(
            f"{m.n_out} experts do not divide into {n_groups} groups ({about.groups})",
            hint=f"take a multiple of {n_groups}",
        )
    return new


def _available(model: Model, about: Experts, groups: Mapping[str, int], n_experts: int) -> int:
    """Of how many experts a router chooses, once it has chosen groups."""
    n_groups = groups.get(about.groups or "", 1)
    chosen = [count for name, count in groups.items() if name != about.groups]
    return n_experts // n_groups * min(chosen, default=n_groups)


def _why_inexact(about: Experts, m: BlockMap, name: str, k: int, after: object) -> str | None:
    fewest, most = min(m.uses), max(m.uses)
    if k == 1 and isinstance(after, int):
        # The best expert's copies are chosen first, and nothing else if there are enough of them.
        if about.gates == "renormalised" and after <= fewest:
            return None
        if about.gates == "own" and after == 1 <= fewest:
            return None
    if fewest != most:
        return "experts are copied unevenly"
    if about.gates == "own":
        return "a gate is a function of the expert's own score, so copies add up"
    if after != k * most:
        return f"{name} is {after}, but {k * most} experts hold what {k} did"
    return None


def why_regrouped(
    model: Model, about: Experts, m: BlockMap, fields: Mapping[str, object]
) -> str | None:
    """Why experts in other places change which groups are chosen; None where they don't.

    A router that first chooses groups scores each by its best experts (the best two in DeepSeek): a
    group of the result must be a copy of one old group, not hold an expert twice.
    """
    n_groups = meant(model.config, about.groups) if about.groups else 1
    if not isinstance(n_groups, int) or n_groups <= 1:
        return None
    after = fields.get(about.groups or "", n_groups)
    size = m.n_in // n_groups
    if not isinstance(after, int) or m.n_out // after != size:
        return f"a group of experts ({about.groups}) is of another size"
    for start in range(0, m.n_out, size):
        copied = {j for i in range(start, start + size) for j, _ in m.members(i)}
        if len({j // size for j in copied}) != 1 or len(copied) != size:
            found = f"inside one of the {n_groups} groups"
            return f"experts of other groups, or copies, {found} change its score"
    return None
