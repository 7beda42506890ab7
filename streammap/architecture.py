"""Architecture specs: what each tensor of a model is made of, as data.

A spec is one TOML file of `architectures/`. Its tables:

    model_types   the config.json model_type it serves; `detect`: keys that tell it without one
    [vars]        alternatives used in patterns: base = ["bert.", ""]
    [axes]        axis = config field | "=expression" | a list of these, the first that is there
    [axis_kind]   "width" (default), "depth" (an index of the key), "frozen" (never resized)
    [alias]       names for expressions: qk = "heads*head_dim"
    [constraints] rules = ["embed == heads*head_dim"], held by source and result
    [modules]     pattern = "linear in -> out" | "conv1d ..." (stored in x out) | "conv ..."
                  | "embedding n -> width" | "norm width": expands to .weight, .bias (.gamma, .beta)
    [tensors]     pattern = one entry a dimension, "expression:role"; "_" keeps, "..." is the rest
    [buffers]     keys that are copied as they are
    [drop]        keys that the result doesn't have
    [required]    keys that must be there, for every layer where they have one
    [head]        the head tied to the embedding, the norm that feeds it, other readers of that norm
    [config]      further config fields to rewrite: field = expression

A role is `out` (the tensor makes this axis), `in` (it reads it), or none (kept as it is).
"""

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from streammap.errors import ArchitectureError
from streammap.pattern import Expression, KeyPattern, compile_pattern, parse_expression

Role = Literal["out", "in", "keep"]
Kind = Literal["width", "depth", "frozen"]
REST = "..."
_TABLES = (
    "schema", "model_types", "detect", "vars", "axes", "axis_kind", "alias", "constraints",
    "modules", "tensors", "buffers", "drop", "required", "head", "config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dim:
    """What one dimension of a tensor is."""

    text: str
    """As the spec has it; "_" for any size, "..." for any number of dimensions."""
    expression: Expression | None
    role: Role


@dataclass(frozen=True, slots=True)
class Rule:
    """What the tensors of one key pattern are."""

    pattern: KeyPattern
    kind: str
    """linear, conv1d, conv, embedding, norm, tensor, buffer or drop."""
    dims: tuple[Dim, ...] = ()

    def dims_for(self, rank: int) -> tuple[Dim, ...] | None:
        """One Dim for each dimension of a tensor of `rank`, or None where that can't be."""
        if self.kind in ("buffer", "drop"):
            return (_KEEP,) * rank
        at = next((i for i, dim in enumerate(self.dims) if dim.text == REST), None)
        if at is None:
            return self.dims if len(self.dims) == rank else None
        n_rest = rank - len(self.dims) + 1
        if n_rest < 0:
            return None
        return self.dims[:at] + (_KEEP,) * n_rest + self.dims[at + 1 :]


@dataclass(frozen=True, slots=True)
class Head:
    """A head that may share the embedding's tensor, and what reads the norm before it."""

    norm: KeyPattern
    embed: KeyPattern
    head: KeyPattern
    readers: tuple[KeyPattern, ...]
    """Other tensors that read what the norm makes."""
    classes: tuple[str, ...]
    """Model classes that have the head (glob patterns); empty for "wherever the norm is there"."""

    def is_in(self, classes: Iterable[str]) -> bool:
        """Whether a model of config.json's `architectures` has this head."""
        given = tuple(classes)
        return not (self.classes and given) or any(
            fnmatch.fnmatchcase(name, glob) for name in given for glob in self.classes
        )


@dataclass(frozen=True, slots=True)
class Axis:
    """A named size of the model."""

    name: str
    kind: Kind
    sources: tuple[str | Expression, ...]
    """Config fields ("a.b" is nested) and expressions; the first that is there counts."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The config fields among the sources."""
        return tuple(source for source in self.sources if isinstance(source, str))


@dataclass(frozen=True, slots=True)
class Architecture:
    """One spec."""

    name: str
    model_types: tuple[str, ...]
    detect: tuple[KeyPattern, ...]
    axes: Mapping[str, Axis]
    aliases: Mapping[str, Expression]
    constraints: tuple[tuple[str, Expression, Expression], ...]
    rules: tuple[Rule, ...]
    required: tuple[KeyPattern, ...]
    head: Head | None
    config: Mapping[str, Expression]

    @property
    def depth_axis(self) -> str:
        """The axis that counts layers."""
        return next(axis.name for axis in self.axes.values() if axis.kind == "depth")


_HEAD = ("norm", "embed", "head", "readers", "classes")
_KEEP = Dim("_", None, "keep")


@cache
def names() -> tuple[str, ...]:
    """The shipped specs."""
    folder = resources.files("streammap") / "architectures"
    return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".toml")))


