"""How the processes of a launch write one result together: small files in the work folder.

    ranks/launch.json    rank 0's: the request, and a token that no other run has; later, which rank
                         writes which shard
    ranks/R.json         the state of rank R, written again each second while it lives
    ranks/R.lock         held by rank R while it writes; rank 0 holds the work folder's own lock

    rank 0      token ... all have answered: assigns ... writes ... all are whole: commits, says so
    the others  wait for a token, answer it ... write ... say "whole", wait for the commit

Files of an earlier launch mean nothing: their token is another. A rank is dead if it is silent and
its lock is free; or silent for long, since not all file systems share their locks.
"""

import contextlib
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import final

from streammap.common.ranks import Ranks
from streammap.errors import OutputError, StreammapError, some
from streammap.io.storage import disk as disks
from streammap.output import bound_json, work_folder
from streammap.output.fingerprint import Fingerprint
from streammap.output.ranks import heartbeat
from streammap.output.ranks.assignment import assign_shards
from streammap.output.ranks.heartbeat import Heartbeat, Peer
from streammap.output.work_folder import LOCK, RANKS, WorkFolder

START_SECONDS = 300.0
"""How long ranks wait for each other at the start."""
LEAVE_SECONDS = 10.0
_MAX_PAUSE_SECONDS = 0.5
_FORMAT = 1
_LAUNCH = "launch.json"
_N_BEATS = 3
"""Heartbeats that prove another launch to be at work."""
_ALONE = "start all ranks, or work alone (--no-ranks)"


@final
class Solo:
    """The only process. What its methods say holds for the other participants too."""

    leads = True
    """Whether this process holds the work folder, and commits the result."""

    def assign(self, sizes: Sequence[int]) -> Sequence[int]:
        """The rank that writes each shard, by the bytes that are still to be written of each."""
        return [0] * len(sizes)

    def count(self, nbytes: int) -> None:
        """This process has written so many more bytes."""

    def check(self) -> int:
        """Bytes that others have written since the last call; fails if one died or failed."""
        return 0

    def wait(self, n_read: int, check: Callable[[], None]) -> int:
        """Once this process's shards are whole: wait for the others', or for the commit.

        Args:
            n_read: Bytes that this process has read.
            check: Called while waiting; it calls `check` above.

        Returns:
            Bytes that others have read, as far as this process has to tell.
        """
        return 0


@final
class Leader:
    """Rank 0 of several. Use as a context, inside that of the work folder."""

    leads = True

    def __init__(self, work: WorkFolder, request: Fingerprint, here: Ranks) -> None:
        """Nothing is written before the context is entered."""
        self._work, self._request, self._ranks = work, request, here
        self._folder = work.path / RANKS
        self._token = secrets.token_hex(8)
        self._others = [
            Peer(self._folder, rank, _lock_of(self._folder, rank), self._token)
            for rank in range(1, here.world_size)
        ]
        self._heartbeat = Heartbeat(self._folder, 0, self._others)
        self._has_assigned, self._n_reported = False, 0

    def __enter__(self) -> "Leader":
        try:
            work_folder.make(self._folder, [])
            self._heartbeat.say(token=self._token, state="here")
            self._heartbeat.start()
            self._publish()
            self._gather()
        except BaseException as error:
            self._end(error)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end(error)

    def assign(self, sizes: Sequence[int]) -> Sequence[int]:
        """Publish which rank writes each shard."""
        owners = assign_shards(sizes, self._ranks.world_size)
        self._has_assigned = True
        self._publish(owners=owners)
        return owners

    def count(self, nbytes: int) -> None:
        """Nobody asks rank 0 for it."""

    def check(self) -> int:
        """See Solo."""
        self._heartbeat.check()
        before, self._n_reported = self._n_reported, sum(o.number("nbytes") for o in self._others)
        return self._n_reported - before

    def wait(self, n_read: int, check: Callable[[], None]) -> int:
        """Until the others' shards are whole."""

        def are_whole() -> bool:
            check()
            return all(other.state == "whole" for other in self._others)

        _until(self._heard(are_whole), None)
        return sum(other.number("n_read") for other in self._others)

    def _publish(self, **more: object) -> None:
        here = self._ranks
        launch = {"launch": here.launch, "world_size": here.world_size, "token": self._token}
        head = self._request.head(streammap_launch=_FORMAT, **launch, **more)
        bound_json.write(self._folder / _LAUNCH, head, disk=disks.current(), fsync=False)

    def _gather(self) -> None:
        have_come = self._heard(lambda: all(other.state for other in self._others))
        if not _until(have_come, START_SECONDS):
            missing = [other.rank for other in self._others if not other.state]
            raise OutputError(
                f"{self._work.path.parent}: after {START_SECONDS:.0f} s, of "
                f"{self._ranks.world_size} ranks these have not come: {some(missing)}",
                hint=_ALONE,
            )

    def _heard(self, is_done: Callable[[], bool]) -> Callable[[], bool]:
        """The same question, after a look at the others; fails if one of them did."""

        def look() -> bool:
            self._heartbeat.look()
            self._heartbeat.check()
            return is_done()

        return look

    def _end(self, error: BaseException | None) -> None:
        """Publish how the run ended, and let the others leave first: they have files open."""
        have_left = False
        with contextlib.suppress(OSError):
            self._heartbeat.say(**_ending(error, "committed"))
            if error is None or isinstance(error, Exception):
                have_left = _until(self._have_left, LEAVE_SECONDS)
        self._heartbeat.end()
        if error is not None and self._has_assigned:
            work = self._work  # others may have made something durable
            work.keep_on_exit = work.keep_on_exit or work.is_resumable or not have_left

    def _have_left(self) -> bool:
        self._heartbeat.look()
        return all(o.state in ("", "left", "failed") or o.is_gone for o in self._others)


