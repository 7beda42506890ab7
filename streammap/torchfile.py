"""torch's own checkpoint files (.bin, .pt, .pth in the zip form), read and written without loading.

A zip file whose entries are not compressed: one pickle that describes the tensors, and the raw
bytes of each storage. The pickle is read with `weights_only`, so no code of the file ever runs.
"""

import argparse
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from streammap.errors import CheckpointError
from streammap.header import Slot
from streammap.spec import TensorSpec
from streammap.storage.spans import SpanReader

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


def read(path: Path, file: Path | SpanReader | None = None) -> TorchFile:
    """Read where the tensors of a torch file are.

    Args:
        path: The file, or its name.
        file: Where its bytes are, if not at `path`.

    Raises:
        CheckpointError: not a zip-form torch file, a pickle that asks for more than tensors and
            plain values, no state dict inside, a tensor that reaches past its file.
    """
    opened = io.BufferedReader(file) if isinstance(file, SpanReader) else file or path
    places = _places(path, opened)
    content = _unpickled(path, opened)
    state, nest = _state_dict(content, path.name)
    slots = [_slot(path.name, key, tensor, places) for key, tensor in state.items()]
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


def _places(path: Path, file: Path | BinaryIO) -> dict[int, int]:
    """First byte -> size of each entry that is stored as it is.

    torch reckons where storages are from how it writes zip files; this is where they are.
    """
    try:
        if isinstance(file, Path):
            if zipfile.is_zipfile(file):
                with file.open("rb") as opened:
                    return _entries(path, opened)
        elif zipfile.is_zipfile(file):
            return _entries(path, file)
    except CheckpointError:
        raise
    except Exception as error:  # a hostile zip file can make zipfile raise anything
        raise CheckpointError(
            f"{path.name}: a broken zip file: {error}", hint="download or save the file again"
        ) from error
    raise CheckpointError(
        f"{path.name}: not a torch file in the zip form (torch 1.6 and later)",
        hint="load it with torch and save it again, or convert it to safetensors",
    )


def _entries(path: Path, file: BinaryIO) -> dict[int, int]:
    places: dict[int, int] = {}
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        raw = getattr(file, "raw", None)
        if isinstance(raw, SpanReader):
            raw.fetch(entry.header_offset for entry in archive.infolist())
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(
                    f"{path.name}: {entry.filename} is compressed, torch stores entries plainly",
                    hint="load it with torch and save it again",
                )
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise CheckpointError(
                    f"{path.name}: written on a big-endian machine",
                    hint="load it with torch and save it again",
                )
            file.seek(entry.header_offset + 26)
            lengths = file.read(4)
            n_name, n_extra = (int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            start = entry.header_offset + 30 + n_name + n_extra
            if start + entry.file_size <= size:
                places[start] = entry.file_size
    return places


def _unpickled(path: Path, file: Path | BinaryIO) -> object:
    import torch

    # A namespace of plain values, which training scripts keep beside the model.
    harmless = torch.serialization.safe_globals([argparse.Namespace])
    try:
        with harmless, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if not isinstance(file, Path):
                file.seek(0)
            return torch.load(file, map_location="meta", weights_only=True)
    except CheckpointError:  # of a file that is elsewhere
        raise
    except Exception as error:  # a hostile pickle can make torch raise anything
        text = str(error)
        asked = re.search(r"(?:GLOBAL|[Cc]lass|function) ([\w.]+\.[\w.]+|eval|exec)", text)
        if isinstance(error, pickle.UnpicklingError) and asked is not None:
            raise CheckpointError(
                f"{path.name}: its pickle asks for more than tensors: {asked[1]}",
                hint="only load files you trust; save the state dict alone, as safetensors",
            ) from error
        reason = text.split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
        raise CheckpointError(
            f"{path.name}: not a torch checkpoint: {reason or type(error).__name__}",
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


def _slot(file: str, key: str, tensor: "Tensor", places: dict[int, int]) -> Slot:
    import torch

    from streammap.dtypes import from_torch

    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(
            f"{file}: {key}: a sparse, quantised, conjugate or negated tensor",
            hint="save it as a plain one: tensor.to_dense(), .dequantize(), .resolve_conj()",
        )
    start = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if not isinstance(start, int):
        raise CheckpointError(
            f"{file}: {key}: this torch does not tell where its bytes are",
            hint="update torch, or convert the file to safetensors",
        )
    spec = TensorSpec(from_torch(tensor.dtype, where=f"{file}: {key}"), tuple(tensor.shape))
    first = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    end = first + (last + 1) * tensor.element_size() if tensor.numel() else first
    if tensor.numel() and places.get(start, -1) < end:
        raise CheckpointError(
            f"{file}: {key} needs {end} bytes of an entry at byte {start}, "
            f"there are {places.get(start, 0)}",
            hint="the file was cut short or zipped anew: load it with torch and save it again",
        )
    strides = None if tensor.is_contiguous() else tuple(tensor.stride())
    return Slot(key, spec, start + first, strides)
