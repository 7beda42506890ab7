"""Coalesce and decoalesce: merge heads and layers, and the way back.

One Level (merging maps F of each width axis, R of the layers) serves both directions:

    coalesce     out = F (mean of a group),   into = sum of a group,        layers = R (mean)
    decoalesce   out = T (copy),              into = copy / size of group,  layers = G (copy)

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from streammap import maps, planner, scheme
from streammap.errors import PlanError, SchemeError, some
from streammap.mapfile import Level
from streammap.maps import AxisMap, BlockMap
from streammap.model import Model
from streammap.plan import Plan, Promise, Step
from streammap.planner import Change, Rule
from streammap.scheme import Grouping, Groups, Scheme

Direction = Literal["coalesce", "decoalesce"]
REFERENCE_FACTORS: dict[Direction, float] = {"coalesce": 2.0, "decoalesce": 0.5}


@dataclass(frozen=True, slots=True)
class Resize:
    """What to merge, or to grow back."""

    direction: Direction
    scheme: Scheme | None = None
    """Groups of heads and layers; None takes factors, or the map saved with the source."""
    width: int | None = None
    """Factor on every width."""
    depth: int | None = None
    """Factor on the layers."""
    grouping: Grouping = "stacked"
    levels: tuple[Level, ...] | None = None
    """A map file's levels to choose from; None for those saved with the source."""
    target: Mapping[str, int] | None = None
    """Axis sizes that the result must have; parts whose sizes don't change are then left out."""
    rule: Rule = "exact"

    def __post_init__(self) -> None:
        given = [n for n in ("width", "depth") if getattr(self, n) is not None]
        ways = [*(["a scheme"] if self.scheme else []), *(f"--{name}" for name in given)]
        if self.scheme is not None and given:
            raise PlanError(f"both a scheme and --{given[0]}", hint="give one of the two")
        if self.levels is not None and ways:
            raise PlanError(f"both a map file and {ways[0]}", hint="give one of the two")
        for name in given:
            if getattr(self, name) < 1:
                raise PlanError(f"--{name} is {getattr(self, name)}, expected 1 or more")

    def plan(self, source: Plan) -> Plan:
        """The resized plan.

        Raises:
            SchemeError: a scheme that does not fit the model.
            PlanError: nothing to do, or a request that makes no sense.
        """
        model = source.model
        level, notes = self._level(source, model)
        return _apply(self, source, model, level, notes)

    def _level(self, source: Plan, model: Model) -> tuple[Level, list[str]]:
        saved = source.levels if self.levels is None else self.levels
        explicit = self.scheme is not None or self.width is not None or self.depth is not None
        found = fitting(saved, model, self.direction, self.target)
        if explicit and self.levels is None:
            known = {} if found is None else {n: pair[0] for n, pair in found.sizes.items()}
            level, notes = self._from_groups(model, known)
            if found is not None and found.digest != level.digest:
                notes.append("the map saved with the source is another one; it is not used")
            return level, notes
        if found is not None:
            return found, ["the map saved with the source is used"]
        if self.levels is not None:
            raise PlanError(
                f"the map file has {len(saved)} maps, none {_from_to(self.direction, model)}",
                hint="give the map that was saved when this model was made",
            )
        if self.target is not None:
            return self._from_target(model)
        raise PlanError(
            f"nothing says how to {self.direction}: no map is saved with the source",
            hint="give --scheme FILE, or --width K and --depth K",
        )

    def _from_target(self, model: Model) -> tuple[Level, list[str]]:
        """Factors from the ratio of the sizes."""
        assert self.target is not None
        depth_axis = model.architecture.depth_axis
        factors = {}
        for what, axis in (("width", "heads"), ("depth", depth_axis)):
            large, small = self._ordered(model.sizes[axis], self.target.get(axis))
            if large % small:
                raise PlanError(f"{axis}: {large} is no multiple of {small}", hint="give a scheme")
            factors[what] = large // small
        return replace(self, width=factors["width"], depth=factors["depth"])._from_groups(model)

    def _ordered(self, own: int, other: int | None) -> tuple[int, int]:
        """(large, small) of the source's size and the result's."""
        wanted = own if other is None else other
        large, small = (own, wanted) if self.direction == "coalesce" else (wanted, own)
        if large < small:
            raise PlanError(
                f"can't {self.direction} from {own} to {wanted}",
                hint="coalesce makes a model smaller, decoalesce larger",
            )
        return large, small

    def _from_groups(
        self, model: Model, known: Mapping[str, int] | None = None
    ) -> tuple[Level, list[str]]:
        """Maps from groups; `known` are sizes of a large model that this one was made from."""
        depth_axis = model.architecture.depth_axis
        notes: list[str] = []
        if self.scheme is not None and self.scheme.unused:
            notes.append(f"{', '.join(self.scheme.unused)}: accepted, and not used")
        known = known if known is not None and self.scheme is not None else {}
        width = self._groups(
            model, "heads", "heads", "width_scheme", notes, n_known=known.get("heads", 0)
        )
        depth = self._groups(
            model, depth_axis, "layers", "depth_scheme", notes, n_known=known.get("layer", 0)
        )
        merging: dict[str, AxisMap] = {}
        if width is not None:
            merging.update(self._width_maps(model, *width))
        if depth is not None:
            merging["layer"] = maps.merging(*depth)
        if not merging and self.target is None:
            raise PlanError(
                "the scheme has neither a width_scheme nor a depth_scheme",
                hint="give one of them, or --width K, --depth K",
            )
        return Level(merging), notes

    def _groups(
        self, model: Model, axis: str, what: str, entry: str, notes: list[str], *, n_known: int
    ) -> tuple[Groups, int] | None:
        """The groups of one axis and the large model's size there; None where it stays."""
        own = model.sizes[axis]
        wanted = None if self.target is None else self.target.get(axis)
        if wanted == own:
            return None
        groups = None
        if self.scheme is not None:
            groups = self.scheme.width if axis == "heads" else self.scheme.depth
        else:
            factor = self.width if axis == "heads" else self.depth
            if factor is not None and factor > 1:
                n_large = own if self.direction == "coalesce" else own * factor
                groups = scheme.uniform(n_large, factor, self.grouping, what=what)
        if groups is None:
            if wanted is not None:
                raise PlanError(
                    f"{what}: source {own}, target {wanted}, and no {entry} says how",
                    hint=f"give a scheme with a {entry}",
                )
            return None
        n_large = self._check_groups(groups, own, wanted, what, entry, notes, n_known=n_known)
        return groups, n_large

    def _check_groups(
        self,
        groups: Groups,
        own: int,
        wanted: int | None,
        what: str,
        entry: str,
        notes: list[str],
        *,
        n_known: int,
    ) -> int:
        shrinks = self.direction == "coalesce"
        n_small = wanted if shrinks else own
        if n_small is not None and len(groups) != n_small:
            raise SchemeError(
                f"{entry}: {len(groups)} groups, the small model has {n_small} {what}",
                hint="write the scheme for this pair of models; `streammap scheme` prints one",
            )
        n_large = own if shrinks else wanted
        if n_large is None:
            n_large = max(n_known, 1 + max(member for group in groups for member in group))
        scheme.check_range(groups, n_large, where=entry, what=what)
        left = scheme.uncovered(groups, n_large)
        if left:
            fate = "dropped" if shrinks else "zeros in the result"
            notes.append(f"{what} {some(left)} of {n_large}: in no group, {fate}")
        twice = scheme.overlapping(groups)
        if twice:
            notes.append(f"{what} {some(twice)}: in more than one group")
        return n_large

    def _width_maps(self, model: Model, groups: Groups, n_large: int) -> dict[str, BlockMap]:
        """One map for each width axis: a group of heads is a group of equal parts of any width."""
        own = model.sizes["heads"]
        found = {}
        for name, axis in model.architecture.axes.items():
            if axis.kind != "width" or name not in model.sizes:
                continue
            size = model.sizes[name]
            if size % own:
                raise PlanError(
                    f"{name}: {size} does not divide into {own} parts, one for each head",
                    hint="this model's widths can't follow its heads",
                )
            found[name] = maps.merging(groups, n_large, block=size // own)
        return found


def fitting(
    levels: tuple[Level, ...],
    model: Model,
    direction: Direction,
    target: Mapping[str, int] | None,
) -> Level | None:
    """The last level whose large (or small) side is this model."""
    side = 0 if direction == "coalesce" else 1
    depth_axis = model.architecture.depth_axis
    for level in reversed(levels):
        fits = True
        for axis, pair in level.sizes.items():
            name = depth_axis if axis == "layer" else axis
            own = model.sizes.get(name, _alias_size(model, name))
            fits = fits and pair[side] == own
            if target is not None and name in target:
                fits = fits and pair[1 - side] == target[name]
        if fits:
            return level
    return None


def _alias_size(model: Model, name: str) -> int | None:
    alias = model.architecture.aliases.get(name)
    return None if alias is None else model.size(alias)


def _from_to(direction: Direction, model: Model) -> str:
    sizes = ", ".join(f"{n} {model.sizes[n]}" for n in ("embed", "heads", "layer"))
    return f"{'from' if direction == 'coalesce' else 'up from'} this size ({sizes})"


def _apply(op: Resize, source: Plan, model: Model, level: Level, notes: list[str]) -> Plan:
    grows = op.direction == "decoalesce"
    depth_axis = model.architecture.depth_axis
    chosen = {name: maps.growing(m) if grows else m for name, m in level.merging.items()}
    layers = chosen.pop("layer", None)
    pairs = {name: maps.pair_of(m) for name, m in chosen.items() if not m.is_identity}
    sizes = {name: m.n_out for name, m in chosen.items() if name in model.sizes}
    if layers is not None:
        sizes[depth_axis] = layers.n_out
    if "embed" in sizes and "heads" not in sizes:
        sizes["heads"] = model.sizes["heads"] * sizes["embed"] // model.sizes["embed"]
    changed = {name: size for name, size in sizes.items() if size != model.sizes[name]}
    for name, size in {**model.sizes, **changed}.items():
        if op.target is not None and op.target.get(name, size) != size:
            raise PlanError(
                f"{name} would be {size}, the target says {op.target[name]}",
                hint="is the target config.json of the same family, in proportion?",
            )
    promise, reason = _promise(op, model, chosen, layers)
    step = Step(op.direction, _options(op, model, chosen, layers), promise, reason, tuple(notes))
    factor = REFERENCE_FACTORS[op.direction]
    change = Change(pairs, layers, changed, op.rule, factor)
    result = planner.remap(source, change, step)
    digests = {known.digest for known in source.levels}
    levels = source.levels if level.digest in digests else (*source.levels, level)
    return replace(result, levels=levels if level.merging else source.levels)


def _options(
    op: Resize, model: Model, chosen: Mapping[str, AxisMap], layers: AxisMap | None
) -> dict[str, object]:
    """What was done, for the provenance file."""
    made = {name: [m.n_in, m.n_out, m.describe()] for name, m in chosen.items()}
    if layers is not None:
        made["layer"] = [layers.n_in, layers.n_out, layers.describe()]
    return {"architecture": model.architecture.name, "rule": op.rule, "maps": made}


def _promise(
    op: Resize, model: Model, chosen: Mapping[str, AxisMap], layers: AxisMap | None
) -> tuple[Promise, str]:
    """Whether the result computes what the source does, from the maps."""
    grows = op.direction == "decoalesce"
    if layers is not None and not layers.is_identity:
        if not grows:
            return "approximate", f"layers are merged ({layers.describe()})"
        return "approximate", "copied layers are run twice: depth growth by copying is not exact"
    if all(m.is_identity for m in chosen.values()):
        return "exact", "nothing is resized"
    has_embeddings = any(f.rule.kind == "embedding" for f in model.families)
    if op.rule == "reference" and has_embeddings:
        factor = REFERENCE_FACTORS[op.direction]
        return "approximate", f"the reference rule multiplies the embeddings by {factor:g}"
    for name, m in chosen.items():
        if isinstance(m, maps.DenseMap):
            return "approximate", f"{name} is mapped by a dense matrix"
        uses = _uses(m)
        if any(len(row) != 1 or row[0][1] != 1.0 for row in m.rows):
            what = "are merged" if not grows else "are in several groups or in none"
            return "approximate", f"units of {name} {what} ({m.describe()})"
        if len(uses) != 1:
            low, high = min(uses), max(uses)
            return "approximate", f"{name} is copied unevenly ({low} to {high} times)"
    tied = "; the tied head is folded into the norm before it" if model.tied else ""
    return "exact", f"each unit is copied as often as the others, its readers are split{tied}"


def _uses(m: BlockMap) -> set[int]:
    counts = [0] * m.n_in_blocks
    for row in m.rows:
        for j, _ in row:
            counts[j] += 1
    return set(counts)
