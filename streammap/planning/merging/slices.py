"""Slices: layers of one or several models stacked, each model brought to the result's layers.

Each source is mapped to a model of as many layers as the result has: where a slice reads it, the
layer that is read; elsewhere a layer of the same kind, which nothing reads. From there on, sources
have equal layers like any others, and config.json has followed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

from streammap.architectures.key_pattern import first_match
from streammap.architectures.model import Model
from streammap.errors import PlanError
from streammap.planning import planner
from streammap.planning.maps import BlockMap
from streammap.planning.merging import places
from streammap.planning.merging.settings import Place, Setting
from streammap.planning.plan import Plan, Step
from streammap.planning.tensor_maps.axis_change import AxisChange

Settings = Mapping[str, Setting]


@dataclass(frozen=True, slots=True)
class Span:
    """Layers of one source, in a slice."""

    source: int
    start: int
    end: int
    """One past the last."""
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers that follow those of the slice before: one source's, or several sources' made one."""

    spans: tuple[Span, ...]
    parameters: Settings = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        """Layers of the result."""
        return self.spans[0].end - self.spans[0].start


@dataclass(frozen=True, slots=True)
class Layered:
    """A source that has the result's layers."""

    plan: Plan
    origin: Mapping[str, str]
    """Key -> the key that it has in the source."""
    notes: tuple[str, ...] = ()


@final
class Stack:
    """The layers of a result."""

    def __init__(self, slices: Sequence[Slice]) -> None:
        """`slices` in their order, from the first layer on."""
        self.slices = slices
        self._of = [(number, i) for number, one in enumerate(slices) for i in range(one.n_layers)]

    @property
    def n_layers(self) -> int:
        """Layers of the result."""
        return len(self._of)

    def at(self, layer: int | None, *, is_last: bool) -> tuple[int, float]:
        """The number of a layer's slice, and its depth in it.

        Args:
            layer: None for what is in no layer.
            is_last: Whether that stands behind the layers.
        """
        if layer is None:
            return (len(self.slices) - 1 if is_last else 0), 0.0
        number, i = self._of[layer]
        n = self.slices[number].n_layers
        return number, i / (n - 1) if n > 1 else 1.0

    def places(self, model: Model) -> dict[str, tuple[int, Place]]:
        """Key of the result -> the number of its slice, and its place."""
        found = {}
        for family in model.families:
            kinds = places.kinds_of(model, family)
            at = _depth_index(model, family.indices)
            for values, key in family.members.items():
                layer = None if at is None else values[at]
                number, depth = self.at(layer, is_last=_is_behind(model, key))
                found[key] = number, Place(key, depth, kinds)
        return found

    def layered(self, plans: Sequence[Plan], names: Sequence[str]) -> list[Layered]:
        """Each source with the result's layers.

        Raises:
            PlanError: a range that the source doesn't have, or layers that it can't stand in for.
        """
        models = [plan.model for plan in plans]
        axes = [_depth_axis(model, name) for model, name in zip(models, names, strict=True)]
        for span in (span for one in self.slices for span in one.spans):
            n = models[span.source].sizes[axes[span.source]]
            if not 0 <= span.start < span.end <= n:
                raise PlanError(
                    f"slices: layers {span.start} to {span.end} of {names[span.source]}, which has "
                    f"{n} (0 to {n})",
                    hint="give [first, one past the last]",
                )
        kinds = [model.kinds(axis) for model, axis in zip(models, axes, strict=True)]
        wanted = []
        for number, i in self._of:
            span = self.slices[number].spans[0]
            wanted.append((kinds[span.source][span.start + i], span))
        made = []
        for k, plan in enumerate(plans):
            rows = []
            for layer, (number, i) in enumerate(self._of):
                own = next((s for s in self.slices[number].spans if s.source == k), None)
                if own is not None:
                    rows.append(own.start + i)
                    continue
                kind, span = wanted[layer]
                like = [j for j, other in enumerate(kinds[k]) if other == kind]
                if not like:
                    raise PlanError(
                        f"slices: layer {layer} of the result is layer {span.start + i} of "
                        f"{names[span.source]} ({', '.join(kind)}), and {names[k]} has none of "
                        "this kind",
                        hint="stack layers of models whose layers are of the same kinds",
                    )
                rows.append(min(like, key=lambda j: abs(j - layer)))
            made.append(_layered(plan, models[k], axes[k], rows))
        return made


def _layered(plan: Plan, model: Model, axis: str, rows: Sequence[int]) -> Layered:
    """A source of which the result's layer i is `rows[i]`."""
    n = model.sizes[axis]
    origin = {}
    for family in model.families:
        at = _depth_index(model, family.indices)
        for values, key in family.members.items():
            if at is None:
                origin[key] = key
                continue
            for layer in (i for i, j in enumerate(rows) if j == values[at]):
                origin[family.key((*values[:at], layer, *values[at + 1 :]))] = key
    if list(rows) == list(range(n)):
        return Layered(plan, origin)
    m = BlockMap(tuple(((j, 1.0),) for j in rows), n)
    change = AxisChange({}, {axis: m}, {axis: len(rows)}, "exact", 1.0)
    made = planner.remap(plan, change, Step("slices", {}, "approximate", "layers are stacked"))
    return Layered(made, origin, made.steps[-1].notes)


def _depth_axis(model: Model, name: str) -> str:
    there = [axis for axis in model.architecture.depth_axes if model.sizes.get(axis)]
    if len(there) != 1:
        raise PlanError(
            f"slices: {name} ({model.name}) has {len(there)} stacks of layers "
            f"({', '.join(there)}), expected one",
            hint="blend it without slices",
        )
    return there[0]


def _depth_index(model: Model, indices: Sequence[str]) -> int | None:
    return next((at for at, i in enumerate(indices) if i in model.architecture.depth_axes), None)


def _is_behind(model: Model, key: str) -> bool:
    """Whether a tensor is the head's, or of the norm before it."""
    return any(
        first_match(patterns, key) is not None
        for head in model.architecture.heads
        for patterns in (head.head, *head.norm)
    )
