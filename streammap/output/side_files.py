"""The files beside the weights: config.json, the map, and those of the source's folder.

Of a source's folder, on this machine or elsewhere, everything is taken but its weights, training
state, other checkpoints in folders of their own, and what streammap writes itself. All files are
copied byte for byte, but sentence-transformers' pooling, which follows the hidden size.

On this machine links are followed inside the folder (and inside a Hub cache), not out of it. How
many files there are and how large is bounded. From elsewhere, weights in folders inside and files
too large to hold in memory are left out; `notes` says which.
"""

import fnmatch
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import final
from weakref import WeakKeyDictionary

from streammap.errors import CheckpointError, OutputError, some
from streammap.io import filenames, json_files, lfs_pointer, safe_open
from streammap.io.checkpoint import Checkpoint
from streammap.io.storage.base import Storage
from streammap.planning import map_file
from streammap.planning.plan import Plan

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_EXPORTS = ("*.onnx", "*.onnx_data", "*.gguf")
_LOGS = ("events.out.tfevents.*",)
SKIPPED = (
    *_WEIGHTS,
    *_EXPORTS,
    *_LOGS,
    "*.npz",
    "*.distcp",
    "*.ot",
    "*.tflite",
    "*.index.json",
    "config.json",
    "streammap.*",
    "*.streammap.json",
    ".*",
    "trainer_state.json",
)
SKIPPED_INSIDE = (".*", *_EXPORTS, *_LOGS)
SKIPPED_FOLDERS = (
    ".*",
    "onnx",
    "openvino",
    "coreml",
    "runs",
    "checkpoint-*",
    "global_step*",
    "__pycache__",
)
_POOLED = ("word_embedding_dimension", "embedding_dimension")
_MAX_DEPTH = 3
MAX_FETCHED_NBYTES = 100_000_000
"""A file that is fetched is held in memory for a moment, after all tensors are written."""
_MAX_NBYTES = 1_000_000_000
_MAX_TOTAL_NBYTES = 4_000_000_000
_MAX_FILES = 10_000


@final
@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the weights: new content, or a file of the source's folder."""

    name: str
    """Relative to the result's folder, with slashes."""
    content: bytes | None = None
    """None where it is copied."""
    path: Path | None = None
    """Where it is copied from; None where it has to be fetched."""
    storage: Storage | None = None
    """Where it is fetched from."""
    nbytes: int = 0
    """Size in the source's folder."""

    def read(self) -> bytes:
        """All of it.

        Raises:
            CheckpointError: it can't be read.
        """
        if self.content is not None:
            return self.content
        if self.path is not None:
            return safe_open.content(self.path, limit=_MAX_NBYTES)
        assert self.storage is not None
        return self.storage.read(self.name, limit=MAX_FETCHED_NBYTES)


def collect(plan: Plan, *, single: str | None = None) -> Iterator[SideFile]:
    """The side files of a result.

    Args:
        single: Name of the file that the result is; None for a folder. Beside a file only the map
            is written.

    Raises:
        CheckpointError: a link that leads out of the source's folder; not a regular file; a Git LFS
            pointer.
        OutputError: a side file that can't follow the new sizes.
    """
    if single is None:
        for file in of_source(plan.side):
            if 0 < file.nbytes < lfs_pointer.MAX_NBYTES:
                content = file.read()
                lfs_pointer.refuse(content, file.name)
                if file.path is None:
                    file = replace(file, content=content)  # fetched once
            yield _resized(file, plan.sized)
    if plan.levels:
        name = map_file.NAME if single is None else map_file.beside(Path(single)).name
        yield SideFile(name, map_file.encode(plan.levels))
    if plan.config is not None and single is None:
        yield SideFile("config.json", _config(plan, plan.config))


def of_source(side: Checkpoint | None) -> Iterator[SideFile]:
    """The files of a source's folder that belong to its results.

    Raises:
        CheckpointError: see `collect`.
    """
    if side is None or side.place is None or side.place.file is not None:
        return iter(())
    if not side.is_local:
        return (file for file in _elsewhere(side, side.place) if file.nbytes <= MAX_FETCHED_NBYTES)
    return _here(side.path, side.place)


def notes(plan: Plan) -> tuple[str, ...]:
    """What a user of the plan's result might not expect, side files included."""
    side = plan.side
    if side is None or side.is_local or side.place is None or side.place.file is not None:
        return plan.notes
    large = [file.name for file in _elsewhere(side, side.place) if file.nbytes > MAX_FETCHED_NBYTES]
    left = (f"{side.name}: {some(large)}: large, not copied",) if large else ()
    return (*left, *plan.notes)


def as_text(content: Mapping[str, object]) -> bytes:
    """A JSON file for people."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # JSON can hold what UTF-8 can't
        return f"{json.dumps(content, indent=2)}\n".encode()


def _config(plan: Plan, config: Mapping[str, object]) -> bytes:
    """config.json; the source's own bytes where nothing in it changed."""
    side = plan.side
    if side is not None and side.config_text is not None and side.config == config:
        return side.config_text
    return as_text(config)


