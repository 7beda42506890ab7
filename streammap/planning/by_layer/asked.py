"""Requests that name layers -> the maps of a level.

Each layer is planned as if all were like it, with all that is coupled: so a request on heads in
layer 3 gives that layer its kv heads too. What comes out the same everywhere is one map.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from streammap.architectures import axis_words
from streammap.architectures.axis_facts import Layer
from streammap.architectures.model import Model
from streammap.errors import PlanError, SchemeError
from streammap.planning import coupled_axes, maps
from streammap.planning.axis_maps import ResizeRequest
from streammap.planning.by_layer import layered
from streammap.planning.by_layer.layered import LayerMaps
from streammap.planning.by_layer.shared_rows import SharedRows
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.requests import AxisRequest

_N_NOTES = 3


def merging_level(model: Model, asked: ResizeRequest, *, grows: bool) -> tuple[MapLevel, list[str]]:
    """The maps of a request, and what a user might not expect.

    Raises:
        SchemeError: groups or layers that do not fit the model.
        PlanError: a request that this architecture can't follow, with the reason.
    """
    if asked.width is not None and asked.width.layers is not None:
        raise SchemeError(
            f"{asked.width.where or 'width'}: the hidden size is one for all layers",
            hint="ask for heads, mlp or experts by layers",
        )
    given = {axis: r for axis, r in asked.axes.items() if r.layers is not None}
    if not given:
        merging, notes = coupled_axes.merging_maps(model, asked, grows=grows)
        return MapLevel(dict(merging)), notes
    by_axis = {axis: assigned(model, axis, request) for axis, request in given.items()}
    asked = replace(asked, known={**asked.known, **_largest(by_axis)})
    planned: dict[tuple[AxisRequest, ...], dict[str, BlockMap]] = {}
    noted: dict[str, list[Layer]] = {}
    found: dict[Layer, dict[str, BlockMap]] = {}
    rows = SharedRows()
    for layer in sorted({layer for by_layer in by_axis.values() for layer in by_layer}):
        # A layer without experts is planned as if it had some: their number is the model's.
        here = {a: m[layer] if layer in m else next(iter(m.values())) for a, m in by_axis.items()}
        at = tuple(here.values())
        if at not in planned:
            made, notes = coupled_axes.merging_maps(
                model, replace(asked, axes={**asked.axes, **here}), grows=grows
            )
            planned[at] = {axis: rows.of(m) for axis, m in made.items()}
            for note in notes:
                noted.setdefault(note, []).append(layer)
        found[layer] = planned[at]
    everywhere, several = _collated(model, found)
    by_layer = {
        axis: of_small(model, axis, m, everywhere, grows=grows) for axis, m in several.items()
    }
    return MapLevel(everywhere, by_layer=by_layer), _notes(model, noted, len(planned))


def assigned(model: Model, axis: str, request: AxisRequest) -> dict[Layer, AxisRequest]:
    """Layer -> its request, for each layer that the axis lies in.

    Raises:
        SchemeError: a layer that is not there or not named, a name that fits several.
    """
    there = layered.lying(model, axis).layers
    depths = tuple(dict.fromkeys(depth for depth, _ in there))
    named, rest = dict(request.layers or ()), dict[str, AxisRequest]()
    where, units = request.where or axis, axis_words.units_of(model.architecture, axis)
    found: dict[Layer, AxisRequest] = {}
    for name, one in named.items():
        depth, _, number = name.rpartition(".")
        if depth and depth not in depths:
            raise SchemeError(
                f"{where}: {name}: {units} lie in {' and '.join(depths)}, not in {depth}",
                hint=f"name a layer {depths[0]}.{there[0][1]}",
            )
        if number == "*":
            rest[depth] = one
            continue
        if not depth and len(depths) > 1:
            raise SchemeError(
                f"{where}: layer {number}: {units} lie in {' and '.join(depths)}",
                hint=f"name one: {' or '.join(f'{d}.{number}' for d in depths)}",
            )
        layer = depth or depths[0], int(number)
        if layer not in there:
            raise SchemeError(
                f"{where}: {axis_words.layer_named(model.architecture, layer)} has no {units}; "
                f"{layered.named(model, there)} have",
                hint="leave it out, or name layers by their numbers in the source",
            )
        found[layer] = one
    for layer in there:
        if layer not in found and (layer[0] in rest or "" in rest):
            found[layer] = rest.get(layer[0], rest.get("", request))
    missing = [layer for layer in there if layer not in found]
    if missing:
        raise SchemeError(
            f"{where}: nothing is said of {layered.named(model, missing)}, expected a request for "
            f"each of {len(there)} layers",
            hint='name them too, or say "*" for all others',
        )
    return {layer: found[layer] for layer in there}


def of_small(
    model: Model, axis: str, by_layer: LayerMaps, merging: Mapping[str, AxisMap], *, grows: bool
) -> dict[Layer, AxisMap]:
    """Maps by layers of the source -> by those of the small model.

    Raises:
        PlanError: layers that are merged have different maps.
    """
    if grows:
        return dict(by_layer)
    found: dict[Layer, AxisMap] = {}
    for depth in dict.fromkeys(depth for depth, _ in by_layer):
        of_layers = merging.get(depth)
        if of_layers is None:
            found |= {layer: m for layer, m in by_layer.items() if layer[0] == depth}
            continue
        for i in range(of_layers.n_out):
            row = of_layers.members(i)
            members = [(depth, j) for j, value in row if value and (depth, j) in by_layer]
            if members:
                found[depth, i] = _agreed(model, axis, by_layer, members, "merged")
    return found


def of_result(model: Model, axis: str, level: MapLevel, *, grows: bool) -> dict[Layer, AxisMap]:
    """The merging maps of an axis by layers of the result; a copied layer has its source's.

    Raises:
        SchemeError: a layer that has no map, or a map for one that is not there.
        PlanError: a new layer is a mean of some that have different maps.
    """
    by_layer, there = level.by_layer[axis], layered.lying(model, axis).layers
    made = _made_of(model, level, there, grows=grows)
    # The small model's layers are the source's on the way up, and the result's on the way down.
    layered.check_layers(model, axis, there if grows else made, by_layer)
    if not grows:
        return {layer: by_layer[layer] for layer in made}
    return {
        layer: _agreed(model, axis, by_layer, members, "copied") for layer, members in made.items()
    }


def _made_of(
    model: Model, level: MapLevel, there: Sequence[Layer], *, grows: bool
) -> dict[Layer, list[Layer]]:
    """Layer of the result -> the layers of the source that it is made of, of those of an axis."""
    made: dict[Layer, list[Layer]] = {}
    for depth in dict.fromkeys(depth for depth, _ in there):
        own = [layer for layer in there if layer[0] == depth]
        of_layers = level.merging.get(depth)
        if of_layers is None:
            made |= {layer: [layer] for layer in own}
            continue
        applied = maps.growing(of_layers) if grows else of_layers
        for i in range(applied.n_out):
            row = [(depth, j) for j, _ in applied.members(i)]
            # What nothing maps to takes 0 times a layer: any will do.
            members = [layer for layer in row if layer in own] if row else own[:1]
            if members:
                made[depth, i] = members
    return made


def _agreed(
    model: Model, axis: str, by_layer: LayerMaps, members: Sequence[Layer], done: str
) -> AxisMap:
    """The map that layers have in common."""
    first, *others = members
    for other in others:
        if by_layer[other] != by_layer[first]:
            raise PlanError(
                f"{layered.named(model, members)} are {done} into one, but have different maps of "
                f"{axis} ({layered.named(model, (first, other))})",
                hint="give the layers of a group the same map, or change the depth in a second "
                "step",
            )
    return by_layer[first]


def _largest(by_axis: Mapping[str, Mapping[Layer, AxisRequest]]) -> dict[str, int]:
    """Axis -> how many units the groups of all its layers name: that many the large model has."""
    largest = {
        axis: max(
            (
                1 + max(map(max, request.groups))
                for request in by_layer.values()
                if request.groups is not None
            ),
            default=0,
        )
        for axis, by_layer in by_axis.items()
    }
    return {axis: n for axis, n in largest.items() if n}


def _collated(
    model: Model, found: Mapping[Layer, Mapping[str, BlockMap]]
) -> tuple[dict[str, AxisMap], dict[str, dict[Layer, AxisMap]]]:
    """Maps that are the same in all layers, and those that are not: axis -> layer -> map."""
    merging: dict[str, AxisMap] = {}
    several: dict[str, dict[Layer, AxisMap]] = {}
    one: dict[AxisMap, AxisMap] = {}
    for axis in dict.fromkeys(axis for here in found.values() for axis in here):
        stays = maps.identity(model.sizes[axis])
        by_layer: dict[Layer, AxisMap] = {}
        for layer, here in found.items():
            m = here.get(axis, stays)
            by_layer[layer] = one.setdefault(m, m)
        if len(set(by_layer.values())) == 1:
            merging[axis] = next(iter(by_layer.values()))
            continue
        try:
            there = layered.lying(model, axis).layers
        except SchemeError as error:
            # Nobody asked for it by layers: it follows something else.
            followers = f"{axis_words.shown(model.architecture, axis)} would follow layer by layer"
            raise PlanError(
                f"{followers}, but {error.message}",
                hint=f"ask for {axis_words.units_of(model.architecture, axis)} too, by one "
                "request for all layers",
            ) from error
        several[axis] = {layer: m for layer, m in by_layer.items() if layer in there}
        layered.check_layers(model, axis, there, several[axis])
        layered.sizes_of(model.architecture, axis, several[axis])
        if len(set(several[axis].values())) == 1:
            merging[axis] = next(iter(several.pop(axis).values()))
    return merging, several


def _notes(model: Model, noted: Mapping[str, Sequence[Layer]], n_planned: int) -> list[str]:
    """Notes that hold for all layers, and the first of those that hold for some."""
    notes = [note for note, layers in noted.items() if len(layers) == n_planned]
    own = [
        f"{layered.named(model, layers)}: {note}"
        for note, layers in noted.items()
        if len(layers) < n_planned
    ]
    if len(own) > _N_NOTES:
        own = [*own[:_N_NOTES], f"{len(own) - _N_NOTES} more such notes on other layers"]
    return [*notes, *own]
