"""One tensor of a plan, computed now."""

import mmap
from collections.abc import Iterator

import torch
from torch import Tensor

from streammap import schedule
from streammap.buffers import Buffer
from streammap.compiler import Programs
from streammap.dtypes import to_torch
from streammap.graph import Form
from streammap.header import Slot
from streammap.memory import Memory
from streammap.schedule import Job
from streammap.worker import Worker

_MAPPED_NBYTES = 2**20


def read(form: Form, memory: Memory) -> Tensor:
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
    for job, part in _computed(form, memory):
        for place in job.places:
            view[place.offset : place.offset + job.nbytes] = part
    return torch.frombuffer(held, dtype=to_torch(spec.dtype)).view(spec.shape)


def _computed(form: Form, memory: Memory) -> Iterator[tuple[Job, memoryview]]:
    worker = Worker(memory, Programs(), mapped=False, matrices=None)
    tile = Buffer(memory.dense_limits.out_nbytes)
    for bundle in schedule.bundles({"": form}, [("", Slot("", form.spec, 0))], memory):
        for job in bundle:
            for part in worker.parts(job):
                worker.do(part, tile)
                yield part, tile.view[: part.nbytes]
