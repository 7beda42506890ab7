"""The formulas as dense float64 matrices: what streamed results are compared with.

Written from what the original map tools compute, and shares no code with streammap.

    F  (t x s)   row block i is the mean of the blocks in group i      down, width
    T  (s x t)   rownorm(F^T)                                          up, width
    R  (l x L)   the same over layers; G (L x l) = rownorm(R^T)        down, up, depth
    in(M)        rownorm(M^T), which stands at the right of a weight

    linear      M_out W in(M_in), bias M_out b        norm        M g, M b
    embedding   W M^T, under "reference" times 2 on the way down and 0.5 on the way up
    depth       sum over the source layers of R[i, j] (or G[i, j]) times the mapped tensor

Rule "exact" has no factor. Where a head shares the embedding, the norm before it takes in(M)^T in
the place of M, and what else reads that norm takes M^T in the place of in(M).

Where rule "exact" grows a model whose norms stand before their blocks (GPT-2, DeiT), T copies each
head equally often and leaves others out, these are not zeros: what writes to the residual stream
takes T with 1/s in all of an empty row (the mean of the s units), and the gains of norms take
sqrt(r) T, r = (rows that are not empty) / t. The epsilon in config.json is multiplied by r.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999; Wang et al., LEMON, arXiv:2310.07999.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Groups = Sequence[Sequence[int]]
Direction = Literal["coalesce", "decoalesce"]
Rule = Literal["exact", "reference"]
FACTORS: dict[Direction, float] = {"coalesce": 2.0, "decoalesce": 0.5}
_LAYER = re.compile(r"\b(?:layer|h|blocks)\.(\d+)\.")


def rownorm(m: Tensor) -> Tensor:
    """Each row divided by its sum; a row that sums to 0 stays 0."""
    sums = m.sum(dim=1, keepdim=True)
    return torch.where(sums == 0, torch.zeros_like(m), m / sums)


def into(m: Tensor) -> Tensor:
    """in(M)."""
    return rownorm(m.T)


def merging(groups: Groups, n_large: int, block: int = 1) -> Tensor:
    """F of a width scheme, R of a depth scheme (blocks of 1)."""
    blocks = torch.eye(n_large * block, dtype=torch.float64).view(n_large, block, -1)
    return rownorm(torch.cat([blocks[list(group)].sum(dim=0) for group in groups]))


def growing(m: Tensor) -> Tensor:
    """T of F, G of R."""
    return rownorm(m.T)


def filled(t: Tensor) -> tuple[Tensor, float]:
    """T with the mean in its empty rows, and sqrt(r); as it is, where it copies unevenly."""
    n_copies = (t != 0).sum(dim=0)
    is_even = bool((n_copies == n_copies[0]).all()) and int(n_copies[0]) > 0
    if not is_even or int((t != 0).sum(dim=1).max()) > 1:
        return t, 1.0
    is_empty = (t == 0).all(dim=1, keepdim=True)
    ratio = 1 - int(is_empty.sum()) / t.shape[0]
    return torch.where(is_empty, torch.full_like(t, 1 / t.shape[1]), t), math.sqrt(ratio)


def from_rows(rows: Sequence[Sequence[tuple[int, float]]], n_in_blocks: int, block: int) -> Tensor:
    """kron(S, I_block), S given by its non-zeros."""
    sparse = torch.zeros(len(rows), n_in_blocks, dtype=torch.float64)
    for i, row in enumerate(rows):
        for j, value in row:
            sparse[i, j] += value
    return torch.kron(sparse, torch.eye(block, dtype=torch.float64))


def along(x: Tensor, m: Tensor, dim: int) -> Tensor:
    """m applied to one dimension of x."""
    mapped: Tensor = torch.tensordot(m, x, dims=([1], [dim]))
    return mapped.movedim(0, dim)


@dataclass(frozen=True)
class Widths:
    """What a change of width is made of."""

    hidden: Tensor
    """M of the hidden size, of q, k and v."""
    writes: Tensor
    """M of what writes to the hidden state; another one where empty units are filled."""
    gain: float
    """What the gains of norms are multiplied by."""
    mlp: Tensor
    factor: float
    """What embeddings are multiplied by."""
    folds: bool
    """Whether the norm before a tied head takes in(M)^T, which is so under "exact"."""
    tied: bool


@dataclass(frozen=True)
class Change:
    """A request: a scheme in one direction."""

    direction: Direction
    rule: Rule
    width: Groups | None
    n_heads: int
    """Heads of the large model."""
    depth: Groups | None
    n_layers: int
    """Layers of the large model."""


def resized(
    state: Mapping[str, Tensor],
    change: Change,
    *,
    of: Callable[[str, Tensor, Widths], Tensor],
    head_dim: int,
    mlp_per_head: int,
    tied: bool = False,
) -> dict[str, Tensor]:
    """A whole state dict, coalesced or decoalesced. Tensors that are not float stay.

    Args:
        of: What the width does to a tensor: `bert`, `gpt2` or `deit`.
        tied: Whether the head shares the embedding.
    """
    grows = change.direction == "decoalesce"
    found = {key: x.double() if x.is_floating_point() else x for key, x in state.items()}
    if change.width is not None:
        m, mlp = (merging(change.width, change.n_heads, n) for n in (head_dim, mlp_per_head))
        factor = FACTORS[change.direction] if change.rule == "reference" else 1.0
        folds = tied and change.rule == "exact"
        hidden, mlp = (growing(m), growing(mlp)) if grows else (m, mlp)
        fills = grows and change.rule == "exact" and of is not bert
        writes, gain = filled(hidden) if fills else (hidden, 1.0)
        widths = Widths(hidden, writes, gain, mlp, factor, folds, tied)
        found = {key: of(key, x, widths) for key, x in found.items()}
    if change.depth is not None:
        layers = merging(change.depth, change.n_layers)
        found = _deepened(found, growing(layers) if grows else layers)
    return found


def interpolated(
    source: Mapping[str, Tensor], target: Mapping[str, Tensor], alpha: float
) -> dict[str, Tensor]:
    """(1 - alpha) * target + alpha * source; tensors that are not float are target's."""
    return {
        key: (1 - alpha) * x.double() + alpha * source[key].double() if x.is_floating_point() else x
        for key, x in target.items()
    }


