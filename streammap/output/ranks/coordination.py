"""What the processes of a launch say to each other, in small files of the work folder.

    ranks/launch.json    rank 0's: the request, and a token that no other run has; later, who makes
                         which shard
    ranks/R.json         what rank R says of itself, again each second while it lives
    ranks/R.lock         held by rank R while it works; rank 0 holds the folder's own

    rank 0      token ... all are here: deals ... works ... all are whole: commits, says so
    the others  wait for a token, answer with it ... works ... says it is whole, waits for the end

Files that an earlier launch left mean nothing: their token is another. A rank is dead where it is
silent and its lock is free; or silent for long, since not all file systems share their locks.
"""

import contextlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import final

from streammap.errors import OutputError, StreammapError, some
from streammap.output import journal, work_folder
from streammap.output.journal import Fingerprint
from streammap.output.ranks import heartbeat, launcher
from streammap.output.ranks.heartbeat import Heartbeat, Peer
from streammap.output.ranks.launcher import Ranks
from streammap.output.work_folder import LOCK, RANKS, WorkFolder

START_SECONDS = 300.0
"""How long ranks wait for each other at the start."""
LEAVE_SECONDS = 10.0
_MAX_PAUSE_SECONDS = 0.5
_FORMAT = 1
_LAUNCH = "launch.json"
_N_LIVE = 3
"""Signs of life by which another launch is known to be at work."""
_ALONE = "start all ranks, or work alone (--no-ranks)"


