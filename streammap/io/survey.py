"""A checkpoint read with nothing taken for granted: all that is wrong is listed.

`open_checkpoint` refuses at the first thing that is wrong; this goes on, and gives what is left.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from streammap.errors import CheckpointError, some
from streammap.io import filenames, safe_open
from streammap.io.checkpoint import Checkpoint, SourceFile, open_checkpoint
from streammap.io.formats import dcp_metadata, safetensors_header, torch_zip
from streammap.io.formats.safetensors_header import Slot
from streammap.io.json_files import read_json
from streammap.io.storage.base import OpenFile
from streammap.io.storage.local import LocalFile
from streammap.io.weight_files import INDEXES, is_weights


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was found."""

    level: Literal["error", "note"]
    check: str
    """file, size, index, key, place, dtype, shape, offset, crc32, config, finite, tile, source."""
    message: str
    key: str | None = None
    file: str | None = None
    found: object = None
    expected: object = None

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.key) if part is not None)
        return f"{self.level:<8} {where}{': ' if where else ''}{self.message}"


@dataclass(frozen=True, slots=True)
class SavedRecord:
    """What a result's record says of its files; empty where there is none."""

    content: Mapping[str, object]
    files: Mapping[str, int] = field(default_factory=dict)
    """File -> its size."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Key -> its file."""
    crcs: Mapping[str, str] = field(default_factory=dict)
    """Key -> CRC-32, 8 hex digits."""

    @property
    def is_there(self) -> bool:
        """Whether there is a record."""
        return bool(self.content)


@dataclass(frozen=True, slots=True)
class Survey:
    """What is there."""

    checkpoint: Checkpoint
    findings: tuple[Finding, ...]
    n_unread: int
    """Files that could not be read: their tensors are not missing, but unknown."""


def read_record(path: Path) -> SavedRecord:
    """The record at `path`; an empty one where there is none.

    Raises:
        CheckpointError: it is no record.
    """
    if not path.is_file():
        return SavedRecord({})
    content = read_json(path)
    files, tensors = content.get("files", {}), content.get("tensors", {})
    if not isinstance(files, Mapping) or not isinstance(tensors, Mapping):
        raise CheckpointError(f"{path}: files and tensors are no tables", hint="remove the file")
    places, crcs = {}, {}
    for key, entry in tensors.items():
        if not isinstance(entry, Mapping) or not isinstance(entry.get("file"), str):
            raise CheckpointError(f"{path}: tensors: {key}: no file", hint="remove the file")
        places[str(key)] = entry["file"]
        if isinstance(entry.get("crc32"), str):
            crcs[str(key)] = entry["crc32"]
    sizes = {str(name): n for name, n in files.items() if type(n) is int}
    return SavedRecord(content, sizes, places, crcs)


def survey(path: Path, record: SavedRecord) -> Survey:
    """Read what is there, and list what is wrong with it.

    Raises:
        CheckpointError: nothing is there.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file", hint="check the path")
    if dcp_metadata.is_folder(path):
        return _chunked(path, record)
    folder = path if path.is_dir() else path.parent
    found: list[Finding] = []
    names, weight_map = _names(path, record, found)
    slots: dict[str, Slot] = {}
    file_of: dict[str, str] = {}
    files: list[SourceFile] = []
    n_unread = 0
    for name in names:
        try:
            read = _slots(folder / name)
        except CheckpointError as error:
            n_unread += 1
            found.append(
                Finding("error", "file", error.message.removeprefix(f"{name}: "), file=name)
            )
            found += _sizes(folder / name, record)
            continue
        stat = (folder / name).stat()
        files.append(SourceFile(name, stat.st_size, stat.st_mtime_ns, ""))
        found += _sizes(folder / name, record)
        for slot in read:
            if slot.key in slots:
                told = f"it is in {file_of[slot.key]} too"
                found.append(Finding("error", "key", told, slot.key, name))
                continue
            slots[slot.key], file_of[slot.key] = slot, name
    if weight_map is not None:
        found += _index(weight_map, file_of, {file.name for file in files})
    found += _recorded(record, file_of, n_unread)
    found += _beside(folder, record)
    config, config_path = None, folder / "config.json"
    if path.is_dir() and config_path.is_file():
        try:
            config = read_json(config_path)
        except CheckpointError as error:
            found.append(Finding("error", "config", error.message, file="config.json"))
    opened: dict[str, OpenFile] = {
        f.name: LocalFile(folder / f.name, f.nbytes, f.mtime_ns) for f in files
    }
    checkpoint = Checkpoint(path, tuple(files), slots, file_of, config, _opened=opened)
    return Survey(checkpoint, tuple(found), n_unread)


def _chunked(path: Path, record: SavedRecord) -> Survey:
    """A folder of torch.distributed.checkpoint, whose metadata says where all is."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        told = Finding("error", "file", error.message, file=dcp_metadata.METADATA)
        return Survey(Checkpoint(path, (), {}, {}, None), (told,), 1)
    found = [finding for file in checkpoint.files for finding in _sizes(path / file.name, record)]
    found += _recorded(record, checkpoint.file_of, 0)
    return Survey(checkpoint, tuple(found), 0)


