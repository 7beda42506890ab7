"""Which part of a tensor this process holds: all of it, or a shard of a DTensor.

FSDP2 and tensor parallelism keep parameters as DTensors: over a mesh of processes, each dimension
of which cuts one dimension of the tensor (Shard) or repeats it (Replicate). Cuts are those of
torch.chunk: the last ones may be smaller, or empty. A _StridedShard, which FSDP over tensor
parallelism has, cuts each of `split_factor` parts, so that a shard may be several ranges.

    8 rows over 2 x 2 processes, [StridedShard(0, split_factor=2), Shard(0)]: 0-1, 4-5 | 2-3, 6-7
"""

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammap.common.ranges import Range, Region
from streammap.errors import PlanError

if TYPE_CHECKING:
    import torch
    from torch.distributed.tensor import DTensor

Ranges = tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class LocalShard:
    """A region of a tensor, and where it is in what this process holds."""

    region: Region
    at: Region


def as_dtensor(tensor: "torch.Tensor") -> "DTensor | None":
    """The tensor, where it is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None or not isinstance(tensor, module.DTensor):
        return None
    dtensor: DTensor = tensor
    return dtensor


def local_shards(tensor: "torch.Tensor", *, name: str) -> tuple[LocalShard, ...]:
    """What this process holds of a tensor.

    Raises:
        PlanError: a placement that is neither a cut nor a copy.
    """
    ranges: list[Ranges] = [((0, n),) for n in tensor.shape]
    sharded = as_dtensor(tensor)
    if sharded is not None:
        coordinate = sharded.device_mesh.get_coordinate()
        if coordinate is None:
            return ()
        for dim, placement in enumerate(sharded.placements):
            n, rank = sharded.device_mesh.size(dim), coordinate[dim]
            factor = int(getattr(placement, "split_factor", 1))
            axis: int | None = getattr(placement, "dim", None)
            if placement.is_partial() or (axis is None and not placement.is_replicate()):
                raise PlanError(
                    f"{name}: a DTensor that is {placement} over its mesh, expected Shard or "
                    "Replicate",
                    hint="redistribute it first",
                )
            if axis is not None:
                ranges[axis] = cut(ranges[axis], n, rank, factor=factor)
        _check(sharded, ranges, name)
    return tuple(_shards(ranges))


def cut(ranges: Ranges, n: int, rank: int, *, factor: int = 1) -> Ranges:
    """The rank-th of n parts of some ranges; or of each of `factor` parts."""
    parts = [ranges] if factor == 1 else [_chunk(ranges, factor, i) for i in range(factor)]
    merged: list[Range] = []
    for start, end in itertools.chain(*(_chunk(part, n, rank) for part in parts)):
        if merged and merged[-1][1] == start:
            start, _ = merged.pop()
        merged.append((start, end))
    return tuple(merged)


def _chunk(ranges: Ranges, n: int, i: int) -> Ranges:
    """The i-th of n parts as torch.chunk cuts them."""
    total = sum(end - start for start, end in ranges)
    size = -(-total // n)
    low, high = min(i * size, total), min((i + 1) * size, total)
    chunk, offset = [], 0
    for start, end in ranges:
        first, last = max(start, start + low - offset), min(end, start + high - offset)
        if first < last:
            chunk.append((first, last))
        offset += end - start
    return tuple(chunk)


def _shards(ranges: Sequence[Ranges]) -> Iterator[LocalShard]:
    choices = []
    for dim in ranges:
        at, placed = 0, []
        for start, end in dim:
            placed.append(((start, end), (at, at + end - start)))
            at += end - start
        choices.append(placed)
    for chosen in itertools.product(*choices):
        yield LocalShard(tuple(region for region, _ in chosen), tuple(at for _, at in chosen))


def _check(tensor: "DTensor", ranges: Sequence[Ranges], name: str) -> None:
    """Refuse a shard that torch has cut otherwise."""
    expected = tuple(sum(end - start for start, end in dim) for dim in ranges)
    shape = tuple(local(tensor).shape)
    if shape != expected and 0 not in expected:
        raise PlanError(
            f"{name}: this process holds {list(shape)} of it, expected {list(expected)} for "
            f"{list(tensor.placements)}",
            hint="shard it by fully_shard, or as torch.chunk does",
        )


def local(tensor: "torch.Tensor") -> "torch.Tensor":
    """What this process holds, without a gradient."""
    import torch

    sharded = as_dtensor(tensor)
    if sharded is None:
        return tensor.detach()
    with torch.no_grad():
        part: torch.Tensor = sharded.to_local()
    return part.detach()


def replace_local(tensor: "DTensor", part: "torch.Tensor") -> "DTensor":
    """A DTensor with `part` as what this process holds, over the same mesh."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
