"""torch's own checkpoint files (.bin, .pt, .pth in the zip form), read and written without loading.

A zip file whose entries are not compressed: one pickle that describes the tensors, and the raw
bytes of each storage. The pickle is read with `weights_only`, so no code of the file ever runs.
"""

import argparse
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammap.errors import CheckpointError
from streammap.header import Slot
from streammap.spec import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

NESTS = ("model", "state_dict")
"""Where a training checkpoint keeps its state dict, when it isn't one itself."""


@dataclass(frozen=True, slots=True)
class TorchFile:
    """What a torch file holds."""

    slots: tuple[Slot, ...]
    nest: str | None
    """The entry ("model", ...) that the state dict is nested under."""
    others: tuple[str, ...]
    """The entries beside that one: optimizer, epoch ..."""


def read(path: Path) -> TorchFile:
    """Read where the tensors of a torch file are.

    Raises:
        CheckpointError: not a zip-form torch file, a pickle that asks for more than tensors and
            plain values, no state dict inside, a tensor that reaches past its file.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path.name}: not a torch file in the zip form (torch 1.6 and later)",
            hint="load it with torch and save it again, or convert it to safetensors",
        )
    content = _unpickled(path)
    state, nest = _state_dict(content, path.name)
    size = path.stat().st_size
    slots = [_slot(path.name, key, tensor, size) for key, tensor in state.items()]
    others = tuple(str(k) for k in content if k != nest) if isinstance(content, dict) else ()
    return TorchFile(
        tuple(sorted(slots, key=lambda slot: slot.start)), nest, others if nest else ()
    )


def write_skeleton(
    path: Path, specs: Sequence[tuple[str, TensorSpec]], nest: str | None
) -> tuple[Slot, ...]:
    """Write a torch file of `specs` with room for their bytes; the slots say where those go.

    The bytes are reserved, not written: the cost does not depend on the tensors' size.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.serialization import skip_data

    from streammap.dtypes import to_torch

    with FakeTensorMode():
        state = {key: torch.empty(spec.shape, dtype=to_torch(spec.dtype)) for key, spec in specs}
    with skip_data(materialize_fake_tensors=True):
        torch.save(state if nest is None else {nest: state}, path)
    return read(path).slots


def _unpickled(path: Path) -> object:
    import torch

    # A namespace of plain values, which training scripts keep beside the model.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(
            f"{path.name}: its pickle asks for more than tensors: {reason}",
            hint="only load files you trust; save the state dict alone, as safetensors",
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, EOFError, AttributeError) as error:
        raise CheckpointError(
            f"{path.name}: not a torch checkpoint: {str(error).splitlines()[0]}",
            hint="download or save the file again",
        ) from error


def _state_dict(content: object, file: str) -> tuple[dict[str, "Tensor"], str | None]:
    from torch import Tensor

    def tensors(table: object) -> bool:
        return (
            isinstance(table, dict)
            and bool(table)
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in table.items())
        )

    if isinstance(content, dict):
        if tensors(content):
            return content, None
        for nest in NESTS:
            if tensors(content.get(nest)):
                return content[nest], nest
    found = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content)
    raise CheckpointError(
        f"{file}: no state dict in it or under 'model' or 'state_dict', found {found}",
        hint='save {"model": model.state_dict()}',
    )


def _slot(file: str, key: str, tensor: "Tensor", size: int) -> Slot:
    from streammap.dtypes import from_torch

    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if not isinstance(start, int):
        raise CheckpointError(
            f"{file}: {key}: this torch does not tell where its bytes are",
            hint="update torch, or convert the file to safetensors",
        )
    spec = TensorSpec(from_torch(tensor.dtype, where=f"{file}: {key}"), tuple(tensor.shape))
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    start += tensor.storage_offset() * tensor.element_size()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = start + (last + 1) * tensor.element_size() if tensor.numel() else start
    if end > size:
        raise CheckpointError(
            f"{file}: {key} ends at byte {end}, the file has {size}",
            hint="download or save the file again",
        )
    return Slot(key, spec, int(start), strides)
