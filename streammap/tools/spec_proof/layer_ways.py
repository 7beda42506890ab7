"""How the layers of a proof become more or fewer: each a request for a number of layers."""

from collections.abc import Callable

from streammap.operators.kinds import RequestLike


def repeated(n: int) -> RequestLike:
    """All layers once more, behind the first ones."""
    return {"factor": 2, "grouping": "stacked"}


def doubled(n: int) -> RequestLike:
    """Each layer twice."""
    return {"factor": 2, "grouping": "adjacent"}


def doubled_but_first(n: int) -> RequestLike:
    """Each layer twice but the first."""
    # Where the first layer has other tensors than the rest, it can't stand in a second place.
    return {"groups": [[0], *([2 * i - 1, 2 * i] for i in range(1, n))]}


def repeated_but_first(n: int) -> RequestLike:
    """All layers but the first once more."""
    # As above, where layers take turns by their number: each keeps its place in the turn.
    return {"groups": [[0], *([i, i + n - 1] for i in range(1, n))]}


def every_other_doubled(n: int) -> RequestLike:
    """Every other layer twice."""
    # Layers behind the first new one get numbers of other kinds.
    starts = [i + i // 2 for i in range(n + 1)]
    return {"groups": [list(range(starts[i], starts[i + 1])) for i in range(n)]}


def all_but_one(n: int) -> RequestLike:
    """All layers but the second."""
    return {"groups": [[i] for i in range(n) if i != 1 or n == 1]}


Way = Callable[[int], RequestLike]
WAYS: tuple[Way, ...] = (repeated, doubled, doubled_but_first)
DEEPER = (*WAYS, repeated_but_first)
