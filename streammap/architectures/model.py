"""A checkpoint as its architecture spec sees it: sizes of the axes, tensors by family.

resolving.py reads a checkpoint by its spec.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from streammap.architectures import (
    layer_kinds,
)
from streammap.architectures.expression import Expression, Name
from streammap.architectures.key_pattern import Identity, KeyPattern, first_match
from streammap.architectures.schema import Architecture, Depth, DimSpec, LMHead, TensorRule
from streammap.errors import printable

_MAX_NAME = 80
_OLD_ENDINGS = {"gamma": "weight", "beta": "bias"}


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """The tensors that one rule describes under one name, over all layers and experts."""

    rule: TensorRule
    name: str
    """The key with its indices by name: "h.{layer}.ln_1.weight"."""
    members: Mapping[tuple[int, ...], str]
    """Values of the indices -> key."""
    dims: tuple[DimSpec, ...]

    @property
    def indices(self) -> tuple[str, ...]:
        """Names of the indices in the key."""
        return self.rule.pattern.indices

    def key(self, values: tuple[int, ...]) -> str:
        """The key of the family with these indices, there or not."""
        key = self.name
        for index, value in zip(self.indices, values, strict=True):
            key = key.replace(f"{{{index}}}", str(value))
        return key

    @property
    def identity(self) -> Identity:
        """What the tensors are, however their checkpoint spells their keys.

        Two checkpoints of one spec have equal families where the identities are equal.
        """
        scope, text, indices, names = self.rule.pattern.identity(next(iter(self.members.values())))
        return scope, self.with_new_ending(text), indices, names

    def with_new_ending(self, key: str) -> str:
        """A key, or a pattern of keys; of a norm, with today's names for gamma and beta."""
        module, _, end = key.rpartition(".")
        is_old = self.rule.kind == "norm" and end in _OLD_ENDINGS
        return f"{module}.{_OLD_ENDINGS[end]}" if is_old else key

    def index_expression(self, index: str) -> Expression:
        """What an index counts: an axis, or an expression of its own."""
        return self.rule.pattern.counts.get(index, Name(index))


@dataclass(frozen=True, slots=True, eq=False)
class TiedHead:
    """A head that shares the embedding's tensor, at its place in a checkpoint."""

    head: LMHead
    norm: tuple[KeyPattern, ...]
    """Of the head's norms, the one that is there; empty where none is."""

    def feeds(self, key: str, n_last: Mapping[str, int]) -> bool:
        """Whether the tensor `key` belongs to the norm before the head.

        Args:
            n_last: Depth axis -> its last layer.
        """
        for pattern in self.norm:
            values = pattern.match(key)
            if values is not None:
                return all(values[name] == n_last.get(name) for name in pattern.last)
        return False

    def is_head(self, key: str) -> bool:
        """Whether `key` is the head's own tensor (a copy of the embedding)."""
        return first_match(self.head.head, key) is not None

    def is_embedding(self, key: str) -> bool:
        """Whether `key` is the tensor that the head shares."""
        return first_match(self.head.embed, key) is not None

    def reads(self, key: str) -> bool:
        """Whether `key` also reads what the norm makes."""
        return first_match(self.head.readers, key) is not None


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A resolved checkpoint."""

    architecture: Architecture
    config: Mapping[str, object]
    sizes: Mapping[str, int]
    """Axis -> size, for each axis whose size is known."""
    families: tuple[Family, ...]
    tied_heads: tuple[TiedHead, ...]

    @property
    def name(self) -> str:
        """What the model is, for messages: its model_type, or its spec where it has none."""
        return printable(str(self.config.get("model_type", self.architecture.name))[:_MAX_NAME])

    @property
    def tied(self) -> bool:
        """Whether a head shares the embedding's tensor."""
        return bool(self.tied_heads)

    @property
    def n_layers(self) -> int:
        """Layers of the first depth axis, by config.json."""
        return self.sizes[self.architecture.depth_axes[0]]

    def size(self, expression: Expression) -> int:
        """The value of a dimension expression."""
        return self.architecture.size(expression, self.sizes)

    def kinds(self, axis: str) -> tuple[layer_kinds.LayerKind, ...]:
        """What config.json says of each layer of a depth axis."""
        depth = self.architecture.depth.get(axis, Depth())
        return layer_kinds.kinds(depth, self.config, self.sizes[axis])
