"""What a spec says of one checkpoint: rules for its tensors, axes, heads, norms, as plain values.

`parser` reads them from TOML; the annotations below are the format of most tables (`decode`), which
architectures/README.md describes.

A role is `out` (the tensor makes this axis), `in` (it reads it), or `keep` (neither).
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

from streammap.architectures import expression as expressions
from streammap.architectures.expression import Expression, Name, Operation
from streammap.architectures.key_pattern import KeyPattern
from streammap.errors import ArchitectureError

Role = Literal["out", "in", "keep"]
AxisKind = Literal["width", "depth", "frozen", "group", "expert"]
Space = Literal["hidden", "heads", "kv_heads", "mlp", "experts"]
SPACES: tuple[Space, ...] = get_args(Space)
"""Names under which users ask for axes; layers are those of kind depth."""
REST = "..."

ConfigField = Annotated[str, "config field"]
"""A field of config.json by its path; in an included spec, inside that spec's part of it."""
OwnName = Annotated[str, "own name"]
"""An axis or alias as this spec has it; in an included spec, with its scope before it."""
AxisName = Annotated[str, "axis"]
"""As OwnName, or the axis of another scope that [same_axis] says it is."""
KeyPatterns = Annotated[tuple[KeyPattern, ...], "keys"]
"""Patterns from one text or a list of them."""
ModulePatterns = Annotated[tuple[KeyPattern, ...], "modules"]
"""Patterns for all tensors of some modules."""
NormChoices = Annotated[tuple[tuple[KeyPattern, ...], ...], "one module of several"]
"""Patterns for each of some modules, of which the first that is there counts."""
AxisSources = Annotated[tuple[str | Expression, ...], "sources"]
"""Config fields ("a.b" is nested) and expressions; the first that is there counts."""
WrittenValue = Annotated[bool | Expression, "written"]
"""What a field is set to: a flag, a size, or "ratio(a, b)"."""
Constraint = Annotated[tuple[str, Expression, Expression], "constraint"]
"""Its text, its left side, its right side."""
Numbers = Annotated[tuple[str | int, ...], "numbers"]
"""Config fields and numbers, from one of them or a list; the first that is there counts."""
QUOTIENT = "="
"""What a source begins with that is a quotient of fields or numbers: "=num_layers/num_sparse"."""
Entry = Annotated[str | int, "entry"]
"""An entry of a per-layer list."""
Holds = Annotated[bool, "conditions"]
"""Whether one of some conditions on config.json holds."""


@dataclass(frozen=True, slots=True)
class DimSpec:
    """The meaning of one dimension of a tensor."""

    text: str
    """As the spec has it; "_" for any size, "..." for any number of dimensions."""
    expression: Expression | None
    role: Role


KEEP = DimSpec("_", None, "keep")


@dataclass(frozen=True, slots=True)
class Norm:
    """A normalisation; the entries of [norm]."""

    kind: Literal["rms", "layer"] = "layer"
    offset: float = 0.0
    """It multiplies by offset + weight."""
    other: tuple[str, ...] = ()
    """Modules that are norms of the other kind."""
    plain: tuple[str, ...] = ()
    """Modules that are norms without that offset."""
    eps: tuple[ConfigField, ...] = ()
    """Its epsilon."""
    near_zero: tuple[str, ...] = ()
    """Modules whose inputs may be so small that the epsilon counts: where they share it with
    others, it stays."""
    post: bool = False
    """Whether it stands after the residual addition."""
    posts: tuple[str, ...] = ()
    """Modules that do, where others don't."""
    mean: bool = False
    """Whether a channel may hold the mean of the others: only linears and residual additions come
    between norms."""
    weightless: tuple[AxisName, ...] = ()
    """Axes that norms without weights normalise."""


@dataclass(frozen=True, slots=True)
class LayerCondition:
    """Whether a per-layer list of config.json has a value at the layer of a key."""

    field: str
    axis: str
    value: str
    negated: bool


