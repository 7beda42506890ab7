"""A result that goes elsewhere, shard by shard: made here, sent, and removed here again.

Each shard is made as a file of its own in a folder of this machine (the spool), by the same means
as any result, so that a run that was stopped goes on in the middle of it. While the next one is
made, the last one is sent: two shards are here at most. What was sent is noted in `sent.json`:

    {"request": {...}, "files": {"model-00001-of-00002.safetensors":
        {"nbytes": 4096, "version": "...", "tensors": {"wte.weight": "cbf43926"}}}}

Shards come first, then what goes along, the index and config.json last: before that nothing there
looks like a model. A source tensor that shards share is read for each of them.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from streammap.common.events import Event, Listener, Started, Wrote
from streammap.common.version import VERSION
from streammap.engine.devices import DeviceChoice
from streammap.engine.memory import Memory
from streammap.errors import CheckpointError, OutputError
from streammap.io.json_files import read_json
from streammap.io.storage.base import Sink
from streammap.output import (
    commit,
    fingerprint,
    record,
    side_files,
    side_list,
    transaction,
)
from streammap.output import (
    shards as layout,
)
from streammap.output.options import OutputOptions
from streammap.output.shards import Shard
from streammap.output.transaction import RunResult
from streammap.planning import map_file
from streammap.planning.plan import Plan

_SENT = "sent.json"


def spool_of(label: str) -> Path:
    """The spool of an output: the same for the same output, so that a run can go on."""
    base = os.environ.get("STREAMMAP_SPOOL")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) if base else Path(cache) / "streammap" / "outbox"
    return folder / hashlib.sha256(label.encode()).hexdigest()[:16]


def send(
    plan: Plan,
    where: OutputOptions,
    sink: Sink,
    shards: Sequence[Shard],
    means: tuple[Memory, DeviceChoice],
    listener: Listener,
) -> RunResult:
    """Make a result and send it; `where.path` is the spool.

    Raises:
        OutputError: the place is taken, or can't be written to; a spool of another request.
        CheckpointError: a source changed, or can't be read.
    """
    spool = where.path
    request = fingerprint.request_of(
        plan, shards, max_shard_nbytes=where.max_shard_nbytes, version=VERSION
    )
    named = {"content": request.content, "formulas": request.formulas, "to": sink.label}
    notes = _Sent(spool / _SENT, json.loads(json.dumps(named)))
    if where.restart:
        notes.forget()
    notes.load()
    there = sink.names()
    for name in notes.lost(there):
        notes.files.pop(name)
    _check_place(where, sink, there, notes)
    notes.begin()
    listener(
        Started(
            len(plan.targets),
            plan.nbytes,
            sum(slot.spec.nbytes for s in shards if s.name in notes.files for slot in s.slots),
        )
    )
    run = _UploadTransaction(plan, where, sink, means, listener, notes)
    done = run.shards(shards)
    _finish(plan, sink, shards, notes, is_file=sink.file is not None)
    notes.forget()
    return done


def _check_place(
    where: OutputOptions, sink: Sink, there: Mapping[str, str], notes: "_Sent"
) -> None:
    """Refuse what is there already; with `overwrite`, take away what makes it look whole."""
    if sink.file is not None:
        there = {name: version for name, version in there.items() if name == sink.file}
    others = [name for name in there if name not in notes.files and not sink.is_harmless(name)]
    if not others:
        return
    if not where.overwrite and not notes.is_resumed:
        raise OutputError(f"{sink.label}: is there already", hint="pass --overwrite to replace it")
    globs = (
        (*commit.STALE, (*map_file.NAMES, record.NAME)) if sink.file is None else ((sink.file,),)
    )
    matching = (
        [n for n in others if any(fnmatch.fnmatchcase(n, g) for g in group)] for group in globs
    )
    sink.remove(list(dict.fromkeys(name for group in matching for name in group)))


@final
class _UploadTransaction:
    """Makes shards, and sends each while the next one is made."""

    def __init__(
        self,
        plan: Plan,
        where: OutputOptions,
        sink: Sink,
        means: tuple[Memory, DeviceChoice],
        listener: Listener,
        notes: "_Sent",
    ) -> None:
        self._plan, self._where, self._sink = plan, where, sink
        self._means, self._listener, self._notes = means, listener, notes

    def shards(self, shards: Sequence[Shard]) -> RunResult:
        """All that were not sent before."""
        n_read = n_resumed = resumed_nbytes = 0
        for shard in shards:
            if shard.name in self._notes.files:
                n_resumed += len(shard.slots)
                resumed_nbytes += shard.nbytes
        with ThreadPoolExecutor(1, "streammap-send") as pool:
            sending: Future[None] | None = None
            for shard in shards:
                if shard.name in self._notes.files:
                    continue
                done = self._make(shard)
                n_read += done.n_read
                n_resumed += done.n_resumed
                resumed_nbytes += done.resumed_nbytes
                if sending is not None:
                    sending.result()
                sending = pool.submit(self._send, shard.name)
            if sending is not None:
                sending.result()
        n_bytes = sum(shard.nbytes for shard in shards)
        n = len(self._plan.targets)
        return RunResult(n, len(shards), n_bytes, n_read, n_resumed, resumed_nbytes)

    def _make(self, shard: Shard) -> RunResult:
        """One shard, as a result of its own."""
        targets = {slot.key: self._plan.targets[slot.key] for slot in shard.slots}
        part = replace(self._plan, targets=targets, levels=(), request=None)
        path = self._where.path / shard.name
        if path.exists() and record.beside(path).exists():  # made, and not sent before the end
            n = len(shard.slots)
            return RunResult(n, 1, shard.nbytes, 0, n, shard.nbytes)
        where = replace(self._where, path=path, overwrite=True, restart=False)

        def told(event: Event) -> None:
            if isinstance(event, Wrote):
                self._listener(event)

        return transaction.make(part, where, [shard], self._means, told)

    def _send(self, name: str) -> None:
        path = self._where.path / name
        content = read_json(record.beside(path))
        tensors = {key: entry["crc32"] for key, entry in _table(content["tensors"]).items()}
        nbytes = path.stat().st_size
        version = self._sink.put(name, path)
        self._notes.add(name, nbytes, version, tensors)
        path.unlink()
        record.beside(path).unlink()


def _finish(
    plan: Plan, sink: Sink, shards: Sequence[Shard], notes: "_Sent", *, is_file: bool
) -> None:
    """What goes along, and in the end what makes it a model."""
    small = _small(plan, sink, shards) if not is_file else {}
    if is_file and plan.levels and sink.file is not None:
        small[map_file.beside(Path(sink.file)).name] = map_file.encode(plan.levels)
    small |= {name: content for name, content in sink.extras() if not is_file}
    sizes = {shard.name: notes.nbytes(shard.name) for shard in shards}
    sizes |= {name: len(content) for name, content in small.items()}
    tensors = (
        (slot.key, shard.name, int(notes.crc(shard.name, slot.key), 16))
        for shard in shards
        for slot in shard.slots
    )
    name = record.beside(Path(sink.file)).name if sink.file else record.NAME
    small[name] = b"".join(record.encode(plan, VERSION, sizes, tensors))
    sink.put_all({name: small[name] for name in commit.ordered(tuple(small))})


def _small(plan: Plan, sink: Sink, shards: Sequence[Shard]) -> dict[str, bytes]:
    along = side_files.copied(plan.side)
    found = side_files.contents(plan, along)
    for name, path in along.items():
        found.setdefault(name, path.read_bytes())
    for name in side_list.elsewhere(plan.side):
        if name not in found and plan.side is not None:
            found[name] = side_list.fetch(plan.side, name)
    if len(shards) > 1:
        found[layout.INDEX] = layout.index(shards)
    return found


@final
class _Sent:
    """What was sent so far, on the disk after each file."""

    def __init__(self, path: Path, request: Mapping[str, object]) -> None:
        self._path, self._request = path, request
        self.files: dict[str, dict[str, Any]] = {}
        self.is_resumed = False
        """Whether an earlier run was to do the same."""

    def load(self) -> None:
        """Take over what an earlier run noted.

        Raises:
            OutputError: it was for another request.
        """
        if not self._path.is_file():
            return
        try:
            found = read_json(self._path)
            request, files = found["request"], _table(found["files"])
        except (CheckpointError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self._path}: no notes of a run: {error}", hint="pass --restart to begin anew"
            ) from error
        if request == self._request:
            self.files, self.is_resumed = files, True
        elif files:
            raise OutputError(
                f"{self._path.parent}: an earlier run to the same place asked for something "
                f"else, and has sent {len(files)} files",
                hint="run its command again to end it, or pass --restart to begin anew",
            )
        else:
            self.forget()

    def begin(self) -> None:
        """Note that a run is on its way."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def lost(self, there: Mapping[str, str]) -> list[str]:
        """Files that were sent and are not there any more, or are others now."""
        return [name for name, f in self.files.items() if there.get(name) != f["version"]]

    def add(self, name: str, nbytes: int, version: str, tensors: Mapping[str, str]) -> None:
        """Note a file that was sent."""
        self.files[name] = {"nbytes": nbytes, "version": version, "tensors": dict(tensors)}
        self._write()

    def nbytes(self, name: str) -> int:
        """A file's size."""
        found = self.files[name]["nbytes"]
        assert isinstance(found, int)
        return found

    def crc(self, name: str, key: str) -> str:
        """A tensor's CRC-32, in hexadecimal."""
        tensors = self.files[name]["tensors"]
        assert isinstance(tensors, dict)
        return str(tensors[key])

    def forget(self) -> None:
        """Remove the spool."""
        self.files = {}
        with contextlib.suppress(OSError):
            for path in sorted(self._path.parent.rglob("*"), reverse=True):  # files first
                path.unlink() if not path.is_dir() else path.rmdir()
            self._path.parent.rmdir()

    def _write(self) -> None:
        content = json.dumps({"request": self._request, "files": self.files})
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, delete=False) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(file.name).replace(self._path)


def _table(found: object) -> dict[str, dict[str, Any]]:
    if not isinstance(found, dict):
        raise TypeError(f"a table is expected, found {type(found).__name__}")
    return found
