"""Spec files: TOML -> Architecture, for one config.json. The format: architectures/README.md.

`merged` joins a spec's tables with those of the spec that it extends; `build` decides the
conditions by a config.json and makes the values.
"""

import itertools
import tomllib
from collections.abc import Callable, Mapping, Sequence

from streammap.architectures import config_fields
from streammap.architectures import expression as expressions
from streammap.architectures import toml_values as reading
from streammap.architectures.expression import Expression, Name
from streammap.architectures.schema import Architecture
from streammap.architectures.spec_scope import SpecScope
from streammap.architectures.toml_values import Tables
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
    "caveat",
)
_STACKED = ("modules", "tensors", "buffers", "drop")
_INHERITED = ("constraints", "required", "include", "same_axis")
_OWN = ("schema", "extends", "model_types", "detect", "proof", "depth")
_PROOF = ("name", "model_type", "class", "config", "neutral", "except", "shapes_only")
_MAX_EXTENDS = 8
_MAX_NESTED = 16
_MAX_NAMES = 200
MAX_LETTERS = 1_000_000


def read(text: str, *, name: str) -> Tables:
    """A spec file's reading.

    Raises:
        ArchitectureError: no TOML, an unknown table, another schema.
    """
    if len(text) > MAX_LETTERS:
        raise ArchitectureError(f"{name}.toml: more than {MAX_LETTERS} letters")
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"{name}.toml: {error}", hint="mend the file") from error
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
    found: dict[str, object] = dict(tables)
    for name in _STACKED:
        found[name] = [reading.table(tables, name)]
    if "extends" not in tables:
        return found
    if n_above >= _MAX_EXTENDS:
        raise ArchitectureError(f"more than {_MAX_EXTENDS} specs extend one another")
    above = reading.string(tables["extends"], "extends")
    base = merged(parent(above), parent, n_above=n_above + 1)
    for name in _MERGED:
        found[name] = {**reading.table(base, name), **reading.table(tables, name)}
    for name in _STACKED:
        found[name] = [reading.table(tables, name), *reading.listed(base.get(name, []), name)]
    for name in _INHERITED:
        if name not in tables and name in base:
            found[name] = base[name]
    depths = {**reading.table(base, "depth")}
    for axis, entries in reading.table(tables, "depth").items():
        depths[axis] = {
            **reading.table(depths, axis),
            **reading.as_table(entries, f"[depth.{axis}]"),
        }
    found["depth"] = depths
    return found


def build(
    name: str, tables: Tables, config: Mapping[str, object], included: Callable[[str], Tables]
) -> Architecture:
    """The spec as it stands for a config.json.

    Args:
        tables: As `merged` gives them.
        included: Merged tables of the specs that this one includes.

    Raises:
        ArchitectureError: naming the spec and the entry.
    """
    try:
        return _build(name, tables, config, included)
    except ArchitectureError as error:
        raise ArchitectureError(f"{name}.toml: {error.message}", hint=error.hint) from error


def _build(
    name: str, tables: Tables, config: Mapping[str, object], included: Callable[[str], Tables]
) -> Architecture:
    same = {k: reading.string(v, k) for k, v in reading.table(tables, "same_axis").items()}
    own = SpecScope(tables, config, "", ("",), "", same)
    parts = [own]
    for entry in reading.listed(tables.get("include", []), "[[include]]"):
        table = reading.only(
            reading.as_table(entry, "[[include]]"), ("spec", "as", "prefix", "config"), "include"
        )
        path = reading.string(table.get("config", ""), "[[include]] config")
        inner = config_fields.field_value(config, path) if path else config
        if not isinstance(inner, Mapping):
            # Older checkpoints have the fields of the inner model at the top.
            path, inner = "", config
        parts.append(
            SpecScope(
                included(reading.string(table.get("spec"), "[[include]] spec")),
                inner,
                f"{reading.string(table.get('as'), '[[include]] as')}.",
                reading.strings(table.get("prefix", [""]), "[[include]] prefix"),
                f"{path}." if path else "",
                same,
            )
        )
    return _joined(name, tables, parts, same, config)


