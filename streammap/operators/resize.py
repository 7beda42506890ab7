"""Coalesce and decoalesce: merge units of any axis, and the way back.

One Level (a merging map F for each axis) serves both directions:

    coalesce     out = F (mean of a group),   into = sum of a group,        layers = R (mean)
    decoalesce   out = T (copy),              into = copy / size of group,  layers = G (copy)

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from streammap.architectures import axis_facts
from streammap.architectures.model import Model
from streammap.errors import PlanError
from streammap.planning import coupled_axes as spaces
from streammap.planning import exactness, maps, planner
from streammap.planning.axis_maps import KvMerge, ResizeRequest
from streammap.planning.compensation import compensate
from streammap.planning.head_dim import HeadSize
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.plan import Plan, Step
from streammap.planning.requests import AxisRequest, Grouping
from streammap.planning.scheme import Scheme
from streammap.planning.tensor_maps import AxisChange, Rule

Direction = Literal["coalesce", "decoalesce"]
NewLayers = Literal["copy", "zero"]
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
    levels: tuple[MapLevel, ...] | None = None
    """A map file's levels to choose from; None for those saved with the source."""
    target: Mapping[str, int] | None = None
    """Axis sizes that the result must have; parts whose sizes don't change are then left out."""
    rule: Rule = "exact"
    spaces: Mapping[str, AxisRequest] = field(default_factory=dict)
    """Space (hidden, heads, kv_heads, mlp, experts, layers) -> what becomes of it."""
    axes: Mapping[str, AxisRequest] = field(default_factory=dict)
    """Axis of the architecture spec -> what becomes of it."""
    head_dim: int | None = None
    """New size of a head, larger than before."""
    kv_merge: KvMerge = "mean"
    new_layers: NewLayers = "copy"
    """Whether layers that are copied run twice, or are silent at first."""
    untie: bool = False
    """Whether a tied head gets a tensor of its own."""

    def __post_init__(self) -> None:
        given = [n for n in ("width", "depth") if getattr(self, n) is not None]
        given += [*self.spaces, *self.axes]
        given = [f"--{name.replace('_', '-')}" for name in given]
        ways = [*(["a scheme"] if self.scheme else []), *given]
        if self.scheme is not None and given:
            raise PlanError(f"both a scheme and {given[0]}", hint="give one of the two")
        if self.levels is not None and ways:
            raise PlanError(f"both a map file and {ways[0]}", hint="give one of the two")
        for name in ("width", "depth"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise PlanError(f"--{name} is {getattr(self, name)}, expected 1 or more")
        if self.new_layers == "zero" and self.direction == "coalesce":
            raise PlanError("--new-layers zero with coalesce, which makes no new layers")
        if self.head_dim is not None and self.direction == "coalesce":
            raise PlanError(
                "--head-dim with coalesce: a head can't become smaller without a loss",
                hint="merge heads instead: --heads",
            )

    def plan(self, source: Plan) -> Plan:
        """The resized plan.

        Raises:
            SchemeError: groups that do not fit the model.
            PlanError: nothing to do, or a request that makes no sense.
        """
        model = source.model
        level, notes = self._level(source, model)
        return _apply(self, source, model, level, notes)

    def _level(self, source: Plan, model: Model) -> tuple[MapLevel, list[str]]:
        saved = source.levels if self.levels is None else self.levels
        explicit = (
            self.scheme is not None
            or self.width is not None
            or self.depth is not None
            or bool(self.spaces)
            or bool(self.axes)
            or self.head_dim is not None
            or self.untie
        )
        found = fitting(saved, model, self.direction, self.target)
        if explicit and self.levels is None:
            known = {} if found is None else {n: pair[0] for n, pair in found.sizes.items()}
            level, notes = self._from_requests(model, known)
            if found is not None and level.merging and found.digest != level.digest:
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
            return self._from_requests(model, {})
        raise PlanError(
            f"nothing says how to {self.direction}: no map is saved with the source",
            hint="give --scheme FILE, or --width K and --depth K, or a space such as --mlp K",
        )

    def _from_requests(self, model: Model, known: Mapping[str, int]) -> tuple[MapLevel, list[str]]:
        """Maps from requests; `known` are sizes of a large model that this one was made from."""
        notes: list[str] = []
        if self.scheme is not None and self.scheme.unused:
            notes.append(f"{', '.join(self.scheme.unused)}: accepted, and not used")
        width, requested = self._requests(model)
        known = known if self.scheme is not None else {}
        if self.target is not None:
            if width is None and not requested:
                requested = self._of_target(model)
            requested = {a: r for a, r in requested.items() if self._differs(model, a)}
            if width is not None and not self._differs(model, "heads"):
                width = None
        asked = ResizeRequest(
            requested, width, self.grouping, self.kv_merge, known, self.target or {}
        )
        merging, told = spaces.merging_maps(model, asked, grows=self.direction == "decoalesce")
        found: dict[str, AxisMap] = dict(merging)
        if self.scheme is not None and self.target is None and width is None and not requested:
            raise PlanError(
                "the scheme has neither a width_scheme nor a depth_scheme",
                hint="give one of them, or --width K, --depth K",
            )
        return MapLevel(found), [*notes, *told]

    def _differs(self, model: Model, axis: str) -> bool:
        assert self.target is not None
        own = model.sizes.get(axis)
        return self.target.get(axis, None) is None or self.target[axis] != own

    def _of_target(self, model: Model) -> dict[str, AxisRequest]:
        """The sizes of a target config.json, asked for axis by axis."""
        assert self.target is not None
        return {
            name: AxisRequest(size=self.target[name])
            for name, axis in model.architecture.axes.items()
            if axis.kind in ("width", "depth", "expert")
            and self.target.get(name)
            and name in model.sizes
        }

    def _requests(self, model: Model) -> tuple[AxisRequest | None, dict[str, AxisRequest]]:
        """The request on all widths, and those on single axes."""
        spec = model.architecture
        width = None if self.width is None else AxisRequest(factor=self.width)
        found: dict[str, AxisRequest] = {}
        by_space = dict(self.spaces)
        by_axis = dict(self.axes)
        if self.depth is not None:
            by_space["layers"] = AxisRequest(factor=self.depth)
        if self.scheme is not None:
            by_space |= self.scheme.spaces
            by_axis |= self.scheme.axes
            width = by_space.pop("width", None)
            if self.scheme.width is not None:
                width = AxisRequest(groups=self.scheme.width, where="width_scheme")
            if self.scheme.depth is not None:
                by_space["layers"] = AxisRequest(groups=self.scheme.depth, where="depth_scheme")
        for space, request in by_space.items():
            members = spec.depth_axes if space == "layers" else spec.spaces.get(space, ())
            there = [axis for axis in members if model.sizes.get(axis)]
            if not there:
                told = ", ".join(s for s in spec.spaces) or "none"
                raise PlanError(
                    f"{spec.name} has no {space.replace('_', ' ')}",
                    hint=f"its spaces are {told} and layers; `streammap inspect` lists its axes",
                )
            for axis in there:
                if len(there) == 1 or not axis_facts.must_follow(model, axis):
                    found[axis] = request
        for axis, request in by_axis.items():
            if not model.sizes.get(axis):
                raise PlanError(
                    f"{spec.name} has no axis {axis!r}",
                    hint=f"its axes are {', '.join(model.sizes)}",
                )
            found[axis] = request
        return width, found


def fitting(
    levels: tuple[MapLevel, ...],
    model: Model,
    direction: Direction,
    target: Mapping[str, int] | None,
) -> MapLevel | None:
    """The last level whose large (or small) side is this model."""
    side = 0 if direction == "coalesce" else 1
    for level in reversed(levels):
        fits = True
        for axis, pair in level.sizes.items():
            own = model.sizes.get(axis, _alias_size(model, axis))
            fits = fits and pair[side] == own
            if target is not None and axis in target:
                fits = fits and pair[1 - side] == target[axis]
        if fits:
            return level
    return None


def _alias_size(model: Model, name: str) -> int | None:
    alias = model.architecture.aliases.get(name)
    return None if alias is None else model.size(alias)


def _from_to(direction: Direction, model: Model) -> str:
    known = ("embed", "heads", *model.architecture.depth_axes)
    sizes = ", ".join(f"{n} {model.sizes[n]}" for n in known if n in model.sizes)
    return f"{'from' if direction == 'coalesce' else 'up from'} this size ({sizes})"


def _apply(op: Resize, source: Plan, model: Model, level: MapLevel, notes: list[str]) -> Plan:
    grows = op.direction == "decoalesce"
    spec = model.architecture
    chosen = {name: maps.growing(m) if grows else m for name, m in level.merging.items()}
    layers = {name: chosen.pop(name) for name in spec.depth_axes if name in chosen}
    head_size = None if op.head_dim is None else HeadSize.of(model, op.head_dim)
    found = compensate(model, chosen, grows=grows, filled=level.filled, rule=op.rule)
    if head_size is not None:
        found = head_size.added_to(found)
    pairs = {name: maps.pair_of(m) for name, m in chosen.items() if not m.is_identity}
    pairs |= found.pairs
    sizes = _sizes(model, chosen, layers)
    if head_size is not None:
        sizes[head_size.axis] = head_size.size
    for name, size in {**model.sizes, **sizes}.items():
        if op.target is not None and op.target.get(name, size) != size:
            raise PlanError(
                f"{name} would be {size}, the target says {op.target[name]}",
                hint="is the target config.json of the same family, in proportion?",
            )
    if grows and op.rule == "exact":
        _check_even(model, chosen)
    silent = _silent(op, model, layers)
    if op.untie and not model.tied:
        raise PlanError(
            "--untie, but no head is tied to the embedding",
            hint="leave it out: the head has a tensor of its own",
        )
    _check_tied(op, model, chosen)
    by_axis = exactness.of_axes(
        model, chosen, layers, grows=grows, silent=silent, fills=found, head_size=head_size
    )
    reference = REFERENCE_FACTORS[op.direction] if op.rule == "reference" else None
    promise, reason = exactness.of_all(model, by_axis, reference=reference, untie=op.untie)
    options = _options(op, model, chosen, layers)
    step = Step(op.direction, options, promise, reason, (*notes, *found.notes), by_axis)
    change = AxisChange(
        pairs,
        layers,
        sizes,
        op.rule,
        REFERENCE_FACTORS[op.direction],
        found.fills,
        silent,
        found.factors,
        found.fields,
        op.untie,
    )
    kept = replace(level, filled=frozenset(found.fills) or level.filled)
    if silent:
        # On the way back silent layers are left out, not averaged in.
        spoken = {axis: _spoken(kept.merging[axis], quiet) for axis, quiet in silent.items()}
        kept = replace(kept, merging={**kept.merging, **spoken})
    known = {one.digest for one in source.levels}
    levels = source.levels
    if level.merging and kept.digest not in known:
        levels = (*levels, kept)
    return planner.remap(source, change, step, levels=levels)


def _sizes(
    model: Model, chosen: Mapping[str, AxisMap], layers: Mapping[str, AxisMap]
) -> dict[str, int]:
    """Axis -> new size, for each that changes; groups of query heads and heads of old maps too."""
    sizes = {name: m.n_out for name, m in chosen.items() if name in model.sizes}
    sizes |= {name: m.n_out for name, m in layers.items()}
    if "embed" in sizes and "heads" not in sizes and ("qk" in chosen or "v" in chosen):
        # A map file of the original tools has no map of heads: they go with the hidden size.
        sizes["heads"] = model.sizes["heads"] * sizes["embed"] // model.sizes["embed"]
    after = {**model.sizes, **sizes}
    for shared in model.architecture.shared_heads:
        if shared.group in after:
            sizes[shared.group] = after[shared.heads] // after[shared.kv]
    return {name: size for name, size in sizes.items() if size != model.sizes[name]}


def _silent(op: Resize, model: Model, layers: Mapping[str, AxisMap]) -> dict[str, frozenset[int]]:
    """Depth axis -> layers of the result that are to write nothing."""
    if op.new_layers == "copy":
        return {}
    if not layers:
        raise PlanError("--new-layers zero, but no layers are added", hint="give --layers K")
    post = next(
        (f for f in model.families if f.rule.norm is not None and f.rule.norm.is_post), None
    )
    if post is not None:
        raise PlanError(
            f"{post.name} stands after the residual addition (post-LN): a silent layer "
            "still normalises, so it is not exact there",
            hint="leave --new-layers zero out: layers are copied then",
        )
    found = {}
    for axis, m in layers.items():
        seen: list[int] = []
        quiet = set()
        for i in range(m.n_out):
            (j, _), *_ = m.members(i) or ((0, 0.0),)
            if j in seen:
                quiet.add(i)
            else:
                seen.append(j)
        if seen != sorted(seen) or len(seen) != m.n_in:
            raise PlanError(
                f"{axis}: the first copies of the layers are not in their old order ({seen})",
                hint="give groups that keep it, or leave --new-layers zero out",
            )
        found[axis] = frozenset(quiet)
    return found


def _spoken(m: AxisMap, quiet: frozenset[int]) -> AxisMap:
    """A merging map of layers in which silent ones count nothing."""
    rows = tuple(
        tuple((j, 0.0 if j in quiet else 1.0) for j, _ in m.members(i)) for i in range(m.n_out)
    )
    return BlockMap(rows, m.n_in)


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


def _check_tied(op: Resize, model: Model, chosen: Mapping[str, AxisMap]) -> None:
    """A tied head without a norm before it can't be compensated."""
    hidden = model.architecture.spaces.get("hidden", ())
    if op.untie and not all(tied.head.head for tied in model.tied_heads):
        raise PlanError(
            f"{model.architecture.name}: --untie, but this head has no tensor of its own",
            hint="leave --untie out: the norm before the head is compensated",
        )
    if op.rule == "reference" or op.untie or not any(axis in chosen for axis in hidden):
        return
    for tied in model.tied_heads:
        if not tied.norm:
            raise PlanError(
                f"{model.architecture.name}: the head is tied to the embedding, and no norm with "
                "weights stands before it that could be compensated",
                hint="give --untie: the head gets a tensor of its own",
            )


def _options(
    op: Resize, model: Model, chosen: Mapping[str, AxisMap], layers: Mapping[str, AxisMap]
) -> dict[str, object]:
    """What was done, for the provenance file."""
    made = {name: [m.n_in, m.n_out, m.describe()] for name, m in {**chosen, **layers}.items()}
    found: dict[str, object] = {
        "architecture": model.architecture.name,
        "rule": op.rule,
        "maps": made,
    }
    defaults = {"head_dim": None, "kv_merge": "mean", "new_layers": "copy", "untie": False}
    return found | {k: getattr(op, k) for k, v in defaults.items() if getattr(op, k) != v}
