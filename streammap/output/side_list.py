"""Which files of a source that is elsewhere go along with a result, by their names and sizes.

The rules are those for folders of this machine (side_files.py). Weights in folders inside, and
files that are too large to fetch by the way, stay where they are; the plan says which.
"""

import fnmatch
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from weakref import WeakKeyDictionary

from streammap.io.checkpoint import Checkpoint
from streammap.io.json_files import MAX_JSON_NBYTES, parse_json
from streammap.io.storage.base import Storage

SKIPPED = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "*.npz",
    "*.distcp",
    "*.ot",
    "*.tflite",
    "*.index.json",
    "config.json",
    "streammap.*",
    "*.streammap.json",
    ".*",
    "trainer_state.json",
    "events.out.tfevents.*",
)
SKIPPED_INSIDE = (".*", "*.onnx", "*.onnx_data", "*.gguf", "events.out.tfevents.*")
SKIPPED_FOLDERS = (
    ".*",
    "onnx",
    "openvino",
    "coreml",
    "runs",
    "checkpoint-*",
    "global_step*",
    "__pycache__",
)
MAX_DEPTH = 3
MAX_FETCHED_NBYTES = 100_000_000
"""A file that is fetched is held in memory for a moment, after all tensors are written."""
_known: WeakKeyDictionary[Checkpoint, Mapping[str, int]] = WeakKeyDictionary()
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")


def elsewhere(side: Checkpoint | None) -> tuple[str, ...]:
    """Names of the files to fetch; none for a source of this machine, or a single file."""
    return tuple(name for name, nbytes in _kept(side).items() if nbytes <= MAX_FETCHED_NBYTES)


def left(side: Checkpoint | None) -> tuple[str, ...]:
    """Names of those that are too large."""
    return tuple(name for name, nbytes in _kept(side).items() if nbytes > MAX_FETCHED_NBYTES)


def fetch(side: Checkpoint, name: str) -> bytes:
    """A file's bytes.

    Raises:
        CheckpointError: it can't be read.
    """
    assert side.place is not None
    return side.place.read(name, limit=MAX_FETCHED_NBYTES)


def _kept(side: Checkpoint | None) -> Mapping[str, int]:
    """The sizes of a source's files that go along; looked up once."""
    place = None if side is None or side.is_local else side.place
    if side is None or place is None or place.file is not None:
        return {}
    if side not in _known:
        apart: dict[str, bool] = {}
        names = sorted(place.names())
        _known[side] = {
            name: place.stat(name).nbytes for name in names if _goes_along(name, place, apart)
        }
    return _known[side]


def _goes_along(name: str, place: Storage, apart: dict[str, bool]) -> bool:
    *folders, last = PurePosixPath(name).parts
    if len(folders) > MAX_DEPTH or any(_matches(f, SKIPPED_FOLDERS) for f in folders):
        return False
    if _matches(last, (*SKIPPED_INSIDE, *_WEIGHTS) if folders else SKIPPED):
        return False
    for n in range(1, len(folders) + 1):
        folder = "/".join(folders[:n])
        if folder not in apart:
            apart[folder] = _is_apart(folder, place)
        if apart[folder]:
            return False
    return True


def _is_apart(folder: str, place: Storage) -> bool:
    """Whether a folder is another checkpoint."""
    config = f"{folder}/config.json"
    if place.has(f"{folder}/streammap.json"):
        return True
    if not place.has(config):
        return False
    text = place.read(config, limit=MAX_JSON_NBYTES)
    return "model_type" in parse_json(text, place.where(config))


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
