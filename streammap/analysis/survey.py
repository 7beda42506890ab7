"""A result opened with nothing taken for granted, and compared with its record.

`open_checkpoint` refuses at the first problem; this lists them all, and gives what is left.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from streammap.engine.checksums import Written
from streammap.errors import CheckpointError
from streammap.io import safe_open, weight_files
from streammap.io.checkpoint import Checkpoint, open_checkpoint, open_files
from streammap.io.formats import dcp_metadata
from streammap.io.json_files import read_json
from streammap.io.optimizer import dcp_folder, joined, torch_file
from streammap.io.optimizer.state import PREFIX, OptimizerFile
from streammap.io.problems import Collected, Finding, Problems
from streammap.io.storage.base import Storage
from streammap.io.storage.local import LocalStorage
from streammap.io.weight_files import INDEXES, is_weights
from streammap.output import record as records


@dataclass(frozen=True, slots=True)
class SavedRecord:
    """What a result's record says about its files; empty if there is no record."""

    content: Mapping[str, object]
    files: Mapping[str, Written] = field(default_factory=dict)
    """File -> its size and CRC."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Key -> its file."""
    crcs: Mapping[str, str] = field(default_factory=dict)
    """Key -> CRC-32, 8 hex digits."""
    is_changed: bool = False
    """Whether the record itself is not what was written."""

    @property
    def is_there(self) -> bool:
        """Whether there is a record."""
        return bool(self.content)


@dataclass(frozen=True, slots=True)
class Survey:
    """A checkpoint with its problems."""

    checkpoint: Checkpoint
    """With the optimizer's state among its tensors, where the record says that there is one."""
    findings: tuple[Finding, ...]
    n_unread: int
    """How many files could not be read: their tensors are unknown, not missing."""
    optimizer: OptimizerFile | None = None
    """The optimizer's state."""


def read_record(path: Path) -> SavedRecord:
    """The record at `path`; an empty one if there is none.

    Raises:
        CheckpointError: not a record.
    """
    if not path.exists():
        return SavedRecord({})
    content, is_changed = records.read_any(path)
    files, tensors = content.get("files", {}), content.get("tensors", {})
    sums = content.get("crc32", {})
    if not all(isinstance(table, Mapping) for table in (files, tensors, sums)):
        raise CheckpointError(f"{path}: files and tensors are no tables", hint="remove the file")
    assert isinstance(files, Mapping)
    assert isinstance(tensors, Mapping)
    assert isinstance(sums, Mapping)
    places, crcs = {}, {}
    for key, entry in tensors.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("file"), str):
            raise CheckpointError(f"{path}: tensors: {key}: no file", hint="remove the file")
        places[str(key)] = entry["file"]
        if _crc(entry.get("crc32")) is not None:
            crcs[str(key)] = entry["crc32"]
    written = {
        str(name): Written(n, _crc(sums.get(name))) for name, n in files.items() if type(n) is int
    }
    return SavedRecord(content, written, places, crcs, is_changed)


def _crc(text: object) -> int | None:
    is_one = isinstance(text, str) and re.fullmatch("[0-9a-f]{8}", text) is not None
    return int(str(text), 16) if is_one else None


def survey(path: Path, record: SavedRecord) -> Survey:
    """Open a checkpoint and list its problems.

    Raises:
        CheckpointError: it does not exist.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file", hint="check the path")
    if dcp_metadata.is_folder(path):
        return _survey_chunked(path, record)
    storage, problems = LocalStorage(path), Collected()
    names, weight_map = _names(storage, record, problems)
    checkpoint = open_files(storage, path, names, weight_map, problems=problems)
    n_unread = len(names) - len(checkpoint.files)
    findings = problems.findings
    optimizer, problem = _state(path, record)
    n_unread += len(problem)
    findings += problem
    if optimizer is not None:
        checkpoint = joined.join(checkpoint, optimizer.checkpoint)
    findings += _sizes(storage.folder, names, record)
    findings += _recorded(record, checkpoint.file_of, n_unread)
    if path.is_dir() and storage.has("config.json"):
        try:
            checkpoint = replace(checkpoint, config=read_json(path / "config.json"))
        except CheckpointError as error:
            findings.append(Finding("error", "config", error.message, file="config.json"))
    return Survey(checkpoint, tuple(findings), n_unread, optimizer)


def _state(path: Path, record: SavedRecord) -> tuple[OptimizerFile | None, list[Finding]]:
    """The optimizer's state that the record tells of, or what is wrong with it."""
    files = {name for key, name in record.places.items() if key.startswith(PREFIX)}
    if not files:
        return None, []
    name = dcp_metadata.METADATA if dcp_metadata.is_folder(path) else min(files)
    try:
        if name == dcp_metadata.METADATA:
            found = dcp_folder.read(path)
        else:
            is_plain = safe_open.is_plain_name(name)
            found = torch_file.read(path / name) if is_plain else None
    except (CheckpointError, OSError) as error:
        message = error.message if isinstance(error, CheckpointError) else str(error.strerror)
        return None, [Finding("error", "file", message, file=name)]
    missing = Finding("error", "file", "no optimizer's state, it was written", file=name)
    return found, [] if found is not None else [missing]


