"""Operations of a program as calls of torch on buffers. None of them takes memory of its own."""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from streammap.common.losses import Losses
from streammap.common.ranges import Range
from streammap.engine.program import Op, Strip, View
from streammap.planning.maps import DenseMap

Call = Callable[[], object]
_MENDED = 2**16
"""Elements at a time, so few that what is taken for them does not count; so is the next."""
_ROUNDED = 2**15
_BITS = {
    torch.float32: (torch.int32, 0x7FFF_FFFF, 0x7F80_0000),
    torch.bfloat16: (torch.int16, 0x7FFF, 0x7F80),
    torch.float16: (torch.int16, 0x7FFF, 0x7C00),
}
"""Dtype -> the integers of its size, all bits but the sign, and those of infinity."""
_CUT = 2**29 - 1
"""The bits of float64 that float32 has not."""
_LEAST_NORMAL_BITS = 0x80
"""The bits of bfloat16's least normal number, which is float32's too."""
Note = Callable[[Losses], object]
"""Told of numbers that rounding lost."""
PartOf = Callable[[DenseMap, Range, Range, torch.dtype], Tensor]
"""Gives rows and columns of a map, valid until it is asked again."""


class _Typed(Protocol):
    def typed(self, dtype: str) -> Tensor: ...


def bind(
    op: Op,
    buffers: Callable[[int], _Typed],
    part_of: PartOf,
    note: Note,
) -> Call:
    """The call that does what `op` says, on the buffers of its places."""

    def of(view: View) -> Tensor:
        whole = buffers(view.place).typed(view.dtype)
        return whole.as_strided(view.shape, view.strides, view.offset)

    out = of(op.out)
    sources = [of(view) for view in op.sources]
    match op.kind:
        case "copy":
            return partial(out.copy_, sources[0])
        case "round":
            return partial(_round, sources[0], out, note)
        case "mul":
            return partial(torch.mul, sources[0], op.number, out=out)
        case "div":
            # By a tensor: for a number, some devices multiply by its rounded reciprocal.
            divisor = torch.tensor(op.number, dtype=out.dtype, device=out.device)
            return partial(torch.div, sources[0], divisor, out=out)
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
            assert op.matrix is not None
            return partial(_product, op.matrix, bool(op.number), sources[0], out, part_of)
    raise AssertionError(op.kind)


def _round(source: Tensor, out: Tensor, note: Note) -> None:
    """Out = source to the nearest, ties to even; tells what overflowed or vanished."""
    whole, rounded = source.reshape(-1), out.view(-1)
    twice = source.dtype == torch.float64 and out.dtype != torch.float32
    word, magnitude, infinity = _BITS[out.dtype]
    least_usual = _LEAST_NORMAL_BITS if twice and out.dtype == torch.bfloat16 else 0
    for start in range(0, rounded.numel(), _ROUNDED):
        x, y = whole[start : start + _ROUNDED], rounded[start : start + _ROUNDED]
        y.copy_(_to_odd(x) if twice else x)
        sizes = torch.bitwise_and(y.view(word), magnitude)
        least, largest = (int(n.item()) for n in torch.aminmax(sizes))
        if least > least_usual and largest < infinity:
            continue
        n_infinite = int((y.isinf().sum() - x.isinf().sum()).item()) if largest >= infinity else 0
        n_zero = 0 if least else _n_zero(x, sizes)
        # Less 1, zeros are the largest of all.
        if least_usual and (n_zero or sizes.sub_(1).bitwise_and_(magnitude).amin() < least_usual):
            y.copy_(_small_to_odd(x))
            n_zero = _n_zero(x, torch.bitwise_and(y.view(word), magnitude))
        if n_infinite or n_zero:
            note(Losses(n_infinite, n_zero))


def _n_zero(x: Tensor, sizes: Tensor) -> int:
    """Numbers that became zero."""
    return int((torch.count_nonzero(x) - torch.count_nonzero(sizes)).item())


def _to_odd(x: Tensor) -> Tensor:
    """Float64 cut to the bits of float32, with a last bit that tells whether anything was cut off.

    Rounded again to 16 bits, it is the nearest to `x`; rounded to the nearest twice it need not be.
    This holds where float32 has all its bits: not below its least normal number.
    Source: Boldo, Melquiond, IEEE Transactions on Computers 57 (4), 2008.
    """
    bits = x.view(torch.int64)
    # What is cut off, if it is anything, carries to the bit above.
    odd = torch.bitwise_and(bits, _CUT).add_(_CUT).bitwise_or_(bits).bitwise_and_(~_CUT)
    return odd.view(torch.float64).to(torch.float32)


def _small_to_odd(x: Tensor) -> Tensor:
    """The same for numbers of any size; slower."""
    near = x.to(torch.float32)
    bits, back = near.view(torch.int32), near.to(torch.float64)
    cut = torch.where(back.abs() > x.abs(), bits - 1, bits) | 1
    return torch.where((back == x) | x.isnan(), bits, cut).view(torch.float32)


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


def _product(strip: Strip, adds: bool, source: Tensor, out: Tensor, part_of: PartOf) -> None:
    """Out = matrix times source, over the middle one of three dimensions; or that is added to it.

    The order depends on the matrix and the shapes alone: on these go all of a tensor's bits.
    """
    for rows, columns in strip.blocks():
        matrix = part_of(strip.dense, rows, columns, out.dtype)
        to = out[:, slice(*(i - strip.rows[0] for i in rows))]
        read = source[:, slice(*(i - strip.columns[0] for i in columns))]
        beta = float(adds or columns[0] > strip.columns[0])
        if to.shape[2] == 1:
            flat = to[:, :, 0]
            torch.addmm(flat, read[:, :, 0], matrix.T, beta=beta, out=flat)
            continue
        for one, other in zip(to, read, strict=True):
            torch.addmm(one, matrix, other, beta=beta, out=one)
