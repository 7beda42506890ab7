"""Workers that compute and one thread, the caller's, that writes: a bounded pipeline.

There are as many tiles as were made at the start. A worker takes a free one, fills it and hands it
over; it is free again once it is written. So a slow disk makes workers wait and takes no memory.
"""

import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import final

from streammap.buffers import Buffer
from streammap.memory import Memory
from streammap.program import Programs
from streammap.schedule import Bundle, Job
from streammap.worker import Worker

Write = Callable[[Job, memoryview], None]


def run(bundles: Iterator[Bundle], memory: Memory, write: Write, *, mapped: bool) -> int:
    """Do all bundles; `write` is called in this thread, with each job and its bytes.

    Gives the bytes that were read. What a worker or `write` raises is raised here, once no worker goes on.
    """
    shared = _Shared(bundles, memory)
    threads = [
        threading.Thread(target=_work, args=(shared, memory, mapped), name=f"streammap-{i}", daemon=True)
        for i in range(memory.n_workers)
    ]
    try:
        for thread in threads:
            thread.start()
        active = len(threads)
        while active:
            done = shared.done.get()
            if done is None:
                active -= 1
            elif isinstance(done, BaseException):
                raise done
            else:
                job, tile = done
                write(job, tile.view[: job.nbytes])
                shared.free.put(tile)
    finally:
        shared.stop()
        for thread in threads:
            if thread.ident is not None:
                thread.join()
    return shared.n_read


@final
class _Shared:
    """What the threads share."""

    def __init__(self, bundles: Iterator[Bundle], memory: Memory) -> None:
        self.free: SimpleQueue[Buffer | None] = SimpleQueue()
        self.done: SimpleQueue[tuple[Job, Buffer] | BaseException | None] = SimpleQueue()
        self.programs = Programs()
        self._bundles = bundles
        self._lock = threading.Lock()
        self._n_workers = memory.n_workers
        self._stops = False
        self.n_read = 0
        for _ in range(memory.n_tiles):
            self.free.put(Buffer(memory.dense_limits.out_nbytes))

    def next(self) -> Bundle | None:
        """The next bundle; None when there is none."""
        with self._lock:
            return None if self._stops else next(self._bundles, None)

    def count(self, n_read: int) -> None:
        """Add the bytes that a worker read."""
        with self._lock:
            self.n_read += n_read

    def stop(self) -> None:
        """Let no worker begin anything more."""
        self._stops = True
        for _ in range(self._n_workers):
            self.free.put(None)


def _work(shared: _Shared, memory: Memory, mapped: bool) -> None:  # noqa: FBT001
    try:
        worker = Worker(memory, shared.programs, mapped=mapped)
        while (bundle := shared.next()) is not None:
            for job in bundle:
                for part in worker.parts(job):
                    tile = shared.free.get()
                    if tile is None:
                        return
                    worker.do(part, tile)
                    shared.done.put((part, tile))
        shared.count(worker.n_read)
    except BaseException as error:  # noqa: BLE001 (raised again by the thread that writes)
        shared.done.put(error)
    else:
        shared.done.put(None)
