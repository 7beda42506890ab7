"""The original tools' way to coalesce a GPT-2: whole models in memory, dense matrices, float32.

    python -m bench.original SOURCE SCHEME OUT.safetensors    prints nothing

Written anew from what those tools compute: a state dict, a model of the source and one of the
target are held at once, M_out W in(M_in) is computed with full matrices for every layer, then
layers are averaged. Embeddings are doubled, as there.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HEAD = 64


def rownorm(matrix: Tensor) -> Tensor:
    """Rows divided by their sums; a row of zeros stays."""
    sums = matrix.sum(dim=1, keepdim=True)
    return matrix / torch.where(sums == 0, 1.0, sums)


def merging(groups: Sequence[Sequence[int]], block: int) -> Tensor:
    """F: each row of blocks is the mean of a group's."""
    n = 1 + max(member for group in groups for member in group)
    places = torch.zeros(len(groups), n)
    for i, group in enumerate(groups):
        places[i, list(group)] = 1.0
    return rownorm(torch.kron(places, torch.eye(block)))


class Widths:
    """The maps of widths, as matrices."""

    def __init__(self, groups: Sequence[Sequence[int]]) -> None:
        self.embed, self.mlp = merging(groups, HEAD), merging(groups, 4 * HEAD)
        self.into_embed, self.into_mlp = rownorm(self.embed.T), rownorm(self.mlp.T)

    def map(self, name: str, tensor: Tensor) -> Tensor:
        """One tensor of the small width; linears are stored in x out."""
        if name.startswith(("wte", "wpe")):
            return 2.0 * (tensor @ self.embed.T)
        part = ".".join(name.split(".")[-3:-1])
        out = self.mlp if part == "mlp.c_fc" else self.embed
        if part == "attn.c_attn":
            parts = tensor.chunk(3, dim=-1)
            tensor = torch.cat([each @ out.T for each in parts], dim=-1)
        else:
            tensor = tensor @ out.T
        if tensor.ndim == 1:
            return tensor
        into = self.into_mlp if part == "mlp.c_proj" else self.into_embed
        return into.T @ tensor


def main() -> None:
    """Load, multiply, average, save."""
    source, scheme_path, out = (Path(word) for word in sys.argv[1:])
    scheme = json.loads(scheme_path.read_text())
    state = load_file(source)
    model = {key: tensor.clone() for key, tensor in state.items()}
    widths = Widths(scheme["width_scheme"])
    small = {key: widths.map(key.partition(".")[2], tensor) for key, tensor in model.items()}
    depths = merging(scheme["depth_scheme"], 1)
    target: dict[str, Tensor] = {}
    for key, tensor in small.items():
        prefix, h, rest = key.partition(".h.")
        layer, _, name = rest.partition(".")
        if not h:
            target[key] = torch.zeros_like(tensor).copy_(tensor)
        elif int(layer) < len(depths):
            total = torch.zeros_like(tensor)
            for j, weight in enumerate(depths[int(layer)].tolist()):
                total += weight * small[f"{prefix}.h.{j}.{name}"]
            target[key] = total
    save_file(target, out, {"format": "pt"})


if __name__ == "__main__":
    main()
