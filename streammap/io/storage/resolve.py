"""What a user names as a source -> its Storage.

    runs/bert                 a folder or file on this machine, if there is one
    org/name, org/name@v1     a model of the Hub, if there is no such folder
    hf://org/name@v1/folder   a model of the Hub in any case, or a folder or file inside
    file:///runs/bert         this machine
    s3://bucket/bert, ...     any URL that fsspec knows

A pathlib.Path is always on this machine. To add a kind of storage, see base.py.
"""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from streammap.errors import CheckpointError
from streammap.io.storage import hub_name, nearby
from streammap.io.storage.base import Storage
from streammap.io.storage.local import LocalStorage

PathLike = str | Path
_LOCAL = "file://"


def locate(source: str | Path, *, stream: bool) -> Storage:
    """The storage that `source` names.

    Args:
        stream: Whether to read from the Hub as needed, instead of through its cache.

    Raises:
        CheckpointError: it does not exist.
    """
    text = os.fspath(source)
    check_name(text)
    if is_elsewhere(source):
        if _is_hub(text):
            from streammap.io.storage.hub import HubStorage

            return HubStorage(hub_name.parse(text), stream=stream)
        from streammap.io.storage.remote import RemoteStorage

        return RemoteStorage(text)
    return LocalStorage(here(source))


def here(source: str | Path) -> Path:
    """The path of a folder or file of this machine.

    Raises:
        CheckpointError: there is none.
    """
    check_name(os.fspath(source))
    path = local_path(source)
    try:
        path.absolute()
        if path.exists():
            return path
    except OSError as error:  # too long for a name; relative to a folder that was removed
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the path") from error
    raise CheckpointError(f"{path}: no such folder or file", hint=nearby.hint(path))


def check_name(text: str) -> None:
    """Refuse a name that is none: an empty one would be the current folder.

    Raises:
        CheckpointError: nothing but spaces, or a NUL in it.
    """
    if not text.removeprefix("file://").strip():
        raise CheckpointError(
            f"{text!r}: an empty name, expected a path or URL",
            hint="is a variable of your script empty? The current folder is `.`",
        )
    if "\0" in text:
        raise CheckpointError(f"{text!r}: a NUL in a name", hint="remove it")


def is_elsewhere(source: str | Path) -> bool:
    """Whether `source` is on the Hub or at a URL."""
    if isinstance(source, Path):
        return False
    return is_url(source) or _is_hub(source)


def is_url(output: str | Path) -> bool:
    """Whether an output is a URL of another machine."""
    return isinstance(output, str) and "://" in output and not output.startswith(_LOCAL)


def local_path(source: str | Path) -> Path:
    """A path on this machine, also from file://."""
    text = os.fspath(source)
    if not text.startswith(_LOCAL):
        return Path(text)
    _, slash, path = re.split("[?#]", text.removeprefix(_LOCAL))[0].partition("/")
    return Path(unquote(slash + path))


def _is_hub(text: str) -> bool:
    return text.startswith("hf://") or (hub_name.is_one(text) and not Path(text).exists())
