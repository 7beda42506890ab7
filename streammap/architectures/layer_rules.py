"""Per-layer lists of config.json as loaders see them: a missing one is derived.

transformers works a missing `layer_types` out from the numbers of the layers ("every sixth is full
attention"), so that a layer which moves would become another one. What it makes of each list stands
in the specs ([[depth.*.derived]]).
"""

from collections.abc import Mapping, Sequence

from streammap.architectures import config_fields
from streammap.architectures.schema import QUOTIENT, Depth, LayerRule, Numbers
from streammap.errors import PlanError, printable

Config = Mapping[str, object]
_MAX_UNROLLED = 100_000
_MAX_WORD = 80


def number(sources: Numbers, config: Config) -> int | None:
    """The first of some fields and numbers that is there; of a list, how many entries it has.

    A quotient "=a/b", of fields or numbers, is there where both are whole numbers; where b is 0 it
    is a. None where no source is there, or the first is not a whole number.
    """
    for source in sources:
        value = _value(source, config)
        if isinstance(value, list):
            return len(value)
        if value is not None:
            return value if isinstance(value, int) else None
    return None


def written(sources: Numbers, config: Config) -> str | None:
    """The field that keeps a number which follows from others: the first, where it isn't there."""
    there = next((s for s in sources if _value(s, config) is not None), None)
    first = next(iter(sources), None)
    return first if isinstance(first, str) and isinstance(there, str) and there != first else None


def _value(source: str | int, config: Config) -> object:
    if isinstance(source, int):
        return source
    if not source.startswith(QUOTIENT):
        return config_fields.field_value(config, source)
    above, below = (
        int(name) if name.isdecimal() else config_fields.field_value(config, name)
        for name in source.removeprefix(QUOTIENT).split("/")
    )
    if type(above) is not int or type(below) is not int:
        return None
    return above // below if below else above


def field_of(sources: Numbers, config: Config) -> str | None:
    """The field that gives a number, or would give it: the first that is there, or the first."""
    fields = [s for s in sources if isinstance(s, str) and not s.startswith(QUOTIENT)]
    there = [f for f in fields if config_fields.field_value(config, f) is not None]
    return next(iter([*there, *fields]), None)


def rule_of(depth: Depth, field: str) -> LayerRule | None:
    """How loaders derive a list, if they do."""
    return next((rule for rule in depth.derived if rule.when and rule.list == field), None)


def entries(depth: Depth, config: Config, field: str, n_layers: int) -> list[object] | None:
    """One entry a layer, listed or derived; None where there is neither."""
    listed, rule = config_fields.field_value(config, field), rule_of(depth, field)
    if field in depth.patterns and listed is not None:
        return unrolled(listed) or None
    if isinstance(listed, list) and (listed or rule is None):
        forced = rule is not None and rule.last and len(listed) == n_layers
        return [*listed[:-1], rule.yes] if forced and rule is not None else listed
    if rule is None or listed not in (None, []):
        return None
    return derived(depth, rule, config, n_layers)


def numbers(depth: Depth, config: Config, field: str, n_layers: int) -> list[int] | None:
    """The layers that a list of numbers names, listed or derived; an empty list names none."""
    listed, rule = config_fields.field_value(config, field), rule_of(depth, field)
    if isinstance(listed, list):
        start = 1 if field in depth.from_one else 0
        return [n - start for n in listed if isinstance(n, int)]
    if rule is None or listed is not None:
        return None
    if rule.layers:
        return [n for n in rule.layers if isinstance(n, int)]
    flags = holding(depth, rule, config, n_layers)
    return None if flags is None else [i for i, flag in enumerate(flags) if flag]


def derived(depth: Depth, rule: LayerRule, config: Config, n_layers: int) -> list[object] | None:
    """The entries that loaders derive; None where config.json's numbers are none."""
    flags = holding(depth, rule, config, n_layers)
    return None if flags is None else [rule.yes if flag else rule.no for flag in flags]


def holding(depth: Depth, rule: LayerRule, config: Config, n_layers: int) -> list[bool] | None:
    """At which layers a rule holds; None where config.json's numbers are none."""
    every = number(rule.every, config) if rule.every else 1
    offset = number(rule.offset, config)
    before = number(rule.before, config) if rule.before else n_layers
    if every is None or every < 1 or offset is None or before is None:
        return None
    allowed = _allowed(depth, rule, config, n_layers)
    return [
        ((i - offset) % every == 0 and i < before and allowed[i])
        or (rule.first and i == 0)
        or (rule.last and i == n_layers - 1)
        for i in range(n_layers)
    ]


