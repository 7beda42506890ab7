"""What becomes of layers: kept, copied, dropped, mixed; and which of them can be zero-initialised.

Of the copies of a layer one is the layer itself, so that the old order stays where it can; the
others are new.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from streammap.architectures import axis_words
from streammap.architectures.model import Model
from streammap.errors import PlanError, some
from streammap.planning.maps import AxisMap

_N_SHOWN = 6


@final
@dataclass(frozen=True, slots=True)
class Fate:
    """What a map of layers does to them."""

    n_before: int
    sources: tuple[int | None, ...]
    """Of each layer of the result, the layer that it comes from first; None where nothing does."""
    new: frozenset[int]
    """Layers of the result that are no layer of the source, but a copy of one, or of none."""
    dropped: tuple[int, ...]
    """Layers of the source that are nowhere in the result."""
    is_moved: bool
    """Whether layers of the source change their order."""
    is_mixed: bool
    """Whether a layer is computed from several, or multiplied."""


def of_map(m: AxisMap) -> Fate:
    """What a map of layers does to them."""
    rows = [m.members(i) for i in range(m.n_out)]
    sources = tuple(row[0][0] if row else None for row in rows)
    used = sorted({j for row in rows for j, _ in row})
    first = [j for j in dict.fromkeys(sources) if j is not None]
    own = _in_order(sources, used)
    is_moved = own is None
    if own is None:
        own = {sources.index(j) for j in first}
    return Fate(
        m.n_in,
        sources,
        frozenset(range(m.n_out)) - own,
        tuple(sorted(set(range(m.n_in)) - set(used))),
        is_moved,
        any(len(row) > 1 or (row and row[0][1] != 1.0) for row in rows),
    )


def _in_order(sources: Sequence[int | None], wanted: Sequence[int]) -> set[int] | None:
    """Places that have the wanted layers in this order; None if there are none."""
    found: set[int] = set()
    for i, j in enumerate(sources):
        if len(found) < len(wanted) and j == wanted[len(found)]:
            found.add(i)
    return found if len(found) == len(wanted) else None


def zeroed(model: Model, axis: str, fate: Fate) -> frozenset[int]:
    """The layers of the result that are to be zero-initialised.

    Raises:
        PlanError: a layer with zero weights would be no identity, or the others change places.
    """
    post = post_norm(model, axis)
    if post is not None:
        raise PlanError(
            f"{post} stands after the residual addition (post-LN): a zero-initialised "
            "layer still normalises, so it is no identity there",
            hint="give --new-layers copy: layers are copied then",
        )
    if fate.is_moved:
        first = [j for j in dict.fromkeys(fate.sources) if j is not None]
        raise PlanError(
            f"{axis}: the first copies of the layers are not in their old order ({some(first)})",
            hint="keep it, or give --new-layers copy",
        )
    return fate.new


def post_norm(model: Model, axis: str | None = None) -> str | None:
    """The name of a norm behind the residual addition, of one stack if asked; None if none is."""
    named = [
        (family.name, family.rule.norm)
        for family in model.families
        if axis is None or axis in family.indices
    ]
    if model.architecture.weightless:
        # A norm without weights is in no file.
        named += [(rule.pattern.text, rule.norm) for rule in model.architecture.rules]
    return next((name for name, norm in named if norm is not None and norm.post), None)


def notes(model: Model, axis: str, fate: Fate, *, zero: bool) -> list[str]:
    """Which layers are dropped, copied and zero-initialised, by their numbers."""
    units, n_after = axis_words.units_of(model.architecture, axis), len(fate.sources)
    told = []
    if fate.dropped:
        told.append(f"{units} {_numbers(fate.dropped)} of {fate.n_before}: dropped")
    if fate.new:
        what = "zero-initialised copies" if zero else "copies"
        told.append(f"{units} {_copies(fate)} of {n_after}: {what}")
    return told


def words(fate: Fate) -> str:
    """The layers in slices, as they are asked for: "0:24,8:32"."""
    spans: list[list[int]] = []
    for j in fate.sources:
        if j is not None and spans and j == spans[-1][1]:
            spans[-1][1] = j + 1
        elif j is not None:
            spans.append([j, j + 1])
    return ",".join(f"{a}:{b}" for a, b in spans)


def advice(model: Model, fates: Sequence[Fate]) -> list[str]:
    """How added layers would keep the function, where they can."""
    lost = any(fate.dropped or fate.is_moved or fate.is_mixed for fate in fates)
    if lost or not any(fate.new for fate in fates) or post_norm(model) is not None:
        return []
    return ["--new-layers zero makes added layers zero-initialised, which keeps the function"]


def _numbers(layers: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for i in layers:
        if spans and i == spans[-1][-1] + 1:
            spans[-1].append(i)
        else:
            spans.append([i])
    return some([_span(one[0], len(one)) for one in spans], limit=_N_SHOWN)


def _span(start: int, n: int) -> str:
    return f"{start}" if n == 1 else f"{start} to {start + n - 1}"


def _copies(fate: Fate) -> str:
    """The new layers, and where each run of them comes from: "24 to 39 (8 to 23)"."""
    spans: list[tuple[int, int | None, int]] = []
    for i in sorted(fate.new):
        j = fate.sources[i]
        if spans:
            start, source, n = spans[-1]
            if i == start + n and j is not None and source is not None and j == source + n:
                spans[-1] = start, source, n + 1
                continue
        spans.append((i, j, 1))
    words = []
    for start, source, n in spans:
        here = _span(start, n)
        words.append(here if source is None else f"{here} (of {_span(source, n)})")
    return some(words, limit=_N_SHOWN)
