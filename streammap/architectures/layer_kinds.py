"""What config.json says of single layers, and how it is rewritten when layers change.

A layer's *kind* is all that config.json says of it: its entry of each per-layer list, whether its
number is in a list of numbers, on which side of a count it is. Layers of one kind have the same
tensors.
"""

import copy
from collections.abc import Mapping, Sequence

from streammap.architectures import config_fields, layer_rules
from streammap.architectures.schema import Depth, Numbers
from streammap.errors import PlanError, printable

LayerKind = tuple[str, ...]
_MAX_WORD = 80


def kinds(depth: Depth, config: Mapping[str, object], n_layers: int) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    facts = [
        *_listed(depth, config, n_layers),
        *_counted(depth, config, n_layers),
        *_periodic(depth, config, n_layers),
    ]
    if depth.first:
        facts.append(["first" if i == 0 else "later" for i in range(n_layers)])
    return tuple(tuple(words[i] for words in facts if words[i]) for i in range(n_layers))


def follow(
    depth: Depth,
    config: dict[str, object],
    sources: Sequence[int],
    *,
    what: str,
    n_before: int,
    members: Sequence[Sequence[int]] = (),
) -> tuple[str, ...]:
    """Rewrite config.json for layers that come from others. `config` is changed.

    Args:
        sources: For each layer of the result, the source layer that it takes after.
        what: The axis, for messages.
        n_before: Layers of the source.
        members: For each layer of the result, all source layers that it is made of, where these
            are more.

    Returns:
        Notes for the user.

    Raises:
        PlanError: config.json can't express it.
    """
    if depth.last and sources[-1] != n_before - 1:
        raise PlanError(
            f"the last {what} would come from {sources[-1]}, but loaders take the last one to be "
            f"of the kind of {n_before - 1}",
            hint=f"give groups of which the last begins with {n_before - 1}",
        )
    before = copy.deepcopy(config)
    _follow_lists(depth, before, config, sources, n_before)
    _follow_numbers(depth, before, config, sources, n_before)
    _follow_marks(depth, before, config, members or [[j] for j in sources], n_before)
    _follow_tables(depth, config, sources)
    _follow_counts(depth, config, sources, what, n_before)
    _follow_runs(depth, config, len(sources), what, n_before)
    notes = list(layer_rules.follow_inputs(depth, before, config, sources, n_before))
    for period in depth.periods:
        # Loaders work the kind out from a layer's number, so that a layer may only move to a number
        # of the same kind.
        for i, j in enumerate(sources):
            if _in_period(period, before, i) != _in_period(period, before, j):
                written = layer_rules.written(period[0], before)
                name = written or layer_rules.field_of(period[0], before) or "model_type"
                raise PlanError(
                    f"{what} {i} would come from {j}, but config.json's {name} "
                    f"({layer_rules.number(period[0], before)}) makes them two kinds",
                    hint=f"take groups that keep a layer's place in the period of {name}",
                )
        # A period that follows from the number of layers is written before that changes.
        field = layer_rules.written(period[0], before)
        if field is not None:
            config_fields.set_field(config, field, layer_rules.number(period[0], before))
    there = [f for f in depth.delete if config_fields.field_value(config, f) is not None]
    for field in there:
        config_fields.delete_field(config, field)
    notes += (f"config.json: {f} is removed, it names layers by number" for f in there)
    return tuple(notes)


def _follow_lists(
    depth: Depth,
    before: Mapping[str, object],
    config: dict[str, object],
    sources: Sequence[int],
    n_before: int,
) -> None:
    """Fields with an entry for each layer: entries go with the layers.

    What loaders make of a missing list need not hold after the change: it is written out.
    """
    for field in (*depth.lists, *depth.patterns):
        layer_rules.check(depth, before, field)
        old = layer_rules.entries(depth, before, field, n_before)
        if old is not None and len(old) > max(sources):
            new: list[object] = [old[j] for j in sources]
            config_fields.set_field(config, field, [[new, 1]] if field in depth.patterns else new)