@final
class Follower:
    """Any rank but 0. Use as a context: it is entered once rank 0 has assigned the shards."""

    leads = False

    def __init__(self, work: WorkFolder, request: Fingerprint, here: Ranks, result: Path) -> None:
        """Nothing is written before rank 0 has published its token."""
        self._work, self._request, self._ranks, self._result = work, request, here, result
        self._folder = work.path / RANKS
        self._leaders: list[Peer] = []
        """Rank 0 once its token is answered; a later launch's takes its place."""
        self._heartbeat = Heartbeat(self._folder, here.rank, self._leaders)
        self._lock: int | None = None
        self._owners: tuple[int, ...] = ()

    def __enter__(self) -> "Follower":
        try:
            self._await_assignment()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise
        return self

    def _await_assignment(self) -> None:
        watch = _ForeignLaunch(self._folder)

        def has_assigned() -> bool:
            self._heartbeat.look()
            self._heartbeat.check()
            launch = heartbeat.read(self._folder / _LAUNCH)
            if launch is not None and not self._is_ours(launch):
                watch.check(launch)
                launch = None
            return launch is not None and self._answered(launch)

        if not _until(has_assigned, START_SECONDS):
            raise OutputError(
                f"{self._work.path.parent}: rank 0 has not come in {START_SECONDS:.0f} s",
                hint=_ALONE,
            )

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._heartbeat.end()
        for leader in self._leaders:
            with contextlib.suppress(OSError):
                self._heartbeat.say(token=leader.token, **_ending(error, "left"))
        self._release()

    def assign(self, sizes: Sequence[int]) -> Sequence[int]:
        """As rank 0 has published it."""
        return self._owners

    def count(self, nbytes: int) -> None:
        """See Solo."""
        self._heartbeat.count(nbytes)

    def check(self) -> int:
        """Only rank 0 hears how far the others are."""
        self._heartbeat.check()
        return 0

    def wait(self, n_read: int, check: Callable[[], None]) -> int:
        """Until rank 0 has committed."""
        self._heartbeat.say(state="whole", n_read=n_read)
        self._release()

        def has_committed() -> bool:
            self._heartbeat.look()
            if any(leader.state == "committed" for leader in self._leaders):
                return True
            try:
                check()
            except OutputError:
                # This rank may have been suspended while rank 0 waited for it to leave.
                if self._folder.exists() or not self._result.is_file():
                    raise
                return True
            return False

        _until(has_committed, None)
        return 0

    def _is_ours(self, launch: Mapping[str, object]) -> bool:
        here = self._ranks
        named = launch.get("launch"), launch.get("world_size"), launch.get("streammap_launch")
        return named == (here.launch, here.world_size, _FORMAT)

    def _answered(self, launch: Mapping[str, object]) -> bool:
        """Answer a new token; whether rank 0 has assigned the shards since."""
        token, owners = launch.get("token"), launch.get("owners")
        if owners is None and not self._has_answered(token):
            self._answer(str(token), launch)
        elif isinstance(owners, list) and self._has_answered(token):
            self._owners = tuple(owners)
            return True
        return False

    def _has_answered(self, token: object) -> bool:
        return any(leader.token == token for leader in self._leaders)

    def _answer(self, token: str, launch: Mapping[str, object]) -> None:
        path = _lock_of(self._folder, self._ranks.rank)
        if self._lock is not None and not work_folder.is_at(self._lock, path):
            self._release()  # an earlier rank 0 has removed the file
        if self._lock is None:
            try:
                self._lock = work_folder.take(path)
            except FileNotFoundError:
                return  # rank 0 has ended
            if self._lock is None:
                return  # a rank of an earlier launch has not ended yet
        is_first = not self._leaders
        self._leaders[:] = [Peer(self._folder, 0, self._work.path / LOCK, token)]
        changes = self._request.changes(launch)
        if changes is not None:
            raise OutputError(
                f"{self._work.path.parent}: rank {self._ranks.rank} was asked for something else "
                f"than rank 0: {changes}",
                hint="start all ranks with the same command, and let all see the same source",
            )
        self._heartbeat.say(token=token, state="here")
        if is_first:
            self._heartbeat.start()

    def _release(self) -> None:
        if self._lock is not None:
            work_folder.release(self._lock)
            self._lock = None


