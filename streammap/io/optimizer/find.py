"""Where the optimizer's state of a checkpoint is.

.metadata + *.distcp    the folder itself, where torch.distributed.checkpoint wrote both
optimizer.pt, .bin      beside the weights: transformers' Trainer, accelerate
optimizer_0/, optimizer/    folders of torch.distributed.checkpoint beside the weights (FSDP)
FILE.pt                 the weights' own file, where it holds both
"""

from collections.abc import Iterator
from pathlib import Path

from streammap.errors import CheckpointError
from streammap.io import filenames
from streammap.io.checkpoint import Checkpoint
from streammap.io.formats import dcp_metadata
from streammap.io.optimizer import dcp_folder, torch_file
from streammap.io.optimizer.state import OptimizerFile
from streammap.io.storage import resolve

FILES = ("optimizer.pt", "optimizer.bin")
_FOLDERS = ("optimizer_0", "optimizer")


def of(source: Checkpoint) -> OptimizerFile:
    """The optimizer's state that belongs to a checkpoint.

    Raises:
        CheckpointError: there is none, it is broken, or its optimizer's state has no map.
    """
    for found in _elsewhere(source) if source.origin else _here(source):
        if found is not None:
            return found
    raise CheckpointError(
        f"{source.label}: no optimizer's state, expected {FILES[0]} or {FILES[1]} beside the "
        f"weights, or optim.state.* in a folder of torch.distributed.checkpoint",
        hint="leave --optimizer out: the optimizer starts fresh",
    )


def _here(source: Checkpoint) -> Iterator[OptimizerFile | None]:
    for place in _places(source):
        yield dcp_folder.read(place) if place.is_dir() else torch_file.read(place)


def _elsewhere(source: Checkpoint) -> Iterator[OptimizerFile | None]:
    """Torch's files alone: folders of torch.distributed.checkpoint are read on this machine."""
    place = source.place
    assert place is not None
    own = place.file if place.file and place.file.endswith(filenames.TORCH) else None
    folder = place.address.rpartition("/")[0] if place.file else place.address
    for name in (*((own,) if own else ()), *(name for name in FILES if place.has(name))):
        file = resolve.locate(f"{folder}/{name}", stream=place.is_streamed)
        yield torch_file.read_from(file, name)


def _places(source: Checkpoint) -> list[Path]:
    folder = source.folder
    places = [folder] if dcp_metadata.is_folder(folder) else []
    if source.path.is_file() and source.path.suffix in filenames.TORCH:
        places.append(source.path)
    places += [folder / name for name in FILES if (folder / name).is_file()]
    places += [folder / name for name in _FOLDERS if dcp_metadata.is_folder(folder / name)]
    return places
