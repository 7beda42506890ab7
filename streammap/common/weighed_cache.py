"""A cache of what was made lately, bounded by what it weighs: entries may differ a lot in size."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar, final

V = TypeVar("V")


@final
class WeighedCache(Generic[V]):
    """The entries that were used last; threads may share it."""

    def __init__(self, *, most: int, heaviest: int, weight: Callable[[V], int]) -> None:
        """At most `most` entries, of which all but the newest weigh at most `heaviest`."""
        self._most, self._heaviest, self._weight_of = most, heaviest, weight
        self._kept: dict[Hashable, tuple[V, int]] = {}
        self._weight = 0
        self._lock = threading.Lock()

    def of(self, key: Hashable, make: Callable[[], V]) -> V:
        """The entry of a key, made where it isn't there."""
        with self._lock:
            known = self._kept.pop(key, None)
            if known is not None:
                self._kept[key] = known  # the newest again
                return known[0]
        made = make()
        weight = self._weight_of(made)
        with self._lock:
            before = self._kept.pop(key, None)  # another thread may have made it meanwhile
            self._kept[key] = made, weight
            self._weight += weight - (0 if before is None else before[1])
            while len(self._kept) > 1 and (
                len(self._kept) > self._most or self._weight > self._heaviest
            ):
                _, dropped = self._kept.pop(next(iter(self._kept)))
                self._weight -= dropped
        return made