Participant = Solo | Leader | Follower


@contextlib.contextmanager
def join(
    work: WorkFolder, request: Fingerprint, here: Ranks, result: Path
) -> Iterator[Participant]:
    """Take part in a run, alone or with others.

    Args:
        work: Locked inside, unless another process leads.
        result: A file that is there once rank 0 has committed.

    Raises:
        OutputError: another run is at work there, or a rank does not come.
    """
    if here.rank:
        with Follower(work, request, here, result) as follower:
            yield follower
        return
    with work:
        _check_orphans(work, here)
        if here.world_size == 1:
            yield Solo()
            return
        with Leader(work, request, here) as leader:
            yield leader


@final
class _ForeignLaunch:
    """Whether another launch is at work in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._beats: set[object] = set()
        self._token: object = None

    def check(self, launch: Mapping[str, object]) -> None:
        """Refuse to wait if it is: the rank 0 of this launch won't get the folder.

        Raises:
            OutputError: another launch's heart beats.
        """
        if launch.get("token") != self._token:
            self._token = launch.get("token")
            self._beats.clear()
        leader = heartbeat.read(self._folder / "0.json")
        if leader is not None and leader.get("token") == self._token:
            self._beats.add(leader.get("beat"))
        if len(self._beats) > _N_BEATS:
            raise OutputError(
                f"{self._folder.parent.parent}: another launch is writing there",
                hint="wait until it is done, or stop it",
            )


def _check_orphans(work: WorkFolder, here: Ranks) -> None:
    """Refuse to begin while a rank of a launch whose rank 0 died still writes."""
    for path in sorted((work.path / RANKS).glob("*.lock")):
        name = path.name.removesuffix(".lock")
        if not name.isdecimal() or 0 < int(name) < here.world_size:
            continue  # a rank of this launch, or one that must wait for its token
        if not work_folder.is_free(path):
            work.keep_on_exit = True  # it is in use
            raise OutputError(
                f"{work.path.parent}: rank {name} of an earlier launch is writing there",
                hint="wait until it has ended, or stop it",
            )


def _ending(error: BaseException | None, success: str) -> dict[str, object]:
    """The last state that a rank publishes."""
    if error is None:
        return {"state": success}
    if isinstance(error, StreammapError):
        return {"state": "failed", "error": error.message, "hint": error.hint}
    why = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error) or repr(error)
    return {"state": "failed", "error": why}


def _lock_of(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.lock"


def _until(is_done: Callable[[], bool], seconds: float | None) -> bool:
    """Poll with growing pauses; whether it is done before time is up."""
    started, pause = time.monotonic(), 0.01
    while not is_done():
        if seconds is not None and time.monotonic() - started > seconds:
            return False
        time.sleep(pause)
        pause = min(1.5 * pause, _MAX_PAUSE_SECONDS)
    return True
