"""Operations of a program as calls of torch on buffers. None of them takes memory of its own."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from streammap.engine.program import Op, View
from streammap.planning.maps import DenseMap

Call = Callable[[], object]
_MENDED = 2**16
"""Elements at a time: so few that what is taken for them does not count."""
_BLOCK = 2**13
_CUT = 2**29 - 1
"""The digits of float64 that float32 has not."""


class _Typed(Protocol):
    def typed(self, dtype: str) -> Tensor: ...


def bind(op: Op, buffers: Callable[[int], _Typed], matrix_of: Callable[[DenseMap], Tensor]) -> Call:
    """The call that does what `op` says, on the buffers of its places."""

    def of(view: View) -> Tensor:
        whole = buffers(view.place).typed(view.dtype)
        return whole.as_strided(view.shape, view.strides, view.offset)

    out = of(op.out)
    sources = [of(view) for view in op.sources]
    match op.kind:
        case "copy":
            return partial(out.copy_, sources[0])
        case "mul":
            return partial(torch.mul, sources[0], op.number, out=out)
        case "div":
            # By a tensor: for a number, some devices multiply by its rounded reciprocal.
            divisor = torch.tensor(op.number, dtype=out.dtype, device=out.device)
            return partial(torch.div, sources[0], divisor, out=out)
        case "odd":
            return partial(_round_to_odd, out)
        case "add":
            return partial(torch.add, sources[0], sources[1], out=out)
        case "blend":
            return partial(_blend, sources[0], sources[1], op.number, out)
        case "pool":
            return _pool(sources[0], int(op.number), out)
        case "fill":
            return partial(out.fill_, op.number)
        case "take":
            return partial(torch.index_select, sources[0], 1, _indices(op, out), out=out)
        case "put":
            return partial(out.index_add_, 1, _indices(op, out), sources[0])
        case "clear":
            return partial(out.index_fill_, 1, _indices(op, out), 0.0)
        case "scale":
            numbers = torch.tensor(op.numbers, dtype=out.dtype, device=out.device)
            return partial(torch.mul, out, numbers.view(1, -1, 1), out=out)
        case "matmul":
            return _product(op, sources, out, matrix_of)
    raise AssertionError(op.kind)


def _blend(a: Tensor, b: Tensor, weight: float, out: Tensor) -> None:
    """Out = (1 - weight) a + weight b, rounded once: a kernel for it reckons a + weight (b - a).

    Where b - a is none of the numbers that float32 has (of infinities, of numbers beyond its
    range), the result is mended. A sum over it tells, which is read from a cache.
    """
    torch.lerp(a, b, weight, out=out)
    if math.isfinite(torch.sum(out).item()):
        return
    least, largest = torch.aminmax(out)
    if not (math.isfinite(least.item()) and math.isfinite(largest.item())):
        for start in range(0, out.numel(), _MENDED):
            end = start + _MENDED
            parts = [x.view(-1)[start:end] for x in (a, b, out)]
            mended = parts[0].float().mul_(1.0 - weight).add_(parts[1].float().mul_(weight))
            parts[2].copy_(torch.where(parts[2].isfinite(), parts[2], mended.to(out.dtype)))


def _round_to_odd(x: Tensor) -> None:
    """Round float64 to float32's digits, so that rounding to fewer digits later is rounding once.

    What is cut off leaves its trace in the last digit that is kept, which becomes 1: Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57(4), 2008.
    """
    bits = x.view(torch.int64).view(-1)
    for start in range(0, bits.numel(), _BLOCK):
        part = bits[start : start + _BLOCK]
        cut = part & _CUT
        cut += _CUT  # carries into the last digit, unless all that is cut is 0
        part |= cut & (_CUT + 1)
        part &= ~_CUT


def _pool(source: Tensor, divisor: int, out: Tensor) -> Call:
    """Sums over windows of [N, H, W, C] that span H and lie side by side in W, divided.

    Shapes: [N, H, W, C] -> [N, 1, W / w, C].
    """
    window = [source.shape[1], source.shape[2] // out.shape[2]]
    pool, pads = torch.ops.aten.avg_pool2d.out, [0, 0]
    source, out = (x.permute(0, 3, 1, 2) for x in (source, out))
    return partial(pool, source, window, window, pads, False, True, divisor, out=out)


def _indices(op: Op, out: Tensor) -> Tensor:
    return torch.tensor(op.indices, dtype=torch.int64, device=out.device)


def _product(
    op: Op, sources: Sequence[Tensor], out: Tensor, matrix_of: Callable[[DenseMap], Tensor]
) -> Call:
    """Out = matrix times source, over the middle one of three dimensions."""
    strip = op.matrix
    assert strip is not None
    whole = matrix_of(strip.dense)
    matrix = whole[slice(*strip.rows), slice(*strip.columns)].to(out.dtype)
    (source,) = sources
    if out.shape[2] == 1:
        return partial(torch.mm, source[:, :, 0], matrix.T, out=out[:, :, 0])
    if out.shape[0] == 1:
        return partial(torch.mm, matrix, source[0], out=out[0])
    return partial(torch.matmul, matrix, source, out=out)
