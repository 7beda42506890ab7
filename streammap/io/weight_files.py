"""The weight files of a folder: their names, their index and their headers.

An index maps keys to files of the same folder: {"weight_map": {"wte.weight": "model-...-of-..."}}
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammap.errors import CheckpointError, some
from streammap.io import filenames, json_files, lfs_pointer, safe_open
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot
from streammap.io.problems import Finding, Problems
from streammap.io.storage.base import Stat, Storage

if TYPE_CHECKING:
    from streammap.io.storage.range_reader import RangeReader

_NO_WEIGHTS = ("training_args.bin", "MapMatrix.bin", "optimizer.pt", "scheduler.pt")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
_AGAIN = "download the index again"
ADAPTER_CONFIG = "adapter_config.json"
DCP_METADATA, DCP_SUFFIX = ".metadata", ".distcp"
"""Names in a folder of torch.distributed.checkpoint: the table of chunks, and files of chunks."""


def weights_of(storage: Storage) -> list[str]:
    """The weight files of a folder itself, without adapters."""
    names = (name for name in storage.names() if "/" not in name)
    return sorted(name for name in names if is_weights(name) and not is_adapter(name))


def is_weights(name: str) -> bool:
    """Whether a file of this name holds weights: no training state, no map."""
    if name.startswith(".") or ".map." in name or name in _NO_WEIGHTS:
        return False
    return name.endswith(filenames.WEIGHTS)


def is_adapter(name: str) -> bool:
    """Whether a file is a part of an adapter, which loaders put on a model."""
    return name == ADAPTER_CONFIG or name.startswith("adapter_model.")


def read_index(storage: Storage, name: str, problems: Problems) -> dict[str, str] | None:
    """Key -> file, as an index has it; None if it can't be read."""
    try:
        weight_map = _weight_map(storage, name)
    except CheckpointError as error:
        problems.failed("index", error, file=name)
        return None
    files = {key: plain for key, file in weight_map.items() if (plain := _plain(file))}
    strange = [
        f"{key} is said to be in {file!r}, expected a file of the same folder"
        for key, file in weight_map.items()
        if key not in files
    ]
    problems.report(
        [Finding("error", "index", message, file=name) for message in strange],
        hint="put the shards beside the index, and let it name them without a folder; if you do "
        "not know where it comes from, do not use this checkpoint",
    )
    return files


def _weight_map(storage: Storage, name: str) -> dict[str, str]:
    """The table of an index, with values unchecked."""
    weight_map = json_files.read_stored(storage, name)[0].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{storage.where(name)}: no weight_map", hint="download the index again"
        )
    for key in weight_map:
        safetensors_header.check_key(name, key)
    return weight_map


def _plain(file: object) -> str | None:
    """The name of a file of the index's own folder; None for all else."""
    name = file.removeprefix("./") if isinstance(file, str) else ""
    return name if safe_open.is_plain_name(name) else None


def check_index(
    weight_map: Mapping[str, str],
    file_of: Mapping[str, str],
    read: Collection[str],
    problems: Problems,
) -> None:
    """Compare an index with the files. Loaders read whole files, whatever it says of single keys.

    Args:
        weight_map: Key -> file, as the index has it.
        file_of: Key -> file, as it is.
        read: The files that could be read.
        problems: Takes each difference.
    """
    wrong: dict[bool, list[Finding]] = {True: [], False: []}
    for key, name in weight_map.items():
        actual = file_of.get(key)
        if actual == name or (actual is None and name not in read):
            continue
        place = "no shard has it" if actual is None else f"it is in {actual}"
        message = f"the index says {name}, {place}"
        found = Finding("error", "index", message, key, actual, found=actual, expected=name)
        wrong[actual is None].append(found)
    for alike in wrong.values():
        problems.tolerate(alike)
    surplus = [key for key in file_of if key not in weight_map]
    if surplus:
        message = f"the index lacks {len(surplus)} tensors that the files have: {some(surplus)}"
        problems.tolerate([Finding("error", "index", message, found=len(surplus), expected=0)])


@dataclass(frozen=True, slots=True)
class WeightFile:
    """The header of one weight file."""

    name: str
    stat: Stat
    slots: tuple[Slot, ...]
    digest: str
    """sha256 of the header."""
    nest: str | None = None
    """The entry of a torch file that its state dict is nested under."""
    others: tuple[str, ...] = ()
    """Other entries of a torch file."""


def read_files(
    storage: Storage, names: tuple[str, ...], problems: Problems
) -> Iterator[WeightFile]:
    """The headers of files, in order; several are read at once where that is faster."""

    def read(name: str) -> WeightFile | None:
        try:
            return _read_file(storage, name, problems)
        except CheckpointError as error:
            problems.failed("file", error, file=name)
            return None

    if storage.n_at_once == 1 or len(names) == 1:
        yield from filter(None, map(read, names))
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(storage.n_at_once) as pool:
        yield from filter(None, pool.map(read, names))


def _read_file(storage: Storage, name: str, problems: Problems) -> WeightFile | None:
    path = storage.path(name)
    if not (storage.has(name) if path is None else path.exists()):
        missing = Finding("error", "file", "missing", file=name)
        problems.report([missing], hint="download the missing shard")
        return None
    lfs_pointer.refuse_file(storage, name)
    if name.endswith(filenames.TORCH):
        return _read_torch_file(storage, name, path)
    if not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{storage.where(name)}: not a weight file: {Path(name).suffix or 'no ending'}",
            hint=f"expected .safetensors, {', '.join(filenames.TORCH)}",
        )
    stat = storage.stat(name)
    slots, text = (
        safetensors_header.read_from(name, ranges(storage, name), stat.nbytes)
        if path is None
        else safetensors_header.read(path)
    )
    return WeightFile(name, stat, slots, hashlib.sha256(text).hexdigest())


def _read_torch_file(storage: Storage, name: str, path: Path | None) -> WeightFile:
    from streammap.io.formats import torch_zip

    content = torch_zip.read(path or Path(name), None if path else ranges(storage, name))
    check_strides(storage, name, content.slots)
    text = repr([(slot.key, slot.spec, slot.start) for slot in content.slots]).encode()
    digest = hashlib.sha256(text).hexdigest()
    return WeightFile(name, storage.stat(name), content.slots, digest, content.nest, content.others)


def check_strides(storage: Storage, name: str, slots: Iterable[Slot]) -> None:
    """Refuse tensors that are not stored row by row, where each read goes over a network.

    Raises:
        CheckpointError: naming the file.
    """
    if storage.is_streamed and any(slot.strides is not None for slot in slots):
        raise CheckpointError(
            f"{storage.where(name)}: holds transposed tensors, which can't be read over a network",
            hint="use it without --stream, or download the file first",
        )


def ranges(storage: Storage, name: str) -> "RangeReader":
    """A file elsewhere, to read its beginning and end."""
    from streammap.io.storage.range_reader import RangeReader

    nbytes = storage.stat(name).nbytes
    return RangeReader(storage.peek(name), nbytes, n_at_once=storage.n_at_once)
