"""One tensor of a plan, computed now."""

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from streammap import memory, schedule
from streammap.buffers import Buffer
from streammap.dtypes import to_torch
from streammap.graph import Form
from streammap.header import Slot
from streammap.memory import Memory
from streammap.program import Programs
from streammap.schedule import Job
from streammap.worker import Worker

_MAPPED_NBYTES = 2**20


def read(form: Form, *, budget: int) -> Tensor:
    """The whole tensor of a form, as a new tensor; `budget` is for all but that.

    Raises:
        CheckpointError: a source can't be read.
        OutputError: the budget is too small.
    """
    spec = form.spec
    if spec.n_elements == 0:
        return torch.empty(spec.shape, dtype=to_torch(spec.dtype))
    # An anonymous mapping is zeros already; a bytearray would be written twice.
    held = mmap.mmap(-1, spec.nbytes) if spec.nbytes > _MAPPED_NBYTES else bytearray(spec.nbytes)
    view = memoryview(held)
    for job, part in _computed(form, memory.fit([form], budget=budget, n_workers=1)):
        for place in job.places:
            view[place.offset : place.offset + job.nbytes] = part
    return torch.frombuffer(held, dtype=to_torch(spec.dtype)).view(spec.shape)


def _computed(form: Form, fitted: Memory) -> Iterator[tuple[Job, memoryview]]:
    worker = Worker(fitted, Programs(), mapped=False)
    tile = Buffer(fitted.dense_limits.out_nbytes)
    for bundle in schedule.bundles({"": form}, [("", Slot("", form.spec, 0))], fitted):
        for job in bundle:
            for part in worker.parts(job):
                worker.do(part, tile)
                yield part, tile.view[: part.nbytes]
