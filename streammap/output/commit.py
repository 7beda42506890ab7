"""Putting a result in place: from its work folder to OUT, so that any kill can be mended.

    1  commit.json says which files go where: from here on the same command only finishes this
    2  an earlier result is removed: its index and config.json first, so that no mixture looks whole
    3  the files are renamed: shards, what goes along, and last the index and config.json
    4  the work folder is removed, commit.json last

Whether a file was renamed before a kill shows by its being in OUT and no longer in the work folder.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import final

from streammap.errors import OutputError
from streammap.io.storage import disk as disks
from streammap.io.storage.disk import Disk
from streammap.output import journal, shards, work_folder
from streammap.output.journal import Fingerprint
from streammap.output.work_folder import MARK, SUFFIX, WorkFolder

Stale = Sequence[Sequence[str]]
"""Glob patterns of what an earlier result left, group by group."""
STALE: Stale = (
    ("model.safetensors.index.json", "pytorch_model.bin.index.json", "config.json", ".metadata"),
    (
        "model.safetensors",
        "model-*-of-*.safetensors",
        "pytorch_model.bin",
        "pytorch_model-*-of-*.bin",
        "__*_*.distcp",
    ),
)
"""What makes weights a model, and then these, by the names that loaders look for."""
_LAST = (shards.INDEX, "config.json", ".metadata")
_FORMAT = 1
_MAX_NBYTES = 100_000_000


@final
@dataclass(frozen=True, slots=True)
class Commit:
    """What is put in place."""

    names: tuple[str, ...]
    """Files, in the order in which they are renamed."""
    replaces: bool
    """Whether an earlier result is removed before."""


def ordered(names: Sequence[str]) -> tuple[str, ...]:
    """The order in which files of a folder are renamed."""
    return (*(n for n in names if n not in _LAST), *(n for n in _LAST if n in names))


def is_marked(path: Path) -> bool:
    """Whether a work folder holds a result that was being put in place when its run ended."""
    return (path / MARK).is_file()


def begin(
    work: WorkFolder, request: Fingerprint, found: Commit, *, disk: Disk, fsync: bool
) -> None:
    """Write the mark; all files are whole, and on the disk."""
    content = request.line(
        streammap_commit=_FORMAT, files=list(found.names), replaces=found.replaces
    )
    part = work.path / f"{MARK}.partial"
    descriptor = disk.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)
    try:
        disks.write_all(disk, descriptor, memoryview(content), 0)
        if fsync:
            disk.sync(descriptor)
    finally:
        os.close(descriptor)
    if fsync:
        for folder in (*_folders(work.files, found.names), work.files):
            disks.sync_folder(disk, folder)
    disk.replace(part, work.path / MARK)
    if fsync:
        disks.sync_folder(disk, work.path)
        disks.sync_folder(disk, work.path.parent)


def read(work: WorkFolder, request: Fingerprint | None) -> Commit:
    """What a run that ended was putting in place.

    Args:
        request: What is asked for now; None to finish whatever it was.

    Raises:
        OutputError: it was another request's, or the mark is damaged.
    """
    path = work.path / MARK
    try:
        with open(work_folder.opened(path), "rb") as file:  # noqa: PTH123  no link is followed
            content = file.read(_MAX_NBYTES + 1)
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    found = journal.parsed(content) if len(content) <= _MAX_NBYTES else None
    if found is None or found.get("streammap_commit") != _FORMAT:
        raise _damaged(path, "none that this version wrote")
    if request is not None:
        request.check(found, path)
    names, replaces = _names(found.get("files")), found.get("replaces")
    if names is None or not isinstance(replaces, bool):
        raise _damaged(path, "names that are none of a result's files")
    return Commit(names, replaces)


def finish(
    work: WorkFolder, output: Path, found: Commit, stale: Stale, *, disk: Disk, fsync: bool
) -> None:
    """Do what the mark says, or what is left of it.

    Args:
        output: The folder that the files go to.
        stale: What is removed, where an earlier result is replaced.

    Raises:
        OutputError: a file is missing, or a folder is in its place.
    """
    waiting = {name for name in found.names if _is_file(work.files, name)}
    for name in found.names:
        if name not in waiting and not (output / name).is_file():
            raise OutputError(
                f"{work.path}: {name} is missing in it and in {output}", hint=journal.RESTART
            )
        if name in waiting and (output / name).is_dir():
            raise OutputError(
                f"{output / name}: a folder is in the place of a file", hint="remove it"
            )
    if found.replaces:
        _remove_stale(output, stale, set(found.names) - waiting, disk=disk, fsync=fsync)
    is_synced = False
    for name in (name for name in found.names if name in waiting):
        if fsync and name in _LAST and not is_synced:
            _sync(output, found.names, disk)
            is_synced = True
        work_folder.make((output / name).parent, [])
        disk.replace(work.files / name, output / name)
    if fsync:
        _sync(output, found.names, disk)


def _remove_stale(output: Path, stale: Stale, moved: set[str], *, disk: Disk, fsync: bool) -> None:
    for globs in stale:
        found = [old for glob in globs for old in sorted(output.glob(glob))]
        gone = [old for old in found if old.name not in moved and not old.is_dir()]
        for old in gone:
            disk.remove(old)
        if gone and fsync:
            disks.sync_folder(disk, output)


def _sync(output: Path, names: Sequence[str], disk: Disk) -> None:
    for folder in (*_folders(output, names), output):
        disks.sync_folder(disk, folder)


def _folders(root: Path, names: Sequence[str]) -> list[Path]:
    """Folders inside `root` that files are in."""
    found = {root / parent for name in names for parent in PurePosixPath(name).parents}
    return sorted(found - {root}, reverse=True)


def _is_file(root: Path, name: str) -> bool:
    """Whether it is one, and no link leads there."""
    found = root / name
    above = [root / parent for parent in PurePosixPath(name).parents]
    return found.is_file() and not any(path.is_symlink() for path in (found, *above))


def _names(found: object) -> tuple[str, ...] | None:
    """Names of files in a folder or below it."""
    if not isinstance(found, list):
        return None
    for name in found:
        if not isinstance(name, str) or "\0" in name or "\\" in name:
            return None
        parts = name.split("/")
        if any(part in ("", ".", "..") or part.endswith(SUFFIX) for part in parts):
            return None
    return tuple(found)


def _damaged(path: Path, why: str) -> OutputError:
    return OutputError(f"{path}: {why}", hint=journal.RESTART)