def _survey_chunked(path: Path, record: SavedRecord) -> Survey:
    """A torch.distributed.checkpoint folder: without its metadata, nothing can be read."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        finding = Finding("error", "file", error.message, file=dcp_metadata.METADATA)
        return Survey(Checkpoint(path, (), {}, {}, None), (finding,), 1)
    optimizer, problem = _state(path, record)
    if optimizer is not None:
        checkpoint = joined.join(checkpoint, optimizer.checkpoint)
    findings = (
        *problem,
        *_sizes(path, [file.name for file in checkpoint.files], record),
        *_recorded(record, checkpoint.file_of, len(problem)),
    )
    return Survey(checkpoint, findings, len(problem), optimizer)


def _names(
    storage: Storage, record: SavedRecord, problems: Problems
) -> tuple[list[str], Mapping[str, str] | None]:
    """The weight files, by the record and the index, and the index."""
    if storage.file is not None:
        return [storage.file], None
    index = next((name for name in INDEXES if storage.has(name)), None)
    weight_map = None if index is None else weight_files.read_index(storage, index, problems)
    of_state = {name for key, name in record.places.items() if key.startswith(PREFIX)}
    wanted = {name for name in record.files if is_weights(name) and "/" not in name}
    wanted |= {*record.places.values(), *(weight_map or {}).values()}
    wanted -= of_state
    safe = {name for name in wanted if safe_open.is_plain_name(name) and name[:1] != "."}
    message = "no name of a file of this folder"
    strange = [Finding("error", "index", message, file=name) for name in sorted(wanted - safe)]
    problems.report(strange, hint="check the record")
    there = _weights(storage)
    if not safe:
        if not there:
            raise CheckpointError(f"{storage}: no weights", hint="check the path")
        if len(there) > 1:
            message = f"{len(there)} weight files and no index"
            problems.report(
                [Finding("error", "index", message, found=there)], hint="name one of them"
            )
        return there, weight_map
    if weight_map is None and len(safe) > 1:
        missing = Finding("error", "index", "missing", file=INDEXES[0])
        problems.report([missing], hint="copy the index too")
    message = "does not belong here: neither the record nor the index has it"
    alien = [Finding("error", "file", message, file=name) for name in there if name not in safe]
    problems.report(alien, hint="remove it")
    return sorted(safe), weight_map


def _weights(storage: Storage) -> list[str]:
    names = sorted(name for name in storage.names() if is_weights(name))
    return [name for name in names if name.endswith(".safetensors")] or names


def _sizes(folder: Path, names: Iterable[str], record: SavedRecord) -> Iterator[Finding]:
    for name in names:
        written, file = record.files.get(name), folder / name
        if written is None or not file.is_file() or file.stat().st_size == written.nbytes:
            continue
        size = file.stat().st_size
        message = f"{size} bytes, {written.nbytes} were written"
        yield Finding("error", "size", message, file=name, found=size, expected=written.nbytes)


def _recorded(record: SavedRecord, file_of: Mapping[str, str], n_unread: int) -> Iterator[Finding]:
    if not record.places:
        return
    there = set(file_of.values())
    for key, name in record.places.items():
        place = file_of.get(key)
        if place is None and (name in there or not n_unread):
            yield Finding("error", "key", "missing, it was written", key, name, expected=name)
        elif place is not None and place != name:
            message = f"it was written to {name}"
            yield Finding("error", "place", message, key, place, found=place, expected=name)
    for key, place in file_of.items():
        if key not in record.places:
            yield Finding("error", "key", "there, it was not written", key, place, found=place)
