"""What config.json says of single layers, and how it is rewritten when layers change.

A layer's *kind* is all that config.json says of it: its entry of each per-layer list, whether its
number is in a list of numbers, on which side of a count it is. Layers of one kind have the same
tensors.
"""

from collections.abc import Mapping, Sequence

from streammap.architectures import config_fields
from streammap.architectures.schema import Depth
from streammap.errors import PlanError, printable

LayerKind = tuple[str, ...]
_MAX_UNROLLED = 100_000
_MAX_WORD = 80


def kinds(depth: Depth, config: Mapping[str, object], n_layers: int) -> tuple[LayerKind, ...]:
    """The kind of each layer."""
    numbers = {
        field: frozenset(n for n in listed if isinstance(n, int))
        for field in depth.index_lists
        if isinstance(listed := config_fields.field_value(config, field), list)
    }
    return tuple(_kind(depth, config, i, numbers) for i in range(n_layers))


def follow(
    depth: Depth, config: dict[str, object], sources: Sequence[int], *, what: str, n_before: int
) -> tuple[str, ...]:
    """Rewrite config.json for layers that come from others. `config` is changed.

    Args:
        sources: For each layer of the result, the source layer that it takes after.
        what: The axis, for messages.
        n_before: Layers of the source.

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
    _follow_entries(depth, config, sources)
    _follow_counts(depth, config, sources, what)
    for period in depth.periods:
        # Loaders work the kind out from a layer's number, so that a layer may only move to a number
        # of the same kind.
        for i, j in enumerate(sources):
            if _in_period(period, config, i) != _in_period(period, config, j):
                raise PlanError(
                    f"{what} {i} would come from {j}, but config.json's {period[0]} "
                    f"({config_fields.field_value(config, period[0])}) makes them two kinds",
                    hint=f"take groups that keep a layer's place in the period of {period[0]}",
                )
    there = [f for f in depth.delete if config_fields.field_value(config, f) is not None]
    for field in there:
        config_fields.delete_field(config, field)
    return tuple(f"config.json: {f} is removed, it names layers by number" for f in there)


def _follow_entries(depth: Depth, config: dict[str, object], sources: Sequence[int]) -> None:
    """Fields with an entry for each layer, or with layers by number: entries go with the layers."""
    for field in depth.lists:
        # What loaders assume for a missing list need not hold after the change: it is written out.
        old = _listed(depth, config, field, 1 + max(sources))
        if isinstance(old, list) and len(old) > max(sources):
            config_fields.set_field(config, field, [old[j] for j in sources])
    for field in depth.index_lists:
        old = config_fields.field_value(config, field)
        if isinstance(old, list):
            numbers = frozenset(n for n in old if isinstance(n, int))
            new: list[object] = [i for i, j in enumerate(sources) if j in numbers]
            config_fields.set_field(config, field, new)
    for field in depth.tables:
        old = config_fields.field_value(config, field)
        if isinstance(old, Mapping):
            new_table = {str(i): old[str(j)] for i, j in enumerate(sources) if str(j) in old}
            config_fields.set_field(config, field, new_table)
    for field in depth.patterns:
        old = unrolled(config_fields.field_value(config, field))
        if len(old) > max(sources):
            config_fields.set_field(config, field, [[[old[j] for j in sources], 1]])


def _follow_counts(
    depth: Depth, config: dict[str, object], sources: Sequence[int], what: str
) -> None:
    """Fields that count leading layers, or name the last one that leads."""
    for field in depth.prefix_counts:
        old = config_fields.field_value(config, field)
        if isinstance(old, int) and old > 0:
            new_count = _leading([j < old for j in sources], field, what)
            config_fields.set_field(config, field, new_count)
    for field in depth.last_index:
        old = config_fields.field_value(config, field)
        if isinstance(old, int) and old >= 0:
            new_count = _leading([j <= old for j in sources], field, what)
            config_fields.set_field(config, field, new_count - 1)


def _listed(depth: Depth, config: Mapping[str, object], field: str, n_layers: int) -> object:
    """A per-layer list of config.json, or what loaders make of its absence."""
    entries = config_fields.field_value(config, field)
    pattern = depth.default.get(field, ())
    if entries is None and pattern:
        return [pattern[i % len(pattern)] for i in range(n_layers)]
    return entries


def unrolled(value: object) -> list[object]:
    """[[["global", "local"], 6]] -> the entries one by one."""
    unrolled_entries: list[object] = []
    for item in value if isinstance(value, list) else []:
        match item:
            case [list(entries), int(times)] if 0 <= times * len(entries) <= _MAX_UNROLLED:
                unrolled_entries += entries * times
        if len(unrolled_entries) > _MAX_UNROLLED:
            raise PlanError(
                f"config.json: a pattern of more than {_MAX_UNROLLED} layers",
                hint="is this config.json the checkpoint's own?",
            )
    return unrolled_entries


def _kind(
    depth: Depth, config: Mapping[str, object], i: int, numbers: Mapping[str, frozenset[int]]
) -> LayerKind:
    words = []
    for field in depth.lists:
        listed, pattern = config_fields.field_value(config, field), depth.default.get(field, ())
        if isinstance(listed, list) and i < len(listed):
            words.append(f"{field} {printable(str(listed[i])[:_MAX_WORD])}")
        elif listed is None and pattern:
            words.append(f"{field} {pattern[i % len(pattern)]}")
    for field, listed_numbers in numbers.items():
        words.append(f"{'in' if i in listed_numbers else 'not in'} {field}")
    for field, rest in (
        *((f, 0) for f in depth.prefix_counts),
        *((f, 1) for f in depth.last_index),
    ):
        count = config_fields.field_value(config, field)
        if isinstance(count, int) and count >= 0:
            words.append(f"{'before' if i < count + rest else 'after'} {field} {count}")
    words += (
        f"{'at' if _in_period(period, config, i) else 'off'} {period[0]}"
        for period in depth.periods
        if isinstance(config_fields.field_value(config, period[0]), int)
    )
    if depth.first:
        words.append("first" if i == 0 else "later")
    return tuple(words)


def _in_period(period: tuple[str, ...], config: Mapping[str, object], i: int) -> bool:
    every = config_fields.field_value(config, period[0])
    if not isinstance(every, int) or every < 1:
        return True
    offset: object = 0
    if len(period) > 1:
        last = period[1].rpartition(".")[2]
        literal = last.removeprefix("-").isdecimal()
        offset = int(last) if literal else config_fields.field_value(config, period[1])
    return (i - (offset if isinstance(offset, int) else 0)) % every == 0


def _leading(flags: Sequence[bool], field: str, what: str) -> int:
    count = sum(flags)
    if not all(flags[:count]):
        raise PlanError(
            f"config.json's {field} counts leading layers of {what}, and they would not lead",
            hint="take groups that keep the kinds of layers apart and in order",
        )
    return count
