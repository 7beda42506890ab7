"""Where the optimizer's state of a checkpoint is.

.metadata + *.distcp    the folder itself, where torch.distributed.checkpoint wrote both
optimizer.pt, .bin      beside the weights: transformers' Trainer, accelerate
optimizer_0/, optimizer/    folders of torch.distributed.checkpoint beside the weights (FSDP)
FILE.pt                 the weights' own file, where it holds both
"""

from pathlib import Path

from streammap.errors import CheckpointError
from streammap.io import filenames
from streammap.io.checkpoint import Checkpoint
from streammap.io.formats import dcp_metadata
from streammap.io.optimizer import dcp_folder, torch_file
from streammap.io.optimizer.state import OptimizerFile

FILES = ("optimizer.pt", "optimizer.bin")
_FOLDERS = ("optimizer_0", "optimizer")


def of(source: Checkpoint) -> OptimizerFile:
    """The optimizer's state that belongs to a checkpoint.

    Raises:
        CheckpointError: there is none, it is broken, or its optimizer's state has no map.
    """
    if not source.is_local:
        raise CheckpointError(
            f"{source.label}: an optimizer's state is read on this machine only",
            hint="download the folder first",
        )
    for place in _places(source):
        found = dcp_folder.read(place) if place.is_dir() else torch_file.read(place)
        if found is not None:
            return found
    raise CheckpointError(
        f"{source.label}: no optimizer's state, expected {FILES[0]} or {FILES[1]} beside the "
        f"weights, or optim.state.* in a folder of torch.distributed.checkpoint",
        hint="leave --optimizer out: the optimizer starts fresh",
    )


def _places(source: Checkpoint) -> list[Path]:
    folder = source.folder
    places = [folder] if dcp_metadata.is_folder(folder) else []
    if source.path.is_file() and source.path.suffix in filenames.TORCH:
        places.append(source.path)
    places += [folder / name for name in FILES if (folder / name).is_file()]
    places += [folder / name for name in _FOLDERS if dcp_metadata.is_folder(folder / name)]
    return places
