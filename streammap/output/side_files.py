"""The files beside the weights: config.json, the map, and those of the source's folder.

Of a source's folder, on this machine or elsewhere, all is taken that belongs to the model (see
io/folder_files.py). Adapters, further weights and what is too large are left out with a note. Files
are copied byte for byte, but sentence-transformers' pooling, which follows the hidden size.

On this machine links are followed inside the folder (and inside a Hub cache), not out of it.
"""

import contextlib
import fnmatch
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

from streammap.errors import CheckpointError, OutputError, some
from streammap.io import filenames, folder_files, json_files, lfs_pointer, safe_open
from streammap.io.checkpoint import Checkpoint
from streammap.io.folder_files import Fate
from streammap.io.storage.base import Storage
from streammap.planning import map_file
from streammap.planning.plan import Plan

_WHY: Mapping[Fate, str] = {
    "adapter": "an adapter (LoRA), not copied: it fits the weights of the source only",
    "weights": "further weights, not copied: the model is read from others",
    "large": "large, not copied",
}
_POOLED = ("word_embedding_dimension", "embedding_dimension")
MAX_FETCHED_NBYTES = 100_000_000
"""A file that is fetched is held in memory for a moment, after all tensors are written."""
_MAX_NBYTES = 1_000_000_000
_MAX_TOTAL_NBYTES = 4_000_000_000
_MAX_FILES = 10_000
_MAX_SPEC_NBYTES = 1_000_000


@final
@dataclass(frozen=True, slots=True)
class SideFile:
    """A file beside the weights: new content, or a file of the source's folder."""

    name: str
    """Relative to the result's folder, with slashes."""
    content: bytes | None = None
    """None where it is copied, or made of pieces."""
    pieces: Callable[[], Iterable[bytes]] | None = None
    """Makes new content that may be large, a piece at a time."""
    path: Path | None = None
    """Where it is copied from; None where it has to be fetched."""
    storage: Storage | None = None
    """Where it is fetched from."""
    nbytes: int = 0
    """Size in the source's folder; of what is made of pieces, about."""

    @property
    def is_large(self) -> bool:
        """Whether it is made of pieces, and not to be held."""
        return self.pieces is not None and self.nbytes > MAX_FETCHED_NBYTES

    def parts(self) -> Iterable[bytes]:
        """All of it, part by part.

        Raises:
            CheckpointError: it can't be read.
        """
        return [self.read()] if self.pieces is None else self.pieces()

    def read(self) -> bytes:
        """All of it at once.

        Raises:
            CheckpointError: it can't be read.
        """
        if self.content is not None:
            return self.content
        if self.pieces is not None:
            return b"".join(self.pieces())
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
        made = partial(map_file.pieces, plan.levels)
        yield SideFile(name, pieces=made, nbytes=map_file.dense_nbytes(plan.levels))
    if single is None and plan.architecture is not None and plan.architecture.endswith(".toml"):
        spec = safe_open.content(Path(plan.architecture), limit=_MAX_SPEC_NBYTES)
        yield SideFile(filenames.SPEC, spec)
    if plan.config is not None and single is None:
        yield SideFile("config.json", _config(plan, plan.config))


def of_source(side: Checkpoint | None) -> Iterator[SideFile]:
    """The files of a source's folder that belong to its results.

    Raises:
        CheckpointError: see `collect`.
    """
    if side is None or side.place is None or side.place.file is not None:
        return
    n_files = total = 0
    for file in _listed(side, side.place):
        if file.nbytes > _most_nbytes(side):
            continue
        n_files, total = n_files + 1, total + file.nbytes
        if n_files > _MAX_FILES or total > _MAX_TOTAL_NBYTES:
            raise CheckpointError(
                f"{side.place}: {n_files} files beside the weights, {total} bytes, at most "
                f"{_MAX_FILES} and {_MAX_TOTAL_NBYTES} are copied",
                hint="move what is not part of the model out of the folder",
            )
        yield file


def notes(plan: Plan) -> tuple[str, ...]:
    """What a user of the plan's result might not expect, side files included."""
    side = plan.side
    if side is None or side.place is None or side.place.file is not None:
        return plan.notes
    left: dict[Fate, list[str]] = {"adapter": [], "weights": [], "large": []}
    with contextlib.suppress(CheckpointError):  # `collect` says it, where files are copied
        for name, fate in folder_files.sorted_out(side, side.place):
            if fate in left and not (plan.optimizer is not None and fate == "weights"):
                left[fate].append(name)
        limit = _most_nbytes(side)
        left["large"] = [f.name for f in _listed(side, side.place) if f.nbytes > limit]
    told = [f"{side.name}: {some(names)}: {_WHY[fate]}" for fate, names in left.items() if names]
    return (*told, *plan.notes)


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


def _most_nbytes(side: Checkpoint) -> int:
    return _MAX_NBYTES if side.is_local else MAX_FETCHED_NBYTES


def _listed(side: Checkpoint, storage: Storage) -> Iterable[SideFile]:
    """The files that belong to the model, however large."""
    names = (
        _showable(name, storage)
        for name, fate in folder_files.sorted_out(side, storage)
        if fate == "own"
    )
    if side.is_local:
        checked = ((name, *_checked(side.path, side.path / name)) for name in names)
        return (SideFile(name, path=path, nbytes=nbytes) for name, path, nbytes in checked)
    return (SideFile(name, storage=storage, nbytes=storage.stat(name).nbytes) for name in names)


def _showable(name: str, storage: Storage) -> str:
    """The name, if a file of a result may have it."""
    if not name.isprintable() or name.startswith("/"):
        raise CheckpointError(
            f"{storage}: {name!r}: a file name with letters that can't be shown, or a whole path",
            hint="rename the file, or remove it from the folder",
        )
    return name


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
    if not os.access(real, os.R_OK):
        raise CheckpointError(
            f"{entry}: Permission denied", hint="make it readable, or move it out of the folder"
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
