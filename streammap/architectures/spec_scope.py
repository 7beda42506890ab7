"""One spec's tables as values, at their place inside a model and for one config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from streammap.architectures import config_fields as configfields
from streammap.architectures import toml_values as reading
from streammap.architectures.expression import Expression, parse_expression, scoped
from streammap.architectures.key_pattern import KeyPattern, compile_patterns
from streammap.architectures.schema import (
    KEEP,
    REST,
    SPACES,
    Axis,
    AxisKind,
    Depth,
    DimSpec,
    Experts,
    Factor,
    LayerCondition,
    LMHead,
    Norm,
    Role,
    Rope,
    TensorRule,
)
from streammap.architectures.toml_values import Tables
from streammap.errors import ArchitectureError

_HEAD = ("norm", "embed", "head", "tied", "classes", "readers", "scale", "copies")
_NORM = ("kind", "offset", "plain", "eps", "post", "mean", "weightless")
_ROPE = ("theta", "layout", "scores", "query", "query_norm", "key_norm")
_DEPTH = tuple(Depth.__dataclass_fields__)
_MAX_EXPONENT = 4
_MODULES = ("linear", "conv1d", "conv", "embedding")
_KINDS: tuple[AxisKind, ...] = ("width", "depth", "frozen", "group", "expert")


@dataclass(frozen=True, slots=True)
class SpecScope:
    """One spec's tables, at their place inside a model."""

    tables: Tables
    config: Mapping[str, object]
    scope: str
    """What its axes begin with: "text."."""
    prefixes: tuple[str, ...]
    """What its keys begin with."""
    path: str
    """What its config fields begin with: "text_config."."""
    same: Mapping[str, str]

    def _decided(self, value: object, where: str) -> object:
        """The value that holds for this config.json."""
        if not isinstance(value, dict):
            return value
        for condition, found in value.items():
            if condition == "default" or configfields.holds(condition, self.config):
                return found
        raise ArchitectureError(f"{where}: no condition holds, and there is no default")

    def _entry(self, table: str, name: str, default: object) -> object:
        found = self._decided(
            reading.table(self.tables, table).get(name, default), f"[{table}] {name}"
        )
        return default if found is None else found

    def _axis_name(self, name: str) -> str:
        return self.same.get(self.scope + name, self.scope + name)

    def _expression(self, text: object, where: str) -> Expression:
        return scoped(parse_expression(reading.string(text, where)), self.scope, self.same)

    def _compiled(self, text: str) -> tuple[KeyPattern, ...]:
        variables = {
            k: reading.strings(v, f"[vars] {k}")
            for k, v in reading.table(self.tables, "vars").items()
        }
        if self.prefixes == ("",):
            return compile_patterns(text, variables, scope=self.scope)
        variables[" prefix"] = self.prefixes
        return compile_patterns("{ prefix}" + text, variables, scope=self.scope)

    def patterns(self, texts: object, where: str) -> tuple[KeyPattern, ...]:
        """Key patterns from a list of texts, or one."""
        found = [texts] if isinstance(texts, str) else texts
        return tuple(p for text in reading.strings(found, where) for p in self._compiled(text))

    def keys(self, table: str) -> tuple[KeyPattern, ...]:
        """The patterns under `keys`."""
        content = reading.only(reading.table(self.tables, table), ("keys",), table)
        return self.patterns(self._decided(content.get("keys", []), table), f"[{table}] keys")

    def axes(self) -> list[Axis]:
        """The axes, with where their sizes come from."""
        table = reading.table(self.tables, "axes")
        kinds = reading.only(reading.table(self.tables, "axis_kind"), tuple(table), "axis_kind")
        return [self._axis(k, v, self._decided(kinds.get(k, "width"), k)) for k, v in table.items()]

    def _axis(self, name: str, value: object, kind: object) -> Axis:
        found = next((known for known in _KINDS if known == kind), None)
        if found is None:
            raise ArchitectureError(
                f"[axis_kind] {name}: {kind!r} is not one of {', '.join(_KINDS)}"
            )
        chosen = self._decided(value, f"[axes] {name}")
        texts = reading.strings([chosen] if isinstance(chosen, str) else chosen, f"[axes] {name}")
        sources = tuple(
            self._expression(text[1:], name) if text.startswith("=") else self.path + text
            for text in texts
        )
        return Axis(self.scope + name, found, sources)

    def spaces(self) -> dict[str, tuple[str, ...]]:
        """Space -> its axes, there or not."""
        defaults = {space: [space] for space in SPACES}
        defaults |= {"hidden": ["embed"], "experts": ["expert"]}
        given = reading.only(reading.table(self.tables, "spaces"), SPACES, "spaces")
        return {
            space: tuple(self.scope + axis for axis in reading.strings(given.get(space, d), space))
            for space, d in defaults.items()
        }

    def aliases(self) -> dict[str, Expression]:
        """Alias -> what it stands for."""
        return {
            self.scope + k: self._expression(self._decided(v, k), f"[alias] {k}")
            for k, v in reading.table(self.tables, "alias").items()
        }

    def constraints(self) -> list[tuple[str, Expression, Expression]]:
        """(text, left side, right side) of each."""
        table = reading.only(reading.table(self.tables, "constraints"), ("rules",), "constraints")
        found = []
        for text in reading.strings(
            self._decided(table.get("rules", []), "rules"), "[constraints] rules"
        ):
            left, equals, right = text.partition("==")
            if not equals:
                raise ArchitectureError(
                    f"[constraints] {text!r}: expected 'a == b' or 'a % b == 0'"
                )
            whole, percent, part = left.partition("%")
            if percent and right.strip() == "0":
                # a divides by b where a is b * (a/b): the division refuses a rest.
                left, right = whole, f"({part})*(({whole})/({part}))"
            found.append((text, self._expression(left, text), self._expression(right, text)))
        return found

    def rules(self) -> list[TensorRule]:
        """The rules of all generations, own ones first."""
        norm = self._norm()
        plain = reading.strings(self._entry("norm", "plain", []), "[norm] plain")
        found: list[TensorRule] = []
        for generation, table in enumerate(reading.listed(self.tables["modules"], "modules")):
            for text, value in reading.as_table(table, "[modules]").items():
                own = replace(norm, offset=0.0) if text in plain else norm
                for words, when in self._choices(value, text):
                    for end, kind, dims in self._module(text, words):
                        found += [
                            TensorRule(
                                p, kind, dims, generation, when, own if kind == "norm" else None
                            )
                            for p in self._compiled(text + end)
                        ]
        for generation, table in enumerate(reading.listed(self.tables["tensors"], "tensors")):
            for text, value in reading.as_table(table, "[tensors]").items():
                for words, when in self._choices(value, text):
                    dims = (
                        tuple(self._dim(part.strip()) for part in words.split(",")) if words else ()
                    )
                    found += [
                        TensorRule(p, "tensor", dims, generation, when)
                        for p in self._compiled(text)
                    ]
        for name, kind in (("buffers", "buffer"), ("drop", "drop")):
            for generation, table in enumerate(reading.listed(self.tables[name], name)):
                keys = reading.only(reading.as_table(table, name), ("keys",), name).get("keys", [])
                found += [
                    TensorRule(p, kind, (), generation)
                    for p in self.patterns(keys, f"[{name}] keys")
                ]
        return found

    def _choices(self, value: object, where: str) -> list[tuple[str, tuple[LayerCondition, ...]]]:
        """What may stand for a pattern, each with the condition on the layer that it needs."""
        if not isinstance(value, dict):
            return [(reading.string(value, where), ())]
        found: list[tuple[str, tuple[LayerCondition, ...]]] = []
        others: tuple[LayerCondition, ...] = ()
        for condition, words in value.items():
            parts = configfields.layer_condition(condition)
            if parts is not None:
                field, axis, expected = parts
                axis = self._axis_name(axis)
                this = LayerCondition(self.path + field, axis, expected, negated=False)
                found.append((reading.string(words, where), (*others, this)))
                others = (*others, replace(this, negated=True))
            elif condition == "default" or configfields.holds(condition, self.config):
                found.append((reading.string(words, where), others))
                break
        return found

    def _module(self, text: str, words: str) -> list[tuple[str, str, tuple[DimSpec, ...]]]:
        kind, _, shape = words.partition(" ")
        before, arrow, after = (part.strip() for part in shape.partition("->"))
        if kind == "norm" and not arrow:
            width = tuple(self._dim(f"{part.strip()}:out") for part in before.split(","))
            return [(end, kind, width) for end in (".weight", ".bias", ".gamma", ".beta")]
        if not arrow or kind not in _MODULES:
            raise ArchitectureError(f"{text}: {words!r} is no module such as 'linear embed -> mlp'")
        reads, makes = self._dim(f"{before}:in"), self._dim(f"{after}:out")
        if kind == "embedding":
            return [(".weight", kind, (self._dim(before), makes))]
        weight = {
            "linear": (makes, reads),
            "conv1d": (reads, makes),
            "conv": (makes, reads, DimSpec(REST, None, "keep")),
        }[kind]
        return [(".weight", kind, weight), (".bias", kind, (makes,))]

    def _dim(self, text: str) -> DimSpec:
        body, _, role = (part.strip() for part in text.partition(":"))
        if body == REST:
            return DimSpec(REST, None, "keep")
        if role not in ("", "out", "in", "keep"):
            raise ArchitectureError(f"{text!r}: a role is out, in or keep, not {role!r}")
        if body == "_":
            return KEEP
        kept: Role = "out" if role == "out" else "in" if role == "in" else "keep"
        return DimSpec(body, self._expression(body, text), kept)

    def _norm(self) -> Norm:
        reading.only(reading.table(self.tables, "norm"), _NORM, "norm")
        kind = self._entry("norm", "kind", "layer")
        known: Literal["rms", "layer"] = "rms" if kind == "rms" else "layer"
        if kind not in ("rms", "layer"):
            raise ArchitectureError(f"[norm] kind: {kind!r} is not rms or layer")
        eps = reading.strings(self._entry("norm", "eps", []), "[norm] eps")
        offset = reading.number(self._entry("norm", "offset", 0.0), "[norm] offset")
        post = bool(self._entry("norm", "post", False))
        mean = bool(self._entry("norm", "mean", False))
        return Norm(known, offset, tuple(self.path + field for field in eps), post, mean)

    def weightless(self) -> list[str]:
        """Axes that norms without weights see."""
        found = reading.strings(self._entry("norm", "weightless", []), "[norm] weightless")
        return [self._axis_name(axis) for axis in found]

    def heads(self) -> list[LMHead]:
        """The head, if there is one."""
        table = reading.only(reading.table(self.tables, "head"), _HEAD, "head")
        if not table:
            return []
        norm = self._entry("head", "norm", [])
        texts = [norm] if isinstance(norm, str) else reading.strings(norm, "[head] norm")
        scale = self._entry("head", "scale", None)
        copies = reading.as_table(table.get("copies", {}), "[head] copies")
        return [
            LMHead(
                norms=tuple(self.patterns(f"{text}.*", "[head] norm") for text in texts),
                embed=self.patterns(self._entry("head", "embed", []), "[head] embed"),
                head=self.patterns(self._entry("head", "head", []), "[head] head"),
                readers=self.patterns(self._entry("head", "readers", []), "[head] readers"),
                classes=reading.strings(self._entry("head", "classes", []), "[head] classes"),
                is_tied=bool(self._entry("head", "tied", True)),
                scale=None if scale is None else self._factor(scale, "[head] scale"),
                path=self.path,
                copies={k: reading.string(v, "[head] copies") for k, v in copies.items()},
            )
        ]

    def _factor(self, text: object, where: str) -> Factor:
        body, power, exponent = reading.string(text, where).partition("**")
        try:
            value = float(exponent) if power else 1.0
        except ValueError as error:
            raise ArchitectureError(f"{where}: {exponent!r} is no exponent") from error
        if not -_MAX_EXPONENT <= value <= _MAX_EXPONENT:  # nor nan
            raise ArchitectureError(
                f"{where}: {exponent!r} is no exponent, expected one up to {_MAX_EXPONENT}"
            )
        return Factor(self._expression(body, where), value)

    def forward_scale(self) -> list[tuple[KeyPattern, Factor]]:
        """What the model multiplies outputs of tensors by."""
        found = []
        for text, value in reading.table(self.tables, "forward_scale").items():
            words = self._decided(value, f"[forward_scale] {text}")
            if words != "1":
                factor = self._factor(words, text)
                found += [(pattern, factor) for pattern in self._compiled(text)]
        return found

    def experts(self) -> dict[str, Experts]:
        """What config.json says of experts, by their axis."""
        table = reading.only(
            reading.table(self.tables, "experts"), ("multiply", "groups", "inexact"), "experts"
        )
        axes = self.spaces()["experts"]
        if not table or not axes:
            return {}
        multiply = reading.strings(self._entry("experts", "multiply", []), "[experts] multiply")
        groups, inexact = (
            self._entry("experts", "groups", ""),
            self._entry("experts", "inexact", ""),
        )
        group = reading.string(groups, "[experts] groups")
        return {
            axes[0]: Experts(
                tuple(self.path + field for field in multiply),
                self.path + group if group else None,
                reading.string(inexact, "[experts] inexact") or None,
            )
        }

    def rope(self) -> dict[str, Rope]:
        """Rotary positions, by the axis of the head size."""
        table = reading.only(reading.table(self.tables, "rope"), _ROPE, "rope")
        if not table or not self._entry("rope", "theta", []):
            return {}
        layout, scores = (
            self._entry("rope", "layout", "half"),
            self._entry("rope", "scores", "head_dim"),
        )
        if layout not in ("half", "interleaved") or scores not in ("head_dim", "constant"):
            raise ArchitectureError(
                "[rope]: layout is half or interleaved, scores head_dim or constant"
            )

        def patterns(entry: str) -> tuple[KeyPattern, ...]:
            texts = reading.strings(self._entry("rope", entry, []), f"[rope] {entry}")
            return self.patterns([f"{text}.*" for text in texts], f"[rope] {entry}")

        theta = reading.strings(self._entry("rope", "theta", []), "[rope] theta")
        return {
            self.scope + "head_dim": Rope(
                tuple(self.path + field for field in theta),
                "half" if layout == "half" else "interleaved",
                "head_dim" if scores == "head_dim" else "constant",
                patterns("query"),
                patterns("query_norm"),
                patterns("key_norm"),
            )
        }

    def depth(self) -> dict[str, Depth]:
        """What config.json says of layers, by the axis that counts them."""
        return {
            self.scope + axis: self._depth(axis, reading.as_table(entries, f"[depth.{axis}]"))
            for axis, entries in reading.table(self.tables, "depth").items()
        }

    def _depth(self, axis: str, entries: Tables) -> Depth:
        table = reading.only(entries, _DEPTH, f"depth.{axis}")

        def fields(entry: str) -> tuple[str, ...]:
            found = reading.strings(table.get(entry, []), f"[depth.{axis}] {entry}")
            return tuple(self.path + field for field in found)

        periods = reading.listed(table.get("periods", []), f"[depth.{axis}] periods")
        tail = table.get("tail")
        return Depth(
            lists=fields("lists"),
            index_lists=fields("index_lists"),
            prefix_counts=fields("prefix_counts"),
            last_index=fields("last_index"),
            periods=tuple(
                tuple(self.path + f for f in reading.strings(period, "periods"))
                for period in periods
            ),
            tail=None if tail is None else self.path + reading.string(tail, "tail"),
            first=bool(self._decided(table.get("first", False), "first")),
            last=bool(self._decided(table.get("last", False), "last")),
            delete=fields("delete"),
            tables=fields("tables"),
            patterns=fields("patterns"),
            default=self._defaults(axis, table),
            ones=self.patterns(table.get("ones", []), f"[depth.{axis}] ones"),
        )

    def _defaults(self, axis: str, table: Tables) -> dict[str, tuple[str, ...]]:
        where = f"[depth.{axis}] default"
        given = reading.as_table(table.get("default", {}), where)
        decided = {k: self._decided(v, where) for k, v in given.items()}
        return {self.path + k: reading.strings(v, where) for k, v in decided.items() if v}

    def config_fields(self) -> dict[str, Expression]:
        """Further config fields, and what they are."""
        return {
            self.path + k: self._expression(self._decided(v, k), f"[config] {k}")
            for k, v in reading.table(self.tables, "config").items()
        }

    def caveats(self) -> dict[str, str]:
        """Axis -> why a change of it is never exact."""
        found = {
            self.scope + k: self._decided(v, f"[caveat] {k}")
            for k, v in reading.table(self.tables, "caveat").items()
        }
        return {k: reading.string(v, f"[caveat] {k}") for k, v in found.items() if v}
