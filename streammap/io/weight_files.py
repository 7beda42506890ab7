"""Which files of a folder are its weights, and what the header of each says.

An index maps keys to files of the same folder: {"weight_map": {"wte.weight": "model-...-of-..."}}
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from streammap.errors import CheckpointError, some
from streammap.io import filenames, json_files, safe_open
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot
from streammap.io.storage.base import Stat, Storage
from streammap.output import work_folder

if TYPE_CHECKING:
    from streammap.io.storage.range_reader import SpanReader

_NO_WEIGHTS = ("training_args.bin", "MapMatrix.bin", "optimizer.pt", "scheduler.pt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
DCP_METADATA, DCP_SUFFIX = ".metadata", ".distcp"
"""Of a folder of torch.distributed.checkpoint: what says where all is, and files of numbers."""


def names_in(place: Storage) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The weight files of a folder, and its index where it has one.

    Raises:
        CheckpointError: none, several without an index, or an index that is wrong.
    """
    if place.has(f"{work_folder.SUFFIX}/{work_folder.MARK}"):
        raise CheckpointError(
            f"{place}: a run that was putting its result here was stopped",
            hint="run its command again, which finishes it",
        )
    for single, index in zip(SINGLES, INDEXES, strict=True):
        has_single, has_index = place.has(single), place.has(index)
        if has_single and has_index:
            raise CheckpointError(
                f"{place}: has {single} and {index}, which may differ",
                hint="remove the stale one, or name the file",
            )
        if has_single:
            return (single,), None
        if has_index:
            weight_map = _weight_map(place, index)
            return tuple(sorted(set(weight_map.values()))), weight_map
    found = [name for name in place.names() if "/" not in name and is_weights(name)]
    loose = [name for name in found if name.endswith(".safetensors")] or found
    if len(loose) == 1:
        return (loose[0],), None
    if loose:
        raise CheckpointError(
            f"{place}: {len(loose)} weight files and no index: {some(sorted(loose))}",
            hint=f"name one of them, {place.where(sorted(loose)[0])}",
        )
    raise CheckpointError(
        f"{place}: no weights: expected one of {', '.join((*SINGLES, *INDEXES))}",
        hint="name a checkpoint folder, a .safetensors or a .pth file",
    )


def is_weights(name: str) -> bool:
    """Whether a file of this name would be weights: not training state, not a map."""
    if name.startswith(".") or ".map." in name or name in _NO_WEIGHTS:
        return False
    return name.endswith(filenames.WEIGHTS)


def _weight_map(place: Storage, name: str) -> dict[str, str]:
    weight_map, index = json_files.read_in(place, name)[0].get("weight_map"), place.where(name)
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map", hint="download the index again")
    for key, file in weight_map.items():
        safetensors_header.check_key(name, key)
        if not (isinstance(file, str) and safe_open.is_plain_name(file)):
            raise CheckpointError(
                f"{index}: {key} is said to be in {file!r}, expected a file of the same folder",
                hint="do not use this checkpoint: a wrong index can point anywhere",
            )
    return weight_map


def check_index(folder: str, weight_map: Mapping[str, str], file_of: Mapping[str, str]) -> None:
    """Compare an index with what the files have.

    Raises:
        CheckpointError: they differ.
    """
    wrong = [key for key, name in weight_map.items() if file_of.get(key) != name]
    if wrong:
        key = wrong[0]
        where = f"it is in {file_of[key]}" if key in file_of else "no shard has it"
        raise CheckpointError(
            f"{folder}: the index says {key} is in {weight_map[key]}, {where}"
            f" ({len(wrong)} such keys)",
            hint="download the index and shards again",
        )
    surplus = [key for key in file_of if key not in weight_map]
    if surplus:
        raise CheckpointError(
            f"{folder}: the shards have {len(surplus)} tensors that the index lacks: "
            f"{some(surplus)}",
            hint="download the index and shards again",
        )


Read = tuple[Stat, tuple[Slot, ...], str, str | None, tuple[str, ...]]
"""What a file is, its slots, their digest, and what a torch file is beside that."""


def read_files(place: Storage, names: tuple[str, ...]) -> Iterator[tuple[str, Read]]:
    """Each file's header; several at once where that is faster."""
    if place.n_at_once == 1 or len(names) == 1:
        for name in names:
            yield name, _read_file(place, name)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(place.n_at_once) as pool:
        yield from zip(names, pool.map(lambda name: _read_file(place, name), names), strict=True)


def _read_file(place: Storage, name: str) -> Read:
    where = place.where(name)
    path, is_torch = place.path(name), name.endswith(filenames.TORCH)
    if not (place.has(name) if path is None else path.exists()):
        raise CheckpointError(f"{where}: no such file", hint="download the missing shard")
    if not is_torch and not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{where}: a {Path(name).suffix or 'file without ending'} is no weight file",
            hint=f"expected .safetensors, {', '.join(filenames.TORCH)}",
        )
    if is_torch:
        from streammap.io.formats import torch_zip

        content = torch_zip.read(path or Path(name), None if path else _spans(place, name))
        if place.is_streamed and any(slot.strides is not None for slot in content.slots):
            raise CheckpointError(
                f"{where}: holds transposed tensors, which can't be read over a network",
                hint="use it without --stream, or download the file first",
            )
        text = repr([(slot.key, slot.spec, slot.start) for slot in content.slots]).encode()
        digest = hashlib.sha256(text).hexdigest()
        return place.stat(name), content.slots, digest, content.nest, content.others
    slots, text = (
        safetensors_header.read(path)
        if path
        else safetensors_header.read_from(name, _spans(place, name))
    )
    return place.stat(name), slots, hashlib.sha256(text).hexdigest(), None, ()


def _spans(place: Storage, name: str) -> "SpanReader":
    """A file elsewhere, to look at its beginning and end."""
    from streammap.io.storage.range_reader import SpanReader

    return SpanReader(place.peek(name), place.stat(name).nbytes, n_at_once=place.n_at_once)
