"""JSON objects of checkpoints, on this machine and elsewhere."""

from collections.abc import Mapping
from pathlib import Path

from streammap.common import strict_json
from streammap.errors import CheckpointError
from streammap.io import lfs_pointer, safe_open
from streammap.io.storage import resolve
from streammap.io.storage.base import Storage

MAX_JSON_NBYTES = 100_000_000


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: too large, unreadable, not JSON, or not an object.
    """
    return parse_json(safe_open.content(path, limit=MAX_JSON_NBYTES), str(path))


def parse_json(text: bytes, where: str) -> Mapping[str, object]:
    """A JSON object from its text.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    lfs_pointer.refuse(text, where)
    try:
        content = strict_json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {error}", hint="mend the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, found {type(content).__name__}")
    return content


def read_stored(storage: Storage, name: str) -> tuple[Mapping[str, object], bytes]:
    """A JSON object from a file of a storage, and its text.

    Raises:
        CheckpointError: as `read_json`.
    """
    text = storage.read(name, limit=MAX_JSON_NBYTES)
    return parse_json(text, storage.where(name)), text


def load_config(source: str | Path) -> tuple[Mapping[str, object], bytes]:
    """The config.json at `source`, or in the folder `source`, and its text.

    Raises:
        CheckpointError: as `read_json`.
    """
    storage = resolve.locate(source, stream=False)
    name = storage.file or "config.json"
    if storage.origin and not storage.has(name):
        raise CheckpointError(f"{storage.where(name)}: no such file", hint="check the name")
    return read_stored(storage, name)


def read_config(source: str | Path) -> Mapping[str, object]:
    """The same without its text."""
    return load_config(source)[0]
