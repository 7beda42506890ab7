"""Which files of a checkpoint's folder belong to its results, by their names.

    own       tokenizer, generation config, modules of sentence-transformers: taken
    none      training state, runs, other checkpoints in folders of their own, streammap's own files
    adapter   a LoRA adapter, which fits the weights of the source and no others
    weights   the weights in further forms: original/, onnx/, pytorch_model.bin ...

Weights in a folder inside are a module's where the folder has a configuration of its own.
"""

import fnmatch
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import Literal
from weakref import WeakKeyDictionary

from streammap.errors import CheckpointError
from streammap.io import filenames, json_files, weight_files
from streammap.io.checkpoint import Checkpoint
from streammap.io.storage.base import Storage

Fate = Literal["own", "none", "adapter", "weights", "large"]
"""Of a file: taken, not part of the model, or left out for a reason that is told."""
_WEIGHTS = (*filenames.WEIGHTS, ".index.json")
"""What a module in a folder of its own may have."""
_FORMS = (".ckpt", ".distcp", ".npz", ".h5", ".msgpack", ".ot", ".tflite")
_EXPORTS = (".onnx", ".onnx_data", ".gguf")
_WEIGHT_FOLDERS = ("onnx", "openvino", "coreml", "original")
_TRAINED = ("training_args.bin", "optimizer*.pt", "optimizer*.bin", "scheduler.pt", "scheduler.bin")
_STATES = ("scaler.pt", "rng_state*.pth", "MapMatrix.bin", "events.out.tfevents.*")
_WRITTEN = ("streammap.*", "*.streammap.json", "*.map.safetensors")
_AT_TOP = ("trainer_state.json", "config.json", "*.index.json", *_WRITTEN)
_QUANTISED = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""How the source is quantised (GPTQ, AWQ, ModelOpt); of a result of plain weights not true."""
_SKIPPED_FOLDERS = ("runs", "checkpoint-*", "global_step*", "__pycache__")
_MAX_DEPTH = 3


_Sorted = Iterable[tuple[str, Fate]]
_known: WeakKeyDictionary[Checkpoint, _Sorted] = WeakKeyDictionary()
"""Of sources elsewhere, whose files stay what they were when they were listed."""


def sorted_out(side: Checkpoint, storage: Storage) -> _Sorted:
    """Each file of the folder, and each folder that is left out as a whole, with its fate.

    Raises:
        CheckpointError: a folder inside that can't be listed, or whose config.json is broken.
    """
    if side.is_local:
        return _sorted_out(side, storage)
    if side not in _known:
        _known[side] = tuple(_sorted_out(side, storage))
    return _known[side]


def _sorted_out(side: Checkpoint, storage: Storage) -> Iterator[tuple[str, Fate]]:
    own = {file.name for file in side.files}
    fate_of = cache(partial(_fate_of_folder, storage))
    entries: Iterable[str] = (
        _entries(side.path, fate_of, "")
        if side.is_local
        else dict.fromkeys(_outermost(name, fate_of) for name in sorted(storage.names()))
    )
    has_config = cache(partial(_has_config, side, storage))
    for name in entries:
        if name.endswith("/"):
            yield name, fate_of(name[:-1])
        elif name not in own and not (side.parts_of and name in _QUANTISED):
            yield name, _fate(name, has_config)


def _entries(root: Path, fate_of: Callable[[str], Fate], folder: str) -> Iterator[str]:
    """The files of a folder of this machine; a folder that is left out is one entry.

    Raises:
        CheckpointError: a folder that can't be listed.
    """
    try:
        entries = sorted((root / folder).iterdir())
    except OSError as error:
        raise CheckpointError(
            f"{root / folder}: {error.strerror}", hint="move it out of the checkpoint's folder"
        ) from error
    for entry in entries:
        name = entry.relative_to(root).as_posix()
        if not entry.is_dir():
            yield name
        elif not entry.is_symlink():
            if fate_of(name) == "own":
                yield from _entries(root, fate_of, name)
            else:
                yield f"{name}/"


def _outermost(name: str, fate_of: Callable[[str], Fate]) -> str:
    """A file, or the outermost folder above it that is left out."""
    above = (str(folder) for folder in reversed(PurePosixPath(name).parents[:-1]))
    return next((f"{folder}/" for folder in above if fate_of(folder) != "own"), name)


def _fate(name: str, has_config: Callable[[str], bool]) -> Fate:
    """Whether a file is taken, by its name."""
    folder, _, last = name.rpartition("/")
    if last.startswith(".") or _matches(last, (*_TRAINED, *_STATES)):
        return "none"
    if not folder and _matches(last, _AT_TOP):
        return "none"
    if weight_files.is_adapter(last):
        return "adapter"
    if last.endswith(_WEIGHTS) and folder and has_config(folder):
        return "own"
    return "weights" if last.endswith((*_WEIGHTS, *_FORMS, *_EXPORTS)) else "own"


def _fate_of_folder(storage: Storage, folder: str) -> Fate:
    """Whether a folder is part of the model, and not another form, a run, or another checkpoint."""
    path = PurePosixPath(folder)
    if path.name.startswith(".") or _matches(path.name, _SKIPPED_FOLDERS):
        return "none"
    if _matches(path.name, _WEIGHT_FOLDERS):
        return "weights"
    if storage.has(f"{folder}/{weight_files.ADAPTER_CONFIG}"):
        return "adapter"
    if len(path.parts) > _MAX_DEPTH or storage.has(f"{folder}/{filenames.RECORD}"):
        return "none"
    config = f"{folder}/config.json"
    is_other = storage.has(config) and "model_type" in json_files.read_stored(storage, config)[0]
    return "none" if is_other else "own"


def _has_config(side: Checkpoint, storage: Storage, folder: str) -> bool:
    """Whether a folder has a configuration: config.json, cnn_config.json ..."""
    if side.is_local:
        return any((side.path / folder).glob("*config.json"))
    return any(
        name.rpartition("/")[0] == folder and name.endswith("config.json")
        for name in storage.names()
    )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
