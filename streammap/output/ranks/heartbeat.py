"""What a rank says of itself, and hears of others: a small file for each, in the work folder."""

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

from streammap.errors import OutputError
from streammap.output import journal, work_folder

BEAT_SECONDS = 1.0
GONE_SECONDS = 5.0
"""Silence of a dead rank, whose lock is free."""
SILENT_SECONDS = 300.0
"""Silence of a rank that is taken for dead whatever its lock says."""
_MAX_NBYTES = 100_000_000


@final
class Heartbeat:
    """What a rank says of itself: its file, written again and again by a thread."""

    def __init__(self, folder: Path, rank: int, look: Callable[[], None]) -> None:
        """`look` is called as often, to look at the others."""
        self._path, self._look = folder / f"{rank}.json", look
        self._said: dict[str, object] = {}
        self._beat = self._nbytes = 0
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streammap-rank", daemon=True)

    def say(self, **news: object) -> None:
        """Say this from now on, beside what was said before."""
        with self._lock:
            self._said |= news
            self._beat += 1
            _write(self._path, {**self._said, "beat": self._beat, "nbytes": self._nbytes})

    def count(self, nbytes: int) -> None:
        """Say with the next words that so many more bytes are written."""
        with self._lock:
            self._nbytes += nbytes

    def start(self) -> None:
        """Go on by itself."""
        self._thread.start()

    def end(self) -> None:
        """Fall silent."""
        self._ends.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk: the work itself ends with that
                self.say()
            self._look()


@final
class Peer:
    """What is heard of another rank."""

    def __init__(self, folder: Path, rank: int, lock: Path, token: str) -> None:
        self.rank, self.token = rank, token
        self._path, self._lock = folder / f"{rank}.json", lock
        self._beat: object = None
        self._at = time.monotonic()
        self.state = ""
        """ "" where it has not come yet."""
        self.said: Mapping[str, object] = {}

    def look(self) -> None:
        """Hear what it says now."""
        found = read(self._path)
        if found is not None and found.get("token") == self.token:
            if found.get("beat") != self._beat:
                self._beat, self._at = found.get("beat"), time.monotonic()
            self.state, self.said = str(found.get("state")), found

    def number(self, name: str) -> int:
        """A number that it says."""
        found = self.said.get(name)
        return found if isinstance(found, int) else 0

    @property
    def is_gone(self) -> bool:
        """Whether it died."""
        silent = time.monotonic() - self._at
        return silent > SILENT_SECONDS or (
            silent > GONE_SECONDS and work_folder.is_free(self._lock)
        )

    def error(self, named: Path) -> OutputError | None:
        """Why there is no result, where that is up to this rank."""
        if self.state == "failed":
            told, hint = str(self.said.get("error")), self.said.get("hint")
            told = told if told.startswith("rank ") else f"rank {self.rank}: {told}"
            return OutputError(told, hint=None if hint is None else str(hint))
        if self.state == "here" and self.is_gone:
            return OutputError(
                f"{named}: rank {self.rank} died", hint="start all ranks again: they go on"
            )
        return None


def _write(path: Path, content: Mapping[str, object]) -> None:
    replace(path, journal.encoded(content))


def replace(path: Path, content: bytes) -> None:
    """Let a file have this content, all at once."""
    part = path.with_name(f"{path.name}.partial")
    part.write_bytes(content)
    part.replace(path)


def read(path: Path) -> Mapping[str, object] | None:
    """What a file says; None where it is not there, or makes no sense."""
    try:
        descriptor = work_folder.opened(path)
        with open(descriptor, "rb") as file:  # noqa: PTH123  a descriptor, so that no link is followed
            return journal.parsed(file.read(_MAX_NBYTES))
    except OSError:
        return None