_listed: WeakKeyDictionary[Checkpoint, tuple[SideFile, ...]] = WeakKeyDictionary()


def _elsewhere(side: Checkpoint, storage: Storage) -> tuple[SideFile, ...]:
    """The files of a folder that is not on this machine, however large; listed once."""
    if side not in _listed:
        takes = cache(partial(_is_part_of_model, storage))
        _listed[side] = tuple(
            SideFile(name, storage=storage, nbytes=storage.stat(name).nbytes)
            for name in sorted(storage.names())
            if not _is_skipped(name, storage, (*SKIPPED_INSIDE, *_WEIGHTS))
            and all(map(takes, _above(name)))
        )
    return _listed[side]


def _here(root: Path, storage: Storage) -> Iterator[SideFile]:
    """The files of a folder of this machine, within bounds."""
    n_files = total = 0
    for name in _names(root, storage, ""):
        if _is_skipped(name, storage, SKIPPED_INSIDE):
            continue
        path, nbytes = _checked(root, root / name)
        n_files, total = n_files + 1, total + nbytes
        if n_files > _MAX_FILES or total > _MAX_TOTAL_NBYTES:
            raise CheckpointError(
                f"{root}: {n_files} files beside the weights, {total} bytes, at most "
                f"{_MAX_FILES} and {_MAX_TOTAL_NBYTES} are copied",
                hint="move what is not part of the model out of the folder",
            )
        yield SideFile(name, path=path, nbytes=nbytes)


def _names(root: Path, storage: Storage, folder: str) -> Iterator[str]:
    """The files in a folder of this machine and in those inside that belong to the model."""
    for entry in sorted((root / folder).iterdir()):
        name = entry.relative_to(root).as_posix()
        if not entry.is_dir():
            yield name
        elif not entry.is_symlink() and _is_part_of_model(storage, name):
            yield from _names(root, storage, name)


def _is_skipped(name: str, storage: Storage, inside: Sequence[str]) -> bool:
    """Whether a file is left out by its name.

    Args:
        inside: The patterns for files that are not at the top.

    Raises:
        CheckpointError: a name that no file of a result should have.
    """
    if _matches(PurePosixPath(name).name, inside if "/" in name else SKIPPED):
        return True
    if not name.isprintable() or name.startswith("/"):
        raise CheckpointError(
            f"{storage}: {name!r}: a file name with letters that can't be shown, or a whole path",
            hint="rename the file, or remove it from the folder",
        )
    return False


def _above(name: str) -> Iterator[str]:
    """The folders that a file is in, the outermost first."""
    return (str(folder) for folder in reversed(PurePosixPath(name).parents[:-1]))


def _is_part_of_model(storage: Storage, folder: str) -> bool:
    """Whether a folder is not another format, a run, or another checkpoint."""
    path = PurePosixPath(folder)
    if len(path.parts) > _MAX_DEPTH or _matches(path.name, SKIPPED_FOLDERS):
        return False
    if storage.has(f"{folder}/{filenames.RECORD}"):
        return False
    config = f"{folder}/config.json"
    return not storage.has(config) or "model_type" not in json_files.read_stored(storage, config)[0]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _checked(root: Path, entry: Path) -> tuple[Path, int]:
    """Where a file really is, and its size; refuses links out of the folder, pipes and the like."""
    real = Path(os.path.realpath(entry))
    if not safe_open.is_own(root, entry):
        raise CheckpointError(
            f"{entry}: a link out of the checkpoint, to {real}",
            hint="copy the file into the folder, or remove the link",
        )
    try:
        status = real.stat()
    except OSError as error:
        raise CheckpointError(f"{entry}: {error.strerror}", hint="remove the link") from error
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{entry}: not a regular file", hint="remove it from the folder")
    if status.st_size > _MAX_NBYTES:
        raise CheckpointError(
            f"{entry}: {status.st_size} bytes, at most {_MAX_NBYTES} for a file beside the weights",
            hint="move it out of the folder",
        )
    return real, status.st_size


def _resized(file: SideFile, sized: Mapping[str, tuple[int, int]]) -> SideFile:
    """A sentence-transformers module's config for the new hidden size; other files as they are."""
    old, new = sized.get("embed", (0, 0))
    if old == new or not fnmatch.fnmatchcase(file.name, "*/config.json"):
        return file
    if file.path is not None:
        content = json_files.read_json(file.path)
    else:
        content = json_files.parse_json(file.read(), file.name)
    fields = [name for name in _POOLED if content.get(name) == old]
    if fields:
        return SideFile(file.name, as_text({**content, **dict.fromkeys(fields, new)}))
    if content.get("in_features") == old:
        raise OutputError(
            f"{file.name}: a dense module that reads {old} features; the model will have {new}",
            hint="remove the module from the source folder and modules.json",
        )
    return file
