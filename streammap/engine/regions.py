"""A region of a tensor: a range in each dimension, computed from tiles like the whole.

A range of the first dimension is a matter of which tiles are made. One of a later dimension is
taken out of its map, where that changes no bit; else what is left of each tile is thrown away.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from streammap.common import ranges
from streammap.common.ranges import Range, Region, Tile
from streammap.errors import PlanError
from streammap.io.tensor_spec import DTYPE_BITS
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap

if TYPE_CHECKING:
    from torch import Tensor

_MAX_BLOCKS = 4096
"""A range that takes more blocks to write down is cut out of tiles instead."""


@dataclass(frozen=True, slots=True)
class RegionRead:
    """What is computed for a region."""

    form: LinearForm
    ranges: Region
    """The region, as one of `form`."""

    @property
    def rows(self) -> Range | None:
        """What is wanted of the first dimension; None for all of it."""
        shape = self.form.spec.shape
        return None if not shape or self.ranges[0] == (0, shape[0]) else self.ranges[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the region."""
        return tuple(end - start for start, end in self.ranges)

    @property
    def nbytes(self) -> int:
        """Bytes of the region."""
        return math.prod(self.shape) * DTYPE_BITS[self.form.spec.dtype] // 8


def whole(shape: tuple[int, ...]) -> Region:
    """All of a tensor."""
    return tuple((0, n) for n in shape)


def parse(region: slice | Sequence[slice], shape: tuple[int, ...], *, key: str) -> Region:
    """The region that slices name, as torch reads them; dimensions without one are whole.

    Raises:
        PlanError: more slices than dimensions, or a step.
    """
    slices = (region,) if isinstance(region, slice) else tuple(region)
    if len(slices) > len(shape):
        raise PlanError(f"{key}: {len(slices)} slices, the tensor has {len(shape)} dimensions")
    found = []
    for given, n in zip(slices, shape, strict=False):
        start, end, step = given.indices(n)
        if step != 1:
            raise PlanError(f"{key}: a slice with step {step}, expected 1")
        found.append((start, max(start, end)))
    return (*found, *((0, n) for n in shape[len(found) :]))


def part(form: LinearForm, region: Region) -> RegionRead:
    """What to compute for a region."""
    for dim in range(1, len(region)):
        form, taken = _without(form, dim, region[dim])
        if taken:
            start, end = region[dim]
            region = (*region[:dim], (0, end - start), *region[dim + 1 :])
    return RegionRead(form, region)


def put(part: RegionRead, offset: int, held: "Tensor", out: "Tensor") -> int:
    """Put elements of a part's form into its region; gives how many are of it.

    Args:
        offset: Elements of the form before those of `held`.
        held: Elements in their order, in one dimension.
        out: The region; of any strides, dtype and device.
    """
    n = 0
    for source, target in pairs(part, offset, held, out):
        target.copy_(source)
        n += source.numel()
    return n


def pairs(
    part: RegionRead, offset: int, held: "Tensor", out: "Tensor"
) -> "Iterator[tuple[Tensor, Tensor]]":
    """(of held, of out) for the elements that are of the region; see `put`."""
    for box, theirs, ours in within(part, offset, held.numel()):
        start = box.offset - offset
        yield held[start : start + box.n_elements].view(box.shape)[theirs], out[ours]


Index = tuple[int | slice, ...]
"""What a tensor is indexed with."""


def within(part: RegionRead, offset: int, n: int) -> list[tuple[Tile, Index, Index]]:
    """For n elements of a part's form: boxes, what of each is in the region, and where."""
    found: list[tuple[Tile, Index, Index]] = []
    for box in ranges.boxes(part.form.spec.shape, offset, offset + n):
        shape = part.form.spec.shape
        n_prefix = len(box.prefix)
        if not shape:
            found.append((box, (), ()))
            continue
        inner = ((box.start, box.end), *((0, n) for n in shape[n_prefix + 1 :]))
        if not all(
            start <= i < end for i, (start, end) in zip(box.prefix, part.ranges, strict=False)
        ):
            continue
        theirs: list[slice] = []
        ours: list[int | slice] = [
            i - start for i, (start, _) in zip(box.prefix, part.ranges, strict=False)
        ]
        for (at, until), (start, end) in zip(inner, part.ranges[n_prefix:], strict=True):
            low, high = max(at, start), min(until, end)
            theirs.append(slice(low - at, max(low, high) - at))
            ours.append(slice(low - start, max(low, high) - start))
        found.append((box, tuple(theirs), tuple(ours)))
    return found


def _without(form: LinearForm, dim: int, wanted: Range) -> tuple[LinearForm, bool]:
    """The form of a range of a dimension, if that is the same function, operation by operation."""
    n = form.spec.shape[dim]
    start, end = wanted
    block = gcd(start, end, n)
    if wanted == (0, n) or start == end or (end - start) // block > _MAX_BLOCKS:
        return form, False
    if not all(_is_plain(term.maps[dim], block) for term in form.terms):
        return form, False
    rows = tuple(((i, 1.0),) for i in range(start // block, end // block))
    taken = BlockMap(rows, n // block, block)
    dims = [taken if d == dim else None for d in range(len(form.spec.shape))]
    found = graph.map_dims(form, dims)
    same = found.accumulator == form.accumulator and len(found.terms) == len(form.terms)
    if same and all(a.blend == b.blend for a, b in zip(found.terms, form.terms, strict=True)):
        return found, True
    return form, False


def _is_plain(m: AxisMap | None, block: int) -> bool:
    """Whether a map moves units, all with one coefficient: a part of it does the same to each."""
    if m is None:
        return True
    if not isinstance(m, BlockMap) or m.longest > 1 or m.common is None:
        return False
    return m.n_out // gcd(block, m.block) <= _MAX_BLOCKS
