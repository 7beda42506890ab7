"""Checkpoints quantised here, with codes and scales written out, and what they mean.

Each function takes a plain state and gives the stored tensors; `meant` has what they stand for, by
the formula, in float64 and rounded once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.support import tiny

E4M3 = torch.float8_e4m3fn
VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)


@dataclass
class Quantised:
    """Stored tensors, and the tensors that they mean."""

    stored: tiny.State = field(default_factory=dict)
    meant: tiny.State = field(default_factory=dict)

    def keep(self, key: str, tensor: Tensor) -> None:
        """A tensor that is not quantised."""
        self.stored[key] = self.meant[key] = tensor.bfloat16()


def spread(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    """Scales for each number of a matrix, float64."""
    whole = scales.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return whole[..., : shape[-2], : shape[-1]]


def fp8_blocks(
    state: tiny.State,
    chosen: Callable[[str], bool],
    *,
    size: int = 128,
    scale_dtype: torch.dtype = torch.float32,
) -> Quantised:
    """Of DeepSeek-V3: blocks, of which the last ones may be partial."""
    made = Quantised()
    for key, tensor in state.items():
        if not chosen(key) or tensor.dim() != 2:
            made.keep(key, tensor)
            continue
        rows, columns = -(-tensor.shape[0] // size), -(-tensor.shape[1] // size)
        scales = torch.empty(rows, columns, dtype=scale_dtype)
        for i in range(rows):
            for j in range(columns):
                block = tensor[i * size : (i + 1) * size, j * size : (j + 1) * size]
                scales[i, j] = block.abs().max() / 448
        exact = spread(scales, tuple(tensor.shape), (size, size))
        codes = (tensor / exact.clamp_min(1e-30)).float().clamp(-448, 448).to(E4M3)
        made.stored |= {key: codes, f"{key}_scale_inv": scales}
        made.meant[key] = (codes.double() * exact).float().bfloat16()
    return made


def mxfp4(state: tiny.State, chosen: Callable[[str], bool]) -> Quantised:
    """Of gpt-oss: [experts, columns, rows] as blocks of 32 along its columns."""
    made = Quantised()
    for key, tensor in state.items():
        if not chosen(key):
            made.keep(key, tensor)
            continue
        turned = tensor.transpose(-1, -2).double()
        groups = turned.reshape(*turned.shape[:-1], -1, 32)
        exponent = groups.abs().amax(-1).clamp_min(1e-20).log2().floor().sub(2).clamp(-127, 126)
        scaled = (groups / exponent.exp2().unsqueeze(-1)).clamp(-6, 6)
        nearest = (scaled.abs().unsqueeze(-1) - VALUES).abs().argmin(-1)
        codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
        low, high = codes[..., 0::2], codes[..., 1::2]
        name = key.removesuffix(".weight")
        made.stored[f"{name}_blocks"] = low | (high << 4)
        made.stored[f"{name}_scales"] = (exponent + 127).to(torch.uint8)
        value = VALUES[nearest] * (1 - 2 * (scaled < 0).double()) * exponent.exp2().unsqueeze(-1)
        made.meant[key] = value.flatten(-2).transpose(-1, -2).contiguous().bfloat16()
    return made


def gptq(
    key: str, n_out: int, n_in: int, group: int, *, is_v2: bool, shuffled: bool, bits: int = 4
) -> Quantised:
    """AutoGPTQ's layout with random codes; its inputs may be in groups of any order."""
    made, n_groups, a_word = Quantised(), n_in // group, 32 // bits
    codes = torch.randint(0, 1 << bits, (n_in, n_out))
    zeros = torch.randint(0, 1 << bits, (n_groups, n_out))
    scales = torch.rand(n_groups, n_out).mul(0.1).half()
    order = torch.arange(n_in) // group
    if shuffled:
        order = order[torch.randperm(n_in)]
    less = 0 if is_v2 else 1
    base = key.removesuffix("weight")
    made.stored = {
        f"{base}qweight": words(codes.view(-1, a_word, n_out).transpose(1, 2), bits),
        f"{base}qzeros": words(((zeros - less) % (1 << bits)).view(n_groups, -1, a_word), bits),
        f"{base}scales": scales,
        f"{base}g_idx": order.to(torch.int32),
    }
    exact = (codes - zeros[order]).double() * scales.double()[order]
    made.meant[key] = exact.t().contiguous().half()
    return made


def awq(key: str, n_out: int, n_in: int, group: int) -> Quantised:
    """AutoAWQ's gemm layout with random codes."""
    made, n_groups = Quantised(), n_in // group
    codes = torch.randint(0, 16, (n_in, n_out))
    zeros = torch.randint(0, 16, (n_groups, n_out))
    scales = torch.rand(n_groups, n_out).mul(0.1).half()
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the column that each place of a word holds
    base = key.removesuffix("weight")
    made.stored = {
        f"{base}qweight": words(codes.view(n_in, -1, 8)[..., order], 4),
        f"{base}qzeros": words(zeros.view(n_groups, -1, 8)[..., order], 4),
        f"{base}scales": scales,
    }
    of = torch.arange(n_in) // group
    exact = (codes - zeros[of]).double() * scales.double()[of]
    made.meant[key] = exact.t().contiguous().half()
    return made


def words(codes: Tensor, bits: int) -> Tensor:
    """Codes along the last dimension as int32 words, the lowest bits first."""
    shifts = torch.arange(0, 32, bits)
    packed = (codes.to(torch.int64) << shifts).sum(-1)
    return packed.to(torch.int32)  # the upper half becomes negative
