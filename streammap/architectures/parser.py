"""Spec files: TOML -> Architecture, for one config.json. The format: architectures/README.md.

`merged` joins a spec's tables with those of the spec that it extends; `build` decodes them for a
config.json, and joins the specs that are included with the one that includes them.
"""

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from streammap.architectures import config_fields
from streammap.architectures import expression as expressions
from streammap.architectures.decode import Decoder, Tables, as_list, as_table, string
from streammap.architectures.expression import Expression, Name
from streammap.architectures.schema import Architecture, Depth, LMHead, TinyModel
from streammap.architectures.scopes import SpecScope
from streammap.errors import ArchitectureError

_MERGED = (
    "vars",
    "axes",
    "axis_kind",
    "spaces",
    "alias",
    "norm",
    "head",
    "forward_scale",
    "experts",
    "rope",
    "config",
    "written",
    "caveat",
    "unsigned",
    "numbered",
    "layout",
)
_STACKED = ("modules", "tensors", "buffers", "drop")
_INHERITED = ("constraints", "required", "include", "same_axis", "unserved")
_OWN = ("schema", "extends", "model_types", "detect", "proof", "proved", "depth", "reads")
_MAX_EXTENDS = 8
_MAX_NESTED = 16
_MAX_NAMES = 200
MAX_LETTERS = 1_000_000
_MAX_DOTS = 200
"""In a line: what a dotted key takes grows with the square of its parts."""


@dataclass(frozen=True, slots=True)
class Include:
    """[[include]]: another spec inside this one."""

    scope: str = field(metadata={"entry": "as"})
    prefix: tuple[str, ...] = ("",)
    config: str = ""
    spec: str = ""
    """Its name; without one, what serves the model_type in its part of config.json."""
    model_type: str = ""
    """The model_type of a part that doesn't say."""


@dataclass(frozen=True, slots=True)
class Specs:
    """The other specs, as merged tables."""

    named: Callable[[str], Tables]
    serving: Callable[[str], Tables | None]
    """Model type -> the tables that serve it; None where none do."""


@dataclass(frozen=True, slots=True)
class Proof:
    """[proof]: tiny models, and what all their configs have."""

    config: Mapping[str, object] = field(default_factory=dict)
    models: tuple[TinyModel, ...] = ()


@dataclass(frozen=True, slots=True)
class WholeTables:
    """The tables that only the outermost spec has."""

    model_types: tuple[str, ...]
    include: tuple[Include, ...] = ()
    same_axis: Mapping[str, str] = field(default_factory=dict)
    proved: Mapping[str, object] = field(default_factory=dict)
    """Config field -> its value in the model that the spec was tested on."""


def read(text: str, *, name: str) -> Tables:
    """Parse a spec file.

    Raises:
        ArchitectureError: not TOML, an unknown table, another schema.
    """
    if len(text) > MAX_LETTERS:
        raise ArchitectureError(f"{name}.toml: more than {MAX_LETTERS} letters")
    if any(line.count(".") > _MAX_DOTS for line in text.split("\n")):
        raise ArchitectureError(
            f"{name}.toml: more than {_MAX_DOTS} dots in a line", hint="write shorter keys"
        )
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"{name}.toml: {error}", hint="correct the file") from error
    known = (*_MERGED, *_STACKED, *_INHERITED, *_OWN)
    unknown = [table for table in content if table not in known]
    if unknown:
        raise ArchitectureError(
            f"{name}.toml: unknown entry {unknown[0]!r}", hint=f"known: {', '.join(known)}"
        )
    if content.get("schema") != 1:
        raise ArchitectureError(f"{name}.toml: schema is {content.get('schema')!r}, expected 1")
    return content


def merged(tables: Tables, parent: Callable[[str], Tables], *, n_above: int = 0) -> Tables:
    """The tables joined with those of the spec that they extend.

    [modules], [tensors], [buffers] and [drop] become lists of tables, the spec's own first.
    """
    joined: dict[str, object] = dict(tables)
    for name in _STACKED:
        joined[name] = [_table(tables, name)]
    if "extends" not in tables:
        return joined
    if n_above >= _MAX_EXTENDS:
        raise ArchitectureError(f"more than {_MAX_EXTENDS} specs extend one another")
    base = merged(parent(string(tables["extends"], "extends")), parent, n_above=n_above + 1)
    for name in _MERGED:
        joined[name] = {**_table(base, name), **_table(tables, name)}
    for name in _STACKED:
        joined[name] = [_table(tables, name), *as_list(base[name], name)]
    for name in _INHERITED:
        if name not in tables and name in base:
            joined[name] = base[name]
    depths, own = _table(base, "depth"), _table(tables, "depth")
    joined["depth"] = {axis: {**_table(depths, axis), **_table(own, axis)} for axis in depths | own}
    return joined