def _follow_numbers(
    depth: Depth,
    before: Mapping[str, object],
    config: dict[str, object],
    sources: Sequence[int],
    n_before: int,
) -> None:
    """Fields that name layers by number."""
    for field in depth.index_lists:
        layer_rules.check(depth, before, field)
        old = layer_rules.numbers(depth, before, field, n_before)
        if old is not None:
            named, start = frozenset(old), 1 if field in depth.from_one else 0
            new = [i + start for i, j in enumerate(sources) if j in named]
            config_fields.set_field(config, field, new)


def _follow_marks(
    depth: Depth,
    before: Mapping[str, object],
    config: dict[str, object],
    members: Sequence[Sequence[int]],
    n_before: int,
) -> None:
    """Fields that name layers whose outputs are read: behind the layers that come from each."""
    places: dict[int, int] = {}
    for i, row in enumerate(members):
        # A zero-initialised layer right behind its original gives the same; one elsewhere does not.
        places |= {j: i for j in row if places.get(j, i - 1) == i - 1}
    for field in depth.marks:
        marks = layer_rules.numbers(depth, before, field, n_before)
        if marks is None:
            continue
        # A layer that is left out gives what the one before it gives. Marks beyond the stack are
        # never reached, and stay beyond it.
        moved = [
            places.get(max((j for j in places if j <= mark), default=-1), -1)
            if mark < n_before
            else mark - n_before + len(members)
            for mark in marks
        ]
        if len(set(moved)) < len(set(marks)) or -1 in moved:
            raise PlanError(
                f"config.json's {field} ({marks}) names layers whose outputs are read, and they "
                f"would be layers {moved}",
                hint="take groups that keep these layers apart, and keep one up to each of them",
            )
        config_fields.set_field(config, field, moved)
    for states in depth.states:
        _follow_states(states, before, config, places, n_before=n_before, n_after=len(members))


def _follow_states(
    states: Numbers,
    before: Mapping[str, object],
    config: dict[str, object],
    places: Mapping[int, int],
    *,
    n_before: int,
    n_after: int,
) -> None:
    """A field that says which hidden states are read: they are those behind the same layers."""

    def moved(state: object) -> object:
        if isinstance(state, list):
            return [moved(one) for one in state]
        if not isinstance(state, int):
            return state
        n_run = state + n_before + 1 if state < 0 else state
        last = max((j for j in places if j < n_run), default=-1)
        n_behind = n_after if n_run >= n_before else places.get(last, -1) + 1
        return n_behind - n_after - 1 if state < 0 else n_behind

    given = (config_fields.field_value(before, s) if isinstance(s, str) else s for s in states)
    old = next((one for one in given if one is not None), None)
    field = layer_rules.field_of(states, before)
    if field is not None and moved(old) != old:
        config_fields.set_field(config, field, moved(old))


def _follow_tables(depth: Depth, config: dict[str, object], sources: Sequence[int]) -> None:
    for field in depth.tables:
        table = config_fields.field_value(config, field)
        if isinstance(table, Mapping):
            # transformers pads the numbers: "05" is layer 5 of ten or more.
            old = {key.lstrip("0") or "0": entry for key, entry in table.items()}
            width = len(str(len(sources) - 1))
            new = {f"{i:0{width}}": old[str(j)] for i, j in enumerate(sources) if str(j) in old}
            config_fields.set_field(config, field, new)


