"""States of ranks: each writes its own to a file of the work folder, and reads the others'."""

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import final

from streammap.errors import OutputError
from streammap.io.storage import disk as disks
from streammap.output import bound_json, work_folder

BEAT_SECONDS = 1.0
GONE_SECONDS = 5.0
"""Silence after which a rank whose lock is free is dead."""
SILENT_SECONDS = 300.0
"""Silence after which a rank is dead whatever its lock says."""


@final
class Peer:
    """Another rank, by its file."""

    def __init__(self, folder: Path, rank: int, lock: Path, token: str) -> None:
        self.rank, self.token = rank, token
        self._folder, self._lock = folder, lock
        self._beat: object = None
        self._seen_at = time.monotonic()
        self.state = ""
        """Empty as long as it has not come."""
        self.said: Mapping[str, object] = {}

    def look(self) -> None:
        """Read its file again."""
        said = read(self._folder / f"{self.rank}.json")
        if said is not None and said.get("token") == self.token:
            if said.get("beat") != self._beat:
                self._beat, self._seen_at = said.get("beat"), time.monotonic()
            self.state, self.said = str(said.get("state")), said

    def number(self, name: str) -> int:
        """An entry that is a number; 0 where it is missing."""
        value = self.said.get(name)
        return value if isinstance(value, int) else 0

    @property
    def is_gone(self) -> bool:
        """Whether it died."""
        silent = time.monotonic() - self._seen_at
        return silent > SILENT_SECONDS or (
            silent > GONE_SECONDS and work_folder.is_free(self._lock)
        )

    @property
    def error(self) -> OutputError | None:
        """The error that it ended with, or that it died; None while it is at work."""
        if self.state == "failed":
            why, hint = str(self.said.get("error")), self.said.get("hint")
            why = why if why.startswith("rank ") else f"rank {self.rank}: {why}"
            return OutputError(why, hint=None if hint is None else str(hint))
        if self.state == "here" and self.is_gone:
            output = self._folder.parent.parent
            return OutputError(
                f"{output}: rank {self.rank} died", hint="start all ranks again: they resume"
            )
        return None


@final
class Heartbeat:
    """This rank's state, which a thread writes again each second; it looks at others as often."""

    def __init__(self, folder: Path, rank: int, peers: list[Peer]) -> None:
        """Nothing is written before something is said."""
        self._path, self._peers = folder / f"{rank}.json", peers
        self._said: dict[str, object] = {}
        self._beat = self._nbytes = 0
        self._error: OutputError | None = None
        self._saying, self._looking = threading.Lock(), threading.Lock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="streammap-rank", daemon=True)

    def say(self, **entries: object) -> None:
        """Write the state now, with these entries added to the earlier ones."""
        with self._saying:
            self._said |= entries
            self._beat += 1
            state = {**self._said, "beat": self._beat, "nbytes": self._nbytes}
            bound_json.write(self._path, state, disk=disks.current(), fsync=False)

    def count(self, nbytes: int) -> None:
        """Add to the bytes written that the next beat tells."""
        with self._saying:
            self._nbytes += nbytes

    def look(self) -> None:
        """Read the others' states."""
        with self._looking:  # the thread that writes or waits comes here too
            for peer in self._peers:
                peer.look()
                self._error = self._error or peer.error

    def check(self) -> None:
        """Fail if another rank did.

        Raises:
            OutputError: naming it.
        """
        if self._error is not None:
            raise self._error

    def start(self) -> None:
        """Beat from now on."""
        self._thread.start()

    def end(self) -> None:
        """Stop."""
        self._ends.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._ends.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # of a full disk: the run itself will fail with it
                self.say()
            self.look()


def read(path: Path) -> Mapping[str, object] | None:
    """A rank's or a launch's file; None where it is missing, or makes no sense."""
    try:
        return bound_json.read(path)
    except OSError:
        return None
