"""Operations of a program as calls of torch on buffers. None of them takes memory of its own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from streammap.buffers import Buffer
from streammap.program import Op, View

Call = Callable[[], object]


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Threads started in here compute in one thread each; torch is as it was afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bind(op: Op, buffers: Callable[[int], Buffer]) -> Call:
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
        case "add":
            return partial(torch.add, sources[0], sources[1], out=out)
        case "lerp":
            return partial(torch.lerp, sources[0], sources[1], op.number, out=out)
        case "fill":
            return partial(out.fill_, op.number)
        case "take":
            return partial(torch.index_select, sources[0], 1, _indices(op), out=out)
        case "put":
            return partial(out.index_add_, 1, _indices(op), sources[0])
        case "clear":
            return partial(out.index_fill_, 1, _indices(op), 0.0)
        case "scale":
            numbers = torch.tensor(op.numbers, dtype=out.dtype).view(1, -1, 1)
            return partial(torch.mul, out, numbers, out=out)
        case "matmul":
            return _product(op, sources, out)
    raise AssertionError(op.kind)


def _indices(op: Op) -> Tensor:
    return torch.tensor(op.indices, dtype=torch.int64)


def _product(op: Op, sources: Sequence[Tensor], out: Tensor) -> Call:
    """Out = matrix times source, over the middle one of three dimensions."""
    strip = op.matrix
    assert strip is not None
    matrix = strip.dense.matrix[slice(*strip.rows), slice(*strip.columns)].to(out.dtype)
    (source,) = sources
    if out.shape[2] == 1:
        return partial(torch.mm, source[:, :, 0], matrix.T, out=out[:, :, 0])
    if out.shape[0] == 1:
        return partial(torch.mm, matrix, source[0], out=out[0])
    return partial(torch.matmul, matrix, source, out=out)
