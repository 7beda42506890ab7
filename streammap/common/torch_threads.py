"""How many threads a torch kernel takes while runs are under way."""

import contextlib
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager

_threads_lock = threading.Lock()
_threads_users: list[AbstractContextManager[None]] = []


@contextlib.contextmanager
def torch_threads() -> Iterator[None]:
    """One thread per kernel while any run is under way, then as many as before.

    Imports torch: a result that is only copied does without it.
    """
    with _threads_lock:
        first = _threads_users[0] if _threads_users else one_thread_each()
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


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Threads started in here run kernels in one thread each, and GPUs multiply in float32.

    torch's settings are restored afterwards.
    """
    import torch

    threads, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def begin_thread() -> None:
    """Let kernels that this thread calls keep to `torch_threads`.

    Products ask a library of their own, which knows torch's setting in a thread only once torch
    was asked for it there.
    """
    if "torch" in sys.modules:
        import torch

        torch.get_num_threads()
