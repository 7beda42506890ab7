"""The loop of a run: threads that compute tiles, and push their bytes into a sink.

Each thread reads, computes and pushes tiles of its own, one after the other. While one computes,
another reads and a third writes: that is the overlap. Nothing is handed over and nothing queues
up, so a slow disk takes no memory. Pieces are so small that they are still in a processor's cache
when the sink takes them.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Protocol, final

from streammap.common.events import Listener, Wrote
from streammap.common.losses import Losses
from streammap.common.ranges import Range
from streammap.common.torch_threads import torch_threads
from streammap.engine import read_ahead, schedule
from streammap.engine.compiler import Programs
from streammap.engine.devices import Matrices
from streammap.engine.memory import Memory
from streammap.engine.schedule import Bundle, Job
from streammap.engine.worker import Worker, decodes
from streammap.io.storage.base import Reader
from streammap.planning.graph import LinearForm

_EVENT_SECONDS = 0.1
"""Time between two events for the listener."""


class Lane(Protocol):
    """What one thread pushes its parts through, one part at a time."""

    def write(self, part: Job, offset: int, piece: memoryview) -> None:
        """Take the part's bytes from its byte `offset` on, for all of its places.

        The pieces of a part come in order. A piece is valid until this returns.
        """

    def done(self, part: Job, lost: Losses) -> None:
        """All pieces of the part have come; `lost` is what rounding lost in it."""


class Sink(Protocol):
    """Where the bytes of a run go."""

    def grid(self, key: str) -> int | None:
        """Where a target begins on the grid that its pieces are cut on; see schedule.Grid."""

    def lane(self) -> Lane:
        """A lane for one thread, made in that thread."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use."""

    memory: Memory
    device: str = "cpu"
    reader: Reader = "pread"
    """How files of this machine are read."""


def run(
    targets: Mapping[str, LinearForm],
    sink: Sink,
    resources: Resources,
    *,
    listener: Listener,
    rows: Mapping[str, Range] | None = None,
) -> int:
    """Compute all targets and push them into the sink; gives the bytes that were read.

    Args:
        listener: Called in the caller's own thread. What it, a source or the sink raises is raised
            here, once no thread is left.
        rows: Key -> what is wanted of the first dimension, if not all of it.
    """
    memory = resources.memory
    bundles = schedule.bundles(targets, memory, grid=sink.grid, rows=rows or {})
    sources = read_ahead.expect(targets.values())
    computes = any(form.copied is None or decodes(form.copied) for form in targets.values())
    with (
        torch_threads() if computes else nullcontext(),
        read_ahead.ahead(bundles, sources, memory.ahead_nbytes) as fetched,
    ):
        threads = _Threads(fetched, sink, resources)
        try:
            threads.run(listener)
        finally:
            threads.stops = True
            if threads.n_active:
                read_ahead.cancel(sources)  # they may wait for a network
            threads.join()
        return threads.n_read


def run_here(
    targets: Mapping[str, LinearForm],
    sink: Sink,
    memory: Memory,
    *,
    rows: Mapping[str, Range] | None = None,
) -> None:
    """The same in the caller's own thread: a single tensor is not worth starting others."""
    worker, lane = Worker(memory, Programs(), grid=sink.grid), sink.lane()
    # As in a run: a product of several threads would be rounded otherwise.
    multiplies = any(
        form.is_dense or any(True for _ in form.derived()) for form in targets.values()
    )
    with torch_threads() if multiplies else nullcontext():
        for bundle in schedule.bundles(targets, memory, grid=sink.grid, rows=rows or {}):
            for _ in _pushed(bundle, worker, lane):
                pass


def _pushed(bundle: Bundle, worker: Worker, lane: Lane) -> Iterator[Job]:
    """Compute a bundle and push it, part by part; gives each part once the sink has it."""
    worker.begin()
    for job in bundle:
        for part in worker.split(job):
            for offset, piece in worker.compute(part):
                lane.write(part, offset, piece)
            lane.done(part, worker.losses())
            yield part


@final
class _Threads:
    """The threads of a run, and what they share."""

    def __init__(self, bundles: Iterator[Bundle], sink: Sink, resources: Resources) -> None:
        self.n_read = self.n_active = 0
        self.stops = False
        """Whether threads end after the part that they are at."""
        self._bundles, self._sink, self._resources = bundles, sink, resources
        self._matrices = None if resources.device == "cpu" else Matrices(resources.device)
        self._programs = Programs()
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        """Why a thread ended: an error, or None if there was nothing left to do."""
        self._lock = threading.Lock()
        self._wrote = ("", 0)
        """Key and bytes of what the listener does not know of yet."""
        n = resources.memory.n_workers
        self._threads = [
            threading.Thread(target=self._work, name=f"streammap-{i}") for i in range(n)
        ]

    def run(self, listener: Listener) -> None:
        """Start the threads, and report to the listener until all have ended."""
        self.n_active = len(self._threads)
        for thread in self._threads:
            thread.start()
        while self.n_active:
            try:
                error = self._ended.get(timeout=_EVENT_SECONDS)
            except Empty:
                pass
            else:
                self.n_active -= 1
                if error is not None:
                    raise error
            self._report(listener)

    def join(self) -> None:
        """Wait until no thread is left."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _work(self) -> None:
        resources = self._resources
        try:
            worker = Worker(
                resources.memory,
                self._programs,
                grid=self._sink.grid,
                reader=resources.reader,
                matrices=self._matrices,
            )
            try:
                self._push_all(worker, self._sink.lane())
            finally:
                worker.close()
                with self._lock:
                    self.n_read += worker.n_read
        except BaseException as error:  # raised again in the caller's thread
            self._ended.put(error)
        else:
            self._ended.put(None)

    def _push_all(self, worker: Worker, lane: Lane) -> None:
        while (bundle := self._next()) is not None:
            for part in _pushed(bundle, worker, lane):
                with self._lock:
                    nbytes = self._wrote[1] + part.nbytes * len(part.places)
                    self._wrote = part.places[0].key, nbytes
                if self.stops:
                    return

    def _next(self) -> Bundle | None:
        with self._lock:
            return None if self.stops else next(self._bundles, None)

    def _report(self, listener: Listener) -> None:
        with self._lock:
            (key, nbytes), self._wrote = self._wrote, ("", 0)
        if nbytes:
            listener(Wrote(key, nbytes))
