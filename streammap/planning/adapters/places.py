"""Which tensors of a model an adapter's names are, whatever each of the two calls them.

    model.layers.0.self_attn.q_proj     layers.0.self_attn.q_proj.weight    a class inside another
    transformer.h.0.attn.c_attn         h.0.attn.c_attn.weight
    mlp.experts, gate_up_proj           mlp.experts.3.up_proj.weight        a part of one expert
    mlp.experts.3.up_proj               mlp.experts.gate_up_proj            the other way round

Equal names are one tensor; then those that the model's spec knows as one; then those that only
begin otherwise, with what wraps a model inside another.
"""

import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

from streammap.architectures.key_pattern import Identity
from streammap.architectures.model import Model
from streammap.errors import ArchitectureError, CheckpointError
from streammap.planning.plan import Plan

_WRAPPERS = frozenset(
    ("model", "module", "transformer", "language_model", "text_model", "base_model", "lm", "llm")
)
"""Parts that a name may begin with or not."""
_HALVES = {
    "gate_proj": ("gate_up_proj", 0),
    "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", None),
    "w2": ("down_proj", None),
}
"""Module of one expert -> the parameter of all experts, and which half of its rows it is."""
_EXPERT = re.compile(r"(?P<module>.+\.experts)\.(?P<expert>\d{1,6})\.(?P<name>\w+)")
_OTHER_BLOCK = ("block_sparse_moe", "mlp")
"""Mixtral's block, as it is published and in memory."""


@final
@dataclass(frozen=True, slots=True)
class Slab:
    """Rows of one matrix of a stack, or of a tensor that is one matrix."""

    key: str
    matrix: int = 0
    half: int | None = None
    """Which half of the rows; None for all of them."""


@final
class Places:
    """Finds tensors of a model by an adapter's names for them."""

    def __init__(self, plan: Plan) -> None:
        """Nothing is looked up yet."""
        self._plan = plan

    @cached_property
    def model(self) -> Model | None:
        """The model by its spec; None where none serves it."""
        try:
            return self._plan.model
        except (ArchitectureError, CheckpointError):
            return None

    def find(self, name: str) -> str | None:
        """The model's key for a tensor, such as "model.norm.weight"; None where it has none."""
        if name in self._plan.targets:
            return name
        return self._by_identity(name) or self._by_beginning(name)

    def is_transposed(self, key: str) -> bool | None:
        """Whether a weight is stored with a row for each input; None where no spec tells."""
        family = self._family_of.get(key)
        if family is None or self.model is None:
            return None
        dims = self.model.families[family].dims
        roles = [dim.role for dim in dims[-2:]]
        return {("in", "out"): True, ("out", "in"): False}.get((roles[0], roles[-1]))

    def slab(self, module: str) -> Slab | None:
        """The slab of fused experts that a module of one expert is."""
        match = _EXPERT.fullmatch(module)
        if match is None or match["name"] not in _HALVES:
            return None
        fused, half = _HALVES[match["name"]]
        for parent in _spellings(match["module"]):
            key = self.find(f"{parent}.{fused}")
            if key is not None:
                return Slab(key, int(match["expert"]), half)
        return None

    def parameters(self, module: str) -> Iterator[str]:
        """Keys of parameters of a module that are named by themselves, such as fused experts."""
        for name in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"):
            for parent in _spellings(module):
                key = self.find(f"{parent}.{name}")
                if key is not None:
                    yield key
                    break

    def experts(self, module: str, parameter: str) -> list[tuple[int, int | None, str]]:
        """The parts of a parameter of all experts: (expert, half of its rows, key)."""
        for parent in _spellings(module):
            found = [
                (expert, half, key)
                for name, (fused, half) in _HALVES.items()
                if fused == parameter
                for expert, key in enumerate(self._numbered(parent, name))
            ]
            if found:
                return found
        return []

    def _numbered(self, parent: str, name: str) -> Iterator[str]:
        """Keys of a module's weight, expert by expert."""
        for expert in itertools.count():
            key = self.find(f"{parent}.{expert}.{name}.weight")
            if key is None:
                return
            yield key

    @cached_property
    def _identities(self) -> dict[tuple[Identity, tuple[int, ...]], str]:
        families = () if self.model is None else self.model.families
        return {(f.identity, values): key for f in families for values, key in f.members.items()}

    @cached_property
    def _family_of(self) -> dict[str, int]:
        families = () if self.model is None else self.model.families
        return {key: i for i, family in enumerate(families) for key in family.members.values()}

    def _by_identity(self, name: str) -> str | None:
        for rule in () if self.model is None else self.model.architecture.rules:
            values = rule.pattern.match(name)
            if values is not None:
                indices = tuple(values[index] for index in rule.pattern.indices)
                key = self._identities.get((rule.pattern.identity(name), indices))
                if key is not None:
                    return key
        return None

    @cached_property
    def _by_end(self) -> dict[str, list[str]]:
        """Name without what wraps a model -> the keys that end so."""
        ends: dict[str, list[str]] = {}
        for key in self._plan.targets:
            ends.setdefault(_without_wrappers(key), []).append(key)
        return ends

    def _by_beginning(self, name: str) -> str | None:
        keys = self._by_end.get(_without_wrappers(name), [])
        return keys[0] if len(keys) == 1 else None


def _without_wrappers(name: str) -> str:
    parts = name.split(".")
    n = next((i for i, part in enumerate(parts) if part not in _WRAPPERS), len(parts) - 1)
    return ".".join(parts[n:])


def _spellings(module: str) -> Iterable[str]:
    """A module of experts, as it is published and in memory."""
    yield module
    old, new = _OTHER_BLOCK
    for one, other in ((old, new), (new, old)):
        if f".{one}." in module:
            yield module.replace(f".{one}.", f".{other}.")
