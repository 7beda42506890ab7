"""Numbers that config.json leaves out, as transformers' classes mean them (defaults.json).

A config.json may hold no more than what differs from its class's defaults, and those of the parts
of published models often do. defaults.json is made by `python -m streammap.tools.class_defaults`.
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

Value = int | float | bool | list[object]
_OTHER_NAMES, _OF = "also", "of"


def size(config: Mapping[str, object], path: str) -> int | None:
    """The size that the class of a config.json, or of a part of it, has for a field not there.

    None where the field is there, even as null, or under another name that the class takes; where
    its part is not there; and where the class has no size for it either.
    """
    found = value(config, path)
    return found if type(found) is int else None


def value(config: Mapping[str, object], path: str) -> Value | None:
    """As `size`; another number, a switch or a list of sizes where the field is one."""
    table: object = config
    name = config.get("model_type")
    parts = path.split(".")
    while True:
        if not isinstance(table, Mapping):
            return None
        about = _entry(name)
        inner = about.get(parts[0])
        if len(parts) == 1 or not isinstance(inner, str):
            break
        table = table.get(parts[0])
        # A part without a model type, or whose class has none, is of the class that it is by
        # default, of which some wholes have sizes of their own.
        own = table.get("model_type") if isinstance(table, Mapping) else None
        name = inner if own in (None, "", _entry(inner).get(_OF)) else own
        parts = parts[1:]
    others = about.get(_OTHER_NAMES)
    aliases = others.items() if isinstance(others, Mapping) else ()
    if parts[0] in table or any(alias in table for alias, field in aliases if field == parts[0]):
        return None
    return _item(inner, parts[1:])


def _item(found: object, parts: list[str]) -> Value | None:
    """A number or switch, a list of some, or the one of them that the rest of a path names."""
    if isinstance(found, list) and len(parts) == 1 and parts[0].lstrip("-").isdecimal():
        at = int(parts[0])
        found, parts = found[at] if -len(found) <= at < len(found) else None, []
    return found if not parts and isinstance(found, int | float | list) else None


def _entry(name: object) -> Mapping[str, object]:
    return _of_type(name) if isinstance(name, str) else {}


@lru_cache(maxsize=64)
def _of_type(name: str) -> Mapping[str, object]:
    # A line each, so that a run holds those of its own model types alone.
    start = f"{json.dumps(name)}: "
    with (resources.files(__package__) / "defaults.json").open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith(start):
                entry: dict[str, object] = json.loads(line.removeprefix(start).rstrip(",\n"))
                return entry
    return {}
