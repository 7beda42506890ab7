"""Adapters: a folder of adapter_config.json and its weights, and names that put one on a model.

    adapter/                       adapter_config.json, adapter_model.safetensors (or .bin)
    model+adapter                  the model in `model` with that adapter, as mergekit writes it
    org/model@v1+runs/a+runs/b     of the Hub, and with several

A folder or file whose own name has a "+" is itself, where it is there.
"""

from dataclasses import replace
from pathlib import Path

from streammap.errors import CheckpointError
from streammap.io import json_files
from streammap.io.checkpoint import Checkpoint, open_files
from streammap.io.problems import Strict
from streammap.io.storage import hub_name, resolve
from streammap.io.storage.base import Storage
from streammap.io.weight_files import ADAPTER_CONFIG

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PLUS = "+"


def open_adapter(path: str | Path, *, stream: bool = False) -> Checkpoint:
    """Open an adapter's folder; its config is adapter_config.json.

    Raises:
        CheckpointError: nothing there, or no adapter.
    """
    try:
        storage = resolve.locate(path, stream=stream)
        name = _weights(storage)
        content = json_files.read_stored(storage, ADAPTER_CONFIG)[0]
        place = resolve.local_path(str(storage) if storage.origin else path)
        opened = open_files(storage, place, (name,), None, problems=Strict(storage))
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the path") from error
    return replace(opened, config=content)


def split(source: str | Path) -> tuple[str | Path, tuple[str, ...]]:
    """A name as that of a model, and those of the adapters that are put on it."""
    if not isinstance(source, str) or _PLUS not in source or _is_here(source):
        return source, ()
    pieces = source.split(_PLUS)
    n = _longest(pieces)
    model, rest = _PLUS.join(pieces[:n]), pieces[n:]
    if not _is_here(model) and not resolve.is_elsewhere(model):
        return source, ()  # no such model: the name as a whole is what is not there
    adapters: list[str] = []
    while rest:
        n = _longest(rest)
        adapters.append(_PLUS.join(rest[:n]))
        rest = rest[n:]
    if resolve.is_url(model) and not all(map(_is_named, adapters)):
        return source, ()  # a "+" in a URL; what is there is not known before it is asked for
    return model, tuple(adapters)


def _longest(pieces: list[str]) -> int:
    """How many of the pieces, from the first on, name something together."""
    whole = [n for n in range(len(pieces), 0, -1) if _is_here(_PLUS.join(pieces[:n]))]
    return whole[0] if whole else 1


def _is_here(name: str) -> bool:
    try:
        return not resolve.is_url(name) and bool(name) and resolve.local_path(name).exists()
    except (OSError, ValueError):  # no name that a file can have
        return False


def _is_named(name: str) -> bool:
    return _is_here(name) or resolve.is_url(name) or hub_name.is_one(name)


def _weights(storage: Storage) -> str:
    """The adapter's weight file.

    Raises:
        CheckpointError: it is not a folder with an adapter.
    """
    if storage.file is not None:
        raise CheckpointError(
            f"{storage}: a file, expected an adapter's folder",
            hint=f"name the folder, with {ADAPTER_CONFIG} in it: that says how it is scaled",
        )
    found = [name for name in WEIGHTS if storage.has(name)]
    if not storage.has(ADAPTER_CONFIG):
        what = found[0] if found else "neither adapter weights"
        told = f"{what} and no {ADAPTER_CONFIG}" if found else f"{what} nor {ADAPTER_CONFIG}"
        raise CheckpointError(
            f"{storage}: no adapter: it has {told}",
            hint="name the folder that peft's save_pretrained wrote",
        )
    if not found:
        raise CheckpointError(
            f"{storage}: {ADAPTER_CONFIG}, but neither {' nor '.join(WEIGHTS)}",
            hint="copy the adapter's weights beside it",
        )
    return found[0]