def _table(tables: Tables, name: str) -> dict[str, object]:
    return dict(as_table(tables.get(name, {}), name))


def build(name: str, tables: Tables, config: Mapping[str, object], specs: Specs) -> Architecture:
    """The spec as it stands for a config.json.

    Args:
        tables: As `merged` gives them.
        specs: Those that this one may include.

    Raises:
        ArchitectureError: naming the spec and the entry.
    """
    try:
        known = {entry: tables[entry] for entry in WholeTables.__dataclass_fields__ & tables.keys()}
        whole = Decoder(config, {}).table(WholeTables, known, "")
        own = SpecScope(tables, config, same=whole.same_axis)
        inner = [_included(entry, config, whole.same_axis, specs) for entry in whole.include]
        return _joined(name, whole, (own, *inner), config)
    except ArchitectureError as error:
        raise _named(name, error) from error


def _included(
    entry: Include, config: Mapping[str, object], same: Mapping[str, str], specs: Specs
) -> SpecScope:
    if not entry.spec and not entry.model_type:
        raise ArchitectureError(f"include {entry.scope}: expected spec, or model_type")
    inner = config_fields.field_value(config, entry.config) if entry.config else config
    path = f"{entry.config}." if entry.config else ""
    if not isinstance(inner, Mapping):
        # Older checkpoints have the fields of the inner model at the top.
        path, inner = "", config
    if entry.model_type and (not path or inner.get("model_type") is None):
        inner = {**inner, "model_type": entry.model_type}
    return SpecScope(
        specs.named(entry.spec) if entry.spec else _serving(inner, path, specs),
        inner,
        same=same,
        scope=f"{entry.scope}.",
        prefixes=entry.prefix,
        path=path,
    )


def _serving(part: Mapping[str, object], path: str, specs: Specs) -> Tables:
    """What serves a part of config.json, by its model_type."""
    model_type = str(part["model_type"])
    tables = specs.serving(model_type)
    if tables is None:
        raise ArchitectureError(
            f"no architecture spec serves {path}model_type {model_type[:80]!r}",
            hint="`streammap architectures` lists the model types that a part may have",
        )
    return tables


def _joined(
    name: str, whole: WholeTables, scopes: Sequence[SpecScope], config: Mapping[str, object]
) -> Architecture:
    own, tables = scopes[0].tables, [scope.tables for scope in scopes]
    axes = {axis.name: axis for scope in scopes for axis in scope.axes}
    written = {path: value for one in tables for path, value in one.config.items()}
    for other, axis in whole.same_axis.items():
        if other == axis:
            continue  # Config.json decided that it is an axis of its own.
        # The axis goes, its config field stays: it is written with the axis that stands for it.
        listed = axes.pop(other).fields if other in axes else ()
        there = [path for path in listed if config_fields.field_value(config, path) is not None]
        written |= {path: Name(axis) for path in there[:1]}
    if not axes:
        raise ArchitectureError("expected axes, which name the sizes of a model")
    for axis_name in (name for one in tables for name in one.written):
        if axis_name not in axes:
            raise ArchitectureError(
                f"written.{axis_name}: unknown axis", hint=f"known: {', '.join(axes)}"
            )
    spaces: dict[str, tuple[str, ...]] = {}
    for one in tables:
        for space, members in one.spaces.items():
            known = (axis for axis in members if axis in axes)
            spaces[space] = tuple(dict.fromkeys((*spaces.get(space, ()), *known)))
    untested = _untested(whole.proved, config)
    aliases = {alias: value for one in tables for alias, value in one.alias.items()}
    _check_aliases(aliases)
    return Architecture(
        name=name,
        model_types=whole.model_types,
        detect=own.detect,
        axes=axes,
        spaces={space: members for space, members in spaces.items() if members},
        aliases=aliases,
        constraints=tuple(rule for one in tables for rule in one.constraints.rules),
        rules=tuple(rule for scope in scopes for rule in scope.rules()),
        required=tuple(pattern for one in tables for pattern in one.required.keys),
        heads=_heads(scopes),
        weightless=tuple(axis for one in tables for axis in one.norm.weightless),
        reads=tuple(pair for one in tables for pair in one.reads.items() if pair[1]),
        forward_scale=tuple(factor for scope in scopes for factor in scope.forward_scale),
        experts={axis: value for scope in scopes for axis, value in scope.experts.items()},
        rope={axis: value for scope in scopes for axis, value in scope.rope.items()},
        depth=_depths(scopes),
        numbered={axis: value for one in tables for axis, value in one.numbered.items()},
        config=written,
        written={axis: value for one in tables for axis, value in one.written.items()},
        layout={end: hub for one in tables for end, hub in one.layout.items() if hub},
        unserved=next((one.unserved for one in tables if one.unserved), ""),
        caveats={
            **dict.fromkeys(axes if untested else (), untested),
            **{axis: text for one in tables for axis, text in one.caveat.items() if text},
        },
        unsigned={axis: text for one in tables for axis, text in one.unsigned.items() if text},
    )


