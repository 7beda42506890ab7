"""A file of learned maps: matrices by the names of axes, as safetensors or npz.

    hidden.matrix            [new, old]   P: what makes hidden units becomes P W (rows, biases,
                                          norms, embeddings)
    hidden.reader            [old, new]   C: what reads them becomes W C; without it, P transposed
    mlp@3.matrix             [new, old]   the same in layer 3 of the result alone, where the axis
                                          has one for each; "mlp@dec_layer.3" of several stacks
    layer.matrix             [new, old]   weights of layers: new layer i is the sum over j of
                                          matrix[i, j] times layer j
    layer.q_proj.matrix      [new, old]   the same for tensors whose keys have this part, or match
                                          it, with * for any text; the longest that fits counts

Coefficients may be of any sign. float64 stays, other floats are computed with as float32. A matrix
stays in its file, and is read a block at a time: it may be larger than the memory.

In memory such a file is a level of maps with names of its own ("hidden^matrix", "mlp#3^reader"),
which records hold, and which no other operator takes for one of its own.

Sources: LiGO, arXiv:2303.00980 (widths and layer weights); SliceGPT, arXiv:2401.15024 (rotations);
DotResize, arXiv:2507.04517.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from streammap.architectures import axis_words
from streammap.architectures.axis_facts import Layer
from streammap.architectures.model import Model
from streammap.errors import CheckpointError, SchemeError, some
from streammap.io.dtypes import TORCH_NAMES
from streammap.io.storage.local import LocalFile
from streammap.planning import maps
from streammap.planning.dense import stored
from streammap.planning.dense.matrix import Matrix
from streammap.planning.learned.pair import Pair
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, DenseMap

PARTS = ("matrix", "reader")
_LAYER = re.compile(r"([^@]+)@(?:([A-Za-z_][\w.]*)\.)?(0|[1-9][0-9]{0,5})")


@final
@dataclass(frozen=True, slots=True)
class Learned:
    """The maps of a file, by the axes of one model."""

    pairs: Mapping[str, Pair]
    """Width axis or alias -> its matrices in all layers."""
    by_layer: Mapping[str, Mapping[Layer, Pair]]
    """Axis -> layer of the result -> its matrices; of one size in all."""
    layers: Mapping[str, Matrix]
    """Depth axis -> weights of layers [new, old]."""
    families: Mapping[str, Mapping[str, Matrix]]
    """Depth axis -> part of a key, or a pattern -> weights of layers there."""


def read(path: Path) -> tuple[MapLevel, ...]:
    """The one level of a file.

    Raises:
        SchemeError: the file is no safetensors or npz, or a name or shape in it is wrong.
    """
    merging: dict[str, AxisMap] = {}
    for name, dtype, shape, matrix in _matrices(path):
        axis, _, part = name.rpartition(".")
        if not axis or part not in PARTS:
            raise SchemeError(
                f"{path.name}: {name[:80]!r} is no name of a map, expected NAME.matrix or "
                "NAME.reader",
                hint="`streammap maps template` writes a file with the names of a model",
            )
        if matrix is None or not all(shape):
            raise SchemeError(
                f"{path.name}: {name}: {dtype} of shape {list(shape)}, expected a matrix of "
                "floating-point numbers",
                hint="give [new, old] for matrix, [old, new] for reader, in float32 or float64",
            )
        if not matrix.is_finite():
            raise SchemeError(
                f"{path.name}: {name} has numbers that are infinite or NaN",
                hint="look at what made the file",
            )
        merging[f"{axis.replace('@', '#')}^{part}"] = DenseMap(matrix)
    if not merging:
        raise SchemeError(
            f"{path.name}: no maps in it", hint="streammap maps template SRC FILE writes one"
        )
    return (MapLevel(merging, where=str(path)),)


def _matrices(path: Path) -> Iterator[tuple[str, str, tuple[int, ...], Matrix | None]]:
    """Name, dtype and shape of each tensor of a file; and the tensor, if it is a matrix."""
    from streammap.io.formats import safetensors_header
    from streammap.planning.learned import npz

    try:
        if path.suffix == ".npz":
            yield from npz.matrices(path)
            return
        slots, _ = safetensors_header.read(path)
        stat = path.stat()
        file = LocalFile(path, stat.st_size, stat.st_mtime_ns)
        for slot in slots:
            dtype = TORCH_NAMES.get(slot.spec.dtype, slot.spec.dtype)
            yield slot.key, dtype, slot.spec.shape, stored.of_slot(file, slot)
    except OSError as error:
        raise SchemeError(f"{path}: {error.strerror or error}", hint="check the path") from error
    except CheckpointError as error:
        raise SchemeError(f"map file {error.message}", hint=error.hint) from error


def of_model(level: MapLevel, model: Model) -> Learned:
    """The maps by the model's axes.

    Raises:
        SchemeError: a name that the model doesn't have, or a shape that doesn't fit it.
    """
    found = {name: maps.matrix_of(m, "F64") for name, m in level.merging.items()}
    depths = [axis for axis in model.architecture.depth_axes if model.sizes.get(axis)]
    pairs: dict[str, Pair] = {}
    by_layer: dict[str, dict[Layer, Pair]] = {}
    layers: dict[str, Matrix] = {}
    families: dict[str, dict[str, Matrix]] = {}
    for name, matrix in found.items():
        place, _, part = name.replace("#", "@").partition("^")
        if part not in PARTS:
            raise SchemeError(
                f"{name}: no learned map",
                hint="give a map file of coalesce to --map of coalesce or decoalesce",
            )
        depth = next((a for a in depths if place == a or place.startswith(f"{a}.")), None)
        if part == "reader":
            if f"{name.partition('^')[0]}^matrix" not in found or depth is not None:
                what = "weights of layers" if depth else f"no {place}.matrix beside it"
                raise SchemeError(
                    f"{place}.reader: {what}", hint="give a matrix, and a reader where it needs one"
                )
            continue
        if depth is not None:
            _check(f"{place}.matrix", matrix, model.sizes[depth], "layers")
            pattern = place.removeprefix(depth).removeprefix(".")
            if pattern:
                families.setdefault(depth, {})[pattern] = matrix
            else:
                layers[depth] = matrix
            continue
        axis, layer = _placed(place, model, depths)
        pair = _pair(place, axis, matrix, found.get(name.replace("^matrix", "^reader")), model)
        if layer is None:
            pairs[axis] = pair
        else:
            by_layer.setdefault(axis, {})[layer] = pair
    _check_sizes(layers, families)
    twice = [axis for axis in by_layer if axis in pairs]
    if twice:
        raise SchemeError(
            f"{twice[0]}: one map for all layers, and some for single layers",
            hint="give one for each layer, or one for all",
        )
    return Learned(pairs, by_layer, layers, families)


def _placed(place: str, model: Model, depths: list[str]) -> tuple[str, Layer | None]:
    """The axis or alias that a name is about, and the layer, if it is about one."""
    spec, found = model.architecture, _LAYER.fullmatch(place)
    name = place if found is None else found[1]
    axis = axis_words.axis_named(spec, name)
    known = [*model.sizes, *spec.aliases]
    kind = spec.axes[axis].kind if axis in spec.axes else None
    if axis not in known or kind not in (None, "width", "expert"):
        shown = [a for a in known if a not in spec.axes or spec.axes[a].kind in ("width", "expert")]
        raise SchemeError(
            f"{place}.matrix: {model.name} has no axis {name!r} that can be mapped",
            hint=f"it has {some(shown, limit=8)}; layers are {', '.join(depths)}",
        )
    if found is None:
        return axis, None
    depth = found[2] or (depths[0] if len(depths) == 1 else "")
    if depth not in depths:
        raise SchemeError(
            f"{place}.matrix: layers are {' or '.join(depths)}",
            hint=f"name one: {name}@{depths[0]}.{found[3]}" if depths else "leave the layer out",
        )
    return axis, (depth, int(found[3]))


def _pair(place: str, axis: str, matrix: Matrix, reader: Matrix | None, model: Model) -> Pair:
    size = model.sizes.get(axis)
    if size is None:
        size = model.size(model.architecture.aliases[axis])
    _check(f"{place}.matrix", matrix, size, axis_words.shown(model.architecture, axis))
    if reader is None:
        return Pair(matrix, matrix.transposed())
    n_new, n_old = matrix.shape
    if reader.shape != (n_old, n_new):
        raise SchemeError(
            f"{place}.reader: shape {list(reader.shape)}, expected [{n_old}, {n_new}] (old, new) "
            f"for {place}.matrix [{n_new}, {n_old}]",
            hint="transpose it, if it is [new, old]",
        )
    return Pair(matrix, reader)


def _check(name: str, matrix: Matrix, n_old: int, what: str) -> None:
    if matrix.shape[1] != n_old:
        raise SchemeError(
            f"{name}: shape {list(matrix.shape)}, expected [new, {n_old}]: the model has {n_old} "
            f"{what}",
            hint="rows are new units, columns old ones",
        )


def _check_sizes(
    layers: Mapping[str, Matrix], families: Mapping[str, Mapping[str, Matrix]]
) -> None:
    """Weights of layers make one number of them."""
    for depth, table in families.items():
        given = {f"{depth}.{part}.matrix": matrix.shape[0] for part, matrix in table.items()}
        if depth in layers:
            given[f"{depth}.matrix"] = layers[depth].shape[0]
        if len(set(given.values())) > 1:
            raise SchemeError(
                f"{depth}: "
                + ", ".join(f"{name} makes {n} layers" for name, n in list(given.items())[:3]),
                hint="give all as many rows",
            )