def _follow_counts(
    depth: Depth, config: dict[str, object], sources: Sequence[int], what: str, n_before: int
) -> None:
    """Fields that count leading or trailing layers, or name the last one that leads."""
    for counts in (*depth.prefix_counts, *depth.suffix_counts):
        count, field = layer_rules.number(counts, config), layer_rules.field_of(counts, config)
        if count is not None and field is not None and count > 0:
            trails = counts in depth.suffix_counts
            n_leading = n_before - count if trails else count
            whose = f"{'trailing' if trails else 'leading'} {what}s"
            new_leading = _leading([j < n_leading for j in sources], field, whose)
            new_count = len(sources) - new_leading if trails else new_leading
            if new_count != count:
                config_fields.set_field(config, field, new_count)
    for field in depth.last_index:
        old = config_fields.field_value(config, field)
        if isinstance(old, int) and old >= 0:
            new_count = _leading([j <= old for j in sources], field, f"leading {what}s")
            config_fields.set_field(config, field, new_count - 1)


def _follow_runs(
    depth: Depth, config: dict[str, object], n_after: int, what: str, n_before: int
) -> None:
    """How often layers are run in all: each as often as before."""
    n_runs, field = layer_rules.number(depth.runs, config), layer_rules.field_of(depth.runs, config)
    if n_runs is None or field is None:
        return
    if n_runs % n_before:
        raise PlanError(
            f"config.json's {field} is {n_runs}, no multiple of the {n_before} of {what}: they "
            "are run unequally often, or never",
            hint=f"resize the widths only, or a model whose {field} is a multiple",
        )
    config_fields.set_field(config, field, n_runs // n_before * n_after)


def _listed(depth: Depth, config: Mapping[str, object], n_layers: int) -> list[list[str]]:
    """Of each list, its word for each layer; "" where it has none."""
    facts = []
    for field in (*depth.lists, *depth.patterns):
        listed = layer_rules.entries(depth, config, field, n_layers)
        if listed is not None:
            words = [f"{field} {printable(str(entry)[:_MAX_WORD])}" for entry in listed[:n_layers]]
            facts.append([*words, *[""] * (n_layers - len(words))])
    for field in depth.index_lists:
        numbers = layer_rules.numbers(depth, config, field, n_layers)
        if numbers is not None:
            named = frozenset(numbers)
            facts.append([f"{'in' if i in named else 'not in'} {field}" for i in range(n_layers)])
    return facts


def _counted(depth: Depth, config: Mapping[str, object], n_layers: int) -> list[list[str]]:
    """Of each count, on which side of it a layer is."""
    ends: tuple[tuple[Numbers, int, int], ...] = (
        *((counts, 0, 1) for counts in depth.prefix_counts),
        *((counts, n_layers, -1) for counts in depth.suffix_counts),
        *(((field,), 1, 1) for field in depth.last_index),
    )
    facts = []
    for counts, start, sign in ends:
        count, field = layer_rules.number(counts, config), layer_rules.field_of(counts, config)
        if count is not None and field is not None and count >= 0:
            end = start + sign * count
            words = [f"{'before' if i < end else 'after'} {field} {count}" for i in range(n_layers)]
            facts.append(words)
    return facts


def _periodic(depth: Depth, config: Mapping[str, object], n_layers: int) -> list[list[str]]:
    """Of each period, whether a layer is at it."""
    facts = []
    for period in depth.periods:
        every = layer_rules.number(period[0], config)
        if every is not None:
            word = layer_rules.field_of(period[0], config) or f"every {every}"
            facts.append(
                [
                    f"{'at' if _in_period(period, config, i) else 'off'} {word}"
                    for i in range(n_layers)
                ]
            )
    return facts


def _in_period(period: tuple[Numbers, ...], config: Mapping[str, object], i: int) -> bool:
    every = layer_rules.number(period[0], config)
    if every is None or every < 1:
        return True
    offset = layer_rules.number(period[1], config) if len(period) > 1 else 0
    return (i - (offset or 0)) % every == 0


def _leading(flags: Sequence[bool], field: str, what: str) -> int:
    count = sum(flags)
    if not all(flags[:count]):
        raise PlanError(
            f"config.json's {field} counts {what}, and they would stand elsewhere",
            hint="take groups that keep the kinds of layers apart and in order",
        )
    return count
