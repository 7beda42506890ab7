"""Compute any tile of a Form, in bounded scratch.

The dimensions up to the tile's range are mapped while source tensors are added up (only what the
tile needs is read); the maps of the dimensions after it are then applied one by one. Sums are kept
in the form's accumulator (float32, or float64) and rounded once, at the end.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import final

import torch
from torch import Tensor

from streammap import tiling
from streammap.dtypes import to_torch
from streammap.graph import Form, Term
from streammap.maps import AxisMap, BlockMap, DenseMap
from streammap.segments import Segment
from streammap.tiling import Tile

_DENSE_STRIP = 512
"""Source rows that a dense map takes in at once."""


def read(form: Form) -> Tensor:
    """The whole tensor of a form, as a new tensor."""
    out = torch.empty(form.spec.shape, dtype=to_torch(form.spec.dtype))
    copied = form.copied
    if copied is not None:
        return out.copy_(copied.source.tensor(copied.key))
    flat = out.view(-1)
    scratch = Scratch()
    for tile in tiling.tiles(form.spec, tiling.widening(form)):
        part = flat[tile.offset : tile.offset + tile.n_elements].view(tile.shape)
        compute(form, tile, part, scratch)
    return out


@final
class Scratch:
    """Buffers that are used again from tile to tile."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def take(self, place: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Buffer number `place`, holding whatever it held last."""
        n = math.prod(shape)
        held = self._buffers.get((place, dtype))
        if held is None or held.numel() < n:
            self._buffers.pop((place, dtype), None)
            held = self._buffers[place, dtype] = torch.empty(n, dtype=dtype)
        return held[:n].view(tuple(shape))


def compute(form: Form, tile: Tile, out: Tensor, scratch: Scratch) -> None:
    """Write one tile of `form` to `out` (shape tile.shape, the form's dtype)."""
    dtype = to_torch(form.accumulator)
    direct = dtype == out.dtype
    total = out if direct else scratch.take(0, tile.shape, dtype)
    for position, term in enumerate(form.terms):
        _add_term(term, tile, total, scratch, adds=position > 0)
    if not direct:
        out.copy_(total)


def _add_term(term: Term, tile: Tile, total: Tensor, scratch: Scratch, *, adds: bool) -> None:
    source = term.blend[0][1].spec.shape
    dim = len(tile.prefix)
    later = [(d, m) for d, m in enumerate(term.maps[dim + 1 :], start=1) if m is not None]
    if not later and not adds:
        _gather(term, tile, total)
        return
    held = scratch.take(1, (*tile.shape[:1], *source[dim + 1 :]), total.dtype)
    _gather(term, tile, held)
    for number, (d, m) in enumerate(later):
        last = number == len(later) - 1
        if last and not adds:
            apply(m, held, total, d)
            return
        shape = (*held.shape[:d], m.n_out, *held.shape[d + 1 :])
        mapped = scratch.take(2 + number, shape, total.dtype)
        apply(m, held, mapped, d)
        held = mapped
    total.add_(held)


def _gather(term: Term, tile: Tile, out: Tensor) -> None:
    """Map the dimensions up to the tile's range and add up the blend."""
    dim = len(tile.prefix)
    fresh = True
    for coefficient, found in term.blend:
        whole = found.source.tensor(found.key)
        if not tile.shape:
            _accumulate(out, whole, coefficient, adds=not fresh)
            fresh = False
            continue
        for place, weight in _sources_of(term.maps[:dim], tile.prefix):
            part = whole[place] if place else whole
            _gather_range(term.maps[dim], tile, part, out, coefficient * weight, adds=not fresh)
            fresh = False
    if fresh:
        out.zero_()


def _sources_of(
    before: Sequence[AxisMap | None], prefix: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], float]]:
    """The source indices, with coefficients, that leading dimensions of a tile are made of."""
    rows = [((i, 1.0),) if m is None else m.members(i) for m, i in zip(before, prefix, strict=True)]
    for chosen in itertools.product(*rows):
        yield tuple(i for i, _ in chosen), math.prod(value for _, value in chosen)


def _gather_range(
    m: AxisMap | None, tile: Tile, part: Tensor, out: Tensor, coefficient: float, *, adds: bool
) -> None:
    if m is None:
        _accumulate(out, part[tile.start : tile.end], coefficient, adds=adds)
    elif isinstance(m, DenseMap):
        rows = m.matrix[tile.start : tile.end].to(out.dtype)
        _multiply(rows, part, out, coefficient, adds=adds)
    else:
        for segment in m.segments:
            for piece in segment.clipped(tile.start, tile.end):
                _move(piece, part, out, coefficient, dim=0, adds=adds)


def _multiply(rows: Tensor, part: Tensor, out: Tensor, coefficient: float, *, adds: bool) -> None:
    """Out (+)= coefficient * rows @ part, over the first dimension, a strip of it at a time."""
    flat = out.view(out.shape[0], -1)
    if not adds:
        flat.zero_()
    for start in range(0, part.shape[0], _DENSE_STRIP):
        strip = part[start : start + _DENSE_STRIP].reshape(-1, flat.shape[1]).to(out.dtype)
        flat.addmm_(rows[:, start : start + _DENSE_STRIP], strip, alpha=coefficient)


def apply(m: AxisMap, held: Tensor, out: Tensor, dim: int) -> None:
    """Out = m applied to dimension `dim` of `held`."""
    if isinstance(m, BlockMap):
        for segment in m.segments:
            _move(segment, held, out, 1.0, dim=dim, adds=False)
        return
    rows = m.matrix.to(held.dtype)
    out.copy_(torch.matmul(held.movedim(dim, -1), rows.T).movedim(-1, dim))


def _move(
    segment: Segment, held: Tensor, out: Tensor, factor: float, *, dim: int, adds: bool
) -> None:
    """One regular run of block moves as one kernel over views."""
    to = _blocks(out, dim, segment.out_start, segment.out_step, segment.count, segment.length)
    coefficient = segment.coefficient * factor
    adds = adds or segment.adds
    if segment.coefficient == 0.0:
        if not adds:
            to.zero_()
        return
    at = _blocks(held, dim, segment.in_start, segment.in_step, segment.count, segment.length)
    _accumulate(to, at, coefficient, adds=adds)


def _blocks(x: Tensor, dim: int, start: int, step: int, count: int, length: int) -> Tensor:
    """Blocks of `length`, `step` apart, as a view. Shapes: [.., n, ..] -> [.., C, L, ..]."""
    stride = x.stride()
    shape = (*x.shape[:dim], count, length, *x.shape[dim + 1 :])
    strides = (*stride[:dim], step * stride[dim], stride[dim], *stride[dim + 1 :])
    return x.as_strided(shape, strides, x.storage_offset() + start * stride[dim])


def _accumulate(out: Tensor, x: Tensor, coefficient: float, *, adds: bool) -> None:
    if adds:
        out.add_(x, alpha=coefficient)
    elif coefficient == 0.0:
        out.zero_()
    elif coefficient != 1.0 and x.dtype == out.dtype:
        torch.mul(x, coefficient, out=out)
    else:
        out.copy_(x)
        if coefficient != 1.0:
            out.mul_(coefficient)