def check(depth: Depth, config: Config, field: str) -> None:
    """Refuse a missing list that loaders would derive from numbers that are none.

    Raises:
        PlanError: naming the list and the numbers.
    """
    rule, listed = rule_of(depth, field), config_fields.field_value(config, field)
    if rule is None or listed not in (None, []) or holding(depth, rule, config, 1) is not None:
        return
    fields = [field_of(inputs, config) for inputs in (rule.every, rule.offset, rule.before)]
    values = {f: config_fields.field_value(config, f) for f in fields if f is not None}
    given = ", ".join(f"{f} ({printable(str(v)[:_MAX_WORD])})" for f, v in values.items())
    raise PlanError(
        f"config.json has no {field}, and {given} can't say it: expected whole numbers of layers",
        hint=f"write {field} into config.json, with an entry for each layer",
    )


def follow_inputs(
    depth: Depth, before: Config, config: dict[str, object], sources: Sequence[int], n_before: int
) -> tuple[str, ...]:
    """Rewrite the counts and periods that lists were derived from. `config` is changed.

    The lists are written out by now, and loaders go by them; but older ones know the numbers only.
    A number that can't say what its list says is removed.

    Args:
        before: config.json of the source.
        config: That of the result so far.

    Returns:
        Notes for the user.
    """
    notes = []
    for rule in depth.derived:
        if rule is not rule_of(depth, rule.list) or (rule.yes and rule.yes == rule.no):
            continue
        listed = _listed(depth, rule, before, n_before)
        if listed is None or listed != holding(depth, rule, before, n_before):
            continue  # It says something else already.
        after = [listed[j] for j in sources]
        count, field = number(rule.before, before), field_of(rule.before, before)
        if count is not None and field is not None:
            # A count that all layers are below says nothing but that.
            new = sum(j < count for j in sources) if count < n_before else max(count, len(sources))
            if new != count:
                config_fields.set_field(config, field, new)
        if holding(depth, rule, config, len(sources)) == after:
            continue
        for inputs in (rule.every, rule.before):
            field = field_of(inputs, config)
            if field is not None and config_fields.field_value(config, field) is not None:
                config_fields.delete_field(config, field)
                notes.append(f"config.json: {field} is removed, {rule.list} lists the layers now")
    return tuple(notes)


def unrolled(value: object) -> list[object]:
    """[[["global", "local"], 6]] -> the entries one by one."""
    unrolled_entries: list[object] = []
    for item in value if isinstance(value, list) else []:
        match item:
            case [list(pattern), int(times)] if 0 <= times * len(pattern) <= _MAX_UNROLLED:
                unrolled_entries += pattern * times
        if len(unrolled_entries) > _MAX_UNROLLED:
            raise PlanError(
                f"config.json: a pattern of more than {_MAX_UNROLLED} layers",
                hint="is this config.json the checkpoint's own?",
            )
    return unrolled_entries


def _allowed(depth: Depth, rule: LayerRule, config: Config, n_layers: int) -> list[bool]:
    """The layers that another list and `layers` allow."""
    named = frozenset(rule.layers) if rule.layers else frozenset(range(n_layers))
    flags = [i in named for i in range(n_layers)]
    if rule.where is None:
        return flags
    if rule.where in depth.index_lists:
        there = numbers(depth, config, rule.where, n_layers)
        return flags if there is None else [i in there for i in range(n_layers)]
    listed = entries(depth, config, rule.where, n_layers)
    if listed is None or len(listed) < n_layers:
        return flags
    return [bool(listed[i]) for i in range(n_layers)]


def _listed(depth: Depth, rule: LayerRule, config: Config, n_layers: int) -> list[bool] | None:
    """At which layers a rule holds by its list."""
    if rule.list in depth.index_lists:
        there = numbers(depth, config, rule.list, n_layers)
        return None if there is None else [i in there for i in range(n_layers)]
    listed = entries(depth, config, rule.list, n_layers)
    return None if listed is None else [entry == rule.yes for entry in listed]