def _joined(
    name: str,
    tables: Tables,
    parts: Sequence["SpecScope"],
    same: Mapping[str, str],
    config: Mapping[str, object],
) -> Architecture:
    own = parts[0]
    axes = {axis.name: axis for part in parts for axis in part.axes()}
    fields = {field: found for part in parts for field, found in part.config_fields().items()}
    for other, axis in same.items():
        listed = axes.pop(other).fields if other in axes else ()
        there = (f for f in listed if config_fields.field_value(config, f) is not None)
        for field in itertools.islice(there, 1):
            fields[field] = Name(axis)
    spaces: dict[str, tuple[str, ...]] = {}
    for part in parts:
        for space, members in part.spaces().items():
            found = (same.get(axis, axis) for axis in members)
            spaces[space] = (*spaces.get(space, ()), *(axis for axis in found if axis in axes))
    if not any(axis.kind == "depth" for axis in axes.values()):
        raise ArchitectureError("expected an axis of kind depth")
    aliases = {k: v for part in parts for k, v in part.aliases().items()}
    _check_aliases(aliases)
    return Architecture(
        name=name,
        model_types=reading.strings(tables.get("model_types"), "model_types"),
        detect=own.patterns(tables.get("detect", []), "detect"),
        axes=axes,
        spaces={space: tuple(dict.fromkeys(found)) for space, found in spaces.items() if found},
        aliases=aliases,
        constraints=tuple(c for part in parts for c in part.constraints()),
        rules=tuple(rule for part in parts for rule in part.rules()),
        required=tuple(p for part in parts for p in part.keys("required")),
        heads=tuple(h for part in parts for h in part.heads()),
        weightless=tuple(axis for part in parts for axis in part.weightless()),
        forward_scale=tuple(f for part in parts for f in part.forward_scale()),
        experts={k: v for part in parts for k, v in part.experts().items()},
        rope={k: v for part in parts for k, v in part.rope().items()},
        depth={k: v for part in parts for k, v in part.depth().items()},
        config=fields,
        caveats={k: v for part in parts for k, v in part.caveats().items()},
        proof=_proof(reading.table(tables, "proof")),
    )


def _check_aliases(aliases: Mapping[str, Expression]) -> None:
    """Refuse aliases that stand for themselves, or that taken apart have no end to speak of."""
    names_in: dict[str, int] = {}

    def count(alias: str, depth: int) -> int:
        if depth > _MAX_NESTED:
            raise ArchitectureError(
                f"[alias] {alias}: more than {_MAX_NESTED} aliases within one another"
            )
        if alias not in names_in:
            found = list(expressions.names(aliases[alias]))
            names_in[alias] = sum(
                count(name, depth + 1) if name in aliases else 1 for name in found
            )
        if names_in[alias] > _MAX_NAMES:
            raise ArchitectureError(f"[alias] {alias}: stands for more than {_MAX_NAMES} names")
        return names_in[alias]

    for alias in aliases:
        count(alias, 0)


def _proof(table: Tables) -> tuple[Mapping[str, object], ...]:
    reading.only(table, ("config", "models"), "proof")
    common = reading.as_table(table.get("config", {}), "[proof] config")
    found = []
    for entry in reading.listed(table.get("models", []), "[[proof.models]]"):
        model = reading.only(reading.as_table(entry, "[[proof.models]]"), _PROOF, "proof.models")
        name = reading.string(model.get("name"), "[[proof.models]] name")
        own = reading.as_table(model.get("config", {}), f"[[proof.models]] {name}")
        defaults = {"model_type": name, "neutral": [], "except": [], "shapes_only": False}
        found.append({**defaults, **model, "config": {**common, **own}})
    return tuple(found)
