"""The maps of a resize, for all the model or for some layers, and what they ask of other tensors.

Layers that have maps of their own are treated as if all were like them: what must be compensated,
and what is promised, is found for each. What the model says once for all must come out the same.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from streammap.architectures import axis_facts, axis_words
from streammap.architectures.axis_facts import Layer
from streammap.architectures.config_fields import field_value
from streammap.architectures.model import Model
from streammap.errors import PlanError
from streammap.planning import exactness, experts, maps
from streammap.planning.by_layer import asked, layered
from streammap.planning.by_layer.layered import Alike
from streammap.planning.by_layer.shared_rows import SharedRows
from streammap.planning.compensation import Compensation, compensate
from streammap.planning.copies.apart import ApartRequest
from streammap.planning.copies.noising import NoiseRequest
from streammap.planning.copies.shares import Split
from streammap.planning.experts import TopK
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, BlockMap, MapPair
from streammap.planning.tensor_maps.axis_change import LayerChange, Rule


@final
@dataclass(frozen=True, slots=True)
class Copies:
    """What tells copies apart."""

    decibels: float | None = None
    """Of noise in what reads them; None for none."""
    seed: int = 0
    split: Split | None = None


@final
@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Maps that hold everywhere, or in some layers, and what they ask of other tensors."""

    layers: tuple[Layer, ...]
    """Of the result; empty for what holds everywhere."""
    chosen: Mapping[str, AxisMap]
    """Axis -> the map of its producers."""
    pairs: Mapping[str, MapPair]
    compensation: Compensation

    @property
    def change(self) -> LayerChange:
        """What it changes in its layers."""
        return LayerChange({**self.pairs, **self.compensation.pairs}, self.compensation.fills)


def made(
    model: Model,
    level: MapLevel,
    everywhere: Mapping[str, AxisMap],
    *,
    grows: bool,
    rule: Rule,
    top_k: TopK | None,
    split: Split | None = None,
) -> list[Part]:
    """The maps that hold everywhere, and after them those of layers that have others.

    Args:
        everywhere: Width or expert axis -> its merging map F, where it is one for all.
        top_k: What is asked of the number of experts that a token takes.
        split: The shares that readers have in copies, where groups have no weights.

    Raises:
        SchemeError, PlanError: maps of layers that don't fit the model, or not one another.
    """
    by_layer = {a: asked.of_result(model, a, level, grows=grows) for a in level.by_layer}
    for axis, of_layers in by_layer.items():
        layered.sizes_of(model.architecture, axis, of_layers)
    # Layers often share a map: each is worked out once.
    rows, of_pair = SharedRows(), maps.pair_of_growth if grows else maps.pair_of

    @functools.cache
    def applied(m: AxisMap) -> AxisMap:
        return rows.of(maps.growing(m)) if grows else m

    @functools.cache
    def pair_of(m: AxisMap) -> MapPair:
        pair = of_pair(m)
        return MapPair(m if pair.out is m else rows.of(pair.out), rows.of(pair.into))

    parts = []
    for one in (Alike((), everywhere), *layered.alike(by_layer)):
        here: dict[str, AxisMap] = {axis: applied(m) for axis, m in one.maps.items()}
        # In a layer an identity counts too: the axis has no map that holds everywhere.
        named = [a for a, m in here.items() if one.layers or not m.is_identity]
        pairs = {axis: pair_of(_shared(model, axis, one.maps[axis], split)) for axis in named}
        if grows and rule == "exact":
            _check_even(model, here)
        has_experts = any(axis_facts.is_expert(model.architecture, axis) for axis in here)
        compensation = compensate(
            model,
            here,
            pairs,
            grows=grows,
            filled=level.filled,
            rule=rule,
            top_k=top_k if has_experts else None,
        )
        parts.append(Part(one.layers, here, pairs, compensation))
    return parts


