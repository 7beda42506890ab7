"""Bytes of files elsewhere, fetched before they are asked for: several connections, fixed memory.

A run knows what it will read (read_ahead.py), so it asks for parts in the order of their use. Parts
that lie side by side in a file are fetched as one range. Each is kept until whoever asked for it
drops it, so each byte comes once. What was not asked for in time is read as without a window.
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
"""Bytes between two parts that are fetched with them, rather than with another question."""
_POLL_SECONDS = 0.5


@final
class AheadFile(OpenFile):
    """A file elsewhere that a window may have parts of."""

    def __init__(self, file: OpenFile) -> None:
        """Without a window, reads are the file's own."""
        self.inner = file
        self.window: Window | None = None

    def read_into(self, offset: int, view: memoryview, *, mapped: bool) -> None:
        """Fill `view` from the window, or from the file."""
        window = self.window
        if window is None or not window.take(self, offset, view):
            self.inner.read_into(offset, view, mapped=mapped)

    def part(self, start: int, end: int) -> "Tensor":
        """The file's own."""
        return self.inner.part(start, end)

    def check_unchanged(self) -> None:
        """The file's own."""
        self.inner.check_unchanged()

    def release(self) -> None:
        """The file's own."""
        self.inner.release()

    def cancel(self) -> None:
        """The file's own."""
        self.inner.cancel()

    def close(self) -> None:
        """The file's own."""
        self.inner.close()


@dataclass(slots=True, eq=False)
class _FetchRange:
    """Bytes that are fetched as one."""

    start: int
    end: int
    content: mmap.mmap | None = None
    """Memory of its own, which goes back at once: an allocator would keep it."""
    error: BaseException | None = None
    n_parts: int = 0
    """Parts of it that are not dropped yet."""
    done: threading.Event = field(default_factory=threading.Event)


@dataclass(slots=True, eq=False)
class PrefetchPart:
    """Bytes that were asked for."""

    file: AheadFile
    start: int
    end: int
    n_asked: int = 0
    """How often, less how often it was dropped."""
    fetched: _FetchRange | None = None
    """None while it waits."""


@final
class Window:
    """Parts of files, waiting, on their way and there. Use as a context."""

    def __init__(self, nbytes: int) -> None:
        """Hold at most `nbytes`."""
        self._nbytes = nbytes
        self._held = 0
        """Bytes of parts that wait, and of ranges that are not dropped."""
        self._parts: dict[tuple[int, int, int], PrefetchPart] = {}
        self._waiting: deque[PrefetchPart] = deque()
        self._starts: dict[int, list[tuple[int, int]]] = {}
        """File -> (start, end) of parts that wait, in order."""
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
        """Whether it is worth asking for more: in large steps, so that neighbours come together."""
        return self._held <= self._nbytes // 2

    @property
    def room(self) -> int:
        """Bytes that may be asked for."""
        return self._nbytes - self._held

    def ask(self, file: AheadFile, start: int, end: int) -> PrefetchPart | None:
        """Ask for bytes of a file; None where there is no room."""
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
        """Let what was asked for be fetched."""
        with self._changed:
            self._changed.notify_all()

    def drop(self, parts: list[PrefetchPart]) -> None:
        """Say that parts are not needed any more."""
        with self._changed:
            for part in parts:
                part.n_asked -= 1
                if part.n_asked:
                    continue
                del self._parts[(id(part.file), part.start, part.end)]
                found = part.fetched
                if found is None:
                    self._held -= part.end - part.start
                    self._starts[id(part.file)].remove((part.start, part.end))
                    continue
                found.n_parts -= 1
                if not found.n_parts:
                    found.content = None
                    self._held -= found.end - found.start

    def take(self, file: AheadFile, offset: int, view: memoryview) -> bool:
        """Fill `view` with bytes that were asked for just so; False where they were not."""
        with self._changed:
            part = self._parts.get((id(file), offset, offset + len(view)))
            while part is not None and part.fetched is None and not self._stops:
                self._changed.wait(_POLL_SECONDS)
            found = None if part is None else part.fetched
        if found is None:
            return False
        found.done.wait()
        if found.error is not None:
            raise found.error
        content = found.content
        if content is None:
            return False
        at = offset - found.start
        with memoryview(content) as whole:
            view[:] = whole[at : at + len(view)]
        return True

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._waits() and not self._stops:
                    self._changed.wait()
                if self._stops:
                    return
                file, found = self._next()
                self._changed.notify_all()
            try:
                found.content = _fetched(file.inner, found.start, found.end)
            except BaseException as error:  # raised again where the bytes are wanted
                found.error = error
            found.done.set()

    def _waits(self) -> bool:
        """Whether a part waits; those that came with others, or were dropped, are passed over."""
        while self._waiting:
            first = self._waiting[0]
            if first.fetched is None and first.n_asked:
                return True
            self._waiting.popleft()
        return False

    def _next(self) -> tuple[AheadFile, _FetchRange]:
        """The first part that waits, and those that follow it in its file."""
        first = self._waiting.popleft()
        starts = self._starts[id(first.file)]
        i = bisect.bisect_left(starts, (first.start, first.end))
        found, j, total = _FetchRange(first.start, first.end), i, 0
        while j < len(starts):
            start, end = starts[j]
            whole = max(found.end, end) - found.start
            if start > found.end + GAP_NBYTES or (j > i and whole > MAX_RANGE_NBYTES):
                break
            found.end = max(found.end, end)
            total += end - start
            part = self._parts[(id(first.file), start, end)]
            part.fetched = found
            found.n_parts += 1
            j += 1
        del starts[i:j]
        self._held += found.end - found.start - total
        return first.file, found


def _fetched(file: OpenFile, start: int, end: int) -> mmap.mmap:
    content = mmap.mmap(-1, end - start)
    with memoryview(content) as view:
        file.read_into(start, view, mapped=False)
    return content
