"""A file of learned maps to fill in: each map that a model may have, changing nothing."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from streammap.architectures import axis_words
from streammap.architectures.model import Model
from streammap.errors import SchemeError

if TYPE_CHECKING:
    from torch import Tensor


def template(model: Model, sizes: Mapping[str, int]) -> "dict[str, Tensor]":
    """Name -> identity on top, zeros below: the first units and layers stay, new ones are 0.

    Args:
        sizes: Axis -> its new size, by the user's word; for none, all widths and layers as they
            are.

    Raises:
        SchemeError: an axis that the model doesn't have, or can't map.
    """
    import torch

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
    return {
        f"{name}.matrix": torch.eye(size, own[axis], dtype=torch.float32)
        for axis, (name, size) in wanted.items()
    }
