"""JSON objects of checkpoints: from files of this machine, and from places elsewhere."""

from collections.abc import Mapping
from pathlib import Path

from streammap.common import strict_json
from streammap.errors import CheckpointError
from streammap.io import safe_open
from streammap.io.storage import resolve
from streammap.io.storage.base import Storage

MAX_JSON_NBYTES = 100_000_000


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: too large, unreadable, not JSON, or not an object.
    """
    return parse_json(_json_text(path), str(path))


def parse_json(text: bytes, where: str) -> Mapping[str, object]:
    """A JSON object from its text.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    try:
        content = strict_json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {error}", hint="mend the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, found {type(content).__name__}")
    return content


def _json_text(path: Path) -> bytes:
    return safe_open.content(path, limit=MAX_JSON_NBYTES)


def read_in(place: Storage, name: str) -> tuple[Mapping[str, object], bytes]:
    """A JSON object from a file of a place, and its text."""
    path = place.path(name)
    text = place.read(name, limit=MAX_JSON_NBYTES) if path is None else _json_text(path)
    return parse_json(text, place.where(name)), text


def config_at(source: str | Path) -> tuple[Mapping[str, object], bytes]:
    """A config.json, or that of a folder, and its text.

    Raises:
        CheckpointError: as `read_json`.
    """
    path = Path(source)
    if not resolve.is_elsewhere(source):
        text = _json_text(path / "config.json" if path.is_dir() else path)
        return parse_json(text, str(path / "config.json" if path.is_dir() else path)), text
    place = resolve.locate(source, stream=False)
    return read_in(place, place.file or "config.json")


def read_config(path: str | Path) -> Mapping[str, object]:
    """The config.json at `path`, or in the folder `path`, or on the Hub, or at a URL."""
    return config_at(path)[0]