def fields(model: Model, parts: Sequence[Part]) -> dict[str, object]:
    """What config.json says of all layers.

    Raises:
        PlanError: layers that would need different numbers.
    """
    agreed: dict[str, object] = {}
    for name in dict.fromkeys(name for part in parts for name in part.compensation.fields):
        sets = [part for part in parts if name in part.compensation.fields]
        # A layer that has the same axes and leaves the field alone says that it stays.
        axes = frozenset.intersection(*(frozenset(part.chosen) for part in sets))
        says = [
            part for part in parts if part in sets or (part.layers and axes <= set(part.chosen))
        ]
        old = field_value(model.config, name)
        first, *others = [(part.compensation.fields.get(name, old), part) for part in says]
        for value, part in others:
            if value != first[0]:
                one, other = (layered.named(model, p.layers[:1]) for p in (first[1], part))
                raise PlanError(
                    f"config.json: {name} would be {first[0]} for {one}, {value} for {other}",
                    hint="it has one number for all layers: give --top-k, or groups alike",
                )
        agreed[name] = first[0]
    return agreed


def guarantees(
    model: Model, parts: Iterable[Part], *, grows: bool
) -> dict[str, exactness.Guarantee]:
    """Axis -> what its change promises, for axes whose maps differ from layer to layer."""
    return exactness.of_layers(
        [
            (
                layered.named(model, part.layers[:1]),
                exactness.of_axes(
                    model,
                    part.chosen,
                    {},
                    grows=grows,
                    silent={},
                    fills=part.compensation,
                    head_size=None,
                ),
            )
            for part in parts
        ]
    )


def notes(model: Model, whole: Part, parts: Sequence[Part]) -> list[str]:
    """What a user might not expect of compensations, and how many maps there are."""
    told = dict.fromkeys(note for part in (whole, *parts) for note in part.compensation.notes)
    one = {axis: m for part in parts for axis, m in part.chosen.items()}
    return [
        *told,
        *(
            f"{axis_words.shown(model.architecture, axis)} {m.n_in} -> {m.n_out}: "
            f"{differing(axis, parts)}"
            for axis, m in one.items()
        ),
    ]


def _shared(model: Model, axis: str, m: AxisMap, split: Split | None) -> AxisMap:
    """A merging map with the shares that are asked for, where weights read by shares."""
    spec = model.architecture
    reads = axis_facts.is_read_by_shares(spec, axis)
    if split is None or not reads or not isinstance(m, BlockMap):
        return m
    return split.weighted(m, axis_words.units_of(spec, axis))


def twins(model: Model, parts: Iterable[Part]) -> dict[str, str]:
    """Axes whose copies training can't tell apart, with their units in words."""
    return {
        axis: units
        for part in parts
        for axis, units in exactness.twins(model, part.chosen, part.pairs).items()
    }


def apart(
    model: Model,
    parts: Sequence[Part],
    asked: Copies,
    twins: Mapping[str, str],
    fields: Mapping[str, object],
) -> ApartRequest:
    """What tells copies apart, with what is known of the axes.

    Args:
        twins: Axis -> units, where training could not tell copies apart without.
        fields: New values of fields of config.json.
    """
    adds_up = asked.split is not None
    if asked.decibels is None:
        return ApartRequest(adds_up=adds_up)
    copied: dict[str, list[AxisMap]] = {}
    for part in parts:
        for axis, m in part.chosen.items():
            if axis_facts.is_expert(model.architecture, axis):
                copied.setdefault(axis, []).append(m)
    sums = frozenset(
        axis
        for axis, of_parts in copied.items()
        if all(experts.takes_all_copies(model, axis, m, fields) for m in of_parts)
    )
    return ApartRequest(NoiseRequest(asked.decibels, asked.seed, twins, sums), adds_up)


def differing(axis: str, parts: Sequence[Part]) -> str:
    """How many maps an axis has: "another map in each of 4 layers"."""
    here = [part for part in parts if axis in part.chosen]
    n_maps = len({part.chosen[axis] for part in here})
    return layered.words(sum(len(part.layers) for part in here), n_maps)


def _check_even(model: Model, chosen: Mapping[str, AxisMap]) -> None:
    """Refuse uneven copies of heads behind a norm over all of them: nothing could compensate it."""
    by_space = model.architecture.spaces
    of_heads = {*by_space.get("heads", ()), *by_space.get("kv_heads", ())}
    normed = axis_facts.normed_axes(model)
    for axis, m in chosen.items():
        if axis in of_heads & normed and isinstance(m, BlockMap) and not exactness.is_even(m):
            raise PlanError(
                f"{axis}: {m.n_in} -> {m.n_out} copies some heads more often than others, which "
                "a norm over all of them (full-width q_norm, k_norm) would see",
                hint=f"take a multiple of {m.n_in}",
            )
