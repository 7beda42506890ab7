"""What transformers' classes mean by a size that config.json leaves out: classes/defaults.json.

python -m streammap.tools.class_defaults > streammap/architectures/classes/defaults.json
"""

import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from streammap.architectures import registry
from streammap.architectures.expression import FunctionCall
from streammap.architectures.schema import Architecture
from streammap.common import optional

Entry = dict[str, object]
"""Field -> its default; of a part, the entry that describes it.

"also" has other names of fields, "of" the model type of a part that has other sizes in its whole.
"""


def collected() -> dict[str, Entry]:
    """Model type (or "type.part", of a part without one) -> its entry, for all that is served."""
    classes: Mapping[str, Any] = optional.library("transformers").CONFIG_MAPPING
    names = frozenset(_asked())
    entries: dict[str, Entry] = {}
    for model_type in sorted(registry.model_types()):
        if model_type in classes:
            _collect(model_type, classes[model_type], names, entries)
    return dict(sorted(entries.items()))


def text(entries: Mapping[str, Entry]) -> str:
    """The file: a line for each entry."""
    lines = (f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _asked() -> Iterator[str]:
    """All names that are part of a field that gives a size or another number, in any spec."""
    yield "tie_word_embeddings"
    for model_type, name in registry.model_types().items():
        yield from _fields_of(registry.load(name, {"model_type": model_type}))
    for name in registry.names():
        for model in registry.tiny_models(name):
            spec = registry.load(name, {**model.config, "model_type": model.model_type})
            yield from _fields_of(spec)


def _fields_of(spec: Architecture) -> Iterator[str]:
    for rule in spec.rules:
        if rule.norm is not None:
            yield from (field.split(".")[-1] for field in rule.norm.eps)
    for experts in spec.experts.values():
        named = (*experts.top_k, *experts.multiply, experts.groups or "")
        yield from (field.split(".")[-1] for field in named)
    for axis in spec.axes.values():
        for source in axis.sources:
            listed = source.arguments if isinstance(source, FunctionCall) else ()
            for field in (source,) if isinstance(source, str) else listed:
                yield from field.split(".")


def _collect(name: str, kind: Any, names: frozenset[str], entries: dict[str, Entry]) -> None:
    if name in entries:
        return
    entry = entries[name] = _sizes(kind, names)
    for part, inner in _parts(kind):
        own_type: str = getattr(inner, "model_type", "")
        if own_type:
            _collect(own_type, inner, names, entries)
        own = _inside(kind, part, inner, names)
        if own_type and own == {field: entries[own_type].get(field) for field in own}:
            entry[part] = own_type
        elif own:
            entry[part] = f"{name}.{part}"
            entries[f"{name}.{part}"] = {**own, **({"of": own_type} if own_type else {})}


def _sizes(kind: Any, names: frozenset[str]) -> Entry:
    """A class's sizes, and the other names that it has for them."""
    entry: Entry = {}
    for field, parameter in sorted(inspect.signature(kind.__init__).parameters.items()):
        if field in names and _is_told(parameter.default):
            entry[field] = parameter.default
    other = {alias: field for alias, field in kind.attribute_map.items() if field in entry}
    if other:
        entry["also"] = dict(sorted(other.items()))
    return entry


def _inside(kind: Any, part: str, inner: Any, names: frozenset[str]) -> Entry:
    """The sizes of a part of which nothing is said but its type: some wholes have their own."""
    sizes = _sizes(inner, names)
    own_type: str = getattr(inner, "model_type", "")
    try:
        given = {"model_type": own_type} if own_type else {}
        made: Mapping[str, object] = getattr(kind(**{part: given}), part).to_dict()
        own = {field: made.get(field, x) if _is_told(x) else x for field, x in sizes.items()}
        if own == sizes:
            return sizes
        sizes = own
        alone = inner(**{field: x for field, x in sizes.items() if _is_told(x)}).to_dict()
    except Exception:  # Some classes can't do without their parts.
        return sizes
    more = (field for field in sorted(names) if _is_told(made.get(field)))
    return sizes | {field: made[field] for field in more if alone.get(field) != made[field]}


def _is_told(value: object) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return bool(items) and all(type(item) in (int, float, bool) for item in items)


def _parts(kind: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a configuration, and the class that each has where nothing is said."""
    try:
        made = kind()
    except Exception:  # Some classes can't do without their parts.
        return
    for part in sorted(kind.sub_configs):
        inner = getattr(made, part, None)
        if inner is not None:
            yield part, type(inner)


if __name__ == "__main__":
    sys.stdout.write(text(collected()))