def _names(
    path: Path, record: SavedRecord, found: list[Finding]
) -> tuple[list[str], Mapping[str, str] | None]:
    """The files that belong to it, and the index."""
    if path.is_file():
        return [path.name], None
    weight_map: dict[str, str] | None = None
    for index in INDEXES:
        if weight_map is None and (path / index).is_file():
            weight_map = _weight_map(path / index, found)
    there = _weights(path)
    wanted = set(record.files) & {n for n in record.files if is_weights(n)}
    wanted |= set(record.places.values()) | set((weight_map or {}).values())
    safe = {name for name in wanted if safe_open.is_plain_name(name) and name[:1] != "."}
    told = "no name of a file of this folder"
    found += [Finding("error", "index", told, file=name) for name in sorted(wanted - safe)]
    if not safe:
        if not there:
            raise CheckpointError(f"{path}: no weights", hint="check the path")
        if len(there) > 1:
            told = f"{len(there)} weight files and no index"
            found.append(Finding("error", "index", told, found=there))
        return there, weight_map
    if weight_map is None and len(safe) > 1:
        found.append(Finding("error", "index", "missing", file=INDEXES[0]))
    alien = [name for name in there if name not in safe]
    told = "does not belong here: neither the record nor the index has it"
    found += [Finding("error", "file", told, file=name) for name in alien]
    return sorted(safe), weight_map


def _weights(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if is_weights(entry.name))
    safe = [name for name in names if name.endswith(".safetensors")]
    return safe or names


def _weight_map(index: Path, found: list[Finding]) -> dict[str, str] | None:
    try:
        content = read_json(index).get("weight_map")
    except CheckpointError as error:
        found.append(Finding("error", "index", error.message, file=index.name))
        return None
    if not isinstance(content, Mapping) or not all(isinstance(v, str) for v in content.values()):
        found.append(Finding("error", "index", "no weight_map of file names", file=index.name))
        return None
    return {str(key): name for key, name in content.items()}


def _slots(file: Path) -> tuple[Slot, ...]:
    if not file.is_file():
        raise CheckpointError(f"{file.name}: missing")
    if file.suffix in filenames.TORCH:
        return torch_zip.read(file).slots
    return safetensors_header.read(file)[0]


def _sizes(file: Path, record: SavedRecord) -> Iterator[Finding]:
    expected = record.files.get(file.name)
    if expected is not None and file.is_file() and file.stat().st_size != expected:
        told = f"{file.stat().st_size} bytes, {expected} were written"
        yield Finding(
            "error", "size", told, file=file.name, found=file.stat().st_size, expected=expected
        )


def _beside(folder: Path, record: SavedRecord) -> Iterator[Finding]:
    """config.json, tokenizer and the like: they may be edited, and must be there."""
    for name, expected in record.files.items():
        if is_weights(Path(name).name):
            continue
        parts = Path(name).parts
        if ".." in parts or Path(name).is_absolute() or "\0" in name:
            yield Finding("error", "file", "no name of a file of this folder", file=name)
        elif not (folder / name).is_file():
            yield Finding("error", "file", "missing", file=name, expected=expected)
        elif (size := (folder / name).stat().st_size) != expected:
            told = f"{size} bytes, {expected} were written"
            yield Finding("note", "size", told, None, name, size, expected)


def _index(
    weight_map: Mapping[str, str], file_of: Mapping[str, str], read: set[str]
) -> Iterator[Finding]:
    for key, name in weight_map.items():
        place = file_of.get(key)
        if place == name or (place is None and name not in read):
            continue
        told = f"the index says {name}, {'no file has it' if place is None else 'it is elsewhere'}"
        yield Finding("error", "index", told, key, place, found=place, expected=name)
    surplus = [key for key in file_of if key not in weight_map]
    if surplus:
        told = f"the index lacks {len(surplus)} tensors that the files have: {some(surplus)}"
        yield Finding("error", "index", told, found=len(surplus), expected=0)


def _recorded(record: SavedRecord, file_of: Mapping[str, str], n_unread: int) -> Iterator[Finding]:
    if not record.places:
        return
    there = set(file_of.values())
    for key, name in record.places.items():
        place = file_of.get(key)
        if place is None and (name in there or not n_unread):
            yield Finding("error", "key", "missing, it was written", key, name, expected=name)
        elif place is not None and place != name:
            told = f"it was written to {name}"
            yield Finding("error", "place", told, key, place, found=place, expected=name)
    for key, place in file_of.items():
        if key not in record.places:
            yield Finding("error", "key", "there, it was not written", key, place, found=place)
