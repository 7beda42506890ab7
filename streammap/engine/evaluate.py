"""One tensor of a plan, or a region of it, computed now."""

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streammap.engine import regions, schedule
from streammap.engine.compiler import Programs
from streammap.engine.memory import Memory
from streammap.engine.schedule import Job
from streammap.engine.worker import Worker
from streammap.io.buffers import Buffer
from streammap.io.dtypes import to_torch
from streammap.io.formats.safetensors_header import Slot
from streammap.planning.graph import LinearForm

if TYPE_CHECKING:
    from streammap.common.ranges import Range, Region

_MAPPED_NBYTES = 2**20


def read(form: LinearForm, memory: Memory) -> Tensor:
    """The whole tensor of a form, as a new tensor; `memory` is what one thread takes beside it.

    Raises:
        CheckpointError: a source can't be read.
    """
    spec = form.spec
    if spec.n_elements == 0:
        return torch.empty(spec.shape, dtype=to_torch(spec.dtype))
    # An anonymous mapping is zeros already; a bytearray would be written twice.
    held = mmap.mmap(-1, spec.nbytes) if spec.nbytes > _MAPPED_NBYTES else bytearray(spec.nbytes)
    view = memoryview(held)
    for job, part in _computed(form, None, memory):
        for place in job.places:
            view[place.offset : place.offset + job.nbytes] = part
    return torch.frombuffer(held, dtype=to_torch(spec.dtype)).view(spec.shape)


def read_into(form: LinearForm, region: "Region", out: Tensor, memory: Memory) -> None:
    """Fill `out` with a region of a form, tile by tile.

    Each number is rounded to the form's dtype first, as in a file, and then cast to that of `out`.

    Args:
        out: Of the region's shape; of any strides, dtype and device.
        memory: What one thread takes.

    Raises:
        CheckpointError: a source can't be read.
    """
    part = regions.part(form, region)
    if not part.nbytes:
        return
    dtype = to_torch(form.spec.dtype)
    with torch.no_grad():
        for job, view in _computed(part.form, part.rows, memory):
            held = torch.frombuffer(view, dtype=dtype)
            for place in job.places:
                regions.put(part, place.offset // dtype.itemsize, held, out)


def _computed(
    form: LinearForm, rows: "Range | None", memory: Memory
) -> Iterator[tuple[Job, memoryview]]:
    worker = Worker(memory, Programs(), mapped=False, matrices=None)
    tile = Buffer(memory.dense_limits.out_nbytes)
    slots, wanted = [("", Slot("", form.spec, 0))], {} if rows is None else {"": rows}
    for bundle in schedule.bundles({"": form}, slots, memory, rows=wanted):
        for job in bundle:
            for part in worker.parts(job):
                worker.do(part, tile)
                yield part, tile.view[: part.nbytes]