@dataclass(frozen=True, slots=True, eq=False)
class TensorRule:
    """What the tensors of one key pattern are."""

    pattern: KeyPattern
    kind: str
    """linear, conv1d, conv, embedding, norm, tensor, buffer or drop."""
    dims: tuple[DimSpec, ...] = ()
    generation: int = 0
    """0 for the spec's own rules, 1 for those of the spec it extends; the lower one counts."""
    when: tuple[LayerCondition, ...] = ()
    norm: Norm | None = None

    def dims_for(self, rank: int) -> tuple[DimSpec, ...] | None:
        """One DimSpec for each dimension of a tensor of `rank`, or None if it has another rank."""
        if self.kind in ("buffer", "drop"):
            return (KEEP,) * rank
        at = next((i for i, dim in enumerate(self.dims) if dim.text == REST), None)
        if at is None:
            return self.dims if len(self.dims) == rank else None
        n_rest = rank - len(self.dims) + 1
        if n_rest < 0:
            return None
        return self.dims[:at] + (KEEP,) * n_rest + self.dims[at + 1 :]


@dataclass(frozen=True, slots=True)
class Factor:
    """What a model multiplies an activation by: expression ** exponent."""

    expression: Expression
    exponent: float


@dataclass(frozen=True, slots=True)
class LMHead:
    """A head that may share the embedding's tensor, and the norm before it."""

    norm: NormChoices = ()
    """The norm before the head."""
    embed: KeyPatterns = ()
    head: KeyPatterns = ()
    tied: bool = True
    """What a config.json without tie_word_embeddings means."""
    classes: tuple[str, ...] = ()
    """Model classes that have the head (glob patterns); empty for "wherever the norm is there"."""
    readers: KeyPatterns = ()
    """Other tensors that read what the norm makes."""
    scale: Factor | None = None
    """What the model multiplies the head's input by."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """End of a key -> end of the key whose tensor it gets when the head is untied."""
    of: str = ""
    """The included part whose head is the whole model's, but for `head`, `tied` and `classes`."""
    tied_by: str = ""
    """The part of config.json whose tie_word_embeddings counts, where the whole model's doesn't."""
    path: str = field(default="", metadata={"entry": None})
    """Where in config.json its fields are: "" or "text_config."."""

    def is_in(self, classes: Iterable[str]) -> bool:
        """Whether a model of config.json's `architectures` has this head."""
        given = tuple(classes)
        return not (self.classes and given) or any(
            fnmatch.fnmatchcase(name, glob) for name in given for glob in self.classes
        )


@dataclass(frozen=True, slots=True)
class Experts:
    """What config.json says of a mixture of experts."""

    top_k: tuple[ConfigField, ...] = ()
    """How many experts a token takes."""
    gates: Literal["softmax", "renormalised", "own"] = "softmax"
    """What the chosen experts are weighted by: their shares among all, the same made to add up to
    1, or a function of each one's own score."""
    multiply: tuple[ConfigField, ...] = ()
    """Counts of groups, which grow with the number of experts."""
    groups: ConfigField | None = None
    """In how many consecutive groups the experts lie."""
    inexact: str | None = None
    """Why copies of experts change the function, whatever is chosen; None where that decides."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions over all of a head."""

    theta: tuple[ConfigField, ...] = ()
    layout: Literal["half", "interleaved"] = "half"
    """Which pairs of a head's channels turn together: (i, i + head_dim/2) or (2i, 2i + 1)."""
    scores: Literal["head_dim", "constant"] = "head_dim"
    """Scores are divided by sqrt(head_dim), or by a constant of config.json."""
    query: ModulePatterns = ()
    """What makes the queries."""
    query_norm: ModulePatterns = ()
    key_norm: ModulePatterns = ()


