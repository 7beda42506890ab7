"""A config.json with some fields changed; "a.b" is b inside a, "a.-1" the last item."""

import copy
import re
from collections.abc import Iterator, Mapping

from streammap.architectures import config_fields

Fields = Mapping[str, object]
"""config.json's content, or a part of it."""
Changes = Mapping[str, object]
"""Dotted field -> its value in place of the configuration's; None takes the field out."""
NO_SIZE = re.compile(r"_ids?$|seed|version|^id2label|^label2id|^task_specific|^chunk_size_")
"""Names of fields that are not sizes."""


def changed(fields: Fields, changes: Changes) -> dict[str, object]:
    """A copy with the fields changed; None takes a field out."""
    result = copy.deepcopy(dict(fields))
    for name, value in changes.items():
        if value is None:
            config_fields.delete_field(result, name)
        else:
            config_fields.set_field(result, name, value)
    return result


def decoded(value: Mapping[str, object]) -> dict[str, object]:
    """Infinite numbers, which the library writes as {"__float__": ...}, read back."""

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


def leaves(fields: Fields, before: str = "") -> Iterator[tuple[str, object]]:
    """Every field with its dotted name."""
    for name, value in fields.items():
        if isinstance(value, dict):
            if not NO_SIZE.search(name) and all(isinstance(k, str) for k in value):
                yield from leaves(value, f"{before}{name}.")
        else:
            yield before + name, value
