"""A file of learned maps to fill in: each map that a model may have, changing nothing."""

import os
import struct
from collections.abc import Mapping
from pathlib import Path

from streammap.architectures import axis_words
from streammap.architectures.model import Model
from streammap.errors import SchemeError
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header


def template(model: Model, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Name -> rows and columns of each map that may be given.

    Args:
        sizes: Axis -> its new size, by the user's word; for none, all widths and layers as they
            are.

    Raises:
        SchemeError: an axis that the model doesn't have, or can't map.
    """
    spec = model.architecture
    own = {
        axis: size
        for axis, size in model.sizes.items()
        if size and spec.axes[axis].kind in ("width", "expert", "depth")
    }
    named = {axis_words.axis_named(spec, name): (name, size) for name, size in sizes.items()}
    for axis, (name, _) in named.items():
        if axis not in own:
            raise SchemeError(
                f"{model.name} has no axis {name!r} that can be mapped",
                hint=f"it has {', '.join(own)}",
            )
    wanted = named or {axis: (axis, size) for axis, size in own.items()}
    return {f"{name}.matrix": (size, own[axis]) for axis, (name, size) in wanted.items()}


def write(path: Path, shapes: Mapping[str, tuple[int, int]]) -> None:
    """Write the file: identity on top, zeros below, so that the first units and layers stay.

    Raises:
        SchemeError: it can't be written.
    """
    specs = [(name, TensorSpec("F32", shape)) for name, shape in shapes.items()]
    one = struct.pack("<f", 1.0)
    try:
        with path.open("xb") as file:
            file.write(safetensors_header.encode(specs, {"format": "pt"}))
            for n_new, n_old in shapes.values():
                start = file.tell()
                for i in range(min(n_new, n_old)):
                    file.seek(start + (i * n_old + i) * len(one))
                    file.write(one)
                file.truncate(start + n_new * n_old * len(one))  # the rest is zeros
                file.seek(0, os.SEEK_END)
    except OSError as error:
        raise SchemeError(f"{path}: {error.strerror}", hint="check the path") from error