@dataclass(frozen=True, slots=True)
class LayerRule:
    """What loaders make of a per-layer list that config.json lacks: an entry of `derived`.

    It holds at the layers that all of `every`, `before`, `layers` and `where` allow.
    """

    list: ConfigField
    """The list: one entry a layer, or numbers of layers."""
    when: Holds = True
    """Whether the rule is for this config.json."""
    every: Numbers = ()
    """At every n-th layer,"""
    offset: Numbers = (0,)
    """counted from this one."""
    before: Numbers = ()
    """At so many leading layers."""
    layers: Numbers = ()
    """At these layers."""
    where: ConfigField | None = None
    """Where another list has an entry that is true, or names the layer; everywhere without it."""
    first: bool = False
    """And at layer 0, whatever else is said."""
    last: bool = False
    """And at the last layer, even if the list says otherwise."""
    yes: Entry = ""
    """The entry of a layer where it holds."""
    no: Entry = ""
    """The entry of any other layer."""


@dataclass(frozen=True, slots=True)
class Numbered:
    """Layers that compute by their number: an entry of [numbered]."""

    first: Numbers
    """So many leading layers do; of a list, as many as it has entries."""
    why: str
    """What the number is for."""


@dataclass(frozen=True, slots=True)
class Depth:
    """What config.json says of single layers of one depth axis."""

    lists: tuple[ConfigField, ...] = ()
    """One entry a layer."""
    index_lists: tuple[ConfigField, ...] = ()
    """Numbers of layers."""
    from_one: tuple[ConfigField, ...] = ()
    """Those of `index_lists` whose numbers begin with 1."""
    marks: tuple[ConfigField, ...] = ()
    """Numbers of layers whose outputs are read, each by tensors of its own."""
    states: tuple[Numbers, ...] = ()
    """Numbers of hidden states that are read: 0 before the layers, -1 after the last."""
    derived: tuple[LayerRule, ...] = ()
    """What loaders make of missing lists; of rules for one list the first counts."""
    prefix_counts: tuple[Numbers, ...] = ()
    """How many leading layers are of another kind."""
    suffix_counts: tuple[Numbers, ...] = ()
    """How many trailing layers are of another kind."""
    last_index: tuple[ConfigField, ...] = ()
    """The last layer of another kind."""
    periods: tuple[tuple[Numbers, ...], ...] = ()
    """Every n-th layer: n and, where there is one, the offset."""
    runs: Numbers = ()
    """How often layers are run in all; each equally often."""
    tail: ConfigField | None = None
    """How many further layers come after the stack."""
    first: bool = False
    """Whether layer 0 has other tensors than the rest."""
    last: bool = False
    """Whether the last layer is of a kind of its own."""
    delete: tuple[ConfigField, ...] = ()
    """Fields that a change of depth makes wrong."""
    tables: tuple[ConfigField, ...] = ()
    """Tables by layer number."""
    patterns: tuple[ConfigField, ...] = ()
    """[[["global", "local"], 6]]: entries, and how often they repeat."""
    ones: KeyPatterns = ()
    """Tensors that are 1 in a zero-initialised layer."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A named size of the model."""

    name: str
    kind: AxisKind
    sources: AxisSources

    @property
    def fields(self) -> tuple[str, ...]:
        """The config fields among the sources."""
        return tuple(source for source in self.sources if isinstance(source, str))


@dataclass(frozen=True, slots=True)
class SharedHeads:
    """Names of three axes: kv heads, the query heads of each, and all query heads."""

    kv: str
    group: str
    heads: str


@dataclass(frozen=True, slots=True)
class TinyModel:
    """A small random model that proves the spec: one entry of [[proof.models]]."""

    name: str
    class_name: str = field(metadata={"entry": "class"})
    config: Mapping[str, object] = field(default_factory=dict)
    model_type: str = ""
    """Where it is not its name."""
    neutral: tuple[Literal["alibi", "sinusoidal"], ...] = ()
    """What its model computes from positions and is run without."""
    exempt: tuple[str, ...] = field(default=(), metadata={"entry": "except"})
    """Axes that can't be resized; the spec's [caveat] says why."""
    shapes_only: bool = False
    """It is loaded and not run."""