@cache
def load(name: str) -> Architecture:
    """A shipped spec by name.

    Raises:
        ArchitectureError: there is none, or its file is wrong.
    """
    if name not in names():
        raise ArchitectureError(f"no architecture {name!r}", hint=f"there are {', '.join(names())}")
    file = resources.files("streammap") / "architectures" / f"{name}.toml"
    return parse(file.read_text(), name=name)


def parse(text: str, *, name: str) -> Architecture:
    """Read a spec from TOML.

    Raises:
        ArchitectureError: naming the spec and the entry.
    """
    try:
        return _parse(tomllib.loads(text), name)
    except tomllib.TOMLDecodeError as error:
        raise ArchitectureError(f"{name}.toml: {error}", hint="mend the file") from error
    except ArchitectureError as error:
        raise ArchitectureError(f"{name}.toml: {error.message}", hint=error.hint) from error


def for_model_type(model_type: str) -> Architecture | None:
    """The shipped spec that serves a config.json model_type."""
    return next((a for a in map(load, names()) if model_type in a.model_types), None)


def for_keys(keys: Iterable[str]) -> Architecture | None:
    """The shipped spec whose `detect` keys are all there."""
    found = tuple(keys)
    for architecture in map(load, names()):
        patterns = architecture.detect
        if patterns and all(any(p.match(key) is not None for key in found) for p in patterns):
            return architecture
    return None


def _parse(content: Mapping[str, object], name: str) -> Architecture:
    unknown = [table for table in content if table not in _TABLES]
    if unknown:
        raise ArchitectureError(
            f"unknown entry {unknown[0]!r}", hint=f"known: {', '.join(_TABLES)}"
        )
    if content.get("schema") != 1:
        raise ArchitectureError(f"schema is {content.get('schema')!r}, expected 1")
    variables = {k: _strings(v, f"[vars] {k}") for k, v in _table(content, "vars").items()}

    def pattern(text: str) -> KeyPattern:
        return compile_pattern(text, variables)

    def patterns(table: str) -> tuple[KeyPattern, ...]:
        keys = _known(content, table, ("keys",)).get("keys", [])
        return tuple(pattern(text) for text in _strings(keys, f"[{table}] keys"))

    rules = []
    for text, words in _table(content, "modules").items():
        rules += [Rule(pattern(text + end), k, dims) for end, k, dims in _module(text, words)]
    for text, words in _table(content, "tensors").items():
        rules.append(Rule(pattern(text), "tensor", _dims(_string(words, text))))
    rules += [Rule(found, "buffer") for found in patterns("buffers")]
    rules += [Rule(found, "drop") for found in patterns("drop")]
    kinds = _known(content, "axis_kind", tuple(_table(content, "axes")))
    axes = {k: _axis(k, v, kinds.get(k, "width")) for k, v in _table(content, "axes").items()}
    aliases = {k: parse_expression(_string(v, k)) for k, v in _table(content, "alias").items()}
    if sum(axis.kind == "depth" for axis in axes.values()) != 1:
        raise ArchitectureError("expected one axis of kind depth")
    rules_text = _strings(
        _known(content, "constraints", ("rules",)).get("rules", []), "[constraints] rules"
    )
    head = content.get("head")
    return Architecture(
        name=name,
        model_types=_strings(content.get("model_types"), "model_types"),
        detect=tuple(map(pattern, _strings(content.get("detect", []), "detect"))),
        axes=axes,
        aliases=aliases,
        constraints=tuple(_constraint(text) for text in rules_text),
        rules=tuple(rules),
        required=patterns("required"),
        head=None if head is None else _head(_known(content, "head", _HEAD), variables),
        config={k: parse_expression(_string(v, k)) for k, v in _table(content, "config").items()},
    )


