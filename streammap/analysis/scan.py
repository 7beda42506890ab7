"""All bytes of plans, piece by piece, in bounded memory: what verify, diff and health share.

Tiles are read or computed by the threads of a run (threads.py), and go to a function instead of a
file. Two plans go side by side: one drives, the same part of the other is read or computed for each
tile of the first. A piece's bytes are there until the function returns.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar, final

import torch
from torch import Tensor

from streammap.analysis.statistics import CHUNK, Scratch
from streammap.common.events import Finished, Listener, Started, nobody
from streammap.common.ranges import Tile
from streammap.common.torch_threads import torch_threads
from streammap.engine import memory, read_ahead, schedule, threads
from streammap.engine.compiler import Programs
from streammap.engine.memory import Memory
from streammap.engine.options import Engine
from streammap.engine.schedule import Compute, FileOffset, Job
from streammap.engine.tile_reads import Recipe, alike
from streammap.engine.worker import Made, Worker
from streammap.errors import OutputError
from streammap.io.buffers import Buffer
from streammap.io.dtypes import to_torch
from streammap.io.formats.safetensors_header import Slot
from streammap.io.tensor_spec import DTYPE_BITS, FLOATS, TensorSpec
from streammap.planning.graph import LinearForm

MEASURED = (*FLOATS, "F8_E5M2", "F8_E4M3")
"""dtypes whose numbers are looked at; of others, bytes only."""
_SCRATCH_NBYTES = 4 * CHUNK * (4 + 8)
"""Of one thread, with what kernels take for a moment."""
_MAX_WORKERS = 8

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class ScannedPiece:
    """A contiguous part of a tensor."""

    key: str
    spec: TensorSpec
    start: int
    """Elements before it; of dtypes smaller than a byte, bytes."""
    view: memoryview
    other_spec: TensorSpec
    other: memoryview
    """The same part of the other plan's tensor; empty where there is none."""

    def numbers(self) -> Tensor:
        """The elements, in order."""
        return torch.frombuffer(self.view, dtype=to_torch(self.spec.dtype))

    def other_numbers(self) -> Tensor:
        """Those of the other."""
        return torch.frombuffer(self.other, dtype=to_torch(self.other_spec.dtype))


Measure = Callable[[ScannedPiece, Scratch], Found]
Collect = Callable[[str, Found], None]


def each(
    forms: Mapping[str, LinearForm],
    engine: Engine,
    measure: Measure[Found],
    collect: Collect[Found],
    *,
    others: Mapping[str, LinearForm] | None = None,
    listener: Listener = nobody,
) -> None:
    """Measure all pieces of all tensors.

    Args:
        measure: Called by several threads, each with a scratch of its own.
        collect: Called with what `measure` gave, one call at a time.
        others: For each key the form to read beside it, of the same shape. Where one of the two is
            copied and one is computed, it must be this one that is copied.

    Raises:
        CheckpointError: a source can't be read.
        OutputError: the memory is too little.
    """
    held = {key: form for key, form in forms.items() if form.spec.n_elements}
    if not held:
        return
    others = {key: form for key, form in (others or {}).items() if key in held}
    found = fit([*held.values(), *others.values()], engine, n_sides=2 if others else 1)
    widest = max((_ratio(held[key].spec, form.spec) for key, form in others.items()), default=1)
    own = threading.local()
    lock = threading.Lock()

    def write(job: Job, made: Made) -> None:
        view = made.whole()
        if not hasattr(own, "scratch"):
            own.scratch = Scratch()
            own.beside = SecondReader(found, widest) if others else None
        for place in job.places:
            spec, form = held[place.file].spec, others.get(place.file)
            start = place.offset * 8 // max(8, DTYPE_BITS[spec.dtype])
            piece = ScannedPiece(place.file, spec, start, view, spec, _NOTHING)
            if form is not None:
                other = own.beside.read(form, _tile(job, spec, start), start, _n(spec, len(view)))
                piece = replace(piece, other_spec=form.spec, other=other)
            result = measure(piece, own.scratch)
            with lock:
                collect(place.file, result)

    listener(Started(len(held), sum(form.spec.nbytes for form in held.values())))
    sources = read_ahead.as_they_come((*held.values(), *others.values()))
    slots = ((key, Slot(key, form.spec, 0)) for key, form in held.items())
    with torch_threads():
        threads.run(
            schedule.bundles(held, slots, found),
            found,
            write,
            listener=listener,
            mapped=engine.reader == "mmap",
            device="cpu",
            cancel=partial(read_ahead.cancel, sources),
        )
    listener(Finished())


def fit(forms: Sequence[LinearForm], engine: Engine, *, n_sides: int) -> Memory:
    """The memory of such a pass: a thread has a worker for each side.

    Raises:
        OutputError: it is too little.
    """
    wanted = engine.n_threads or min(max(2, memory.n_processors()), _MAX_WORKERS)
    least = wanted if engine.n_threads else 1
    for n in range(wanted, 0, -1):
        budget = engine.memory_nbytes - n * _SCRATCH_NBYTES
        try:
            found = memory.fit(forms, budget=max(1, budget), n_workers=n_sides * n)
        except OutputError:
            if n <= least:
                raise
            continue
        return replace(found, n_workers=n)
    raise AssertionError(wanted)


@final
class SecondReader:
    """Reads or computes parts of tensors, apart from a run. Not to be used by two at once."""

    def __init__(self, found: Memory, widest: int) -> None:
        """Room for a tile, and for `widest` times its bytes where dtypes differ."""
        self._worker = Worker(found, Programs(), mapped=False, matrices=None)
        nbytes = found.dense_limits.out_nbytes
        self._whole, self._part = Buffer(nbytes * widest), Buffer(nbytes * widest)

    def read(self, form: LinearForm, tile: Tile | None, start: int, n: int) -> memoryview:
        """The bytes of n elements, from element `start` on; there until the next call.

        Args:
            tile: The same part as a tile; needed for a form that is computed.
        """
        bits = max(8, DTYPE_BITS[form.spec.dtype])
        view = self._whole.view[: n * bits // 8]
        found = form.copied
        if found is not None:
            found.source.read_into(found.key, start * bits // 8, view, mapped=False)
            return view
        assert tile is not None
        job = Compute("", alike(form), Recipe(form, tile), (FileOffset("", 0),))
        self._worker.begin()
        for part in self._worker.parts(job):
            if part is job:
                self._worker.do(part, self._whole)
                return view
            at = part.places[0].offset
            self._worker.do(part, self._part)
            view[at : at + part.nbytes] = self._part.view[: part.nbytes]
        return view


_NOTHING = memoryview(b"")


def _n(spec: TensorSpec, nbytes: int) -> int:
    """Elements of so many bytes; of dtypes smaller than a byte, bytes."""
    return nbytes * 8 // max(8, DTYPE_BITS[spec.dtype])


def _ratio(spec: TensorSpec, other: TensorSpec) -> int:
    return max(1, DTYPE_BITS[other.dtype] // max(8, DTYPE_BITS[spec.dtype]))


def _tile(job: Job, spec: TensorSpec, start: int) -> Tile | None:
    """The tile of a computed job whose first element is `start`: each of its places has one."""
    if not isinstance(job, Compute):
        return None
    like = job.recipe.tile
    if not spec.shape or like.offset == start:
        return like
    index, rest = [], start
    for n in reversed(spec.shape):
        rest, i = divmod(rest, n)
        index.append(i)
    index.reverse()
    d = len(like.prefix)
    return Tile(tuple(index[:d]), index[d], index[d] + like.end - like.start, start, like.shape)
