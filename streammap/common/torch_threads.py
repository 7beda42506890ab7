"""How many threads a kernel of torch takes while runs go on."""

import contextlib
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

_threads_lock = threading.Lock()
_threads_users: list[AbstractContextManager[None]] = []


@contextlib.contextmanager
def torch_threads() -> Iterator[None]:
    """One thread a kernel while any run goes on, then as many as before.

    Imports torch: a result of copies only does without.
    """
    from streammap.engine import kernels

    with _threads_lock:
        first = _threads_users[0] if _threads_users else kernels.one_thread_each()
        if not _threads_users:
            first.__enter__()
        _threads_users.append(first)
    try:
        yield
    finally:
        with _threads_lock:
            _threads_users.pop()
            if not _threads_users:
                first.__exit__(None, None, None)
