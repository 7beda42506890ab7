"""Axes that a tiny model does not compute with: a proof would say of them what no run has shown.

A model that is given no images, or whose tokens have no place for them, passes each check of its
image encoder.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from streammap import api
from streammap.architectures import axis_facts
from streammap.architectures.schema import AxisKind, TinyModel
from streammap.tools.spec_proof import tiny_models

_WEIGHTS = "model.safetensors"
_RESIZED: tuple[AxisKind, ...] = ("width", "expert", "depth")


def axes(model: TinyModel, arch: str, source: Path) -> tuple[str, ...]:
    """The axes whose tensors all change without a change of the outputs.

    Args:
        model: The model.
        arch: The spec's name or file.
        source: The folder that it is built in.
    """
    expected, lazy = tiny_models.outputs(source, model), api.open(source, arch=arch)
    if not expected:
        return ()  # It is not run.
    spec, weights = lazy.plan.model.architecture, load_file(source / _WEIGHTS)
    other, unseen = source.with_name("unseen"), []
    shutil.copytree(source, other, dirs_exist_ok=True)
    for axis in (name for name, size in lazy.sizes.items() if size):
        if spec.axes[axis].kind not in _RESIZED:
            continue
        keys = {
            key
            for family in lazy.plan.model.families
            if axis in axis_facts.axes_of(lazy.plan.model, family)
            for key in family.members.values()
        }
        if not keys:
            continue  # A count that only makes a size of heads.
        noise = torch.Generator().manual_seed(0)
        changed = {
            # A norm would not see a factor.
            key: x * (1.0 + torch.rand(x.shape, generator=noise).to(x.dtype))
            if key in keys and x.is_floating_point()
            else x
            for key, x in weights.items()
        }
        save_file(changed, other / _WEIGHTS, metadata={"format": "pt"})
        found = tiny_models.outputs(other, model)
        unseen += [axis] * all(torch.equal(x, expected[name]) for name, x in found.items())
    return tuple(unseen)
