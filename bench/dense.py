"""Coalescing a Llama as one does with dense matrices: load_file, F W A in float32, save_file.

python -m bench.dense SOURCE OUT    halves each width; prints nothing
"""

import sys

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def merging(size: int, block: int) -> Tensor:
    """F: mean of block i and block i + n / 2, a matrix of size / 2 rows."""
    eye = torch.eye(size // 2)
    assert size % (2 * block) == 0
    return torch.cat((eye, eye), dim=1) / 2


def main() -> None:
    """Load, multiply, save."""
    tensors = load_file(sys.argv[1])
    embed = tensors["model.norm.weight"].shape[0]
    mlp = tensors["model.layers.0.mlp.up_proj.weight"].shape[0]
    maps = {embed: merging(embed, 64), mlp: merging(mlp, 1)}
    made: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        wide = tensor.float()
        if tensor.ndim == 1 or "layers" in key:
            wide = maps[tensor.shape[0]] @ wide
        if tensor.ndim == 2:
            wide = wide @ (2 * maps[tensor.shape[1]]).T
        made[key] = wide.to(tensor.dtype)
    save_file(made, sys.argv[2], {"format": "pt"})


if __name__ == "__main__":
    main()
