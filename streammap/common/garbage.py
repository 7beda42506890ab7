"""Python's garbage collector, kept from looking through all that a process has, time and again.

With torch imported that takes 0.15 s, which is what writing half a gigabyte takes.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collection in here: for imports and plans, which make many objects and no garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def of_new_objects() -> Iterator[None]:
    """Collections in here look at what is made in here; what was there before stays."""
    freezes = not gc.get_freeze_count()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
