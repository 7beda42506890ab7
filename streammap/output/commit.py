"""Putting a result in place: from its work folder to OUT, in steps that survive any kill.

    1  commit.json lists the files: from here on the same command only finishes this
    2  an earlier result is removed: its index and config.json first, so that no mixture looks whole
    3  the files are renamed: shards, side files, and last the index and config.json
    4  the work folder is removed, commit.json last

A file that is in OUT and no longer in the work folder was renamed before the kill.
"""

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import final

from streammap.errors import OutputError
from streammap.io.storage import disk as disks
from streammap.io.storage.disk import Disk
from streammap.output import bound_json, layout, record, work_folder
from streammap.output.fingerprint import Fingerprint
from streammap.output.work_folder import MARK, SUFFIX, WorkFolder
from streammap.planning import map_file

Stale = Sequence[Sequence[str]]
"""Glob patterns of an earlier result's files, group by group."""
_STALE: Stale = (
    ("model.safetensors.index.json", "pytorch_model.bin.index.json", "config.json", ".metadata"),
    (
        "model.safetensors",
        "model-*-of-*.safetensors",
        "pytorch_model.bin",
        "pytorch_model-*-of-*.bin",
        "__*_*.distcp",
        "optimizer.pt",
    ),
    (*map_file.NAMES, record.NAME),
)
"""The files that make weights a model, then the weights by the names that loaders look for."""
_LAST = (layout.INDEX, layout.TORCH_INDEX, "config.json", ".metadata")
_FORMAT = 1


@final
@dataclass(frozen=True, slots=True)
class Commit:
    """The files that are put in place."""

    names: tuple[str, ...]
    """In the order in which they are renamed."""
    replaces: bool
    """Whether an earlier result is removed first."""


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """The order in which the files of a folder appear: those that make it a model last."""
    return (*(n for n in names if n not in _LAST), *(n for n in _LAST if n in names))


def stale(single: str | None) -> Stale:
    """What an earlier result may have left where a folder goes, or the file `single`."""
    if single is None:
        return _STALE
    beside = (map_file.beside(Path(single)).name, record.name_for(single))
    return ((glob.escape(single),), tuple(map(glob.escape, beside)))


def stale_names(output: Path, single: str | None) -> list[str]:
    """The files that are there and would be removed, where an earlier result is replaced."""
    patterns = [pattern for group in stale(single) for pattern in group]
    return [path.name for pattern in patterns for path in output.glob(pattern)]


def begin(
    work: WorkFolder, request: Fingerprint, commit: Commit, *, disk: Disk, fsync: bool
) -> None:
    """Write the mark; all files are whole, and on the disk."""
    if fsync:
        for folder in (*_folders(work.files, commit.names), work.files):
            disks.sync_folder(disk, folder)
    files = {"files": list(commit.names), "replaces": commit.replaces}
    mark = request.head(streammap_commit=_FORMAT, **files)
    bound_json.write(work.path / MARK, mark, disk=disk, fsync=fsync)
    if fsync:
        disks.sync_folder(disk, work.path.parent)


def read(work: WorkFolder, request: Fingerprint | None) -> Commit:
    """The commit that an earlier run began.

    Args:
        request: What is asked for now; None to finish whatever it was.

    Raises:
        OutputError: it was another request's, or the mark is damaged.
    """
    path = work.path / MARK
    try:
        mark = bound_json.read(path)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    if mark is None or mark.get("streammap_commit") != _FORMAT:
        raise _damaged(path, "not one that this version wrote")
    if request is not None:
        request.check(mark, path)
    names, replaces = _names(mark.get("files")), mark.get("replaces")
    if names is None or not isinstance(replaces, bool):
        raise _damaged(path, "names that can't be files of a result")
    return Commit(names, replaces)


def discard(output: Path, stale: Stale, disk: Disk) -> None:
    """Remove what of a result is in place already, whose other files are given up."""
    _remove_stale(output, stale, set(), disk=disk, fsync=False)


def finish(
    work: WorkFolder, output: Path, commit: Commit, stale: Stale, *, disk: Disk, fsync: bool
) -> None:
    """Do what the mark says, or what is left of it.

    Args:
        output: The folder that the files go to.
        stale: What is removed, where an earlier result is replaced.

    Raises:
        OutputError: a file is missing, or a folder is in its place.
    """
    waiting = {name for name in commit.names if _is_file(work.files, name)}
    for name in commit.names:
        if name not in waiting and not (output / name).is_file():
            raise OutputError(
                f"{work.path}: {name} is missing, here and in {output}", hint=work_folder.RESTART
            )
        if name in waiting and (output / name).is_dir():
            raise OutputError(
                f"{output / name}: a folder is in the place of a file", hint="remove it"
            )
    if commit.replaces:
        _remove_stale(output, stale, set(commit.names) - waiting, disk=disk, fsync=fsync)
    is_synced = False
    for name in (name for name in commit.names if name in waiting):
        if fsync and name in _LAST and not is_synced:
            # The weights are on the disk before the first file that makes them a model.
            _sync(output, commit.names, disk)
            is_synced = True
        work_folder.make((output / name).parent, [])
        disk.replace(work.files / name, output / name)
    if fsync:
        _sync(output, commit.names, disk)


def _remove_stale(output: Path, stale: Stale, moved: set[str], *, disk: Disk, fsync: bool) -> None:
    for patterns in stale:
        matches = [path for pattern in patterns for path in sorted(output.glob(pattern))]
        old = [path for path in matches if path.name not in moved and not path.is_dir()]
        for path in old:
            disk.remove(path)
        if old and fsync:
            disks.sync_folder(disk, output)


def _sync(output: Path, names: Sequence[str], disk: Disk) -> None:
    for folder in (*_folders(output, names), output):
        disks.sync_folder(disk, folder)


def _folders(root: Path, names: Sequence[str]) -> list[Path]:
    """Folders inside `root` that files are in, the innermost first."""
    folders = {root / parent for name in names for parent in PurePosixPath(name).parents}
    return sorted(folders - {root}, reverse=True)


def _is_file(root: Path, name: str) -> bool:
    """Whether it is a file, and no link leads there."""
    path = root / name
    above = [root / parent for parent in PurePosixPath(name).parents]
    return path.is_file() and not any(part.is_symlink() for part in (path, *above))


def _names(value: object) -> tuple[str, ...] | None:
    """Names of files in a folder or below it; None where one is anything else."""
    if not isinstance(value, list):
        return None
    for name in value:
        if not isinstance(name, str) or "\0" in name or "\\" in name:
            return None
        parts = name.split("/")
        if any(part in ("", ".", "..") or part.endswith(SUFFIX) for part in parts):
            return None
    return tuple(value)


def _damaged(path: Path, why: str) -> OutputError:
    return OutputError(f"{path}: {why}", hint=work_folder.RESTART)