def bert(key: str, x: Tensor, m: Widths) -> Tensor:
    """BERT and its heads."""
    name = key.removeprefix("bert.")
    if name.endswith("_ids") or name in ("cls.predictions.bias", "cls.predictions.decoder.bias"):
        return x
    if re.fullmatch(r"embeddings\.\w+_embeddings\.weight", name):
        return x @ m.hidden.T * m.factor
    if name == "cls.predictions.decoder.weight":
        return x @ m.hidden.T * m.factor if m.tied else x @ into(m.hidden)
    if name.startswith("cls.predictions.transform.LayerNorm.") and m.folds:
        return into(m.hidden).T @ x
    if "LayerNorm." in name:
        return m.hidden @ x
    if re.match(r"(classifier|qa_outputs|cls\.seq_relationship)\.", name):
        return _linear(x, None, m.hidden)
    if ".intermediate." in name:
        return _linear(x, m.mlp, m.hidden)
    if re.search(r"\d\.output\.dense\.", name):
        return _linear(x, m.hidden, m.mlp)
    assert re.search(r"self\.(query|key|value)|(pooler|transform|attention\.output)\.dense", name)
    return _linear(x, m.hidden, m.hidden)


def gpt2(key: str, x: Tensor, m: Widths) -> Tensor:
    """GPT-2 and its heads: linears are stored in x out, c_attn is q, k, v side by side."""
    name = key.removeprefix("transformer.")
    if name.endswith(".attn.bias"):
        return x
    if name in ("wte.weight", "wpe.weight"):
        return x @ m.writes.T * m.factor
    if name == "lm_head.weight":
        return x @ m.writes.T * m.factor if m.tied else x @ into(m.hidden)
    if re.match(r"(h\.\d+\.)?ln_[12f]\.", name):
        is_folded = name.startswith("ln_f.") and m.folds
        mapped = (into(m.hidden).T if is_folded else m.hidden) @ x
        return mapped * m.gain if name.endswith("weight") else mapped
    if re.match(r"score|classifier|qa_outputs|multiple_choice_head", name):
        if m.folds and name.endswith("weight"):
            return x @ m.writes.T
        return _linear(x, None, m.hidden)
    if ".c_attn." in name:
        return _transposed(x, _thrice(m.hidden), m.hidden)
    if ".c_fc." in name:
        return _transposed(x, m.mlp, m.hidden)
    if ".mlp.c_proj." in name:
        return _transposed(x, m.writes, m.mlp)
    assert ".attn.c_proj." in name
    return _transposed(x, m.writes, m.hidden)


def deit(name: str, x: Tensor, m: Widths) -> Tensor:
    """ViT and DeiT by timm's names: attn.qkv is q, k, v stacked; no embedding takes a factor."""
    if name in ("cls_token", "dist_token", "pos_embed"):
        return x @ m.writes.T
    if name.startswith("patch_embed.proj."):
        return torch.einsum("ij,j...->i...", m.writes, x)
    if re.match(r"(blocks\.\d+\.)?norm[12]?\.", name):
        mapped = m.hidden @ x
        return mapped * m.gain if name.endswith("weight") else mapped
    if re.match(r"head(_dist)?\.", name):
        return _linear(x, None, m.hidden)
    if ".qkv." in name:
        return _linear(x, _thrice(m.hidden), m.hidden)
    if ".fc1." in name:
        return _linear(x, m.mlp, m.hidden)
    if ".fc2." in name:
        return _linear(x, m.writes, m.mlp)
    assert ".attn.proj." in name
    return _linear(x, m.writes, m.hidden)


def _linear(x: Tensor, makes: Tensor | None, reads: Tensor) -> Tensor:
    made = x if makes is None else makes @ x
    return made @ into(reads) if x.dim() == 2 else made


def _transposed(x: Tensor, makes: Tensor, reads: Tensor) -> Tensor:
    return _linear(x.T, makes, reads).T if x.dim() == 2 else makes @ x


def _thrice(m: Tensor) -> Tensor:
    """q, k and v in one dimension."""
    return torch.kron(torch.eye(3, dtype=m.dtype), m.contiguous())


def _deepened(state: Mapping[str, Tensor], layers: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for key, x in state.items():
        at = _LAYER.search(key)
        if at is None:
            found[key] = x
        elif at[1] == "0":
            before, after = key[: at.start(1)], key[at.end(1) :]
            is_buffer = after == ".attn.bias"
            stack = torch.stack([state[f"{before}{j}{after}"] for j in range(layers.shape[1])])
            for i, row in enumerate(layers):
                mixed = x if is_buffer else torch.tensordot(row, stack, dims=1)
                found[f"{before}{i}{after}"] = mixed
    return found
