"""What belongs to one process: neither a forked child nor a pickle takes over its state."""

import os
import threading
import weakref
from typing import final


@final
class Lock:
    """A lock. It is free in a forked child, where the thread that held it is not."""

    def __init__(self) -> None:
        """Nobody holds it."""
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type["Lock"], tuple[()]]:
        return Lock, ()

    def renew(self) -> None:
        """Free it, whoever held it."""
        self._lock = threading.Lock()


@final
class Event(threading.Event):
    """An event that is not set where it is unpickled."""

    def __reduce__(self) -> tuple[type["Event"], tuple[()]]:
        return Event, ()


_locks: "weakref.WeakSet[Lock]" = weakref.WeakSet()


def _renew() -> None:
    for lock in tuple(_locks):
        lock.renew()


os.register_at_fork(after_in_child=_renew)
