"""Align: put a model's units in the order that brings it beside another one.

Two models that were trained apart have alike neurons at unlike places: their mean is neither. Units
of one are permuted (and hidden units negated, where all norms allow it), which keeps its function,
so that its weights are as near to the other's as can be found.

Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836 (weight matching).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast, final

from streammap.common.kinds import Form, Kind, Whole, shown
from streammap.errors import PlanError
from streammap.operators.declare import (
    Apply,
    Input,
    Operator,
    PlanLike,
    argument,
    declared,
    option,
)
from streammap.operators.kinds import Maps, MapsLike
from streammap.planning import planner
from streammap.planning.by_layer import layered
from streammap.planning.maps import MapPair
from streammap.planning.plan import Plan, Step
from streammap.planning.tensor_maps.axis_change import AxisChange

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.planning.map_file import MapLevel
    from streammap.planning.ordering.search import OrderSearch

ALL = "all"
N_PASSES = 10
AlignLike = bool | str | Sequence[str] | None


@final
class Axes(Kind):
    """Axes to align: "mlp,heads", a list of them, or all that can be."""

    form: Form = "text"
    bare: str | None = ALL

    def parse(self, value: Any, name: str) -> tuple[str, ...]:
        """Their names; no name for all."""
        if value is True or value == ALL:
            return ()
        names = value.split(",") if isinstance(value, str) else value
        is_list = isinstance(names, list | tuple)
        if not is_list or not all(isinstance(one, str) and one.strip() for one in names):
            raise PlanError(
                f"{name} is {shown(value)}, expected axes", hint="give mlp,heads; or all"
            )
        return tuple(one.strip() for one in names)

    def encode(self, value: Any) -> object:
        """A list, or true."""
        return list(value) or True


@declared
class Align(Operator):
    """Put units in the order that brings a model beside another one; the function stays."""

    examples: ClassVar[tuple[str, ...]] = (
        "align maths/ code/ aligned/",
        "align maths/ code/ aligned/ --axes mlp,heads",
    )

    like: PlanLike = argument(
        help="The checkpoint whose order is taken; it has the same sizes.",
        kind=Input(),
        metavar="LIKE",
        kw_only=False,
    )
    axes: AlignLike = option(
        default=None,
        help="What to align: hidden, heads, mlp, experts, or other axes.  [default: all]",
        kind=Axes(),
        metavar="AXES",
    )
    signs: bool = option(
        default=True,
        help="Whether hidden units may be negated, where all norms allow it.",
        off="Negate no hidden units.",
    )
    passes: int = option(
        default=N_PASSES,
        help="Passes over both models at most.",
        kind=Whole(least=1),
        metavar="N",
    )
    map: MapsLike | None = option(
        default=None,
        help="Orders that were found before: a map file.",
        kind=Maps(),
        metavar="FILE",
        json="maps",
    )

    def plan(self, source: Plan, *, like: Plan) -> Plan:
        """The plan in the other's order; without maps, in one that stands for it.

        Raises:
            PlanError: two models, an axis that can't be aligned, maps that are no such orders.
        """
        search = self._search(source, like)
        levels = cast("tuple[MapLevel, ...] | None", self.map)
        if levels is not None and len(levels) != 1:
            raise PlanError(f"align: {len(levels)} maps, expected 1", hint="leave --map out")
        level = search.stand_in() if levels is None else levels[0]
        search.check(level)
        pairs = {axis: MapPair(m, m) for axis, m in level.merging.items()}
        by_layer = layered.change(source.model, level.by_layer)
        signed = any(one.signed for one in search.movables)
        change = AxisChange(pairs, {}, {}, "exact", 1.0, by_layer=by_layer, signed=signed)
        options: dict[str, object] = {"axes": sorted({a for m in search.movables for a in m.axes})}
        if levels is not None:
            options["map"] = level.digest
        reason = "units change places" + (" and signs" if signed else "")
        notes = () if levels is None else search.found(level)
        made = planner.remap(source, change, Step(self.name, options, "exact", reason, notes))
        return replace(made, sources=tuple(dict.fromkeys((*source.sources, *like.sources))))

    def search(self, source: Plan, *, like: Plan) -> "OrderSearch | None":
        """Orders, unless they are given."""
        return None if self.map is not None else self._search(source, like)

    def found(self, level: "MapLevel") -> "Align":
        """With the maps that were found."""
        return replace(self, map=(level,))

    def _search(self, source: Plan, like: Plan) -> "OrderSearch":
        from streammap.planning.ordering import search

        axes = cast("tuple[str, ...] | None", self.axes) or None
        return search.of_plans(source, like, axes, n_passes=self.passes, signs=self.signs)


def aligned(
    apply: Apply, axes: AlignLike, like: Plan, others: Mapping[str, Plan]
) -> dict[str, Plan]:
    """Plans in the order of one of them.

    Args:
        axes: What an operator was asked for by `--align`.
        others: By what messages call them.

    Raises:
        PlanError: a plan that can't be aligned, by its name.
    """
    made = {}
    for name, plan in others.items():
        try:
            made[name] = apply(Align(like=like, axes=axes), plan)
        except PlanError as error:
            raise PlanError(f"{name}: {error.message}", hint=error.hint) from error
    return made
