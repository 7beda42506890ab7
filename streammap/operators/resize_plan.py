"""Coalesce and decoalesce: the maps of a request, and the plan of these maps.

One MapLevel (a merging map F for each axis) serves both directions:

    coalesce     out = F (mean of a group),   into = sum of a group,        layers = R (mean)
    decoalesce   out = T (copy),              into = copy / size of group,  layers = G (copy)

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast, final

from streammap.architectures import axis_facts, axis_words
from streammap.architectures.model import Model
from streammap.errors import PlanError, SchemeError
from streammap.operators import map_lookup, resize_parts
from streammap.operators.resize_options import Resize
from streammap.operators.resize_parts import Copies, Part
from streammap.planning import exactness, maps, planner, requests
from streammap.planning.axis_maps import ResizeRequest
from streammap.planning.by_layer import asked
from streammap.planning.depth import fate
from streammap.planning.experts import TopK
from streammap.planning.head_dim import HeadSize
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.plan import Plan, Step
from streammap.planning.requests import GROUPINGS, AxisRequest
from streammap.planning.tensor_maps.axis_change import AxisChange

NewLayers = Literal["copy", "zero"]
_SHRINK_FACTOR, _GROW_FACTOR = 2.0, 0.5
"""On embeddings, by the reference rule."""


def plan(
    op: Resize,
    source: Plan,
    target: Mapping[str, int] | None,
    *,
    grows: bool,
    head_dim: int | None = None,
    new_layers: NewLayers | None = None,
    blends: bool = False,
    copies: Copies = Copies(),  # noqa: B008 (a value that never changes)
) -> Plan:
    """The resized plan.

    Args:
        target: Axis sizes that the result must have; axes whose size stays are left alone then.
        grows: Whether groups are copied (decoalesce) or merged (coalesce).
        head_dim: New size of a head, larger than before.
        new_layers: Whether added layers are copies, which run twice, or zero-initialised; None for
            what a recipe says, else copies.
        blends: Whether the result is blended with the target, unit by unit.
        copies: What tells them apart.

    Raises:
        SchemeError: groups that do not fit the model.
        PlanError: nothing to do, or a request that makes no sense.
    """
    usual: NewLayers = "zero" if op.adds_zero_layers else "copy"
    new = new_layers or usual
    task = _Task(op, source, source.model, target, grows, head_dim, new, blends, copies)
    level, notes = task.level()
    return task.apply(level, notes)


@final
@dataclass(frozen=True, slots=True)
class _Task:
    """A request and the model that it is for."""

    op: Resize
    source: Plan
    model: Model
    target: Mapping[str, int] | None
    grows: bool
    head_dim: int | None
    new_layers: NewLayers
    blends: bool
    copies: Copies

    def level(self) -> tuple[MapLevel, list[str]]:
        """The maps to use, and notes on where they come from.

        A request wins over the map saved with the source; what a map file holds wins over both.
        """
        op, model = self.op, self.model
        saved = self.source.levels if op.levels is None else op.levels
        only_unties = op.untie and self.target is None
        explicit = op.is_explicit or self.head_dim is not None or only_unties
        fitting = map_lookup.fitting_level(saved, model, self.target, grows=self.grows)
        if explicit and op.levels is None:
            known = {} if fitting is None else {n: pair[0] for n, pair in fitting.sizes.items()}
            level, notes = self._unguessed_level(known)
            if fitting is not None and level.named and fitting.digest != level.digest:
                notes.append("the map saved with the source is another one; it is not used")
            return level, notes
        if fitting is not None:
            given = fitting.where or "the request"
            of = "saved with the source" if op.levels is None else f"of {given}"
            return fitting, [f"the map {of} is used"]
        if op.levels is not None:
            raise PlanError(
                f"the map file has {len(saved)} maps, none {self._from_to()}",
                hint="give the map that was saved when this model was made",
            )
        if self.target is not None:
            return self._unguessed_level({})
        sizes = "--width K and --depth K, or one axis such as --mlp K, or --scheme FILE"
        if not self.grows:
            raise PlanError("no target size given", hint=f"give {sizes}")
        looked, near = map_lookup.told(self.source, self.target)
        raise PlanError(
            f"no target size given, and no map to grow by: looked in {looked}",
            hint=f"give {near}, or {sizes}",
        )

    def _unguessed_level(self, known: Mapping[str, int]) -> tuple[MapLevel, list[str]]:
        """Maps from requests, if these say all; which units were merged is not to be guessed.

        Raises:
            PlanError: a blend with the model that this one is taken to be made from, by one of
                several maps.
        """
        level, notes = self._requested_level(known)
        if not self.grows or self.target is None or self.op.grouping is not None:
            return level, notes
        ways = [replace(self.op, grouping=grouping) for grouping in GROUPINGS]
        made = {replace(self, op=op)._requested_level(known)[0].digest for op in ways}
        if len(made) == 1:
            return level, notes
        looked, near = map_lookup.told(self.source, self.target)
        if self.blends:
            raise PlanError(
                "nothing says which units of the large model each unit stands for: no map in "
                f"{looked}",
                hint=f"give {near}, or how it was made: --scheme FILE, --grouping stacked or "
                "--grouping adjacent",
            )
        guess = (
            f"no map in {looked}: the usual groups are taken; if the source was made from a larger "
            f"model, give {near}, or --grouping"
        )
        return level, [*notes, guess]

    def _requested_level(self, known: Mapping[str, int]) -> tuple[MapLevel, list[str]]:
        """Maps from requests; `known` are sizes of a large model that this one was made from."""
        op, model, groups = self.op, self.model, self.op.groups
        notes: list[str] = []
        if groups is not None and groups.unused:
            notes.append(f"{', '.join(groups.unused)}: accepted, and not used")
        if groups is not None and groups.copies and not self.grows:
            notes.append(f"{', '.join(groups.copies)} of the scheme: for growing alone, not used")
        width, requested = self._requests()
        sliced = {axis for axis, request in requested.items() if request.taken is not None}
        known = {axis: n for axis, n in known.items() if groups and axis not in sliced}
        if self.target is not None:
            if width is None and not requested:
                requested = self._target_requests()
            requested = {a: r for a, r in requested.items() if self._differs(a)}
            if width is not None and not self._differs("heads"):
                width = None
        request = ResizeRequest(
            requested,
            width,
            next((grouping for grouping in GROUPINGS if grouping == op.grouping), None),
            op.kv_merge,
            known,
            self.target or {},
        )
        level, more_notes = asked.merging_level(model, request, grows=self.grows)
        if groups is not None and self.target is None and width is None and not requested:
            raise PlanError(
                "the scheme has neither a width_scheme nor a depth_scheme",
                hint="give one of them, or --width K, --depth K",
            )
        return level, [*notes, *more_notes]

    def _differs(self, axis: str) -> bool:
        assert self.target is not None
        own = self.model.sizes.get(axis)
        return self.target.get(axis, None) is None or self.target[axis] != own

    def _target_requests(self) -> dict[str, AxisRequest]:
        """The sizes of a target config.json, asked for axis by axis."""
        assert self.target is not None
        return {
            name: AxisRequest(size=self.target[name])
            for name, axis in self.model.architecture.axes.items()
            if axis.kind in ("width", "depth", "expert")
            and self.target.get(name)
            and name in self.model.sizes
        }

    def _requests(self) -> tuple[AxisRequest | None, dict[str, AxisRequest]]:
        """The request on all widths, and those on single axes."""
        op, groups = self.op, self.op.groups
        width = op.widths
        by_name, by_axis = dict(op.by_name), dict(op.by_axis)
        if groups is not None:
            by_name |= groups.spaces
            by_axis |= groups.axes
            width = by_name.pop("width", None)
            if groups.width is not None:
                width = AxisRequest(groups=groups.width, where="width_scheme")
            if groups.depth is not None:
                by_name["layers"] = AxisRequest(groups=groups.depth, where="depth_scheme")
        by_own: dict[str, AxisRequest] = {}
        for name, request in by_name.items():
            axes = self._axes_of(name)
            # Of several axes that a name stands for, those that follow another one do so.
            alone = [axis for axis in axes if not axis_facts.must_follow(self.model, axis)]
            chosen = axes if len(axes) == 1 else alone
            self._check_one_size(name, request, [axis for axis in chosen if axis not in by_axis])
            by_own |= dict.fromkeys(chosen, request)
        spec = self.model.architecture
        for name, request in by_axis.items():
            axis = axis_words.axis_named(spec, name)
            if not self.model.sizes.get(axis):
                known = ", ".join(axis_words.shown(spec, own) for own in self.model.sizes)
                raise PlanError(
                    f"{self.model.name} has no axis {name!r}", hint=f"its axes are {known}"
                )
            by_own[axis] = request
        self._check_bare(width, by_own)
        if width is not None and width.taken is not None:
            raise SchemeError(
                f"{width.where} {width.taken.text}: no slices of all widths together",
                hint="give them for heads, hidden, mlp or experts",
            )
        return width, {axis: self._settled(axis, request) for axis, request in by_own.items()}

    def _settled(self, axis: str, request: AxisRequest) -> AxisRequest:
        """A request by slices as groups."""
        spec = self.model.architecture
        units = axis_words.units_of(spec, axis)
        inner = (request, *(one for _, one in request.layers or ()))
        recipe = next((one.taken for one in inner if one.taken and one.taken.recipe), None)
        if recipe is not None and spec.axes[axis].kind != "depth":
            raise SchemeError(
                f"{request.where}: {recipe.text} is a recipe for layers, not for {units}",
                hint="give a factor, a size, groups or slices",
            )
        return requests.settled(request, self.model.sizes[axis], units, grows=self.grows)

    def _check_bare(self, width: AxisRequest | None, by_axis: Mapping[str, AxisRequest]) -> None:
        """Refuse numbers that may have been meant as sizes."""
        spec, sizes = self.model.architecture, self.model.sizes
        hidden = [axis for axis in spec.spaces.get("hidden", ()) if sizes.get(axis)]
        # --width and --depth take factors alone; sizes are asked for axis by axis.
        if width is not None and hidden:
            units, most = axis_words.units_of(spec, hidden[0]), requests.MAX_BARE_WIDTH
            own, by, grows = sizes[hidden[0]], "--hidden to:", self.grows
            requests.check_bare(width, own, units, grows=grows, size=by, most=most)
        for axis, request in by_axis.items():
            by = "--layers to:" if request.where == "--depth" else "to:"
            units = axis_words.units_of(spec, axis)
            for one in (request, *(inner for _, inner in request.layers or ())):
                requests.check_bare(one, sizes[axis], units, grows=self.grows, size=by)

    def _check_one_size(self, name: str, request: AxisRequest, axes: Sequence[str]) -> None:
        """Refuse one size, or one list of groups, for towers that are not of one size.

        Raises:
            PlanError: naming their axes, and how to ask for one of them.
        """
        sizes = {axis: self.model.sizes[axis] for axis in axes}
        n_towers = len({axis.rpartition(".")[0] for axis in axes})
        scales = request.factor is not None or (request.taken is not None and request.taken.recipe)
        if scales or n_towers < 2 or len(set(sizes.values())) < 2:
            return
        flag, first = f"--{name.replace('_', '-')}", axes[0]
        what = "groups" if request.size is None else f"={request.size}"
        what = what if request.taken is None else request.taken.text
        each = ", ".join(f"{axis} is {size}" for axis, size in sizes.items())
        raise PlanError(
            f"{flag} {what}: the model's towers differ in it: {each}",
            hint=f"say which one: --axis {first}={what}, or one --axis for each of them",
        )

    def _axes_of(self, name: str) -> list[str]:
        """The axes of the model that an option such as --mlp is about."""
        spec = self.model.architecture
        members = spec.depth_axes if name == "layers" else spec.spaces.get(name, ())
        axes = [axis for axis in members if self.model.sizes.get(axis)]
        if not axes:
            known = ", ".join(spec.spaces) or "none"
            raise PlanError(
                f"{self.model.name} has no {name.replace('_', ' ')}",
                hint=f"it has {known} and layers; `streammap inspect` lists its axes",
            )
        return axes

    def _from_to(self) -> str:
        model = self.model
        known = ("embed", "heads", *model.architecture.depth_axes)
        sizes = ", ".join(f"{n} {model.sizes[n]}" for n in known if n in model.sizes)
        return f"{'up from' if self.grows else 'from'} this size ({sizes})"

    def apply(self, level: MapLevel, notes: list[str]) -> Plan:
        """The plan with these maps."""
        op, model, source = self.op, self.model, self.source
        chosen = {n: maps.growing(m) if self.grows else m for n, m in level.merging.items()}
        layers = {n: chosen.pop(n) for n in model.architecture.depth_axes if n in chosen}
        head_size = self._head_size(level, chosen)
        top_k = self._top_k({*chosen, *level.by_layer})
        everywhere = {axis: level.merging[axis] for axis in chosen}
        whole, *parts = resize_parts.made(
            model,
            level,
            everywhere,
            grows=self.grows,
            rule=op.rule,
            top_k=top_k,
            split=self.copies.split,
        )
        compensation = whole.compensation
        if head_size is not None:
            compensation = head_size.added_to(compensation)
            notes += head_size.notes
        pairs = {**whole.pairs, **compensation.pairs}
        fields = {**resize_parts.fields(model, (whole, *parts)), **compensation.fields}
        every = {axis: m for part in (whole, *parts) for axis, m in part.chosen.items()}
        sizes = sizes_after(model, every, layers)
        if head_size is not None:
            sizes[head_size.axis] = head_size.size
        self._check_target(sizes)
        zeroed = self._zeroed(layers)
        self._check_tied(chosen)
        by_axis = exactness.of_axes(
            model,
            chosen,
            layers,
            grows=self.grows,
            silent=zeroed,
            fills=compensation,
            head_size=head_size,
        )
        by_axis |= resize_parts.guarantees(model, parts, grows=self.grows)
        factor = _GROW_FACTOR if self.grows else _SHRINK_FACTOR
        reference = factor if op.rule == "reference" else None
        promise, reason = exactness.of_all(model, by_axis, reference=reference, untie=op.untie)
        options = self._options({**every, **layers}, parts)
        notes += resize_parts.notes(model, whole, parts)
        twins = resize_parts.twins(model, (whole, *parts)) if self.grows else {}
        apart = resize_parts.apart(model, (whole, *parts), self.copies, twins, fields)
        if self.grows and not self.blends and not zeroed:
            notes += fate.advice(model, [fate.of_map(m) for m in layers.values()])
        left = tuple(dict.fromkeys(twins.values())) if apart.noise is None else ()
        step = Step(op.name, options, promise, reason, tuple(notes), by_axis, left)
        change = AxisChange(
            pairs,
            layers,
            sizes,
            op.rule,
            factor,
            compensation.fills,
            zeroed,
            compensation.factors,
            fields,
            op.untie,
            {layer: part.change for part in parts for layer in part.layers},
            apart=apart,
        )
        filled = frozenset(axis for part in (whole, *parts) for axis in part.compensation.fills)
        kept = replace(level, filled=filled or level.filled)
        if head_size is not None and self.head_dim is not None:
            kept = replace(kept, merging={**kept.merging, head_size.axis: head_size.merging})
        if zeroed:
            # On the way back zero-initialised layers are left out, not averaged in.
            without = {axis: _without(kept.merging[axis], new) for axis, new in zeroed.items()}
            kept = replace(kept, merging={**kept.merging, **without})
        levels = source.levels
        if kept.named and kept.digest not in {one.digest for one in source.levels}:
            levels = (*levels, kept)
        result = planner.remap(source, change, step, levels=levels)
        rounded = None if promise == "approximate" else exactness.rounding(result.targets)
        if rounded is None:
            return result
        *before, last = result.steps
        last = replace(last, notes=(*last.notes, rounded))
        return replace(result, steps=(*before, last))

    def _head_size(self, level: MapLevel, chosen: dict[str, AxisMap]) -> HeadSize | None:
        """The change of the head size; its map is taken out of `chosen`."""
        if self.head_dim is not None:
            return HeadSize.grown(self.model, self.head_dim)
        axis = next((axis for axis in self.model.architecture.rope if axis in level.merging), None)
        m = None if axis is None else chosen.pop(axis)
        return HeadSize.mapped(self.model, m) if isinstance(m, BlockMap) else None

    def _top_k(self, chosen: Collection[str]) -> TopK | None:
        """What is asked of the number of experts that a token takes."""
        top_k = cast("TopK | None", self.op.top_k)
        spec = self.model.architecture
        if top_k is not None and not any(axis_facts.is_expert(spec, n) for n in chosen):
            raise PlanError(
                "--top-k, but the number of experts does not change",
                hint="give --experts too, or leave it out",
            )
        return top_k

    def _check_target(self, sizes: Mapping[str, int]) -> None:
        """Refuse sizes that are not the target's."""
        for name, size in {**self.model.sizes, **sizes}.items():
            if self.target is not None and self.target.get(name, size) != size:
                raise PlanError(
                    f"{axis_words.shown(self.model.architecture, name)} would be {size}, the "
                    f"target says {self.target[name]}",
                    hint="is the target config.json of the same family, in proportion?",
                )

    def _zeroed(self, layers: Mapping[str, AxisMap]) -> dict[str, frozenset[int]]:
        """Depth axis -> layers of the result that are zero-initialised."""
        if self.new_layers == "copy":
            return {}
        if not layers:
            raise PlanError("--new-layers zero, but no layers are added", hint="give --layers K")
        return {axis: fate.zeroed(self.model, axis, fate.of_map(m)) for axis, m in layers.items()}

    def _check_tied(self, chosen: Mapping[str, AxisMap]) -> None:
        """A tied head without a norm before it can't be compensated."""
        op, model = self.op, self.model
        if op.untie and not model.tied:
            raise PlanError(
                "--untie, but no head is tied to the embedding",
                hint="leave it out: the head has a tensor of its own",
            )
        hidden = model.architecture.spaces.get("hidden", ())
        if op.untie:
            planner.check_untie(model)
        if op.rule == "reference" or op.untie or not any(axis in chosen for axis in hidden):
            return
        for tied in model.tied_heads:
            if not tied.norm:
                raise PlanError(
                    f"{model.name}: the head is tied to the embedding, and no norm "
                    "with weights stands before it that could be compensated",
                    hint="give --untie: the head gets a tensor of its own",
                )

    def _options(self, made: Mapping[str, AxisMap], parts: Sequence[Part]) -> dict[str, object]:
        """What was done, for the record."""
        by_layer = {axis for part in parts for axis in part.chosen}
        options: dict[str, object] = {
            "architecture": self.model.architecture.name,
            "rule": self.op.rule,
            "maps": {
                name: [
                    m.n_in,
                    m.n_out,
                    resize_parts.differing(name, parts) if name in by_layer else m.describe(),
                ]
                for name, m in made.items()
            },
        }
        rare = {
            "head_dim": (self.head_dim, None),
            "kv_merge": (self.op.kv_merge, "mean"),
            "noise": (self.copies.decibels, None),
            "seed": (self.copies.seed, 0),
            "split": (self.copies.split and self.copies.split.as_json(), None),
            "new_layers": (self.new_layers, "copy"),
            "top_k": (self.op.top_k, None),
            "untie": (self.op.untie, False),
        }
        return options | {name: value for name, (value, usual) in rare.items() if value != usual}


def sizes_after(
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


def _without(m: AxisMap, new: frozenset[int]) -> AxisMap:
    """A merging map of layers in which some count nothing."""
    rows = tuple(
        tuple((j, 0.0 if j in new else 1.0) for j, _ in m.members(i)) for i in range(m.n_out)
    )
    return BlockMap(rows, m.n_in)
