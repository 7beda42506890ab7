"""Remap: apply maps that were learned elsewhere. planning/learned/ reads and judges them."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Union, cast, final

from streammap.common.kinds import Kind, shown
from streammap.errors import PlanError, SchemeError
from streammap.operators.declare import Operator, declared, option

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.architectures.axis_facts import Layer
    from streammap.architectures.model import Model
    from streammap.planning.exactness import Guarantee
    from streammap.planning.learned.matrices import Learned
    from streammap.planning.learned.pair import Pair
    from streammap.planning.map_file import MapLevel
    from streammap.planning.maps import AxisMap, MapPair
    from streammap.planning.plan import Plan
    from streammap.planning.tensor_maps.axis_change import NormCompensation

LearnedLike = Union[str, Path, "tuple[MapLevel, ...]"]


@final
class LearnedMaps(Kind):
    """A file of matrices; a record holds the matrices themselves."""

    from_file = True

    def parse(self, value: Any, name: str) -> "tuple[MapLevel, ...]":
        """The matrices, read."""
        from streammap.planning.learned import matrices

        if isinstance(value, tuple):
            return value
        if not isinstance(value, str | Path):
            raise PlanError(f"{name} is {shown(value)}, expected a file")
        return matrices.read(Path(value))

    def decode(self, value: Any, name: str) -> "tuple[MapLevel, ...]":
        """Matrices that were unpacked from a record."""
        if not isinstance(value, tuple):
            raise PlanError(f"{name}: expected packed maps, or their digests")
        return value


@declared
class Remap(Operator):
    """Apply learned maps: matrices of axes, and weights of layers (LiGO, rotations).

    `streammap maps template` writes a file to fill in, `streammap maps check` looks at one.
    """

    examples: ClassVar[tuple[str, ...]] = ("remap bert-small/ grown/ --maps ligo.safetensors",)

    maps: LearnedLike = option(
        help="File of matrices, safetensors or npz: hidden.matrix, mlp.reader, layer.matrix ...",
        kind=LearnedMaps(),
        metavar="FILE",
    )

    fold_gains: bool = option(
        default=False,
        help="Fold the gains of norms into the weights that read them: a rotation is then exact.",
    )

    def plan(self, source: "Plan") -> "Plan":
        """The mapped plan.

        Raises:
            SchemeError: names or shapes in the file that don't fit the model.
            PlanError: a result that config.json can't express.
        """
        from streammap.operators import resize_plan
        from streammap.planning import exactness, maps, planner
        from streammap.planning.learned import matrices
        from streammap.planning.plan import Step
        from streammap.planning.tensor_maps.axis_change import AxisChange, LayerChange

        level, *others = cast("tuple[MapLevel, ...]", self.maps)
        if others or level.by_layer:
            raise SchemeError(
                "maps of several levels: that is a map file of coalesce",
                hint="give it to --map of coalesce or decoalesce",
            )
        model = source.model
        learned = matrices.of_model(level, model)
        notes: list[str] = []
        if self.fold_gains:
            source, notes = _folded(source, learned)
            model = source.model
        pairs = {axis: _map_pair(pair) for axis, pair in learned.pairs.items()}
        fills = {
            axis: fill for axis, one in learned.pairs.items() if (fill := _fill(model, axis, one))
        }
        by_layer = _by_layer(model, learned)
        families = _families(model, learned)
        layers = {axis: maps.from_matrix(matrix) for axis, matrix in learned.layers.items()}
        for table in families.values():
            layers = {**table, **layers}
        first = {axis: next(iter(of.values())) for axis, of in learned.by_layer.items()}
        outs = {axis: pair.out for axis, pair in pairs.items()}
        outs |= {axis: _map_pair(pair).out for axis, pair in first.items()}
        by_axis = _guarantees(source, learned, layers)
        promise, reason = exactness.worst(by_axis)
        shapes = {axis: [m.n_in, m.n_out, m.describe()] for axis, m in {**outs, **layers}.items()}
        options = {"maps": shapes} | ({"fold_gains": True} if self.fold_gains else {})
        step = Step(self.name, options, promise, reason, tuple(notes), by_axis)
        change = AxisChange(
            pairs,
            layers,
            resize_plan.sizes_after(model, outs, layers),
            "exact",
            1.0,
            fills,
            by_layer={layer: LayerChange(of) for layer, of in by_layer.items()},
            families=families,
        )
        return planner.remap(source, change, step, levels=(*source.levels, level))


def _folded(source: "Plan", learned: "Learned") -> "tuple[Plan, list[str]]":
    """The plan with the gains of norms folded where units are rotated, and notes.

    Raises:
        PlanError: no map is a rotation, or gains that can't be folded.
    """
    from streammap.planning.learned import fold

    notes = []
    for axis, pair in learned.pairs.items():
        if pair.is_rotation:
            source, note = fold.folded(source, axis)
            notes.append(note)
    if not notes:
        raise PlanError(
            "--fold-gains: no map is a rotation (square, orthogonal, read by its transpose)",
            hint="leave it out",
        )
    return source, notes


def _map_pair(pair: "Pair") -> "MapPair":
    from streammap.planning import maps
    from streammap.planning.maps import MapPair

    out = maps.from_matrix(pair.matrix)
    if pair.is_transposed:
        return MapPair(out, out)
    return MapPair(out, maps.from_matrix(pair.reader.transposed()))


def _fill(model: "Model", axis: str, pair: "Pair") -> "NormCompensation | None":
    """Norms under a rotation: their gains stay, or change places where units do."""
    from streammap.architectures import axis_facts
    from streammap.planning import maps
    from streammap.planning.dense.matrix import Changed
    from streammap.planning.tensor_maps.axis_change import NormCompensation

    if axis not in axis_facts.normed_axes(model) or not pair.is_rotation:
        return None
    places = maps.from_matrix(Changed(pair.matrix, "abs")) if pair.is_signed else None
    return NormCompensation(places or maps.identity(pair.matrix.shape[0]), 1.0, both=True)


def _by_layer(model: "Model", learned: "Learned") -> "dict[Layer, dict[str, MapPair]]":
    """Layer of the result -> axis -> its maps.

    Raises:
        SchemeError: an axis that is one for all layers, or a layer that is left out.
        PlanError: sizes that differ between layers.
    """
    from streammap.planning.by_layer import layered

    found: dict[Layer, dict[str, MapPair]] = {}
    for axis, of_layers in learned.by_layer.items():
        own = {layer: _map_pair(pair) for layer, pair in of_layers.items()}
        there = layered.lying(model, axis).layers
        if not {layer[0] for layer in own} & (learned.layers.keys() | learned.families.keys()):
            layered.check_layers(model, axis, there, own)
        layered.sizes_of(model.architecture, axis, {at: pair.out for at, pair in own.items()})
        for layer, pair in own.items():
            found.setdefault(layer, {})[axis] = pair
    return found


def _families(model: "Model", learned: "Learned") -> "dict[str, dict[str, AxisMap]]":
    """Family -> depth axis -> the map of its layers, where it is not that of all.

    Raises:
        SchemeError: a pattern that no tensor has, or tensors that none is for.
    """
    from streammap.planning import maps

    found: dict[str, dict[str, AxisMap]] = {}
    for depth, table in learned.families.items():
        left = set(table)
        made = {part: maps.from_matrix(matrix) for part, matrix in table.items()}
        for family in model.families:
            if depth not in family.indices or family.rule.kind == "drop":
                continue
            keys = family.members.values()
            fitting = [p for p in table if any(_fits(p, key) for key in keys)]
            left -= set(fitting)
            if fitting:
                best = max(fitting, key=lambda part: (len(part), part))
                found.setdefault(family.name, {})[depth] = made[best]
            elif depth not in learned.layers:
                raise SchemeError(
                    f"{depth}.matrix: there is none, and no weights of layers for {family.name}",
                    hint=f"give {depth}.matrix for all tensors that have no weights of their own",
                )
        if left:
            name = f"{depth}.{min(left)}.matrix"
            raise SchemeError(
                f"{name}: no key of a layer has {min(left)!r}",
                hint="`streammap inspect` lists the keys",
            )
    return found


def _fits(pattern: str, key: str) -> bool:
    return fnmatchcase(key, pattern) if "*" in pattern else pattern in key


def _guarantees(
    source: "Plan", learned: "Learned", layers: "Mapping[str, AxisMap]"
) -> "dict[str, Guarantee]":
    """Axis -> what its maps keep, with the reason."""
    from streammap.planning import exactness
    from streammap.planning.learned import kept

    found = {axis: kept.guarantee(source, axis, pair) for axis, pair in learned.pairs.items()}
    for axis, of_layers in learned.by_layer.items():
        found |= exactness.of_layers(
            [
                (f"{depth} {number}", {axis: kept.guarantee(source, axis, pair)})
                for (depth, number), pair in of_layers.items()
            ]
        )
    for axis, m in layers.items():
        if axis in learned.families or not m.is_identity:
            found[axis] = "approximate", f"{axis}: layers are weighted sums of others"
            chosen = all(
                len(row) == 1 and row[0][1] == 1.0 for row in map(m.members, range(m.n_out))
            )
            if axis not in learned.families and chosen:
                found[axis] = exactness.of_depth(source.model, axis, m, grows=False, silent=None)
    return found
