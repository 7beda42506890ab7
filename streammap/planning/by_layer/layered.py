"""Maps of axes that differ from layer to layer: where they may, and which layers share them.

An axis inside of layers (heads, MLP neurons, experts) may put its units in an order of its own, or
keep others, in each. What all layers read and write, the hidden units, can't. Sizes are the same
in all: config.json has one number for them.

`change` is the way in for whatever has found such maps: {axis: {layer: map}} -> a part of an
AxisChange, which `planner.remap` applies.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import final

from streammap.architectures import axis_facts, axis_words
from streammap.architectures.axis_facts import Layer, Lying
from streammap.architectures.model import Model
from streammap.architectures.schema import Architecture
from streammap.errors import PlanError, SchemeError, some
from streammap.planning import maps
from streammap.planning.maps import AxisMap
from streammap.planning.tensor_maps.axis_change import LayerChange

LayerMaps = Mapping[Layer, AxisMap]
"""A map of one axis for each layer that it lies in."""


@final
@dataclass(frozen=True, slots=True)
class Alike:
    """Layers that have the same maps."""

    layers: tuple[Layer, ...]
    maps: Mapping[str, AxisMap]
    """Axis -> its map in these layers."""


def named(model: Model, layers: Iterable[Layer]) -> str:
    """Layers in words: "layer 0", "layers 0, 3 and 4"."""
    return some([axis_words.layer_named(model.architecture, layer) for layer in layers], limit=4)


def lies(model: Model, axis: str) -> Lying:
    """The layers that an axis lies in, and what keeps it from being another one in each."""
    spec, found = model.architecture, axis_facts.lying(model, axis)
    if axis in spec.depth_axes:
        return replace(found, shared="they are what is counted")
    if axis in spec.spaces.get("hidden", ()):
        return replace(found, shared="all layers read and write the same ones")
    return found


def lying(model: Model, axis: str) -> Lying:
    """The layers that an axis lies in, where each may have a map of its own.

    Raises:
        SchemeError: the axis is one for all layers; the message says why.
    """
    found, units = lies(model, axis), axis_words.units_of(model.architecture, axis)
    if found.shared is not None or not found.layers:
        raise SchemeError(
            f"{units}: one map for all layers is needed ({found.shared or 'no tensor has them'})",
            hint=f"give the {units} one request for all layers, without numbers of layers",
        )
    return found


def sizes_of(spec: Architecture, axis: str, by_layer: LayerMaps) -> tuple[int, int]:
    """What the maps of an axis read and make: the same in each layer.

    Raises:
        PlanError: not the same; two of the layers are named.
    """
    first, *rest = by_layer
    expected = by_layer[first].n_in, by_layer[first].n_out
    for layer in rest:
        m = by_layer[layer]
        if (m.n_in, m.n_out) != expected:
            raise PlanError(
                f"{axis}: {axis_words.layer_named(spec, first)} maps {expected[0]} to "
                f"{expected[1]}, {axis_words.layer_named(spec, layer)} {m.n_in} to {m.n_out}",
                hint=f"config.json has one number of {axis_words.units_of(spec, axis)} for all "
                "layers: give each as many groups",
            )
    return expected


def alike(by_axis: Mapping[str, LayerMaps]) -> tuple[Alike, ...]:
    """The layers, put together where all their maps are equal."""
    layers = sorted({layer for by_layer in by_axis.values() for layer in by_layer})
    known: dict[tuple[tuple[str, AxisMap], ...], list[Layer]] = {}
    for layer in layers:
        here = tuple((axis, m[layer]) for axis, m in by_axis.items() if layer in m)
        known.setdefault(here, []).append(layer)
    return tuple(Alike(tuple(layers), dict(here)) for here, layers in known.items())


def change(model: Model, by_axis: Mapping[str, LayerMaps]) -> dict[Layer, LayerChange]:
    """Maps of units that keep their layers, for `AxisChange.by_layer`.

    Args:
        by_axis: Axis -> layer -> the map of its producers; readers get what belongs to it.

    Raises:
        SchemeError: an axis that is one for all layers, a layer that is left out or not there.
        PlanError: sizes that differ between layers.
    """
    for axis, by_layer in by_axis.items():
        check_layers(model, axis, lying(model, axis).layers, by_layer)
        sizes_of(model.architecture, axis, by_layer)
    made: dict[Layer, LayerChange] = {}
    for one in alike(by_axis):
        pairs = {axis: maps.pair_of(m) for axis, m in one.maps.items()}
        made |= dict.fromkeys(one.layers, LayerChange(pairs))
    return made


def check_layers(model: Model, axis: str, needed: Iterable[Layer], found: Iterable[Layer]) -> None:
    """Refuse maps that leave out a layer, or name one that has nothing of the axis.

    Raises:
        SchemeError: naming the layers.
    """
    wanted, given = set(needed), set(found)
    if wanted == given:
        return
    missing, unknown = sorted(wanted - given), sorted(given - wanted)
    what = f"none for {named(model, missing)}" if missing else f"one for {named(model, unknown)}"
    raise SchemeError(
        f"{axis}: of maps for each layer there is {what}, expected one for each of "
        f"{named(model, sorted(wanted))}",
        hint="`streammap inspect` lists the tensors that each layer has",
    )


def words(n_layers: int, n_maps: int) -> str:
    """How many maps there are: "another map in each of 4 layers"."""
    if n_maps == n_layers:
        return f"another map in each of {n_layers} layers"
    return f"{n_maps} different maps in {n_layers} layers"
