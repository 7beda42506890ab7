"""JSON from files that may be hostile: no key twice, no depth that exhausts the stack."""

import json


def loads(content: bytes) -> object:
    """The value of a JSON text.

    Raises:
        ValueError: not UTF-8, not JSON, nested too deeply, or a key that stands twice in an object.
    """
    try:
        found: object = json.loads(content.decode(), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return found


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"{key!r} twice")
            seen.add(key)
    return found
