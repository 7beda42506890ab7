"""Orders of units that bring one model beside another, found by coordinate descent.

Each order is the best one for the orders that all others have at that time, so that the sum of all
products of the two models' weights never falls. An order is sought again only where one that it
depends on has changed since; that ends when none has.

Source: Ainsworth, Hayase, Srinivasa, Git Re-Basin, ICLR 2023, arXiv:2209.04836 (weight matching).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from streammap.architectures.axis_facts import Layer
from streammap.common.torch_threads import torch_threads
from streammap.engine.searching import similarity
from streammap.engine.searching.similarity import Beside, Numbers
from streammap.io.storage.base import Reader
from streammap.planning.by_layer.shared_rows import SharedRows
from streammap.planning.dim_maps import DimMaps
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, MapPair
from streammap.planning.ordering import assignment
from streammap.planning.ordering.assignment import Order
from streammap.planning.ordering.search import OrderSearch
from streammap.planning.ordering.stacks import Side, Stack
from streammap.planning.ordering.units import Movable

if TYPE_CHECKING:
    from streammap.architectures.expression import Expression

_GAIN = 1e-9
"""What an order must gain, of the sum of all that it is compared by: less is rounding."""
_Seen = tuple[tuple[int, ...], int]


def find(search: OrderSearch, *, reader: Reader) -> MapLevel:
    """The orders that a search asks for, as maps.

    Raises:
        CheckpointError: a source can't be read.
        PlanError: scipy is not installed.
    """
    assignment.library()
    read = Numbers(reader)
    try:
        with torch_threads(), torch.no_grad():
            return search.level(_Descent(search, read).orders())
    finally:
        read.close()


@final
class _Descent:
    """The orders found so far."""

    def __init__(self, search: OrderSearch, read: Numbers) -> None:
        self._search, self._read = search, read
        self._model = search.source.model
        self._orders = {one: assignment.as_they_are(one) for one in search.movables}
        self._versions = dict.fromkeys(search.movables, 0)
        self._at = {(axis, one.layer): one for one in search.movables for axis in one.axes}
        self._seen: dict[Movable, _Seen] = {}
        self._rows = SharedRows()
        self._pairs: dict[Movable, tuple[int, dict[str, MapPair]]] = {}
        """By the version of their order."""

    def orders(self) -> Mapping[Movable, Order]:
        """Those that are found."""
        self._first_pass()
        for _ in range(self._search.n_passes - 1):
            n_better = sum(self._improve(one) for one in self._search.movables)
            if not n_better:
                break
        return self._orders

    def _first_pass(self) -> None:
        """Each once, by what is in order already: those first of which most is."""
        known: set[Movable] = set()
        waiting = list(self._search.movables)
        while waiting:
            shares = [self._share(one, known) for one in waiting]
            one = waiting.pop(shares.index(max(shares)))
            stacks = self._search.stacks[one]
            usable = [stack for stack in stacks if self._others(one, stack) <= known]
            self._update(one, usable or stacks, always=True)
            if len(usable) < len(stacks):
                self._seen.pop(one, None)
            known.add(one)

    def _share(self, movable: Movable, known: set[Movable]) -> float:
        """How much of what has an axis is in order but for it, 0 to 1."""
        stacks = self._search.stacks[movable]
        total = sum(stack.n_elements for stack in stacks)
        own = sum(stack.n_elements for stack in stacks if self._others(movable, stack) <= known)
        return own / total if total else 0.0

    def _others(self, movable: Movable, stack: Stack) -> set[Movable]:
        """What else is put in order that a stack has."""
        here = {self._of(axis, stack.layer) for axis in stack.axes}
        return {one for one in here if one is not None} - {movable}

    def _of(self, axis: str, layer: Layer | None) -> Movable | None:
        return self._at.get((axis, layer)) or self._at.get((axis, None))

    def _improve(self, movable: Movable) -> bool:
        """Seek an order again, if there is a reason to; whether it became another one."""
        stacks = self._search.stacks[movable]
        if self._seen.get(movable) == self._dependencies(movable):
            return False
        return self._update(movable, stacks, always=False)

    def _dependencies(self, movable: Movable) -> _Seen:
        """Versions of all orders that the comparison of an axis depends on."""
        others = {
            one
            for stack in self._search.stacks[movable]
            for one in (*self._others(movable, stack), *([movable] * self._is_square(movable)))
        }
        ordered = [one for one in self._search.movables if one in others]
        return tuple(self._versions[one] for one in ordered), len(ordered)

    def _is_square(self, movable: Movable) -> bool:
        """Whether some tensor has the axis on both sides."""
        labels = self._search.labels[movable.axes]
        return any(
            max(labels.of(stack.rows)[0], default=-1) >= 0
            and max(labels.of(stack.columns)[0], default=-1) >= 0
            for stack in self._search.stacks[movable]
        )

    def _update(self, movable: Movable, stacks: Sequence[Stack], *, always: bool) -> bool:
        """Take the best order by some tensors, if it is better than the present one."""
        self._seen[movable] = self._dependencies(movable)
        total, of_groups, negative = self._compared(movable, stacks)
        present = self._orders[movable]
        places = torch.tensor(present.places)
        worth = _worth(movable, total, of_groups, places)
        scale = float(total.diagonal().abs().sum()) + abs(worth)
        best = assignment.best(movable, total, of_groups)
        found = torch.tensor(best)
        gained = _worth(movable, total.neg_(), of_groups, found) - worth
        negated = frozenset[int]()
        if negative is not None:
            flipped = negative[torch.arange(movable.n), found]
            negated = frozenset(flipped.nonzero().flatten().tolist())
        order, is_better = Order(best, negated), always or gained > _GAIN * scale
        if order == present or (best != present.places and not is_better):
            return False
        self._orders[movable] = order
        self._versions[movable] += 1
        return True

    def _compared(
        self, movable: Movable, stacks: Iterable[Stack]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Similarities of units, of what groups have one of, and which of the first are negative.

        Shapes: [n, n], [n_groups, n_groups], [n, n].
        """
        total = torch.zeros(movable.n, movable.n, dtype=torch.float64)
        of_groups = None
        if movable.kv:
            of_groups = torch.zeros(movable.n_groups, movable.n_groups, dtype=torch.float64)
        gains = []
        for stack in stacks:
            if movable.signed and stack.is_gain:
                gains.append(stack)
            else:
                self._add(movable, stack, total, of_groups)
        if not movable.signed:
            return total, of_groups, None
        negative = total < 0
        total.abs_()
        for stack in gains:
            self._add(movable, stack, total, of_groups)
        return total, of_groups, negative

    def _add(self, movable: Movable, stack: Stack, total: Tensor, of_groups: Tensor | None) -> None:
        """Add the products of one stack of matrices, along each side that has the units."""
        labels = self._search.labels[movable.axes]
        totals = ((total, movable.n), (of_groups, movable.n_groups))
        for which, (sums, n) in enumerate(totals):
            if sums is None:
                continue
            rows = similarity.positions(labels.of(stack.rows)[which], n)
            columns = similarity.positions(labels.of(stack.columns)[which], n)
            if rows is not None:
                beside = self._beside(movable, stack, "rows")
                similarity.add_rows(self._read, stack, beside, rows, sums)
            if columns is not None:
                beside = self._beside(movable, stack, "columns")
                similarity.add_columns(self._read, stack, beside, columns, sums)
        outer = {movable.axis: total, **dict.fromkeys(movable.kv, of_groups)}.get(stack.outer or "")
        if outer is not None:
            beside = self._beside(movable, stack, "outer")
            similarity.add_outer(self._read, stack, beside, outer)

    def _beside(self, movable: Movable, stack: Stack, compared: str) -> Beside:
        """Where the other's numbers lie; along what is compared, the axis keeps its order."""
        whole = self._maps(stack.layer, None)
        apart = self._maps(stack.layer, movable)

        def places(side: Side, name: str) -> similarity.Places:
            made = similarity.places_of(side, apart if name == compared else whole)
            return similarity.Places(made.index, None) if stack.is_gain else made

        sheets = list(range(len(stack.sheets)))
        if stack.outer is not None and compared != "outer":
            one = self._of(stack.outer, stack.layer)
            if one is not None and one.axis == stack.outer:
                sheets = list(self._orders[one].places)
        return Beside(places(stack.rows, "rows"), places(stack.columns, "columns"), sheets)

    def _maps(self, layer: Layer | None, without: Movable | None) -> "_Maps":
        """Maps of dimensions in a layer, by the present orders."""
        pairs: dict[str, MapPair] = {}
        for one in self._search.movables:
            if one != without and one.layer in (None, layer):
                pairs |= self._pairs_of(one)
        return _Maps(DimMaps(self._model.architecture, pairs, self._model.sizes, self._model.sizes))

    def _pairs_of(self, movable: Movable) -> dict[str, MapPair]:
        version = self._versions[movable]
        known = self._pairs.get(movable)
        if known is None or known[0] != version:
            made = self._orders[movable].maps(movable, self._rows)
            known = version, {axis: MapPair(m, m) for axis, m in made.items()}
            self._pairs[movable] = known
        return known[1]


@final
class _Maps:
    """The maps of dimensions."""

    def __init__(self, maps: DimMaps) -> None:
        self._maps = maps

    def __call__(self, expression: "Expression") -> AxisMap | None:
        return self._maps.of(expression, "out")


def _worth(movable: Movable, total: Tensor, of_groups: Tensor | None, places: Tensor) -> float:
    """The sum that an order has."""
    worth = float(total[torch.arange(movable.n), places].sum())
    if of_groups is None:
        return worth
    size = movable.n // movable.n_groups
    groups = places[::size] // size
    return worth + float(of_groups[torch.arange(movable.n_groups), groups].sum())
