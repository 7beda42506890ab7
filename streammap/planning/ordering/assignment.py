"""The order of units that makes two models most alike, from how alike each two units are.

    maximise  sum over units i of  similarity[i, order[i]]          (linear assignment)

Where units stay together in groups, an order of groups is sought for the best orders inside of each
two: a small assignment for each pair, and one of the groups. That is the best of all that are
allowed.

Source: Kuhn, 1955, as scipy.optimize.linear_sum_assignment solves it; Ainsworth et al., Git
Re-Basin, arXiv:2209.04836.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, final

from streammap.errors import PlanError
from streammap.planning import maps
from streammap.planning.by_layer.shared_rows import SharedRows
from streammap.planning.maps import BlockMap
from streammap.planning.ordering.units import Movable

if TYPE_CHECKING:
    from torch import Tensor


@final
@dataclass(frozen=True, slots=True)
class Order:
    """Where each unit comes from."""

    places: tuple[int, ...]
    """Unit i is the other model's unit places[i]."""
    negated: frozenset[int] = frozenset()
    """Units i whose sign changes."""

    def maps(self, movable: Movable, rows: SharedRows) -> dict[str, BlockMap]:
        """Axis -> its map."""
        made = {movable.axis: rows.of(BlockMap(self._rows(), movable.n))}
        size = movable.n // movable.n_groups
        groups = [place // size for place in self.places[::size]]
        for axis in movable.kv:
            of_groups = BlockMap(tuple(((j, 1.0),) for j in groups), movable.n_groups)
            made[axis] = rows.of(of_groups)
        return made

    def _rows(self) -> tuple[tuple[tuple[int, float], ...], ...]:
        return tuple(((j, -1.0 if i in self.negated else 1.0),) for i, j in enumerate(self.places))


def as_they_are(movable: Movable) -> Order:
    """The order that changes nothing."""
    return Order(tuple(range(movable.n)))


def backwards(movable: Movable) -> Order:
    """The order that stands for one that is not found yet: groups stay together in it."""
    return Order(tuple(reversed(range(movable.n))))


def library() -> ModuleType:
    """What solves assignments.

    Raises:
        PlanError: scipy is not installed.
    """
    import importlib

    try:
        return importlib.import_module("scipy.optimize")
    except ImportError as error:
        raise PlanError(
            f"align: this needs scipy, which is not installed ({error})",
            hint="pip install 'streammap-weights[align]'",
        ) from error


def best(movable: Movable, similarity: "Tensor", of_groups: "Tensor | None") -> tuple[int, ...]:
    """The order with the largest sum of similarities.

    Args:
        similarity: Of this model's units (rows) and the other's. Float64 [n, n]; it is negated in
            place, so that no copy is made.
        of_groups: The same of what groups have one of; [n_groups, n_groups].
    """
    cost = similarity.neg_().numpy()
    if movable.n_groups == 1 and movable.inside:
        return tuple(map(int, _solved(cost)))
    if movable.n_groups == movable.n:
        together = cost if of_groups is None else cost - of_groups.numpy()
        return tuple(map(int, _solved(together)))
    n, size = movable.n_groups, movable.n // movable.n_groups
    inner: dict[tuple[int, int], list[int]] = {}
    total = similarity.new_zeros((n, n)).numpy()
    for i in range(n):
        for j in range(n):
            block = cost[i * size : (i + 1) * size, j * size : (j + 1) * size]
            chosen = list(range(size))
            if movable.inside:
                chosen = list(map(int, _solved(block)))
            inner[i, j] = chosen
            total[i, j] = sum(float(block[k, chosen[k]]) for k in range(size))
    if of_groups is not None:
        total -= of_groups.numpy()
    groups = map(int, _solved(total))
    return tuple(j * size + k for i, j in enumerate(groups) for k in inner[i, j])


def _solved(cost: object) -> list[int]:
    """The columns of least cost, one for each row."""
    _, columns = library().linear_sum_assignment(cost)
    return list(columns)


def misplaced(movable: Movable, m: maps.AxisMap) -> str | None:
    """Why a map is none of an allowed order; None where it is."""
    if not isinstance(m, BlockMap):
        return "a matrix, expected an order of units"
    fine = maps.reblocked(m, 1)
    if fine.n_in != movable.n or fine.n_out != movable.n:
        return f"{fine.n_in} to {fine.n_out} units, expected {movable.n}"
    if any(len(row) != 1 for row in fine.rows):
        return "units are added up, expected an order of them"
    if {j for row in fine.rows for j, _ in row} != set(range(movable.n)):
        return "a unit is left out, expected each once"
    allowed = (1.0, -1.0) if movable.signed else (1.0,)
    wrong = [value for row in fine.rows for _, value in row if value not in allowed]
    if wrong:
        return f"factor {wrong[0]:g}, expected {' or '.join(f'{one:g}' for one in allowed)}"
    size = movable.n // movable.n_groups
    places = [row[0][0] // size for row in fine.rows]
    if any(place != places[i - i % size] for i, place in enumerate(places)):
        return f"groups of {size} are torn apart, expected them to stay together"
    return None