@final
class Leader:
    """Rank 0, or the only process. Use as a context, inside that of the work folder."""

    def __init__(self, work: WorkFolder, request: Fingerprint, here: Ranks) -> None:
        """Nothing is written when there are no others."""
        self._work, self._request, self._ranks = work, request, here
        self._folder = work.path / RANKS
        self.is_alone = here.world_size == 1
        token = secrets.token_hex(8)
        self._others = [
            Peer(self._folder, rank, _lock_of(self._folder, rank), token)
            for rank in range(1, here.world_size)
        ]
        self._voice = Heartbeat(self._folder, 0, self._look)
        self._head: dict[str, object] = {
            "launch": here.launch,
            "world_size": here.world_size,
            "token": token,
        }
        self._token, self._has_dealt, self._n_told = token, False, 0
        self._error: OutputError | None = None
        self._looking = threading.Lock()

    def __enter__(self) -> "Leader":
        self._check_orphans()
        if not self.is_alone:
            try:
                work_folder.make(self._folder, [])
                self._voice.say(token=self._token, state="here")
                self._voice.start()
                self._publish()
                self._gather()
            except BaseException as error:
                self._end(error)
                raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self.is_alone:
            self._end(error)

    def deal(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Say which rank makes each shard.

        Args:
            sizes: Bytes of each that are to be written.
        """
        owners = launcher.deal(sizes, self._ranks.world_size)
        if not self.is_alone:
            self._has_dealt = True
            self._publish(owners=owners)
        return owners

    def check(self) -> None:
        """Fail where another rank did.

        Raises:
            OutputError: naming it.
        """
        if self._error is not None:
            raise self._error

    def news(self) -> int:
        """Bytes that the others have written since the last time."""
        before, self._n_told = self._n_told, sum(other.number("nbytes") for other in self._others)
        return self._n_told - before

    def wait(self, tell: Callable[[], None]) -> int:
        """Wait until all are whole; gives the bytes that they have read.

        Raises:
            OutputError: one died, or failed.
        """

        def is_done() -> bool:
            tell()
            return all(other.state == "whole" for other in self._others)

        self._until(is_done, None)
        return sum(other.number("n_read") for other in self._others)

    def _check_orphans(self) -> None:
        """Refuse to begin while a rank of a launch whose rank 0 died still writes."""
        for path in sorted(self._folder.glob("*.lock")):
            name = path.name.removesuffix(".lock")
            if not name.isdecimal() or 0 < int(name) < self._ranks.world_size:
                continue  # of this launch, or else it gets no token
            if not work_folder.is_free(path):
                self._work.keeps = True  # what is in it is not this run's
                raise OutputError(
                    f"{self._work.path.parent}: rank {name} of an earlier launch is writing there",
                    hint="wait until it has ended, or stop it",
                )

    def _publish(self, **more: object) -> None:
        line = self._request.line(streammap_launch=_FORMAT, **self._head, **more)
        heartbeat.replace(self._folder / _LAUNCH, line)

    def _gather(self) -> None:
        if not self._until(lambda: all(other.state for other in self._others), START_SECONDS):
            missing = [other.rank for other in self._others if not other.state]
            raise OutputError(
                f"{self._work.path.parent}: after {START_SECONDS:.0f} s, of "
                f"{self._ranks.world_size} ranks these have not come: {some(missing)}",
                hint=_ALONE,
            )

    def _until(self, is_done: Callable[[], bool], seconds: float | None) -> bool:
        def look() -> bool:
            self._look()
            self.check()
            return is_done()

        return _until(look, seconds)

    def _look(self) -> None:
        with self._looking:
            for other in self._others:
                other.look()
                if self._error is None:
                    self._error = other.error(self._work.path.parent)

    def _end(self, error: BaseException | None) -> None:
        """Tell the others how it ended, and let them go first: they have files open."""
        has_left = False
        with contextlib.suppress(OSError):
            self._voice.say(**_ending(error, "committed"))
            if error is None or isinstance(error, Exception):
                has_left = _until(self._have_left, LEAVE_SECONDS)
        self._voice.end()
        if error is not None and self._has_dealt:
            is_kept = journal.is_there(self._work.path)
            self._work.keeps = self._work.keeps or is_kept or not has_left

    def _have_left(self) -> bool:
        for other in self._others:
            other.look()
        return all(o.state in ("", "left", "failed") or o.is_gone for o in self._others)


@final
class Follower:
    """A rank but 0. Use as a context: it is entered when rank 0 has dealt."""

    def __init__(self, work: WorkFolder, request: Fingerprint, here: Ranks) -> None:
        """Nothing is written before rank 0 asks who is there."""
        self._work, self._request, self._ranks = work, request, here
        self._folder = work.path / RANKS
        self._voice = Heartbeat(self._folder, here.rank, self._look)
        self._lead: Peer | None = None
        self._lock: int | None = None
        self._error: OutputError | None = None
        self._looking = threading.Lock()
        self.owners: tuple[int, ...] = ()
        """The rank that makes each shard."""

    def __enter__(self) -> "Follower":
        watch = _ForeignLaunch(self._folder)

        def is_dealt() -> bool:
            self._look()
            self.check()
            found = heartbeat.read(self._folder / _LAUNCH)
            if found is not None and not self._is_ours(found):
                watch.check(found)
                found = None
            return found is not None and self._answered(found)

        try:
            has_come = _until(is_dealt, START_SECONDS)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        if not has_come:
            late = OutputError(
                f"{self._work.path.parent}: rank 0 has not come in {START_SECONDS:.0f} s",
                hint=_ALONE,
            )
            self.__exit__(type(late), late, None)
            raise late
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._voice.end()
        if self._lead is not None:
            with contextlib.suppress(OSError):
                self._voice.say(token=self._lead.token, **_ending(error, "left"))
        self._release()

    def check(self) -> None:
        """Fail where rank 0 did.

        Raises:
            OutputError: saying why.
        """
        if self._error is not None:
            raise self._error

    def count(self, nbytes: int) -> None:
        """Say that so many more bytes are written."""
        self._voice.count(nbytes)

    def wait(self, n_read: int, result: Path) -> None:
        """Say that all shards of this rank are whole, and wait for rank 0 to commit.

        Args:
            result: A file that is there once it has.

        Raises:
            OutputError: it could not.
        """
        self._voice.say(state="whole", n_read=n_read)
        self._release()

        def is_over() -> bool:
            self._look()
            lead = self._lead
            if lead is not None and lead.state == "committed":
                return True
            if self._error is not None and not self._folder.exists() and result.is_file():
                return True  # this rank was asleep while rank 0 waited for it
            self.check()
            return False

        _until(is_over, None)

    def _is_ours(self, found: Mapping[str, object]) -> bool:
        here = self._ranks
        named = found.get("launch"), found.get("world_size"), found.get("streammap_launch")
        return named == (here.launch, here.world_size, _FORMAT)

    def _answered(self, found: Mapping[str, object]) -> bool:
        """Answer a token that is new; whether rank 0 has dealt since this one did."""
        token, owners = found.get("token"), found.get("owners")
        if owners is None and not self._has_answered(token):
            self._answer(str(token), found)
        elif isinstance(owners, list) and self._has_answered(token):
            self.owners = tuple(owners)
            return True
        return False

    def _has_answered(self, token: object) -> bool:
        return self._lead is not None and self._lead.token == token

    def _answer(self, token: str, found: Mapping[str, object]) -> None:
        path = _lock_of(self._folder, self._ranks.rank)
        if self._lock is not None and not work_folder.is_at(self._lock, path):
            self._release()  # an earlier rank 0 has removed it
        if self._lock is None:
            try:
                self._lock = work_folder.take(path)
            except FileNotFoundError:
                return  # rank 0 has ended
            if self._lock is None:
                return  # a rank of an earlier launch has not ended yet
        is_first = self._lead is None
        self._lead = Peer(self._folder, 0, self._work.path / LOCK, token)
        told = self._request.changes(found)
        if told is not None:
            raise OutputError(
                f"{self._work.path.parent}: rank {self._ranks.rank} was asked for something else "
                f"than rank 0: {told}",
                hint="start all ranks with the same command, and let all see the same source",
            )
        self._voice.say(token=token, state="here")
        if is_first:
            self._voice.start()

    def _look(self) -> None:
        with self._looking:
            if self._lead is not None:
                self._lead.look()
                if self._error is None:
                    self._error = self._lead.error(self._work.path.parent)

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


@final
class _ForeignLaunch:
    """Whether another launch is at work in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: set[object] = set()
        self._token: object = None

    def check(self, found: Mapping[str, object]) -> None:
        """Refuse to wait where it is: this launch's rank 0 won't get the folder.

        Raises:
            OutputError: another launch gives signs of life.
        """
        if found.get("token") != self._token:
            self._token = found.get("token")
            self._seen.clear()
        said = heartbeat.read(self._folder / "0.json")
        if said is not None and said.get("token") == self._token:
            self._seen.add(said.get("beat"))
        if len(self._seen) > _N_LIVE:
            raise OutputError(
                f"{self._folder.parent.parent}: another launch is writing there",
                hint="wait until it is done, or stop it",
            )


def _ending(error: BaseException | None, well: str) -> dict[str, object]:
    """What a rank says at its end."""
    if error is None:
        return {"state": well}
    if isinstance(error, StreammapError):
        return {"state": "failed", "error": error.message, "hint": error.hint}
    told = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or repr(error)
    return {"state": "failed", "error": told}


def _lock_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.lock"


def _until(is_done: Callable[[], bool], seconds: float | None) -> bool:
    """Ask again and again, with longer pauses; whether it is done before time is up."""
    started, pause = time.monotonic(), 0.01
    while not is_done():
        if seconds is not None and time.monotonic() - started > seconds:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, _MAX_PAUSE_SECONDS)
    return True