@dataclass(frozen=True, slots=True, eq=False)
class Architecture:
    """One spec, as it stands for one config.json."""

    name: str
    model_types: tuple[str, ...]
    detect: tuple[KeyPattern, ...]
    axes: Mapping[str, Axis]
    spaces: Mapping[str, tuple[str, ...]]
    """Space -> its axes."""
    aliases: Mapping[str, Expression]
    constraints: tuple[Constraint, ...]
    rules: tuple[TensorRule, ...]
    required: tuple[KeyPattern, ...]
    heads: tuple[LMHead, ...]
    weightless: tuple[str, ...]
    """Axes that norms without weights normalise."""
    reads: tuple[tuple[tuple[KeyPattern, ...], tuple[KeyPattern, ...]], ...]
    """Norms, and all that reads them, of the same indices."""
    forward_scale: tuple[tuple[KeyPattern, Factor], ...]
    experts: Mapping[str, Experts]
    """Expert axis -> what config.json says of it."""
    rope: Mapping[str, Rope]
    """Axis of the head size -> its rotary positions."""
    depth: Mapping[str, Depth]
    """Depth axis -> what config.json says of its layers."""
    numbered: Mapping[str, Numbered]
    """Depth axis -> which of its layers compute by their number."""
    config: Mapping[str, Expression]
    written: Mapping[str, Mapping[str, WrittenValue]]
    """Axis that config.json has no field for -> the fields that say its size once it changes."""
    layout: Mapping[str, tuple[str, ...]]
    """End of a key in the runtime layout of experts -> those of what it is made of on the hub."""
    caveats: Mapping[str, str]
    """Axis -> why a change of it is never exact."""
    unsigned: Mapping[str, str]
    """Axis -> why its units can't be negated, though all norms over it are RMSNorms."""
    unserved: str
    """Why a model of this config.json is not served, though its model_type is; "" where it is."""

    @property
    def depth_axes(self) -> tuple[str, ...]:
        """The axes that count layers."""
        return tuple(axis.name for axis in self.axes.values() if axis.kind == "depth")

    @property
    def shared_heads(self) -> tuple[SharedHeads, ...]:
        """The kv heads that query heads share.

        Raises:
            ArchitectureError: an axis of kind group that is not a quotient of two axes.
        """
        shared = []
        for axis in self.axes.values():
            match axis.sources:
                case (Operation("/", Name(heads), Name(kv)),) if axis.kind == "group":
                    shared.append(SharedHeads(kv, axis.name, heads))
                case _ if axis.kind == "group":
                    raise ArchitectureError(
                        f"{self.name}.toml: {axis.name} is a group, expected '=heads/kv_heads'"
                    )
        return tuple(shared)

    def axes_in(self, expression: Expression) -> list[str]:
        """The axes that stand in an expression, aliases taken apart."""
        axes: list[str] = []
        for name in expressions.names(expression):
            alias = self.aliases.get(name)
            axes += self.axes_in(alias) if alias is not None else [name]
        return axes

    def plain(self, expression: Expression | None) -> str | None:
        """The axis that an expression is alone, by an alias too; None where it is more than one."""
        if not isinstance(expression, Name):
            return None
        alias = self.aliases.get(expression.name)
        return expression.name if alias is None else self.plain(alias)

    def size(self, expression: Expression, sizes: Mapping[str, int]) -> int:
        """The value of a dimension expression, for given sizes of axes.

        Raises:
            KeyError: the size of an axis that is not known.
        """

        def value_of(name: str) -> int:
            alias = self.aliases.get(name)
            return self.size(alias, sizes) if alias is not None else sizes[name]

        return expressions.evaluate(expression, value_of, _no_call)


def _no_call(function: str, arguments: tuple[str, ...]) -> int:
    raise ArchitectureError(f"{function}({', '.join(arguments)}) can't stand in a dimension")
