"""JSON from files that may be hostile: no duplicate keys, no nesting that exhausts the stack.

NaN and Infinity are read, as Python's own JSON does: published config.json files have them. The
reader of a number checks its range.
"""

import json

_MAX_DEPTH = 64
_MAX_VALUES = 10_000_000
"""A value of 2 bytes of text may take 100 bytes of memory."""


def loads(content: bytes) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, too many values, or a duplicate key.
    """
    n_values = content.count(b",") + content.count(b"[") + content.count(b"{")
    if n_values > _MAX_VALUES:
        raise ValueError(f"about {n_values} values, at most {_MAX_VALUES} are read")
    try:
        value: object = json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    """Refuse nesting that the parser accepts, but that copying or writing might not."""
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
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{key!r} twice")
            seen.add(key)
    return table
