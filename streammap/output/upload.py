"""A result that goes elsewhere, shard by shard: written here, sent, and removed again.

Each shard is a result of one file in a folder of this machine (the spool), written by a transaction
of its own, so that a run that was stopped resumes in the middle of it. While the next one is
written, the last one is sent: at most two shards are here at a time. `sent.json` says what was
sent:

    {"request": {...}, "files": {"model-00001-of-00002.safetensors":
        {"nbytes": 4096, "crc32": "...", "version": "...", "tensors": {"wte.weight": "cbf43926"}}}}

Shards come first, then side files, the index and config.json last: before that nothing there looks
like a model. A source tensor that several shards need is read for each of them.
"""

import contextlib
import fnmatch
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from streammap.common.events import Event, Listener, Started, Wrote
from streammap.common.losses import Losses
from streammap.common.version import VERSION
from streammap.engine import crc32
from streammap.engine.checksums import Written
from streammap.engine.devices import DeviceChoice
from streammap.engine.memory import Memory
from streammap.errors import CheckpointError, OutputError
from streammap.io.storage import disk as disks
from streammap.io.storage.base import Sink
from streammap.output import (
    bound_json,
    commit,
    fingerprint,
    layout,
    losses,
    place,
    record,
    side_files,
    transaction,
    work_folder,
)
from streammap.output.layout import Shard
from streammap.output.options import OutputOptions
from streammap.output.side_files import SideFile
from streammap.output.transaction import RunResult
from streammap.planning.plan import Plan

_SENT = "sent.json"


def spool_for(label: str) -> Path:
    """The spool of an output: the same for the same output, so that a run can be resumed."""
    base = os.environ.get("STREAMMAP_SPOOL")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(base) if base else Path(cache) / "streammap" / "outbox"
    return folder / hashlib.sha256(label.encode()).hexdigest()[:16]


def run(
    plan: Plan,
    options: OutputOptions,
    sink: Sink,
    shards: Sequence[Shard],
    resources: tuple[Memory, DeviceChoice],
    listener: Listener,
) -> RunResult:
    """Write a result and send it; `options.path` is the spool.

    Raises:
        OutputError: the place is taken, or can't be written to; a spool of another request.
        CheckpointError: a source changed, or can't be read.
    """
    side = tuple(side_files.collect(plan, single=sink.file))  # refused before anything is sent
    folder = sink.label if sink.file is None else sink.label.rpartition("/")[0]
    names = [*(shard.name for shard in shards), *(file.name for file in side)]
    place.check_urls(plan, folder, names)
    request = fingerprint.of_result(
        plan, shards, max_shard_nbytes=options.save.max_shard_nbytes, version=VERSION
    )
    named = {"content": request.content, "formulas": request.formulas, "to": sink.label}
    sent = _Sent(options.path / _SENT, json.loads(json.dumps(named)))
    if options.save.restart:
        sent.forget()
    sent.load()
    existing = sink.names()
    sent.drop_lost(existing)
    _check_place(options, sink, existing, sent)
    sent.begin()
    upload = _Upload(plan, options, sink, shards, resources, listener, sent)
    upload.start()
    counters = upload.send_shards()
    upload.complete(side)
    sent.forget()
    return counters


def _check_place(
    options: OutputOptions, sink: Sink, existing: Mapping[str, str], sent: "_Sent"
) -> None:
    """Refuse a place that is taken; with `overwrite`, remove what makes it look whole."""
    names = [name for name in existing if sink.file in (None, name)]
    others = [name for name in names if name not in sent.files and not sink.is_harmless(name)]
    if not others:
        return
    if not options.save.overwrite and not sent.is_resumed:
        raise OutputError(f"{sink.label}: already exists", hint="pass --overwrite to replace it")
    stale = (
        name
        for patterns in commit.stale(sink.file)
        for name in others
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    )
    sink.remove(list(dict.fromkeys(stale)))


