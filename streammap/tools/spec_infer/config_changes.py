"""A config.json with some fields changed; "a.b" is b inside a, "a.-1" the last item."""

import copy
import re
from collections.abc import Iterator, Mapping
from typing import cast

Fields = Mapping[str, object]
"""config.json's content, or a part of it."""
Changes = Mapping[str, object]
"""Dotted field -> its value in place of the configuration's; None takes the field out."""
NO_SIZE = re.compile(r"_ids?$|seed|version|^id2label|^label2id|^task_specific|^chunk_size_")
"""Names of fields that are no sizes."""


def changed(fields: Fields, changes: Changes) -> dict[str, object]:
    """A copy with the fields changed; None takes a field out."""
    found = copy.deepcopy(dict(fields))
    for name, value in changes.items():
        *scope, leaf = name.split(".")
        owner: object = found
        for part in scope:
            owner = cast("dict[str, object]", owner)[part]
        if isinstance(owner, list):
            owner[int(leaf)] = value
        elif isinstance(owner, dict):
            owner[leaf] = value
            if value is None:
                del owner[leaf]
    return found


def decoded(value: Mapping[str, object]) -> dict[str, object]:
    """The library's own way to write an infinite number, read again."""

    def one(value: object) -> object:
        if isinstance(value, dict):
            if value.keys() == {"__float__"}:
                return float(str(value["__float__"]))
            return {k: one(v) for k, v in value.items()}
        return [one(v) for v in value] if isinstance(value, list) else value

    return {k: one(v) for k, v in value.items()}


def joined(scope: str, leaf: str) -> str:
    """The dotted name of a field of a part."""
    return f"{scope}.{leaf}" if scope else leaf


def spread(entries: list[object]) -> list[object]:
    """One entry a layer, of GPT-Neo's [[["global", "local"], 12]] too."""
    pairs = [e for e in entries if isinstance(e, list) and len(e) == 2 and isinstance(e[0], list)]
    if not pairs or len(pairs) != len(entries) or not all(isinstance(e[1], int) for e in pairs):
        return entries
    return [kind for kinds, times in pairs for kind in kinds * times]


def leaves(fields: Fields, before: str = "") -> Iterator[tuple[str, object]]:
    """Every field with its dotted name."""
    for name, value in fields.items():
        if isinstance(value, dict):
            if not NO_SIZE.search(name) and all(isinstance(k, str) for k in value):
                yield from leaves(value, f"{before}{name}.")
        else:
            yield before + name, value
