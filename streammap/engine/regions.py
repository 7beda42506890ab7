"""A region of a tensor: a range in each dimension, computed from tiles like the whole.

A range of the first dimension decides which tiles are computed. One of a later dimension is cut out
of its map, if that changes no bit; else the rest of each tile is computed and thrown away.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from streammap.common import ranges
from streammap.common.ranges import Range, Region
from streammap.errors import PlanError
from streammap.io.dtypes import DTYPE_BITS
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap

if TYPE_CHECKING:
    from torch import Tensor

_MAX_BLOCKS = 4096
"""A range of more blocks than this is cut out of tiles instead."""


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


def parse(region: slice | Sequence[slice], shape: tuple[int, ...], *, key: str) -> Region:
    """The region that slices name, as torch reads them; dimensions without one are whole.

    Raises:
        PlanError: more slices than dimensions, or a step.
    """
    slices = (region,) if isinstance(region, slice) else tuple(region)
    if len(slices) > len(shape):
        raise PlanError(f"{key}: {len(slices)} slices, the tensor has {len(shape)} dimensions")
    parsed = []
    for given, n in zip(slices, shape, strict=False):
        start, end, step = given.indices(n)
        if step != 1:
            raise PlanError(f"{key}: a slice with step {step}, expected 1")
        parsed.append((start, max(start, end)))
    return (*parsed, *ranges.whole(shape[len(parsed) :]))


def region_read(form: LinearForm, region: Region) -> RegionRead:
    """What to compute for a region."""
    # Products are computed as they are for the whole tensor, so that they have the same bits.
    for dim in range(1, 0 if form.is_dense else len(region)):
        form, taken = _without(form, dim, region[dim])
        if taken:
            start, end = region[dim]
            region = (*region[:dim], (0, end - start), *region[dim + 1 :])
    return RegionRead(form, region)


def copy_into(read: RegionRead, offset: int, elements: "Tensor", out: "Tensor") -> int:
    """Copy elements of a region's form into the region; gives how many are of it.

    Args:
        offset: Elements of the form before these.
        elements: In their order, in one dimension.
        out: The region; of any strides, dtype and device.
    """
    n = 0
    for source, target in overlaps(read, offset, elements, out):
        target.copy_(source)
        n += source.numel()
    return n


def overlaps(
    read: RegionRead, offset: int, elements: "Tensor", out: "Tensor"
) -> "Iterator[tuple[Tensor, Tensor]]":
    """(of elements, of out) for the elements that are of the region; see `copy_into`."""
    shape = read.form.spec.shape
    for box in ranges.boxes(shape, offset, offset + elements.numel()):
        region = box.region(shape)
        both = ranges.intersect(region, read.ranges)
        if both is None:
            continue
        start, n_prefix = box.offset - offset, len(box.prefix)
        source = elements[start : start + box.n_elements].view(box.shape)
        ours = ranges.relative(both, read.ranges)
        # `out` has the dimensions that the box's prefix took away: their one index is taken.
        inside = out[tuple(i for i, _ in ours[:n_prefix])][_slices(ours[n_prefix:])]
        yield source[_slices(ranges.relative(both, region)[n_prefix:])], inside


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in region)


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
    part = graph.map_dims(form, dims)
    same = part.accumulator == form.accumulator and len(part.terms) == len(form.terms)
    if same and all(a.blend == b.blend for a, b in zip(part.terms, form.terms, strict=True)):
        return part, True
    return form, False


def _is_plain(m: AxisMap | None, block: int) -> bool:
    """Whether a map moves units, all with one coefficient: a part of it does the same to each."""
    if m is None:
        return True
    if not isinstance(m, BlockMap) or m.longest > 1 or m.common is None:
        return False
    return m.n_out // gcd(block, m.block) <= _MAX_BLOCKS