@final
class _Upload:
    """Writes shards, and sends each while the next one is written."""

    def __init__(
        self,
        plan: Plan,
        options: OutputOptions,
        sink: Sink,
        shards: Sequence[Shard],
        resources: tuple[Memory, DeviceChoice],
        listener: Listener,
        sent: "_Sent",
    ) -> None:
        self._plan, self._options, self._sink, self._shards = plan, options, sink, shards
        self._resources, self._listener, self._sent = resources, listener, sent

    def start(self) -> None:
        """Tell the listener what there is to do."""
        slots = [slot for s in self._shards if s.name in self._sent.files for slot in s.slots]
        resumed_nbytes = sum(slot.spec.nbytes for slot in slots)
        self._listener(Started(len(self._plan.targets), self._plan.nbytes, resumed_nbytes))

    def send_shards(self) -> RunResult:
        """Those that were not sent before."""
        waiting = [shard for shard in self._shards if shard.name not in self._sent.files]
        results = [_whole(shard) for shard in self._shards if shard.name in self._sent.files]
        with ThreadPoolExecutor(1, "streammap-send") as pool:
            sending: Future[None] | None = None
            for shard in waiting:
                results.append(self._write(shard))
                if sending is not None:
                    sending.result()  # before the next shard, so that two are here at most
                sending = pool.submit(self._send, shard.name)
            if sending is not None:
                sending.result()
        return RunResult(
            n_tensors=len(self._plan.targets),
            n_shards=len(self._shards),
            nbytes=sum(shard.nbytes for shard in self._shards),
            n_read=sum(result.n_read for result in results),
            n_resumed=sum(result.n_resumed for result in results),
            resumed_nbytes=sum(result.resumed_nbytes for result in results),
            lost=self._sent.lost(),
        )

    def _write(self, shard: Shard) -> RunResult:
        """One shard, as a result of its own."""
        path = self._options.path / shard.name
        if path.exists() and record.path_beside(path).exists():
            return _whole(shard)  # an earlier run has written it, and ended before it was sent
        targets = {slot.key: self._plan.targets[slot.key] for slot in shard.slots}
        part = replace(self._plan, targets=targets, levels=(), request=None)
        save = replace(self._options.save, overwrite=True, restart=False)
        options = replace(self._options, path=path, save=save)

        def relay(event: Event) -> None:
            if isinstance(event, Wrote):
                self._listener(event)

        return transaction.run(part, options, [shard], self._resources, relay)

    def _send(self, name: str) -> None:
        path = self._options.path / name
        try:
            written = record.read(record.path_beside(path))
        except CheckpointError as error:
            raise OutputError(error.message, hint=work_folder.RESTART) from error
        tensors = {key: entry["crc32"] for key, entry in _table(written["tensors"]).items()}
        lost = {key: list(one) for key, one in losses.of_record(written).items()}
        about = {"nbytes": path.stat().st_size, "crc32": _table(written["crc32"]).get(name)}
        version = self._sink.put(name, path)
        self._sent.add(name, {**about, "version": version, "tensors": tensors, "lost": lost})
        path.unlink()
        record.path_beside(path).unlink()

    def complete(self, side: Sequence[SideFile]) -> None:
        """Send the files beside the shards; the last of them make it a model."""
        sink, single = self._sink, self._sink.file
        are_large = [file for file in side if file.is_large]
        large = {file.name: self._send_side(file) for file in are_large}
        small = {file.name: file.read() for file in side if not file.is_large}
        if single is None:
            weights = layout.holding(self._shards, self._plan.weights)
            if len(weights) > 1:
                small[layout.INDEX] = layout.index(weights)
            small |= dict(sink.extras())
        files = {shard.name: self._sent.written(shard.name) for shard in self._shards}
        files |= large
        files |= {
            name: Written(len(content), crc32.crc32(content)) for name, content in small.items()
        }
        tensors = (
            (slot.key, shard.name, int(self._sent.crc(shard.name, slot.key), 16))
            for shard in self._shards
            for slot in shard.slots
        )
        small[record.name_for(single)] = b"".join(
            record.encode(self._plan, files, tensors, self._sent.lost())
        )
        sink.put_all({name: small[name] for name in commit.in_order(tuple(small))})

    def _send_side(self, file: SideFile) -> Written:
        """Send a file that may be large, by way of the spool."""
        path, nbytes, crc = self._options.path / file.name, 0, 0
        with path.open("wb") as spooled:
            for part in file.parts():
                spooled.write(part)
                nbytes, crc = nbytes + len(part), crc32.crc32(part, crc)
        self._sink.put(file.name, path)
        path.unlink()
        return Written(nbytes, crc)


def _whole(shard: Shard) -> RunResult:
    """The counters of a shard that an earlier run wrote."""
    return RunResult(len(shard.slots), 1, shard.nbytes, 0, len(shard.slots), shard.nbytes, {})


@final
class _Sent:
    """The files that were sent so far; on the disk after each one."""

    def __init__(self, path: Path, request: Mapping[str, object]) -> None:
        self._path, self._request = path, request
        self.files: dict[str, dict[str, Any]] = {}
        self.is_resumed = False
        """Whether an earlier run was to do the same."""

    def load(self) -> None:
        """Take over the list of an earlier run.

        Raises:
            OutputError: it was for another request.
        """
        if not self._path.is_file():
            return
        try:
            content = bound_json.read(self._path) or {}
            request, files = content["request"], _table(content["files"])
        except (OSError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self._path}: not the list of a run: {error}", hint=work_folder.RESTART
            ) from error
        if request == self._request:
            self.files, self.is_resumed = files, True
        elif files:
            raise OutputError(
                f"{self._path.parent}: an earlier run to the same place asked for something "
                f"else, and has sent {len(files)} files",
                hint=f"run its command again to finish it, or {work_folder.RESTART}",
            )
        else:
            self.forget()

    def begin(self) -> None:
        """Create the list."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def drop_lost(self, existing: Mapping[str, str]) -> None:
        """Forget files that are missing by now, or have changed; they are sent again."""
        self.files = {n: f for n, f in self.files.items() if existing.get(n) == f["version"]}

    def add(self, name: str, about: dict[str, Any]) -> None:
        """Add a file that was sent."""
        self.files[name] = about
        self._write()

    def written(self, name: str) -> Written:
        """A file's size and CRC."""
        about = self.files[name]
        crc = about.get("crc32")  # an earlier version's list has none
        return Written(int(about["nbytes"]), None if crc is None else int(crc, 16))

    def crc(self, name: str, key: str) -> str:
        """A tensor's CRC-32, in hexadecimal."""
        tensors = self.files[name]["tensors"]
        assert isinstance(tensors, dict)
        return str(tensors[key])

    def lost(self) -> dict[str, Losses]:
        """Key -> what rounding lost, in all files that were sent."""
        tables = (about.get("lost", {}) for about in self.files.values())
        return {key: Losses(*counts) for table in tables for key, counts in table.items()}

    def forget(self) -> None:
        """Remove the spool."""
        self.files = {}
        with contextlib.suppress(OSError):
            for path in sorted(self._path.parent.rglob("*"), reverse=True):  # files first
                path.unlink() if not path.is_dir() else path.rmdir()
            self._path.parent.rmdir()

    def _write(self) -> None:
        content = {"request": self._request, "files": self.files}
        bound_json.write(self._path, content, disk=disks.current(), fsync=True)


def _table(value: object) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict):
        raise TypeError(f"expected a table, found {type(value).__name__}")
    return value
