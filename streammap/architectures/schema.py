"""What a spec says of one checkpoint: rules for its tensors, axes, heads, norms, as plain values.

`specfile` reads these from TOML, with the conditions of the spec decided by a config.json. The
format is described in architectures/README.md.

A role is `out` (the tensor makes this axis), `in` (it reads it), or `keep` (neither).
"""

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from streammap.architectures import expression as expressions
from streammap.architectures.expression import Expression, Name, Operation
from streammap.architectures.key_pattern import KeyPattern
from streammap.errors import ArchitectureError

Role = Literal["out", "in", "keep"]
AxisKind = Literal["width", "depth", "frozen", "group", "expert"]
SPACES = ("hidden", "heads", "kv_heads", "mlp", "experts")
"""Names under which users ask for axes; layers are those of kind depth."""
REST = "..."


@dataclass(frozen=True, slots=True)
class DimSpec:
    """What one dimension of a tensor is."""

    text: str
    """As the spec has it; "_" for any size, "..." for any number of dimensions."""
    expression: Expression | None
    role: Role


KEEP = DimSpec("_", None, "keep")


@dataclass(frozen=True, slots=True)
class Norm:
    """What a normalisation does."""

    kind: Literal["rms", "layer"]
    offset: float
    """It multiplies by offset + weight."""
    eps: tuple[str, ...]
    """Config fields of its epsilon."""
    is_post: bool
    """Whether it stands after the residual addition."""
    keeps_mean: bool
    """Whether a unit may hold the mean of the others: only linears and residuals come between."""


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
        """One Dim for each dimension of a tensor of `rank`, or None where that can't be."""
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
    """A head that may share the embedding's tensor, and what reads the norm before it."""

    norms: tuple[tuple[KeyPattern, ...], ...]
    """The norm before the head; the first that is there counts."""
    embed: tuple[KeyPattern, ...]
    head: tuple[KeyPattern, ...]
    readers: tuple[KeyPattern, ...]
    """Other tensors that read what the norm makes."""
    classes: tuple[str, ...]
    """Model classes that have the head (glob patterns); empty for "wherever the norm is there"."""
    is_tied: bool
    """What a config.json that doesn't say it means."""
    scale: Factor | None
    """What the model multiplies the head's input by."""
    path: str
    """Where in config.json its fields are: "" or "text_config."."""
    copies: Mapping[str, str]
    """End of a key -> end of the key whose tensor it gets when the head is untied."""

    def is_in(self, classes: Iterable[str]) -> bool:
        """Whether a model of config.json's `architectures` has this head."""
        given = tuple(classes)
        return not (self.classes and given) or any(
            fnmatch.fnmatchcase(name, glob) for name in given for glob in self.classes
        )


@dataclass(frozen=True, slots=True)
class Experts:
    """What config.json says of a mixture of experts."""

    multiply: tuple[str, ...]
    """Fields that grow with the number of experts: top_k, groups."""
    groups: str | None
    """Field: in how many consecutive groups the experts lie."""
    inexact: str | None
    """Why copies of experts change the function; None where they don't."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions over all of a head."""

    theta: tuple[str, ...]
    layout: Literal["half", "interleaved"]
    scores: Literal["head_dim", "constant"]
    query: tuple[KeyPattern, ...]
    query_norm: tuple[KeyPattern, ...]
    key_norm: tuple[KeyPattern, ...]


@dataclass(frozen=True, slots=True)
class Depth:
    """What config.json says of single layers of one depth axis. Entries are config fields."""

    lists: tuple[str, ...] = ()
    index_lists: tuple[str, ...] = ()
    prefix_counts: tuple[str, ...] = ()
    last_index: tuple[str, ...] = ()
    periods: tuple[tuple[str, ...], ...] = ()
    tail: str | None = None
    first: bool = False
    last: bool = False
    delete: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    default: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ones: tuple[KeyPattern, ...] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """A named size of the model."""

    name: str
    kind: AxisKind
    sources: tuple[str | Expression, ...]
    """Config fields ("a.b" is nested) and expressions; the first that is there counts."""

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
    constraints: tuple[tuple[str, Expression, Expression], ...]
    rules: tuple[TensorRule, ...]
    required: tuple[KeyPattern, ...]
    heads: tuple[LMHead, ...]
    weightless: tuple[str, ...]
    """Axes that norms without weights see."""
    forward_scale: tuple[tuple[KeyPattern, Factor], ...]
    experts: Mapping[str, Experts]
    """Expert axis -> what config.json says of it."""
    rope: Mapping[str, Rope]
    """Axis of the head size -> its rotary positions."""
    depth: Mapping[str, Depth]
    """Depth axis -> what config.json says of its layers."""
    config: Mapping[str, Expression]
    caveats: Mapping[str, str]
    """Axis -> why a change of it is never exact."""
    proof: tuple[Mapping[str, object], ...]
    """Tiny models: name, model_type, class, config, neutral, except, shapes_only."""

    @property
    def depth_axes(self) -> tuple[str, ...]:
        """The axes that count layers."""
        return tuple(axis.name for axis in self.axes.values() if axis.kind == "depth")

    @property
    def shared_heads(self) -> tuple[SharedHeads, ...]:
        """The kv heads that query heads share.

        Raises:
            ArchitectureError: an axis of kind group that is no quotient of two axes.
        """
        found = []
        for axis in self.axes.values():
            match axis.sources:
                case (Operation("/", Name(heads), Name(kv)),) if axis.kind == "group":
                    found.append(SharedHeads(kv, axis.name, heads))
                case _ if axis.kind == "group":
                    raise ArchitectureError(
                        f"{self.name}.toml: {axis.name} is a group, expected '=heads/kv_heads'"
                    )
        return tuple(found)

    def axes_in(self, expression: Expression) -> list[str]:
        """The axes that stand in an expression, aliases taken apart."""
        found: list[str] = []
        for name in expressions.names(expression):
            alias = self.aliases.get(name)
            found += self.axes_in(alias) if alias is not None else [name]
        return found

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
