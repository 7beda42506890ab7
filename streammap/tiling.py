"""Tiles: contiguous parts of a result, small enough to compute in bounded memory. No torch here.

A tile is the part of a tensor that has given indices in its leading dimensions, a range in one
dimension, and all of the rest: its bytes are contiguous, and no tensor is too large to be cut.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from streammap.graph import Form
from streammap.spec import DTYPE_BITS, TensorSpec

TILE_NBYTES = 4 * 2**20
"""Bytes of a tile in the accumulator's dtype: small enough to stay in the processor's cache."""
WINDOW_NBYTES = 16 * 2**20
"""Source bytes that may be mapped and used before their pages are given back."""


@dataclass(frozen=True, slots=True)
class Tile:
    """A contiguous part of a tensor."""

    prefix: tuple[int, ...]
    """Indices of the leading dimensions."""
    start: int
    end: int
    """Range in the dimension after the prefix (0 to 1 for a scalar)."""
    offset: int
    """Elements before the tile."""
    shape: tuple[int, ...]
    """[end - start, rest...]; () for a scalar."""

    @property
    def n_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)


def tiles(spec: TensorSpec, widest: int) -> Iterator[Tile]:
    """Cut a tensor into tiles, in the order of their bytes.

    Args:
        widest: What a row costs, in rows (see `widening`); the larger, the fewer rows a tile has.
    """
    if not spec.shape:
        yield Tile((), 0, 1, 0, ())
        return
    if spec.n_elements == 0:
        return
    item = DTYPE_BITS[spec.accumulator] // 8
    room = max(1, TILE_NBYTES // item)
    dim = 0
    while dim < len(spec.shape) - 1 and _row(spec, dim, widest) > room:
        dim += 1
    row = math.prod(spec.shape[dim + 1 :])
    step = max(1, room // _row(spec, dim, widest))
    for prefix in itertools.product(*(range(n) for n in spec.shape[:dim])):
        base = 0
        for n, i in zip(spec.shape, prefix, strict=False):
            base = base * n + i
        base *= spec.shape[dim] * row
        for start in range(0, spec.shape[dim], step):
            end = min(start + step, spec.shape[dim])
            shape = (end - start, *spec.shape[dim + 1 :])
            yield Tile(prefix, start, end, base + start * row, shape)


def _row(spec: TensorSpec, dim: int, widest: int) -> int:
    return math.prod(spec.shape[dim + 1 :]) * (widest if dim + 1 < len(spec.shape) else 1)


def widening(form: Form) -> int:
    """What a row of the result costs in scratch and mapped pages, in rows of the result.

    Scratch is as wide as the widest source; the pages that a tile reads are WINDOW_NBYTES at most
    where its bytes are four tiles.
    """
    result = max(1, math.prod(form.spec.shape[1:]))
    widest = max(math.prod(term.blend[0][1].spec.shape[1:]) for term in form.terms)
    item = DTYPE_BITS[form.spec.accumulator] // 8
    wider = DTYPE_BITS[form.accumulator] // DTYPE_BITS[form.spec.accumulator]
    pages = loads_nbytes(form) * TILE_NBYTES / WINDOW_NBYTES / max(1, form.spec.n_elements * item)
    return max(wider, math.ceil(wider * widest / result), math.ceil(pages))


def loads_nbytes(form: Form) -> int:
    """Bytes of the source tensors that a form reads."""
    return sum(found.spec.nbytes for found in form.loads())


def scratch_nbytes(form: Form) -> int:
    """Upper bound of the memory that one tile of a form needs: the tile, scratch, conversions."""
    first = next(tiles(form.spec, widening(form)), None)
    if form.copied is not None or first is None:
        return 0
    item = DTYPE_BITS[form.accumulator] // 8
    need = 2 * first.n_elements
    for term in form.terms:
        shape = [*first.shape[:1], *term.blend[0][1].spec.shape[len(first.prefix) + 1 :]]
        need += 2 * math.prod(shape)
        for d, m in enumerate(term.maps[len(first.prefix) + 1 :], start=1):
            if m is not None:
                shape[d] = m.n_out
                need += math.prod(shape)
    return need * item
