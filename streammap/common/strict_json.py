"""JSON from files that may be hostile: no key twice, no depth that exhausts the stack.

NaN and Infinity are read, as Python's own JSON does: published config.json have them. What takes a
number says which it takes.
"""

import json

_MAX_DEPTH = 64
_MAX_VALUES = 10_000_000
"""A value takes up to 100 bytes of memory and as little as 2 bytes of text."""


def loads(content: bytes) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, of too many values, or a key that stands
            twice in an object.
    """
    n_values = content.count(b",") + content.count(b"[") + content.count(b"{")
    if n_values > _MAX_VALUES:
        raise ValueError(f"about {n_values} values, at most {_MAX_VALUES} are read")
    try:
        found: object = json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_depth(found)
    return found


def _check_depth(value: object) -> None:
    """Refuse what the parser takes, but what copies it or writes it again might not."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested too deeply, at most {_MAX_DEPTH} levels are read")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{key!r} twice")
            seen.add(key)
    return found
