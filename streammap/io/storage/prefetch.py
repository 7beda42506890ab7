"""Bytes of files elsewhere, fetched before they are read: several connections, bounded memory.

A run knows what it will read (engine/read_ahead.py), so it asks for parts in the order of their
use. Parts that are close together in a file are fetched as one range. Each is kept until everyone
who asked for it has dropped it, so that each byte is fetched once. A part that was not asked for in
time is read as without a window.
"""

import bisect
import mmap
import threading
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from streammap.io.storage.base import N_CONNECTIONS, OpenFile

if TYPE_CHECKING:
    from torch import Tensor

MAX_RANGE_NBYTES = 8 * 2**20
GAP_NBYTES = 2**14
"""Two parts with at most this many bytes between them are fetched by one request."""
_POLL_SECONDS = 0.5


@final
class AheadFile(OpenFile):
    """A file elsewhere whose parts a window may have fetched."""

    def __init__(self, file: OpenFile) -> None:
        """Without a window, read from `file` itself."""
        self.inner = file
        self.window: Window | None = None

    def __reduce__(self) -> tuple[type["AheadFile"], tuple[OpenFile]]:
        return AheadFile, (self.inner,)

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from the window, or from the file."""
        window = self.window
        if window is None or not window.take(self, offset, view):
            self.inner.read_into(offset, view)

    def part(self, start: int, end: int) -> "Tensor":
        """See OpenFile."""
        return self.inner.part(start, end)

    def check_unchanged(self) -> None:
        """See OpenFile."""
        self.inner.check_unchanged()

    def release(self) -> None:
        """See OpenFile."""
        self.inner.release()

    def cancel(self) -> None:
        """See OpenFile."""
        self.inner.cancel()

    def close(self) -> None:
        """See OpenFile."""
        self.inner.close()


@dataclass(slots=True, eq=False)
class _FetchRange:
    """Bytes that are fetched by one request."""

    start: int
    end: int
    content: mmap.mmap | None = None
    """A mapping, because it is given back at once; an allocator would keep the memory."""
    error: BaseException | None = None
    n_parts: int = 0
    """How many of its parts are not dropped yet."""
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class PrefetchPart:
    """Bytes that were asked for."""

    file: AheadFile
    start: int
    end: int
    n_asked: int = 0
    """How often it was asked for, minus how often it was dropped."""
    fetched: _FetchRange | None = None
    """None while it is queued."""


@final
class Window:
    """Parts of files: queued, being fetched, or here. Use as a context."""

    def __init__(self, nbytes: int) -> None:
        """Hold at most `nbytes`."""
        self._nbytes = nbytes
        self._held = 0
        """Bytes of queued parts and of ranges that are not dropped."""
        self._parts: dict[tuple[int, int, int], PrefetchPart] = {}
        self._waiting: deque[PrefetchPart] = deque()
        self._starts: dict[int, list[tuple[int, int]]] = {}
        """File -> (start, end) of its queued parts, in order."""
        self._changed = threading.Condition()
        self._stops = False
        self._threads = [
            threading.Thread(target=self._work, daemon=True, name=f"streammap-ahead-{i}")
            for i in range(N_CONNECTIONS)
        ]

    def __enter__(self) -> "Window":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._stops = True
            self._changed.notify_all()

    @property
    def has_room(self) -> bool:
        """Whether to ask for more: half is free, so that neighbours are asked for together."""
        return self._held <= self._nbytes // 2

    @property
    def room(self) -> int:
        """Bytes that may be asked for."""
        return self._nbytes - self._held

    def ask(self, file: AheadFile, start: int, end: int) -> PrefetchPart | None:
        """Ask for bytes of a file; None if there is no room."""
        with self._changed:
            key = (id(file), start, end)
            part = self._parts.get(key)
            if part is None:
                if self._held + end - start > self._nbytes:
                    return None
                part = self._parts[key] = PrefetchPart(file, start, end)
                self._held += end - start
                self._waiting.append(part)
                bisect.insort(self._starts.setdefault(id(file), []), (start, end))
            part.n_asked += 1
            return part

    def begin(self) -> None:
        """Start fetching what was asked for."""
        with self._changed:
            self._changed.notify_all()

    def drop(self, parts: list[PrefetchPart]) -> None:
        """Parts are no longer needed."""
        with self._changed:
            for part in parts:
                part.n_asked -= 1
                if part.n_asked:
                    continue
                del self._parts[(id(part.file), part.start, part.end)]
                fetched = part.fetched
                if fetched is None:
                    self._held -= part.end - part.start
                    self._starts[id(part.file)].remove((part.start, part.end))
                    continue
                fetched.n_parts -= 1
                if not fetched.n_parts:
                    fetched.content = None
                    self._held -= fetched.end - fetched.start

    def take(self, file: AheadFile, offset: int, view: memoryview) -> bool:
        """Fill `view` with a part, exactly as it was asked for; False if it was not."""
        with self._changed:
            part = self._parts.get((id(file), offset, offset + len(view)))
            while part is not None and part.fetched is None and not self._stops:
                self._changed.wait(_POLL_SECONDS)
            fetched = None if part is None else part.fetched
        if fetched is None:
            return False
        fetched.done.wait()
        if fetched.error is not None:
            raise fetched.error
        content = fetched.content
        if content is None:
            return False
        start = offset - fetched.start
        with memoryview(content) as whole:
            view[:] = whole[start : start + len(view)]
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waits() and not self._stops:
                    self._changed.wait()
                if self._stops:
                    return
                file, fetch = self._next()
                self._changed.notify_all()
            try:
                fetch.content = _fetch(file.inner, fetch.start, fetch.end)
            except BaseException as error:  # raised in `take`
                fetch.error = error
            fetch.done.set()

    def _waits(self) -> bool:
        """Whether a part is queued; skips parts that were fetched with others, or dropped."""
        while self._waiting:
            first = self._waiting[0]
            if first.fetched is None and first.n_asked:
                return True
            self._waiting.popleft()
        return False

    def _next(self) -> tuple[AheadFile, _FetchRange]:
        """The first queued part, with those that follow it in its file, as one range."""
        first = self._waiting.popleft()
        starts = self._starts[id(first.file)]
        i = bisect.bisect_left(starts, (first.start, first.end))
        fetch, j, total = _FetchRange(first.start, first.end), i, 0
        while j < len(starts):
            start, end = starts[j]
            whole = max(fetch.end, end) - fetch.start
            if start > fetch.end + GAP_NBYTES or (j > i and whole > MAX_RANGE_NBYTES):
                break
            fetch.end = max(fetch.end, end)
            total += end - start
            part = self._parts[(id(first.file), start, end)]
            part.fetched = fetch
            fetch.n_parts += 1
            j += 1
        del starts[i:j]
        self._held += fetch.end - fetch.start - total
        return first.file, fetch


def _fetch(file: OpenFile, start: int, end: int) -> mmap.mmap:
    content = mmap.mmap(-1, end - start)
    with memoryview(content) as view:
        file.read_into(start, view)
    return content