def _depths(scopes: Sequence[SpecScope]) -> dict[str, Depth]:
    """What is said of single layers; what the whole says of a part's is added to what that says."""
    joined: dict[str, Depth] = {}
    for scope in reversed(scopes):
        for axis, depth in scope.tables.depth.items():
            said = {one.name: getattr(depth, one.name) for one in fields(depth)}
            said = {name: value for name, value in said.items() if value != getattr(Depth(), name)}
            joined[axis] = replace(joined.get(axis, Depth()), **said)
    return joined


def _heads(scopes: Sequence[SpecScope]) -> tuple[LMHead, ...]:
    """The heads of all parts; `of` names the part whose head is the whole model's."""
    heads = {name: head for scope in scopes for name, head in scope.heads.items()}
    own = heads.get("")
    if own is not None and own.tied_by and not own.of:
        heads[""] = replace(own, path=f"{own.tied_by}.")
    if own is None or not own.of:
        return tuple(heads.values())
    del heads[""]
    if own.of in heads:
        part = heads[own.of]
        path = f"{own.tied_by}." if own.tied_by else own.path
        # A file may have it under the part's name as well, in whatever way it spells the prefix.
        heads[own.of] = replace(
            part,
            head=(*own.head, *part.head),
            norm=own.norm or part.norm,
            readers=(*own.readers, *part.readers),
            tied=own.tied,
            classes=own.classes,
            path=path,
        )
    return tuple(heads.values())


def _untested(proved: Mapping[str, object], config: Mapping[str, object]) -> str:
    """The switch of config.json that is not as in the model that a spec was tested on; "" if none.

    Of numbers only 0, 1 and more are told apart: two experts a token are as four, and not as one.
    """
    for name, value in proved.items():
        own = config_fields.field_value(config, name)
        if own is not None and _kind_of(own) != _kind_of(value):
            return f"the spec was tested with {name} {value}, config.json has {str(own)[:40]}"
    return ""


def _kind_of(value: object) -> object:
    return min(value, 2) if type(value) is int else value


def _check_aliases(aliases: Mapping[str, Expression]) -> None:
    """Refuse aliases that stand for themselves, or that taken apart have no end to speak of."""
    names_in: dict[str, int] = {}

    def count(alias: str, depth: int) -> int:
        if depth > _MAX_NESTED:
            raise ArchitectureError(
                f"[alias] {alias}: more than {_MAX_NESTED} aliases within one another"
            )
        if alias not in names_in:
            names = list(expressions.names(aliases[alias]))
            names_in[alias] = sum(
                count(name, depth + 1) if name in aliases else 1 for name in names
            )
        if names_in[alias] > _MAX_NAMES:
            raise ArchitectureError(f"[alias] {alias}: stands for more than {_MAX_NAMES} names")
        return names_in[alias]

    for alias in aliases:
        count(alias, 0)


def tiny_models(name: str, tables: Tables) -> tuple[TinyModel, ...]:
    """The models of [proof], each config with what is common to all.

    Raises:
        ArchitectureError: naming the spec and the entry.
    """
    try:
        proof = Decoder({}, {}).table(Proof, tables.get("proof", {}), "proof")
    except ArchitectureError as error:
        raise _named(name, error) from error
    return tuple(
        replace(
            model,
            config={**proof.config, **model.config},
            model_type=model.model_type or model.name,
        )
        for model in proof.models
    )


def _named(name: str, error: ArchitectureError) -> ArchitectureError:
    return ArchitectureError(f"{name}.toml: {error.message}", hint=error.hint)