def _module(text: str, words: object) -> list[tuple[str, str, tuple[Dim, ...]]]:
    kind, _, shape = _string(words, text).partition(" ")
    before, arrow, after = (part.strip() for part in shape.partition("->"))
    if kind == "norm" and not arrow:
        width = (_dim(f"{before}:out"),)
        return [(end, kind, width) for end in (".weight", ".bias", ".gamma", ".beta")]
    if not arrow or kind not in ("linear", "conv1d", "conv", "embedding"):
        raise ArchitectureError(f"{text}: {words!r} is no module such as 'linear embed -> mlp'")
    reads, makes = _dim(f"{before}:in"), _dim(f"{after}:out")
    if kind == "embedding":
        return [(".weight", kind, (_dim(before), makes))]
    weight = {
        "linear": (makes, reads),
        "conv1d": (reads, makes),
        "conv": (makes, reads, Dim(REST, None, "keep")),
    }[kind]
    return [(".weight", kind, weight), (".bias", kind, (makes,))]


def _dims(words: str) -> tuple[Dim, ...]:
    return tuple(_dim(part.strip()) for part in words.split(","))


def _dim(text: str) -> Dim:
    body, _, role = text.partition(":")
    if body == REST:
        return Dim(REST, None, "keep")
    if role not in ("", "out", "in", "keep"):
        raise ArchitectureError(f"{text!r}: a role is out, in or keep, not {role!r}")
    if body == "_":
        return _KEEP
    kept: Role = "out" if role == "out" else "in" if role == "in" else "keep"
    return Dim(body, parse_expression(body), kept)


def _axis(name: str, value: object, kind: object) -> Axis:
    if kind not in ("width", "depth", "frozen"):
        raise ArchitectureError(f"[axis_kind] {name}: {kind!r} is not width, depth or frozen")
    texts = _strings([value] if isinstance(value, str) else value, f"[axes] {name}")
    sources = tuple(parse_expression(text[1:]) if text.startswith("=") else text for text in texts)
    known: Kind = "width" if kind == "width" else "depth" if kind == "depth" else "frozen"
    return Axis(name, known, sources)


def _constraint(text: str) -> tuple[str, Expression, Expression]:
    left, equals, right = text.partition("==")
    if not equals:
        raise ArchitectureError(f"[constraints] {text!r}: expected 'a == b'")
    return text, parse_expression(left), parse_expression(right)


def _head(table: Mapping[str, object], variables: Mapping[str, tuple[str, ...]]) -> Head:
    def pattern(entry: str, suffix: str = "") -> KeyPattern:
        return compile_pattern(_string(table.get(entry), f"[head] {entry}") + suffix, variables)

    readers = _strings(table.get("readers", []), "[head] readers")
    return Head(
        norm=pattern("norm", ".*"),
        embed=pattern("embed"),
        head=pattern("head"),
        readers=tuple(compile_pattern(text, variables) for text in readers),
        classes=_strings(table.get("classes", []), "[head] classes"),
    )


def _table(content: Mapping[str, object], name: str) -> Mapping[str, object]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise ArchitectureError(f"[{name}] is no table")
    return table


def _known(
    content: Mapping[str, object], name: str, entries: tuple[str, ...]
) -> Mapping[str, object]:
    """A table that has no other entries than these."""
    table = _table(content, name)
    unknown = [entry for entry in table if entry not in entries]
    if unknown:
        raise ArchitectureError(
            f"[{name}]: unknown entry {unknown[0]!r}", hint=f"known: {', '.join(entries)}"
        )
    return table


def _strings(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise ArchitectureError(f"{where}: expected a list of strings, found {value!r}")
    return tuple(value)


def _string(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise ArchitectureError(f"{where}: expected a string, found {value!r}")
    return value
