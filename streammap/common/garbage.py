"""Pauses or narrows Python's garbage collector during imports and runs.

With torch imported a full collection takes 0.15 s, as long as writing half a gigabyte.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """No collections inside: for imports and plans, which make many objects and no garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def of_new_objects() -> Iterator[None]:
    """Collections inside only look at objects that are made inside."""
    freezes = not gc.get_freeze_count()
    if freezes:
        gc.freeze()
    try:
        yield
    finally:
        if freezes:
            gc.unfreeze()
