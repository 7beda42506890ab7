"""What a run will read from places elsewhere, asked for in advance.

Bundles go to the threads in a known order. A few of them ahead, their reads are asked for, so that
many connections work while the threads compute; with whole files, shards come in that order.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import final

from streammap.engine.schedule import Bundle, Copy
from streammap.io.checkpoint import Checkpoint
from streammap.io.formats.safetensors_header import Slot
from streammap.io.storage.prefetch import AheadFile, PrefetchPart, Window
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan

_Read = tuple[AheadFile, int, int]


def expect(plan: Plan, slots: Iterable[tuple[str, Slot]]) -> None:
    """Tell each source which of its files are read, in the order of their first use.

    Raises:
        CheckpointError: there is no room for them.
    """
    order: dict[int, dict[str, None]] = {id(source): {} for source in plan.sources}
    for _, slot in slots:
        for found in plan.targets[slot.key].loads():
            if isinstance(found.source, Checkpoint):
                order[id(found.source)][found.source.file_of[found.key]] = None
    for source in plan.sources:
        source.expect(tuple(order[id(source)]))


@contextmanager
def ahead(bundles: Iterator[Bundle], plan: Plan, nbytes: int) -> Iterator[Iterator[Bundle]]:
    """The same bundles; what they read over a network is fetched ahead, within `nbytes`."""
    if not any(source.is_streamed for source in plan.sources):
        yield bundles
        return
    try:
        with Window(nbytes) as window:
            for source in plan.sources:
                source.window(window)
            yield _ReadAhead(bundles, window)
    finally:
        for source in plan.sources:
            source.window(None)


def cancel(sources: Iterable[Checkpoint]) -> None:
    """End reads that wait for a network, and downloads: nobody needs them any more."""
    for source in sources:
        source.cancel()


def as_they_come(forms: Iterable[LinearForm]) -> tuple[Checkpoint, ...]:
    """The checkpoints that forms read, each once, told that no file is known to come next."""
    found = (load.source for form in forms for load in form.loads())
    sources = tuple({id(s): s for s in found if isinstance(s, Checkpoint)}.values())
    for source in sources:
        source.expect(())
    return sources


@final
class _ReadAhead:
    """Bundles whose reads have been asked for. `next` is called by one thread at a time."""

    def __init__(self, bundles: Iterator[Bundle], window: Window) -> None:
        self._bundles, self._window = bundles, window
        self._ready: deque[tuple[Bundle, list[PrefetchPart]]] = deque()
        self._next: Bundle | None = next(bundles, None)
        self._parts_of: dict[int, list[PrefetchPart]] = {}
        """Thread -> what its bundle reads, until it takes the next one."""

    def __iter__(self) -> Iterator[Bundle]:
        return self

    def __next__(self) -> Bundle:
        thread = threading.get_ident()
        self._window.drop(self._parts_of.pop(thread, []))
        if not self._ready or self._window.has_room:
            self._ask()
        if not self._ready:
            raise StopIteration
        bundle, parts = self._ready.popleft()
        self._parts_of[thread] = parts
        return bundle

    def _ask(self) -> None:
        """Ask for the reads of bundles as long as there is room, but for one bundle at least."""
        while self._next is not None:
            reads = _reads(self._next)
            if self._ready and sum(end - start for _, start, end in reads) > self._window.room:
                break
            asked = (self._window.ask(*read) for read in reads)
            self._ready.append((self._next, [part for part in asked if part is not None]))
            self._next = next(self._bundles, None)
        self._window.begin()


def _reads(bundle: Bundle) -> list[_Read]:
    """Each stretch of bytes that a bundle reads over a network, once."""
    found: dict[tuple[int, int, int], _Read] = {}
    for job in bundle:
        if isinstance(job, Copy):
            spans = [(job.found, job.start, job.start + job.nbytes)]
        else:
            spans = [stretch for request in job.recipe.requests for stretch in request.stretches()]
        for load, start, end in spans:
            source = load.source
            if isinstance(source, Checkpoint) and source.is_streamed and end > start:
                file, base = source.file(load.key), source.slots[load.key].start
                if isinstance(file, AheadFile):
                    found[id(file), base + start, base + end] = file, base + start, base + end
    return list(found.values())
