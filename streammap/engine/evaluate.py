"""Tensors of a plan for those who ask one by one: a whole one, a region or a tile, computed now."""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from streammap.common.losses import Losses
from streammap.common.ranges import Region, Tile
from streammap.engine import loop, memory, regions
from streammap.engine.compiler import Programs
from streammap.engine.memory import Memory
from streammap.engine.regions import RegionRead
from streammap.engine.schedule import Compute, Job, TensorOffset, whole_tiles
from streammap.engine.tile_reads import Recipe, form_key
from streammap.engine.worker import Worker
from streammap.errors import PlanError
from streammap.io.buffers import Buffer
from streammap.io.dtypes import DTYPE_BITS, to_torch
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan


def read_tensor(
    plan: Plan,
    key: str,
    region: slice | Sequence[slice] | None = None,
    *,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> Tensor:
    """A tensor of a plan or a region of it, in `out` or in a new tensor.

    Raises:
        PlanError: an `out` of another shape or given with a dtype or device; not a region.
        CheckpointError: a source can't be read.
    """
    plan.check_settled()
    form = plan.form(key)
    wanted = regions.parse(() if region is None else region, form.spec.shape, key=key)
    shape = tuple(end - start for start, end in wanted)
    if out is None:
        out = torch.empty(shape, dtype=dtype or to_torch(form.spec.dtype), device=device or "cpu")
    elif dtype is not None or device is not None:
        raise PlanError(f"{key}: `out` has a dtype and a device already", hint="pass out alone")
    elif tuple(out.shape) != shape:
        raise PlanError(f"{key}: `out` is {list(out.shape)}, the region {list(shape)}")
    read_into(form, wanted, out, memory.fit([form], budget=None, n_workers=1))
    return out


@final
class LazyState(Mapping[str, Tensor]):
    """A state dict whose tensors are computed each time they are asked for."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __getitem__(self, key: str) -> Tensor:
        if key not in self:
            raise KeyError(key)
        return read_tensor(self._plan, key)

    def __contains__(self, key: object) -> bool:
        return key in self._plan.targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.targets)

    def __len__(self) -> int:
        return len(self._plan.targets)

    def __repr__(self) -> str:
        return f"<lazy state dict of {len(self)} tensors>"


def read_into(form: LinearForm, region: Region, out: Tensor, room: Memory) -> None:
    """Fill `out` with a region of a form, tile by tile.

    Each number is rounded to the form's dtype first, as in a file, and then cast to that of `out`.

    Args:
        out: Of the region's shape; of any strides, dtype and device.
        room: What one thread takes, on top of `out`.

    Raises:
        CheckpointError: a source can't be read.
    """
    part = regions.region_read(form, region)
    if part.nbytes:
        rows = {} if part.rows is None else {"": part.rows}
        with torch.no_grad():
            loop.run_here({"": part.form}, _OneTensor(part, out), room, rows=rows)


@final
class _OneTensor:
    """The sink of a region of one tensor."""

    def __init__(self, region: RegionRead, out: Tensor) -> None:
        self._region, self._out = region, out
        self._dtype = to_torch(region.form.spec.dtype)

    def grid(self, key: str) -> None:
        """Whole tiles: the larger a piece, the fewer calls."""

    def lane(self) -> "_OneTensor":
        return self

    def write(self, part: Job, offset: int, piece: memoryview) -> None:
        elements = torch.frombuffer(piece, dtype=self._dtype)
        for place in part.places:
            start = (place.offset + offset) // self._dtype.itemsize
            regions.copy_into(self._region, start, elements, self._out)

    def done(self, part: Job, lost: Losses) -> None:
        pass


@final
class TileReader:
    """Reads or computes tiles of any forms, one by one. Not to be used by two threads at once."""

    def __init__(self, room: Memory, *, widest: int = 1) -> None:
        """Room for a tile, and for `widest` times its bytes where dtypes differ."""
        self._worker = Worker(room, Programs(), grid=whole_tiles)
        self._whole = Buffer(room.largest.out_nbytes * widest)

    def read(self, form: LinearForm, tile: Tile | None, start: int, n: int) -> memoryview:
        """The bytes of n elements, from element `start` on; valid until the next call.

        Args:
            tile: The same part as a tile; needed for a form that is computed.
        """
        bits = max(8, DTYPE_BITS[form.spec.dtype])
        view = self._whole.view[: n * bits // 8]
        source = form.bare
        if source is not None:
            self._worker.read(source, start * bits // 8, view)
            return view
        assert tile is not None
        job = Compute(form_key(form), Recipe(form, tile), (TensorOffset("", 0),))
        self._worker.begin()
        for part in self._worker.split(job):
            ((_, piece),) = self._worker.compute(part)
            if part is job:
                return piece
            offset = part.places[0].offset
            view[offset : offset + len(piece)] = piece
        return view
