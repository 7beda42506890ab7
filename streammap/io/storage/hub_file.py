"""Files of a repository: by ranges, or through the client's download into its cache."""

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from streammap.common import own
from streammap.errors import CheckpointError
from streammap.io.storage.base import OpenFile, Reader, Reading, Stat
from streammap.io.storage.hub_client import Client
from streammap.io.storage.local import LocalFile
from streammap.io.storage.retry import RetryPolicy, TransientError

if TYPE_CHECKING:
    from torch import Tensor

    from streammap.io.storage.mapping import MappedPart

_N_AHEAD = 2
"""How many shards are fetched before they are needed, at most."""
_POLL_SECONDS = 0.2
_STOP_SECONDS = 3.0


@final
class RangeFile(OpenFile):
    """A file that is read by ranges. A commit does not change, and each answer is checked."""

    def __init__(
        self, client: Client, name: str, commit: str, stat: Stat, seen: dict[str, str]
    ) -> None:
        """Connect to nothing yet.

        Args:
            seen: The etags of answers so far, by file and kind of answer.
        """
        self._client, self._name, self._stat = client, name, stat
        self._where = f"{client.repo}@{commit[:12]}/{name}"
        self._url = client.url(name, commit)
        self._storage: str | None = None
        """Where a redirect led: a link that is valid for some time and saves a request each."""
        self._seen = seen

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `offset` on; retries ask for the rest only.

        Raises:
            CheckpointError: the Hub refuses, fails too often, or has other bytes now.
        """
        patience, n_done = RetryPolicy(self._where, self._client.cancelled), 0
        while n_done < len(view):
            n_before = n_done
            try:
                for piece in self._pieces(offset + n_done, len(view) - n_done):
                    view[n_done : n_done + len(piece)] = piece
                    n_done += len(piece)
                failure = TransientError("an answer without bytes")
            except TransientError as error:
                failure = error
            if n_done < len(view):
                if n_done > n_before:
                    patience.progress()
                patience.wait(failure, f" at byte {offset + n_done}")

    def cancel(self) -> None:
        """Let waiting reads end in an error."""
        self._client.cancelled.set()

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "_storage": None}  # it may be signed: no secret goes into a pickle

    def _pieces(self, start: int, nbytes: int) -> Iterator[bytes]:
        url, headers = self._storage or self._url, dict(self._client.headers)
        if self._storage is not None:
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        headers["Range"] = f"bytes={start}-{start + nbytes - 1}"
        try:
            with self._client.stream(url, headers) as response:
                self._check(response, start)
                if response.history:
                    self._storage = str(response.url)
                for piece in response.iter_bytes():
                    self._client.check_cancelled()
                    yield piece[:nbytes]
                    nbytes -= len(piece)
                    if nbytes <= 0:
                        return
        except CheckpointError:
            if url == self._url or self._client.cancelled.is_set():
                raise
            # The link may have expired: ask the Hub again, which says so if it is something else.
            self._storage = None
            raise TransientError("the storage refuses") from None

    def _check(self, response: Any, start: int) -> None:
        """Refuse bytes of another range or another version of the file."""
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if response.status_code == 200:
            total = response.headers.get("Content-Length", "")
            if start:
                raise CheckpointError(
                    f"{self._where}: the server sends whole files only",
                    hint="use it without --stream",
                )
        if total.isdecimal() and int(total) != self._stat.nbytes:
            raise CheckpointError(
                f"{self._where}: {total} bytes now, it had {self._stat.nbytes} when it was opened",
                hint="open it again",
            )
        for answer in (*response.history, response):
            linked = answer.headers.get("X-Linked-Etag")
            kind = "linked" if linked else ("storage" if response.history else "own")
            if self._storage is not None and str(response.url) == self._storage:
                kind = "storage"
            etag = _plain(linked or answer.headers.get("ETag"))
            if answer.is_redirect and not linked:
                continue
            first = self._seen.setdefault(f"{self._name} {kind}", etag) if etag else ""
            if etag and first != etag:
                raise CheckpointError(
                    f"{self._where}: its content changed: etag {etag}, it was {first}",
                    hint="open it again",
                )


def _plain(etag: str | None) -> str:
    return (etag or "").removeprefix("W/").strip('"')


@dataclass(slots=True)
class _Job:
    """A download: waiting, running or done."""

    name: str
    stat: Stat
    is_wanted: bool = False
    """Whether a reader waits for it, or has read it."""
    done: threading.Event = field(default_factory=threading.Event)
    path: Path | None = None
    error: BaseException | None = None
    process: int = field(default_factory=os.getpid)
    """Whose thread runs it: a forked child has no such thread."""

    @property
    def is_lost(self) -> bool:
        """Whether it failed, or nobody runs it any more: a retry may succeed."""
        is_elsewhere = self.process != os.getpid() and not self.done.is_set()
        return self.error is not None or is_elsewhere


@final
class Downloads:
    """Downloads files of one commit into the cache, a few ahead of their use."""

    def __init__(self, client: Client, commit: str) -> None:
        """Start no download yet."""
        self._client, self._commit = client, commit
        self._jobs: dict[str, _Job] = {}
        self._expected: deque[_Job] = deque()
        self._lock = own.Lock()

    def __reduce__(self) -> tuple[type["Downloads"], tuple[Client, str]]:
        return Downloads, (self._client, self._commit)

    def expect(self, files: Mapping[str, Stat]) -> None:
        """Start fetching files that will be read, in this order.

        Raises:
            CheckpointError: the disk of the cache has no room for them.
        """
        with self._lock:
            self._expected.clear()
            new = {name: stat for name, stat in files.items() if name not in self._jobs}
            self._client.check_room(sum(stat.nbytes for stat in new.values()))
            self._expected.extend(_Job(name, stat) for name, stat in new.items())
            self._advance()

    def fetch(self, name: str, stat: Stat, revision: str | None = None) -> Path:
        """Wait for a file; returns where it is.

        Args:
            revision: The user's name for the commit, so that the cache knows it by that name too.

        Raises:
            CheckpointError: it can't be fetched.
        """
        with self._lock:
            job = self._jobs.get(name)
            if job is None or job.is_lost:
                job = next((j for j in self._expected if j.name == name), None) or _Job(name, stat)
                if job in self._expected:
                    self._expected.remove(job)
                self._start(job, revision)
            job.is_wanted = True
            self._advance()
        while not job.done.wait(_POLL_SECONDS):
            self._client.check_cancelled()
        if job.path is None:
            raise job.error or CheckpointError(f"{name}: not fetched")
        return job.path

    def cancel(self) -> None:
        """Stop all; wait a little, so that the client can remove its partial files."""
        if self._client.cancelled.is_set():
            return
        self._client.cancelled.set()
        with self._lock:
            running = [job for job in self._jobs.values() if not job.done.is_set()]
            self._expected.clear()
        until = time.monotonic() + _STOP_SECONDS
        for job in running:
            job.done.wait(max(0.0, until - time.monotonic()))

    def _advance(self) -> None:
        """Start the next downloads, up to _N_AHEAD unread ones. Called with the lock held."""
        n_ahead = sum(not job.is_wanted for job in self._jobs.values())
        while self._expected and n_ahead < _N_AHEAD:
            self._start(self._expected.popleft(), None)
            n_ahead += 1

    def _start(self, job: _Job, revision: str | None) -> None:
        self._jobs[job.name] = job
        # A daemon: the client's download only stops at its next piece, and must not delay the exit.
        threading.Thread(
            target=self._run, args=(job, revision), daemon=True, name=f"streammap-{job.name}"
        ).start()

    def _run(self, job: _Job, revision: str | None) -> None:
        try:
            path = self._client.download(job.name, revision or self._commit)
            if revision is not None and self._commit not in path.parts:  # a push came in between
                path = self._client.download(job.name, self._commit)
            self._check(path, job)
            job.path = path
        except BaseException as error:  # raised in `fetch`
            job.error = error
        job.done.set()

    def _check(self, path: Path, job: _Job) -> None:
        where = f"{self._client.repo}@{self._commit[:12]}/{job.name}"
        nbytes = path.stat().st_size
        if nbytes != job.stat.nbytes:
            raise CheckpointError(
                f"{where}: {nbytes} bytes came, the Hub said {job.stat.nbytes}",
                hint=f"remove {path} and try again",
            )
        blob = Path(os.path.realpath(path)).name
        if path.is_symlink() and job.stat.version and blob != job.stat.version:
            raise CheckpointError(
                f"{where}: its content changed: etag {blob}, it was {job.stat.version}",
                hint="open it again",
            )


@final
class CachedFile(OpenFile):
    """A file that is read in the cache, and downloaded there on first use."""

    def __init__(self, downloads: Downloads, name: str, stat: Stat) -> None:
        """Download nothing yet."""
        self._downloads, self._name, self._stat = downloads, name, stat
        self._file: LocalFile | None = None
        self._lock = own.Lock()

    @property
    def _local(self) -> LocalFile:
        with self._lock:
            if self._file is None:
                path = self._downloads.fetch(self._name, self._stat)
                status = path.stat()
                self._file = LocalFile(path, status.st_size, status.st_mtime_ns)
            return self._file

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view`; the first read waits for the download.

        Raises:
            CheckpointError: it can't be fetched or read.
        """
        self._local.read_into(offset, view)

    def reading(self, reader: Reader) -> Reading:
        """How it is read in the cache, once it is there."""
        return Reading("download", "network") if self._file is None else self._file.reading(reader)

    def map_into(self, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """Map bytes `start` to `end` of the file in the cache, unless they are to be read."""
        return self._local.map_into(start, end, part, reader)

    def part(self, start: int, end: int) -> "Tensor":
        """Bytes `start` to `end` as a tensor over the mapping."""
        return self._local.part(start, end)

    def check_unchanged(self) -> None:
        """Compare the file in the cache with what was downloaded."""
        if self._file is not None:
            self._file.check_unchanged()

    def release(self) -> None:
        """Give mapped pages back."""
        if self._file is not None:
            self._file.release()

    def cancel(self) -> None:
        """Stop the downloads."""
        self._downloads.cancel()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
