"""What a run will read over a network, asked for in advance.

Bundles go to the threads in a known order. Their reads are requested a few bundles ahead, so that
many connections work while the threads compute; whole files are fetched in the order of their use.
"""

import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import final

from streammap.engine.schedule import Bundle, Copy
from streammap.io.checkpoint import Checkpoint
from streammap.io.storage.prefetch import AheadFile, PrefetchPart, Window
from streammap.planning.graph import LinearForm

_Read = tuple[AheadFile, int, int]


def expect(forms: Iterable[LinearForm]) -> tuple[Checkpoint, ...]:
    """Tell each source which of its files are read, in the order of their first use.

    Returns:
        The checkpoints that are read, each once.

    Raises:
        CheckpointError: there is no room for the files.
    """
    files: dict[int, tuple[Checkpoint, dict[str, None]]] = {}
    for form in forms:
        for load in form.loads():
            source = load.source
            if isinstance(source, Checkpoint):
                _, names = files.setdefault(id(source), (source, {}))
                names.update(dict.fromkeys(source.files_of(load.key)))
    for source, names in files.values():
        source.expect(tuple(names))
    return tuple(source for source, _ in files.values())


@contextmanager
def ahead(
    bundles: Iterator[Bundle], sources: Iterable[Checkpoint], nbytes: int
) -> Iterator[Iterator[Bundle]]:
    """The same bundles; what they read over a network is fetched ahead, within `nbytes`."""
    streamed = [source for source in sources if source.is_streamed]
    if not nbytes or not streamed:
        yield bundles
        return
    try:
        with Window(nbytes) as window:
            for source in streamed:
                source.window(window)
            yield _ReadAhead(bundles, window)
    finally:
        for source in streamed:
            source.window(None)


def cancel(sources: Iterable[Checkpoint]) -> None:
    """End reads that wait for a network, and downloads: nobody needs them any more."""
    for source in sources:
        source.cancel()


@final
class _ReadAhead:
    """Bundles whose reads have been asked for. `next` is called by one thread at a time."""

    def __init__(self, bundles: Iterator[Bundle], window: Window) -> None:
        self._bundles, self._window = bundles, window
        self._ready: deque[tuple[Bundle, list[PrefetchPart]]] = deque()
        self._next: Bundle | None = next(bundles, None)
        self._parts_of: dict[int, list[PrefetchPart]] = {}
        """Thread -> what its current bundle reads."""

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
    reads: dict[tuple[int, int, int], _Read] = {}
    for job in bundle:
        if isinstance(job, Copy):
            stretches = [(job.source, job.start, job.start + job.nbytes)]
        else:
            stretches = [s for request in job.recipe.requests for s in request.stretches()]
        for load, start, end in stretches:
            source = load.source
            if isinstance(source, Checkpoint) and source.is_streamed and end > start:
                for file, first, last in source.stretches(load.key, start, end):
                    if isinstance(file, AheadFile):
                        reads[id(file), first, last] = file, first, last
    return list(reads.values())
