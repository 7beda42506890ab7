"""Fields of a config.json by path, and the conditions of specs on them.

A path is dotted: "a.b" is b inside a, "a.*.b" the b of the first entry of a that has one, "a.-1"
the last item of a list, "a.*" all of its items, which are equal.
"""

import fnmatch
import re
from collections.abc import Mapping
from itertools import pairwise

from streammap.architectures.classes import defaults
from streammap.errors import ArchitectureError, PlanError

_MAX_TEXT = 200
_LAYER = re.compile(r"\s*([\w.]+)\[(\w+)\]\s*==\s*(\S+)\s*")


def field_value(config: Mapping[str, object], path: str) -> object:
    """config.json's value of a field; None where there is none."""
    return _value(config, path.split("."))


def meant(config: Mapping[str, object], path: str) -> object:
    """config.json's value of a field; where it is not there, the one that its class has."""
    there = field_value(config, path)
    return defaults.value(config, path) if there is None else there


def is_null(config: Mapping[str, object], path: str) -> bool:
    """Whether config.json has a field, and it is null."""
    above, _, name = path.rpartition(".")
    table = field_value(config, above) if above else config
    return isinstance(table, Mapping) and name in table and table[name] is None


def set_field(config: dict[str, object], path: str, value: object) -> None:
    """Set a field, in each entry that a "*" stands for. `config` is changed.

    A table on the way that is not there, or null, is made.

    Raises:
        PlanError: a part of the path is not a table, or a list that is not there.
    """
    last = path.split(".")[-1]
    for table in _tables(config, path.split(".")):
        if isinstance(table, list):
            for at in range(len(table)) if last == "*" else (int(last),):
                table[at] = value
        else:
            table[last] = value


def delete_field(config: dict[str, object], path: str) -> None:
    """Remove a field where it is there. `config` is changed."""
    above, _, last = path.rpartition(".")
    if not above or field_value(config, above) is not None:
        for table in _tables(config, path.split(".")):
            if isinstance(table, dict):
                table.pop(last, None)


def holds(condition: str, config: Mapping[str, object]) -> bool:
    """Whether a spec's condition holds: "field", with "== value", "!= value" or "~ glob" after it.

    "field == null" holds for a field that is null or not there, "field == absent" for the latter. A
    size that is not there is the one that the model's class has.

    Raises:
        ArchitectureError: another form.
    """
    for operator in ("==", "!="):
        field, is_there, value = (part.strip() for part in condition.partition(operator))
        if is_there and value == "absent":
            return _has(config, field) == (operator == "!=")
        if is_there:
            other = _compared(config, value)
            expected = value if other is None else _text(other)
            return (_text(_compared(config, field)) == expected) == (operator == "==")
    field, is_glob, glob = (part.strip() for part in condition.partition("~"))
    if is_glob:
        return fnmatch.fnmatchcase(_text(field_value(config, field))[:_MAX_TEXT], glob)
    if not re.fullmatch(r"[\w.*-]+", condition.strip()):
        raise ArchitectureError(f"condition {condition!r}: expected 'field', or 'field == value'")
    return bool(_compared(config, condition.strip()))


def layer_condition(condition: str) -> tuple[str, str, str] | None:
    """(list, axis, value) of "list[axis] == value"; None for any other condition."""
    match = _LAYER.fullmatch(condition)
    return None if match is None else (match[1], match[2], match[3])


def _compared(config: Mapping[str, object], path: str) -> object:
    there = field_value(config, path)
    return defaults.size(config, path) if there is None else there


def _has(config: Mapping[str, object], path: str) -> bool:
    """Whether there is such an entry, be it null."""
    above, _, last = path.rpartition(".")
    table = field_value(config, above) if above else config
    return isinstance(table, Mapping) and last in table


def _value(value: object, parts: list[str]) -> object:
    for i, part in enumerate(parts):
        if part == "*" and isinstance(value, Mapping | list):
            entries = value if isinstance(value, list) else value.values()
            inner = (_value(entry, parts[i + 1 :]) for entry in entries)
            return next((entry_value for entry_value in inner if entry_value is not None), None)
        if isinstance(value, list) and re.fullmatch(r"-?\d{1,6}", part):
            at = int(part)
            value = value[at] if -len(value) <= at < len(value) else None
        elif isinstance(value, Mapping):
            value = value.get(part)
        else:
            return None
    return value


def _tables(config: dict[str, object], parts: list[str]) -> list[dict[str, object] | list[object]]:
    """What the last part of a path is in."""
    tables: list[dict[str, object] | list[object]] = [config]
    for part, after in pairwise(parts):
        inner: list[dict[str, object] | list[object]] = []
        for table in tables:
            if isinstance(table, list):
                raise PlanError(f"config.json: {part} of a list can't be written")
            if part != "*" and table.get(part) is None:
                if after.lstrip("-").isdecimal():
                    raise PlanError(
                        f"config.json has no list {part}, of which item {after} would change",
                        hint=f"write {part} into config.json as the model's class has it",
                    )
                table[part] = {}
            values = list(table.values()) if part == "*" else [table[part]]
            for value in values:
                if isinstance(value, dict | list):
                    inner.append(value)
                elif part != "*":
                    raise PlanError(f"config.json: {part} is {value!r}, expected a table")
        tables = inner
    return tables


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)
