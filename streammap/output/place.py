"""Checks of the place of a result, before the first byte: what must stay, stays.

A file that is read for a result, or that lies in the folder of a source, is never written over:
not under another name (a link, another case, `..`), and not by a side file of the same name.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from streammap.common.units import format_nbytes
from streammap.errors import OutputError, redacted
from streammap.output import files, record
from streammap.output.side_files import SideFile
from streammap.output.work_folder import SUFFIX
from streammap.planning import map_file
from streammap.planning.plan import Plan

_ELSEWHERE = "write to another place"
_NAMED = (*map_file.NAMES, "config.json")
"""What is read of a folder that is named for it: --map FOLDER, --config FOLDER."""


class _Id(NamedTuple):
    """Which file or folder it is, whatever it is called."""

    device: int
    inode: int


def check_place(
    path: Path, *, single: str | None, overwrite: bool, sources: Sequence[Path]
) -> None:
    """Refuse an output that shouldn't be written, before anything is.

    Args:
        path: A folder, or the file that the result is.
        single: That file's name; None for a folder.
        sources: Folders and files that are read and must stay.

    Raises:
        OutputError: it already exists, or it is a source.
    """
    is_file = single is not None
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError(f"{path}: is the source itself", hint=_ELSEWHERE)
        if not is_file and source.is_file() and path.exists() and path.samefile(source.parent):
            raise OutputError(f"{path}: is the folder of the source", hint=_ELSEWHERE)
    if path.exists() and is_file != path.is_file():
        what = "a file" if is_file else "a folder"
        raise OutputError(f"{path}: not {what}", hint=_ELSEWHERE)
    results = [path]
    if is_file:
        results += [map_file.beside(path), record.path_beside(path)]
    for result in results:
        if not overwrite and result.exists() and (is_file or _holds_files(result)):
            raise OutputError(f"{result}: already exists", hint="pass --overwrite to replace it")


def _holds_files(folder: Path) -> bool:
    """Whether there is anything but an unfinished run, which is resumed or refused later."""
    return any(entry.name != SUFFIX for entry in folder.iterdir())


def check_sources(
    plan: Plan, folder: Path, names: Iterable[str], *, side: Sequence[SideFile]
) -> None:
    """Refuse a result of which a file is one that is read, or lies in the folder of a source.

    Args:
        folder: The folder that the files go to.
        names: The files, and those of an earlier result that are removed.
        side: The side files, some of which are copied.

    Raises:
        OutputError: naming both.
    """
    read = {_id(path): path for path in _read(plan, side) if _id(path) is not None}
    roots = {_id(root): root for root in _roots(plan)}
    checked: set[Path] = set()
    for name in names:
        target = folder / name
        real = Path(os.path.realpath(target.parent))
        above = [path for path in (real, *real.parents) if path not in checked]
        checked.update(above)
        root = next((roots[found] for found in map(_id, above) if found in roots), None)
        if root is not None:
            raise OutputError(f"{target}: lies in {root}, which is read", hint=_ELSEWHERE)
        source = read.get(_id(target))
        if source is not None:
            raise OutputError(f"{target}: is {source}, which is read", hint=_ELSEWHERE)


def check_urls(plan: Plan, label: str, names: Iterable[str]) -> None:
    """The same for a result that goes to a URL.

    Raises:
        OutputError: naming both.
    """
    sources = [redacted(s.origin["url"]) for s in plan.sources if "url" in s.origin]
    for target in (f"{label}/{name}" for name in names):
        for source in sources:
            if target == source or target.startswith(f"{source}/"):
                raise OutputError(f"{target}: lies in {source}, which is read", hint=_ELSEWHERE)


def _roots(plan: Plan) -> Iterator[Path]:
    """The folders of sources on this machine."""
    return (s.path for s in plan.sources if s.is_local and s.path.is_dir())


def _read(plan: Plan, side: Sequence[SideFile]) -> Iterator[Path]:
    """The files of this machine that a result is made of."""
    for source in plan.sources:
        yield from (path for path in source.paths if not path.is_dir())
    for root in _roots(plan):
        yield from (entry for entry in root.iterdir() if entry.is_file())
    yield from (file.path for file in side if file.path is not None)
    for path in plan.named:
        yield from (path / name for name in _NAMED) if path.is_dir() else (path,)


def _id(path: Path) -> _Id | None:
    """None where there is nothing."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return _Id(status.st_dev, status.st_ino)


def check_names(output: Path, names: Iterable[str]) -> None:
    """Refuse a place in which a folder has the name of a file of the result.

    Raises:
        OutputError: naming the folder.
    """
    for name in names:
        if (output / name).is_dir():
            raise OutputError(
                f"{output / name}: a folder is in the place of a file", hint="remove it"
            )


def check_room(path: Path, *, needed: int, written: int) -> None:
    """Refuse a disk that is too small, before the first byte.

    Args:
        needed: Bytes that the result takes.
        written: Bytes of it that an earlier run has written.

    Raises:
        OutputError: it is.
    """
    existing = path
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed - written:
        part = f" ({format_nbytes(written)} of it are written)" if written else ""
        raise OutputError(
            f"{path}: the result takes {format_nbytes(needed)}{part}, "
            f"{format_nbytes(free)} are free",
            hint=files.NO_ROOM,
        )


def written_nbytes(files: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    stats = [path.stat() for path in files.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(min(status.st_blocks * 512, status.st_size) for status in stats)
