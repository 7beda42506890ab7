"""Threads that each read, compute and write tiles of their own, one after the other.

While one computes, another reads and a third writes: that is the overlap, and there is nothing to
hand over and nothing that waits, so a slow disk takes no memory. What is written goes in pieces so
small that they are still in a processor's cache.
"""

import threading
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import final

from streammap.common.events import Listener, Wrote
from streammap.engine.compiler import Programs
from streammap.engine.devices import Matrices
from streammap.engine.memory import Memory
from streammap.engine.schedule import Bundle, Job
from streammap.engine.worker import Made, Worker
from streammap.io.buffers import Buffer

Write = Callable[[Job, Made], None]
_TOLD_SECONDS = 0.1
"""Time between two events for the listener."""


def run(
    bundles: Iterator[Bundle],
    memory: Memory,
    write: Write,
    *,
    listener: Listener,
    mapped: bool,
    device: str,
    cancel: Callable[[], None],
) -> int:
    """Do all bundles; gives the bytes that were read.

    `cancel` ends reads that wait for a network, where the run ends in an error.
    `write` is called by the threads, with each job and its bytes, which are there until it returns;
    `listener` by the caller's own.
    What any of them raises is raised here, once no thread goes on.
    """
    shared = _Shared(bundles, write, mapped=mapped, device=device)
    threads = [
        threading.Thread(target=_work, args=(shared, memory), name=f"streammap-{i}")
        for i in range(memory.n_workers)
    ]
    active = len(threads)
    try:
        for thread in threads:
            thread.start()
        while active:
            error = None
            try:
                error = shared.ended.get(timeout=_TOLD_SECONDS)
                active -= 1
            except Empty:
                pass
            if error is not None:
                raise error
            shared.tell(listener)
    finally:
        shared.stops = True
        if active:
            cancel()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return shared.n_read


@final
class _Shared:
    """What the threads share."""

    def __init__(
        self, bundles: Iterator[Bundle], write: Write, *, mapped: bool, device: str
    ) -> None:
        self.mapped = mapped
        self.matrices = None if device == "cpu" else Matrices(device)
        self.ended: SimpleQueue[BaseException | None] = SimpleQueue()
        """Why a thread ended: an error, or None where all is done."""
        self.programs = Programs()
        self.write = write
        self.n_read = 0
        self.stops = False
        self._bundles = bundles
        self._lock = threading.Lock()
        self._wrote = ("", 0)

    def next(self) -> Bundle | None:
        """The next bundle; None when there is none."""
        with self._lock:
            return None if self.stops else next(self._bundles, None)

    def count(self, job: Job, n_read: int) -> None:
        """Remember what was done, until the listener is told."""
        with self._lock:
            self.n_read += n_read
            self._wrote = job.key, self._wrote[1] + job.nbytes * len(job.places)

    def tell(self, listener: Listener) -> None:
        """Tell the listener what was written since the last time."""
        with self._lock:
            (key, nbytes), self._wrote = self._wrote, ("", 0)
        if nbytes:
            listener(Wrote(key, nbytes))


def _work(shared: _Shared, memory: Memory) -> None:
    try:
        worker = Worker(memory, shared.programs, mapped=shared.mapped, matrices=shared.matrices)
        try:
            _do_all(worker, Buffer(memory.dense_limits.out_nbytes), shared)
        finally:
            worker.close()
    except BaseException as error:  # raised again in the caller's thread
        shared.ended.put(error)
    else:
        shared.ended.put(None)


def _do_all(worker: Worker, tile: Buffer, shared: _Shared) -> None:
    while (bundle := shared.next()) is not None:
        worker.begin()
        for job in bundle:
            for part in worker.parts(job):
                if shared.stops:
                    return
                n_before = worker.n_read
                shared.write(part, Made(worker, part, tile))
                shared.count(part, worker.n_read - n_before)
