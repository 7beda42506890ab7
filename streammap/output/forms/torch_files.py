"""The files of a torch result: pytorch_model.bin, in parts where it is large, or one .pth file."""

from collections import deque
from collections.abc import Mapping
from functools import partial

from streammap.errors import OutputError
from streammap.io import filenames
from streammap.io.dtypes import TORCH_NAMES, TensorSpec
from streammap.io.formats import torch_writer
from streammap.output import layout
from streammap.output.layout import Shard


def arrange(
    specs: Mapping[str, TensorSpec],
    *,
    max_shard_nbytes: int,
    single: str | None = None,
    nest: str | None = None,
) -> tuple[Shard, ...]:
    """The files of a result: as many as a safetensors result has.

    Args:
        single: Name of the only file, whatever its size; by default transformers' names.
        nest: Entry of the only file that its tensors stand under.

    Raises:
        OutputError: a dtype that torch lacks.
    """
    check(specs)
    groups = layout.groups(specs, max_shard_nbytes=max_shard_nbytes, is_single=single is not None)
    names = layout.names(filenames.TORCH_STEM, ".bin", len(groups), single)
    return tuple(
        _shard(name, {key: specs[key] for key in group}, nest if single else None)
        for name, group in zip(names, groups, strict=True)
    )


def check(specs: Mapping[str, TensorSpec]) -> None:
    """Refuse a dtype that torch lacks.

    Raises:
        OutputError: naming the tensor.
    """
    for key, spec in specs.items():
        if spec.dtype not in TORCH_NAMES:
            raise OutputError(f"{key}: torch has no dtype {spec.dtype}", hint="write safetensors")


def _shard(name: str, specs: Mapping[str, TensorSpec], nest: str | None) -> Shard:
    pairs = list(specs.items())
    small, entries = torch_writer.small_entries(torch_writer.state(pairs, nest))
    slots = torch_writer.place(pairs, small)
    around = partial(torch_writer.around, slots, small, entries)
    ((_, table),) = deque(around(), maxlen=1)
    return Shard(name, small, slots, len(table), around)
