"""What has to be found before two models can be brought together: an order of units, by reading.

Orders are found one axis and layer after the other: units are compared by all that writes and reads
them, with what is in order already (weight matching). In the first pass only such tensors count
whose other axes are in order already, where there are any: so a permuted copy is found again,
whatever its layers are. Passes follow until none finds anything better.

Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from streammap.architectures import axis_words
from streammap.common.units import format_nbytes
from streammap.errors import PlanError
from streammap.planning.by_layer.shared_rows import SharedRows
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.ordering import assignment, stacks, units
from streammap.planning.ordering.assignment import Order
from streammap.planning.ordering.stacks import Labels, Stack
from streammap.planning.ordering.units import Movable
from streammap.planning.plan import Plan, Search

HELD = 2**22
"""Numbers of one model that are held while the other's are read."""
TILE = 2**20
"""Numbers of each that are read at once."""
_ITEM = 8
_TILES = 5
"""Tiles at once: what was read, the two models', and these with units side by side."""
LIBRARY_NBYTES = 72 * 2**20
"""scipy's modules and numpy, once they are used; measured, with room to spare."""


@final
@dataclass(frozen=True, eq=False)
class OrderSearch(Search):
    """Find orders of one model's units that bring them beside another's."""

    source: Plan
    """Whose units change places."""
    like: Plan
    movables: tuple[Movable, ...]
    n_passes: int
    """At most."""

    @cached_property
    def stacks(self) -> Mapping[Movable, tuple[Stack, ...]]:
        """What is put in order -> the tensors that have its units."""
        found = stacks.pair_up(self.source, self.like)
        return stacks.by_movable(found, self.movables)

    @cached_property
    def labels(self) -> Mapping[tuple[str, ...], Labels]:
        """Axes that are put in order together -> which unit each position belongs to."""
        firsts = {one.axes: one for one in reversed(self.movables)}
        return {axes: Labels(self.source.model, one) for axes, one in firsts.items()}

    @property
    def pass_nbytes(self) -> int:
        """Bytes that one pass reads."""
        return sum(
            self._read_nbytes(one, stack) for one, found in self.stacks.items() for stack in found
        )

    def _read_nbytes(self, movable: Movable, stack: Stack) -> int:
        """The first model's matrices once, the other's as often as there are blocks of those."""
        along_rows = any(unit >= 0 for unit in self.labels[movable.axes].of(stack.rows)[0])
        if not along_rows:
            return stack.nbytes
        n_blocks = -(-stack.n_rows * stack.n_columns // HELD)
        return stack.nbytes * (1 + n_blocks) // 2

    @property
    def similarity_nbytes(self) -> int:
        """Bytes of the largest similarities, of each unit with each other one."""
        return max((similarity_nbytes(one) for one in self.movables), default=0)

    @property
    def peak_nbytes(self) -> int:
        """Memory that the search takes, on top of what any run takes, at most."""
        sizes = [stack.n_elements for found in self.stacks.values() for stack in found]
        largest = max(sizes, default=0)
        wide = max(
            (
                (len(stack.sheets) if stack.outer else 1) * max(stack.n_columns, stack.n_rows)
                for found in self.stacks.values()
                for stack in found
            ),
            default=0,
        )
        tile = max(min(largest, TILE), wide)
        held = max(min(largest, HELD), wide)
        orders = sum(one.n for one in self.movables)
        each = _ITEM * (held + _TILES * tile)
        return LIBRARY_NBYTES + self.similarity_nbytes + each + 16 * orders

    @property
    def largest(self) -> str:
        """See Search."""
        n = max((one.n for one in self.movables), default=0)
        return f"similarities of {n} x {n} units"

    def told(self) -> tuple[str, ...]:
        """What it does and takes, for plans."""
        axes = dict.fromkeys(axis for one in self.movables for axis in one.axes)
        spec = self.source.model.architecture
        n = max((one.n for one in self.movables), default=0)
        names = " and ".join(dict.fromkeys(s.name for s in self.like.sources))
        signed = any(one.signed for one in self.movables)
        order = (
            f"align: {', '.join(axis_words.units_of(spec, axis) for axis in axes)} take the order "
            f"of {names}{'; hidden units may change their sign' if signed else ''}"
        )
        cost = (
            f"align: orders are searched before anything is written: 1 to {self.n_passes} passes, "
            f"each reads {format_nbytes(self.pass_nbytes)} at most; {n} x {n} similarities take "
            f"{format_nbytes(self.similarity_nbytes)}"
        )
        return (order, cost, *self._held())

    def _held(self) -> Iterator[str]:
        """Units that could be aligned, but for what the spec says of them."""
        model = self.source.model
        for axis, about in model.architecture.axes.items():
            why = units.held(model, axis)
            if why is not None and units.is_movable(model, about):
                name = axis_words.units_of(model.architecture, axis)
                yield f"align: {name} keep their order: {why}"

    def level(self, orders: Mapping[Movable, Order]) -> MapLevel:
        """Orders as maps."""
        rows = SharedRows()
        merging: dict[str, AxisMap] = {}
        by_layer: dict[str, dict[tuple[str, int], AxisMap]] = {}
        for one in self.movables:
            for axis, m in orders[one].maps(one, rows).items():
                if one.layer is None:
                    merging[axis] = m
                else:
                    by_layer.setdefault(axis, {})[one.layer] = m
        return MapLevel(merging, by_layer=by_layer)

    def stand_in(self) -> MapLevel:
        """Maps of the kind that will be found, for plans."""
        return self.level({one: assignment.backwards(one) for one in self.movables})

    def found(self, level: MapLevel) -> tuple[str, ...]:
        """What maps do, in words: how many units change places, and signs."""
        spec = self.source.model.architecture
        moved: dict[str, list[int]] = {}
        for one in self.movables:
            m = level.merging.get(one.axis)
            if one.layer is not None:
                m = level.by_layer[one.axis][one.layer]
            assert isinstance(m, BlockMap)
            rows = [m.members(i)[0] for i in range(m.n_out)]
            counts = moved.setdefault(one.axis, [0, 0, 0])
            counts[0] += sum(j != i for i, (j, _) in enumerate(rows))
            counts[1] += m.n_out
            counts[2] += sum(value < 0 for _, value in rows)
        told = (
            f"{n} of {of} {axis_words.units_of(spec, axis)}{f', {signs} negated' * bool(signs)}"
            for axis, (n, of, signs) in moved.items()
        )
        return (f"align: changed places: {'; '.join(told)}",)

    def check(self, level: MapLevel) -> None:
        """Refuse maps that are not of these orders.

        Raises:
            PlanError: naming the axis, and what is wrong with its map.
        """
        wanted = {axis for one in self.movables for axis in one.axes}
        given = level.merging.keys() | level.by_layer.keys()
        if wanted != given:
            odd = sorted(wanted ^ given)[0]
            what = "has no map" if odd in wanted else "has a map, but is not to be aligned"
            raise PlanError(f"align: {odd} {what}", hint="leave --map out: it is found again")
        for one in self.movables:
            self._check(level, one)

    def _check(self, level: MapLevel, movable: Movable) -> None:
        groups: list[AxisMap] = []
        for axis in movable.axes:
            m = level.merging.get(axis)
            if movable.layer is not None:
                m = level.by_layer.get(axis, {}).get(movable.layer)
            if m is None:
                raise PlanError(
                    f"align: {axis} has no map of {movable.layer or 'all layers'}",
                    hint="leave --map out: it is found again",
                )
            of_groups = Movable(axis, movable.layer, movable.n_groups)
            why = assignment.misplaced(movable if axis == movable.axis else of_groups, m)
            if why is not None:
                raise PlanError(f"align: map of {axis}: {why}", hint="leave --map out")
            groups.append(m)
        size = movable.n // movable.n_groups
        for m in groups[1:]:
            own = [m.members(i)[0][0] for i in range(movable.n_groups)]
            led = [groups[0].members(i * size)[0][0] // size for i in range(movable.n_groups)]
            if own != led:
                raise PlanError(
                    f"align: {', '.join(movable.axes)}: query heads would leave their kv heads",
                    hint="leave --map out",
                )


def similarity_nbytes(movable: Movable) -> int:
    """Bytes of the similarities of its units; where signs count, of these too."""
    item = _ITEM + movable.signed
    kv = _ITEM * movable.n_groups**2 if movable.kv else 0
    return item * movable.n**2 + kv


def of_plans(
    source: Plan, like: Plan, axes: Sequence[str] | None, *, n_passes: int, signs: bool
) -> OrderSearch:
    """The search for orders of `source` beside `like`.

    Args:
        axes: Axes to align, by a user's or the spec's words; None for all that can be.
        signs: Whether hidden units may be negated, where norms allow it.

    Raises:
        PlanError: two models, an axis that is not there or can't be aligned.
    """
    _check_models(source, like)
    wanted = _wanted(source, axes)
    found = units.movables(source.model, wanted)
    if axes is not None:
        moved = {axis for one in found for axis in one.axes}
        every = units.movables(source.model, _wanted(source, None))
        names = dict.fromkeys(axis for one in every for axis in one.axes)
        for axis in wanted:
            if axis not in moved:
                name = axis_words.shown(source.model.architecture, axis)
                raise PlanError(
                    f"align: {name} of {source.model.name} keeps its order",
                    hint=f"units of {', '.join(names) or 'no axis'} may change places",
                )
    if not signs:
        found = tuple(Movable(m.axis, m.layer, m.n, m.n_groups, m.kv, m.inside) for m in found)
    if not found:
        raise PlanError(f"align: no units of {source.model.name} may change places")
    return OrderSearch(source, like, found, n_passes)


def _wanted(source: Plan, axes: Sequence[str] | None) -> tuple[str, ...]:
    """Axes of the spec."""
    model = source.model
    spec = model.architecture
    if axes is None:
        return tuple(name for name, axis in spec.axes.items() if units.is_movable(model, axis))
    spaces: dict[str, Iterable[str]] = {**spec.spaces}
    found: list[str] = []
    for name in axes:
        members = [axis for axis in spaces.get(name, ()) if model.sizes.get(axis)]
        if not members and name in spec.axes and model.sizes.get(name):
            members = [name]
        if not members:
            known = [*spaces, *(a for a in model.sizes if a in spec.axes)]
            raise PlanError(
                f"align: {model.name} has no axis {name!r}",
                hint=f"its axes are {', '.join(dict.fromkeys(known))}; --align=all is all of them",
            )
        found += members
    return tuple(dict.fromkeys(found))


def _check_models(source: Plan, like: Plan) -> None:
    mine, theirs = source.model, like.model
    if mine.architecture.name != theirs.architecture.name:
        raise PlanError(
            f"align: a model of type {mine.name} and one of type {theirs.name}",
            hint="align two checkpoints of one architecture",
        )
    for axis, size in theirs.sizes.items():
        if mine.sizes.get(axis, size) != size:
            shown = axis_words.shown(mine.architecture, axis)
            raise PlanError(
                f"align: {shown}: {mine.sizes[axis]} here, {size} in the model to align with",
                hint="align two checkpoints of the same size",
            )
