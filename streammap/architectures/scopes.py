"""One spec's tables as values, at their place inside a model and for one config.json.

A spec that another one includes is a scope of it: its axes begin with "text.", its keys with one of
some prefixes, its config fields with "text_config.".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from streammap.architectures import config_fields
from streammap.architectures.decode import (
    Decoder,
    Tables,
    as_list,
    as_table,
    string,
    whole_number,
)
from streammap.architectures.expression import Expression, Number, parse_expression, scoped
from streammap.architectures.key_pattern import KeyPattern, compile_patterns
from streammap.architectures.schema import (
    KEEP,
    QUOTIENT,
    REST,
    Axis,
    AxisKind,
    AxisName,
    AxisSources,
    ConfigField,
    Constraint,
    Depth,
    DimSpec,
    Entry,
    Experts,
    Factor,
    Holds,
    KeyPatterns,
    LayerCondition,
    LMHead,
    ModulePatterns,
    Norm,
    NormChoices,
    Numbered,
    Numbers,
    OwnName,
    Role,
    Rope,
    Space,
    TensorRule,
    WrittenValue,
)
from streammap.errors import ArchitectureError

_MAX_EXPONENT = 4
_MODULES = ("linear", "conv1d", "conv", "embedding")
_OTHER_KIND: Mapping[str, Literal["rms", "layer"]] = {"rms": "layer", "layer": "rms"}
_SPACES = {
    "hidden": ["embed"],
    "heads": ["heads"],
    "kv_heads": ["kv_heads"],
    "mlp": ["mlp"],
    "experts": ["expert"],
}


@dataclass(frozen=True, slots=True)
class Constraints:
    """[constraints]."""

    rules: tuple[Constraint, ...] = ()


@dataclass(frozen=True, slots=True)
class Keys:
    """[required], [buffers] or [drop]."""

    keys: KeyPatterns = ()


@dataclass(frozen=True, slots=True)
class ScopeTables:
    """The tables that each scope of a model has, apart from those of rules for tensors."""

    spaces: Mapping[Space, tuple[AxisName, ...]]
    axes: Mapping[OwnName, AxisSources] = field(default_factory=dict)
    axis_kind: Mapping[OwnName, AxisKind] = field(default_factory=dict)
    alias: Mapping[OwnName, Expression] = field(default_factory=dict)
    constraints: Constraints = field(default_factory=Constraints)
    required: Keys = field(default_factory=Keys)
    detect: KeyPatterns = ()
    norm: Norm = field(default_factory=Norm)
    head: LMHead | None = None
    forward_scale: Mapping[KeyPatterns, Factor] = field(default_factory=dict)
    reads: Mapping[ModulePatterns, ModulePatterns] = field(default_factory=dict)
    experts: Experts | None = None
    rope: Rope | None = None
    depth: Mapping[OwnName, Depth] = field(default_factory=dict)
    config: Mapping[ConfigField, Expression] = field(default_factory=dict)
    written: Mapping[OwnName, Mapping[ConfigField, WrittenValue]] = field(default_factory=dict)
    caveat: Mapping[OwnName, str | None] = field(default_factory=dict)
    unsigned: Mapping[OwnName, str | None] = field(default_factory=dict)
    layout: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    unserved: str = ""
    numbered: Mapping[OwnName, Numbered] = field(default_factory=dict)


class SpecScope:
    """One spec's tables, at their place inside a model."""

    def __init__(
        self,
        tables: Tables,
        config: Mapping[str, object],
        *,
        same: Mapping[str, str],
        scope: str = "",
        prefixes: tuple[str, ...] = ("",),
        path: str = "",
    ) -> None:
        """Decode the tables.

        Args:
            same: Axis -> the axis of another scope that it is.
            scope: What the names of its axes begin with: "text.".
            prefixes: What its keys begin with.
            path: What its config fields begin with: "text_config.".
        """
        self._raw, self._config, self._same, self._scope = tables, config, same, scope
        self._prefixes, self._path = prefixes, path
        self._variables = {
            name: tuple(string(text, f"vars.{name}") for text in as_list(texts, f"vars.{name}"))
            for name, texts in as_table(tables.get("vars", {}), "vars").items()
        }
        self._decoder = Decoder(
            config,
            {
                OwnName: lambda value, where: scope + string(value, where),
                AxisName: lambda value, where: self._axis_name(string(value, where)),
                ConfigField: lambda value, where: path + string(value, where),
                Expression: self._expression,
                Factor: self._factor,
                Constraint: self._constraint,
                AxisSources: self._sources,
                WrittenValue: self._written,
                KeyPatterns: self._patterns,
                ModulePatterns: lambda value, where: self._patterns(value, where, end=".*"),
                NormChoices: self._norm_choices,
                Numbers: self._numbers,
                Entry: _entry,
                Holds: self._holds,
            },
        )
        known = {name: tables[name] for name in ScopeTables.__dataclass_fields__ if name in tables}
        spaces = {**_SPACES, **as_table(tables.get("spaces", {}), "spaces")}
        self.tables = self._decoder.table(ScopeTables, {**known, "spaces": spaces}, "")

    @property
    def axes(self) -> list[Axis]:
        """The axes, with where their sizes come from."""
        axes, kinds = self.tables.axes, self.tables.axis_kind
        unknown = [name for name in kinds if name not in axes]
        if unknown:
            raise ArchitectureError(
                f"axis_kind: unknown axis {unknown[0]!r}", hint=f"known: {', '.join(axes)}"
            )
        return [Axis(name, kinds.get(name, "width"), sources) for name, sources in axes.items()]

    @property
    def heads(self) -> dict[str, LMHead]:
        """The head, if there is one, by the name of this part."""
        head = self.tables.head
        if head is None:
            return {}
        scaled = head.scale is not None and head.scale.expression != Number(1)
        scale = head.scale if scaled else None
        return {self._scope[:-1]: replace(head, path=self._path, scale=scale)}

    @property
    def experts(self) -> dict[str, Experts]:
        """What config.json says of experts, by their axis."""
        axes = self.tables.spaces["experts"]
        experts = self.tables.experts
        return {} if experts is None or not axes else {axes[0]: experts}

    @property
    def rope(self) -> dict[str, Rope]:
        """Rotary positions, by the axis of the head size."""
        rope = self.tables.rope
        return {} if rope is None or not rope.theta else {f"{self._scope}head_dim": rope}

    @property
    def forward_scale(self) -> Iterator[tuple[KeyPattern, Factor]]:
        """What the model multiplies outputs of tensors by."""
        for patterns, factor in self.tables.forward_scale.items():
            if factor.expression != Number(1):
                yield from ((pattern, factor) for pattern in patterns)

    def rules(self) -> Iterator[TensorRule]:
        """The rules of all generations, own ones first."""
        for generation, text, value in self._stacked("modules"):
            own = self._norm_of(text)
            for words, when in self._choices(value, text):
                for end, kind, dims in self._module(text, words):
                    its_norm = own if kind == "norm" else None
                    for pattern in self._compiled(text + end):
                        yield TensorRule(pattern, kind, dims, generation, when, its_norm)
        for generation, text, value in self._stacked("tensors"):
            for words, when in self._choices(value, text):
                for layout in words.split("|"):
                    dims = tuple(self._dim(part.strip()) for part in layout.split(",") if words)
                    for pattern in self._compiled(text):
                        yield TensorRule(pattern, "tensor", dims, generation, when)
        for table, kind in (("buffers", "buffer"), ("drop", "drop")):
            for generation, entries in enumerate(as_list(self._raw[table], table)):
                for pattern in self._decoder.table(Keys, entries, table).keys:
                    yield TensorRule(pattern, kind, (), generation)

    def _norm_of(self, text: str) -> Norm:
        """What [norm] says of one module."""
        norm = self.tables.norm
        return replace(
            norm,
            kind=_OTHER_KIND[norm.kind] if text in norm.other else norm.kind,
            offset=0.0 if text in norm.plain else norm.offset,
            post=norm.post or text in norm.posts,
            near_zero=tuple(name for name in norm.near_zero if name == text),
        )

    def _stacked(self, name: str) -> Iterator[tuple[int, str, object]]:
        """Entries of a table of rules: (generation, key pattern, what it says)."""
        for generation, table in enumerate(as_list(self._raw[name], name)):
            for text, value in as_table(table, name).items():
                yield generation, text, value

    def _choices(
        self, value: object, where: str
    ) -> Iterator[tuple[str, tuple[LayerCondition, ...]]]:
        """What may stand for a pattern, each with the condition on the layer that it needs."""
        if not isinstance(value, dict):
            yield string(value, where), ()
            return
        # config.json decides its conditions here; which layer a key is of is known only later, so
        # that each choice after a condition on layers carries its negation.
        others: tuple[LayerCondition, ...] = ()
        for condition, words in value.items():
            parts = config_fields.layer_condition(condition)
            if parts is not None:
                listed, axis, expected = parts
                this = LayerCondition(
                    self._path + listed, self._axis_name(axis), expected, negated=False
                )
                yield string(words, where), (*others, this)
                others = (*others, replace(this, negated=True))
            elif condition == "default" or config_fields.holds(condition, self._config):
                yield string(words, where), others
                return

    def _module(self, text: str, words: str) -> list[tuple[str, str, tuple[DimSpec, ...]]]:
        kind, _, shape = words.partition(" ")
        before, arrow, after = (part.strip() for part in shape.partition("->"))
        if kind == "norm" and not arrow:
            width = tuple(self._dim(f"{part.strip()}:out") for part in before.split(","))
            return [(end, kind, width) for end in (".weight", ".bias", ".gamma", ".beta")]
        if not arrow or kind not in _MODULES:
            raise ArchitectureError(
                f"{text}: {words!r} is not a module such as 'linear embed -> mlp'"
            )
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

    def _axis_name(self, name: str) -> str:
        return self._same.get(self._scope + name, self._scope + name)

    def _expression(self, text: object, where: str) -> Expression:
        return scoped(parse_expression(string(text, where)), self._scope, self._same)

    def _factor(self, text: object, where: str) -> Factor:
        body, power, exponent = string(text, where).partition("**")
        try:
            value = float(exponent) if power else 1.0
        except ValueError as error:
            raise ArchitectureError(f"{where}: {exponent!r} is not an exponent") from error
        if not -_MAX_EXPONENT <= value <= _MAX_EXPONENT:  # nor nan
            raise ArchitectureError(
                f"{where}: expected an exponent up to {_MAX_EXPONENT}, found {exponent!r}"
            )
        return Factor(self._expression(body, where), value)

    def _written(self, value: object, where: str) -> WrittenValue:
        return value if isinstance(value, bool) else self._expression(value, where)

    def _constraint(self, text: object, where: str) -> Constraint:
        whole = string(text, where)
        left, equals, right = whole.partition("==")
        if not equals:
            raise ArchitectureError(f"{where}: {text!r}, expected 'a == b' or 'a % b == 0'")
        dividend, percent, divisor = left.partition("%")
        if percent and right.strip() == "0":
            # a divides by b where a is b * (a/b): the division refuses a remainder.
            left, right = dividend, f"({divisor})*(({dividend})/({divisor}))"
        return whole, self._expression(left, whole), self._expression(right, whole)

    def _sources(self, value: object, where: str) -> AxisSources:
        texts = [value] if isinstance(value, str) else as_list(value, where)
        return tuple(
            self._expression(text[1:], where) if text.startswith("=") else self._path + text
            for text in (string(text, where) for text in texts)
        )

    def _numbers(self, value: object, where: str) -> Numbers:
        entries = value if isinstance(value, list) else [value]
        return tuple(
            self._quotient(entry, where)
            if isinstance(entry, str) and entry.startswith(QUOTIENT)
            else self._path + entry
            if isinstance(entry, str) and not entry.removeprefix("-").isdecimal()
            else whole_number(entry, where)
            for entry in entries
        )

    def _quotient(self, text: str, where: str) -> str:
        names = text.removeprefix(QUOTIENT).split("/")
        if len(names) != 2 or not all(names):
            raise ArchitectureError(f"{where}: {text!r}, expected '=field/field'")
        fields = (name if name.isdecimal() else self._path + name for name in names)
        return QUOTIENT + "/".join(fields)

    def _holds(self, value: object, where: str) -> Holds:
        conditions = as_list(value, where)
        return any(config_fields.holds(string(c, where), self._config) for c in conditions)

    def _patterns(self, value: object, where: str, *, end: str = "") -> KeyPatterns:
        texts = [value] if isinstance(value, str) else as_list(value, where)
        return tuple(p for text in texts for p in self._compiled(string(text, where) + end))

    def _norm_choices(self, value: object, where: str) -> NormChoices:
        texts = [value] if isinstance(value, str) else as_list(value, where)
        return tuple(self._patterns(text, where, end=".*") for text in texts)

    def _compiled(self, text: str) -> tuple[KeyPattern, ...]:
        if self._prefixes == ("",):
            return compile_patterns(text, self._variables, scope=self._scope)
        variables = {**self._variables, " prefix": self._prefixes}
        return compile_patterns("{ prefix}" + text, variables, scope=self._scope)


def _entry(value: object, where: str) -> Entry:
    return value if isinstance(value, str) else whole_number(value, where)
