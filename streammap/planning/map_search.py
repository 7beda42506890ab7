"""Where else the map of a model may be that was trained since, and saved without it.

A trainer's checkpoint (run/checkpoint-500) stands in the folder that the run began in; config.json
may name the folder that the model was loaded from (`_name_or_path`). Maps in other folders near by
are only told of: one of the same sizes may be another model's.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from streammap.errors import StreammapError
from streammap.io.checkpoint import Checkpoint
from streammap.io.storage.local import LocalStorage
from streammap.planning import map_file
from streammap.planning.map_file import MapLevel

Fits = Callable[[tuple[MapLevel, ...]], bool]
_MAX_FOLDERS = 100
"""Folders near by that are looked into."""


@final
@dataclass(frozen=True, slots=True)
class Searched:
    """What was found where a map may be."""

    levels: tuple[MapLevel, ...]
    """Maps of the model's sizes; empty where there are none."""
    looked: tuple[str, ...]
    """The places, in words."""
    near: Path | None
    """A folder near by with a map of the model's sizes, which nothing ties to the model."""


def search(source: Checkpoint, fits: Fits) -> Searched:
    """Look for the maps of an opened checkpoint that has none beside it.

    Args:
        fits: Whether maps are of the model's sizes.
    """
    looked = [source.label]
    for why, folder in _places(source):
        looked.append(why)
        levels = _levels(folder)
        if levels and fits(levels):
            return Searched(levels, tuple(looked), None)
    near = (folder for folder in _near(source) if fits(_levels(folder)))
    return Searched((), tuple(looked), next(near, None))


def _places(source: Checkpoint) -> Iterator[tuple[str, Path]]:
    """Where its map may be, in words and as a folder."""
    above = _above(source)
    if above is not None:
        yield "the folder above", above
    named = (source.config or {}).get("_name_or_path")
    if isinstance(named, str) and named and "\0" not in named:
        for base in (Path(), *([above] if above is not None else [])):
            folder = base / named
            with contextlib.suppress(OSError):  # too long for a name, no right to look
                if folder.is_dir():
                    yield f"{folder} (_name_or_path of config.json)", folder
                    return


def _above(source: Checkpoint) -> Path | None:
    """The folder that holds the checkpoint's; None if it is not on this machine."""
    if not source.is_local or source.place is None:
        return None
    above = source.folder.resolve().parent
    with contextlib.suppress(ValueError, OSError):  # elsewhere; a current folder that was removed
        return above.relative_to(Path.cwd())
    return above


def _near(source: Checkpoint) -> Iterator[Path]:
    above = _above(source)
    if above is None:
        return
    own = source.folder.resolve()
    with contextlib.suppress(OSError):
        for folder in itertools.islice(sorted(above.iterdir()), _MAX_FOLDERS):
            if folder.is_dir() and folder.resolve() != own:
                yield folder


def _levels(folder: Path) -> tuple[MapLevel, ...]:
    """The maps of a folder, if it has any that can be read: nobody has named it."""
    with contextlib.suppress(StreammapError, OSError):
        if any((folder / name).is_file() for name in map_file.NAMES):
            return map_file.find(LocalStorage(folder))
    return ()
