"""One thread's share of a run: reads what a tile needs, and computes it.

A worker keeps the parts of sources that it read last, so that the tiles of a bundle read them once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from streammap.common import ranges
from streammap.engine import elementwise
from streammap.engine.compiler import Programs
from streammap.engine.devices import DeviceBuffer, DeviceSide, Matrices
from streammap.engine.elementwise import Pieces
from streammap.engine.memory import N_PLACES, Limits, Memory
from streammap.engine.program import OUT, WORK, Program
from streammap.engine.schedule import Compute, Copy, Job, fits, limits_of
from streammap.engine.tile_reads import ReadRequest, Recipe
from streammap.errors import PlanError
from streammap.io.buffers import Buffer
from streammap.io.tensor_spec import DTYPE_BITS
from streammap.planning.maps import DenseMap

if TYPE_CHECKING:
    from torch import Tensor

Call = Callable[[], object]
_MAX_BOUND = 256


@final
class Worker:
    """Buffers of one thread. Not to be used by two at once."""

    def __init__(
        self, memory: Memory, programs: Programs, *, mapped: bool, matrices: Matrices | None
    ) -> None:
        """Buffers become resident as they are used.

        Args:
            mapped: Whether to read through mappings.
            matrices: Dense maps on the device to compute on; None for the processor.
        """
        self._memory, self._programs, self._mapped = memory, programs, mapped
        limits = memory.dense_limits
        self._places = [Buffer(limits.read_nbytes) for _ in range(N_PLACES)]
        self._held: list[object] = [None] * N_PLACES
        """What was read into each place, by the order of use: the last one last."""
        self._order = list(range(N_PLACES))
        self._work = Buffer(limits.work_nbytes)
        self.n_read = 0
        """Bytes read so far."""
        self._latest: tuple[Recipe, tuple[Program, Limits]] | None = None
        self._bound: dict[object, tuple[Program, tuple[Call | None, ...]]] = {}
        """With the program, so that no other one gets its id."""
        self._pieces: dict[object, Pieces | None] = {}
        """How flat forms are computed, by what they have in common."""
        self._side = None
        if matrices is not None:
            self._side = DeviceSide(limits, matrices)
            for place in self._places:
                self._side.pin(place)

    @property
    def tile_nbytes(self) -> int:
        """What is read or computed at once, at most."""
        return self._memory.tile_nbytes

    def close(self) -> None:
        """Give back what is on a device."""
        if self._side is not None:
            self._side.close()

    def begin(self) -> None:
        """Forget what was read: a bundle follows, which reads nothing of what the last one did.

        The first places are taken again, which are in the processor's cache.
        """
        self._held = [None] * N_PLACES
        self._order = list(range(N_PLACES))

    def parts(self, job: Job) -> Iterator[Job]:
        """The job, or smaller ones where it takes more memory than the first of its tensor."""
        if isinstance(job, Copy) or self._pieces_of(job) is not None:
            yield job
            return
        program, limits = self._means(job)
        if job.nbytes <= limits.out_nbytes and fits(program, limits):
            yield job
            return
        halves = job.halves()
        if halves is None:
            raise PlanError(
                f"{job.key}: a row of its tile takes {program.work_nbytes} bytes of scratch",
                hint="give the run more memory",
            )
        for half in halves:
            yield from self.parts(half)

    def do(self, job: Job, out: Buffer) -> None:
        """Put the job's bytes at the beginning of `out`."""
        if isinstance(job, Copy):
            self.copy(job, 0, out.view[: job.nbytes])
        elif self._side is None:
            self._compute(job, out)
        else:
            self._compute_there(job, out, self._side)

    def copy(self, job: Copy, start: int, view: memoryview) -> None:
        """Read a part of the job's bytes, from its byte `start` on."""
        source, at = job.found.source, job.start + start
        source.read_into(job.found.key, at, view, mapped=self._mapped)
        self.n_read += len(view)

    def pieces(self, job: Compute, out: Buffer) -> Iterator[memoryview] | None:
        """The job's bytes, each piece at the beginning of `out`; None where it is not done so."""
        found = self._pieces_of(job)
        if found is None:
            return None
        return self._by_pieces(job, found, self._calls(found.program, range(N_PLACES), out), out)

    def _pieces_of(self, job: Compute) -> Pieces | None:
        form = job.recipe.form
        kind = elementwise.kind_of(form) if self._side is None else None
        if kind is not None and kind not in self._pieces:
            if len(self._pieces) >= _MAX_BOUND:
                self._pieces.clear()
            self._pieces[kind] = elementwise.pieces_of(form, self._memory.limits)
        return self._pieces.get(kind)

    def _by_pieces(
        self, job: Compute, found: Pieces, calls: Sequence[Call | None], out: Buffer
    ) -> Iterator[memoryview]:
        """Calls compute a whole piece even where less of it is wanted: the rest is of no use."""
        self.begin()  # what the places hold is not what they held
        form = job.recipe.form
        item, offset = DTYPE_BITS[form.spec.dtype] // 8, job.places[0].offset
        loads = [(load, DTYPE_BITS[load.spec.dtype] // 8) for load in elementwise.loads_of(form)]
        for start, end in ranges.pieces(offset - offset % item, job.nbytes, found.nbytes):
            first, n = job.recipe.tile.start + start // item, (end - start) // item
            reads = iter(zip(loads, self._places, strict=False))
            for call in calls:
                if call is not None:
                    call()
                    continue
                (load, size), place = next(reads)
                part = place.view[: n * size]
                load.source.read_into(load.key, first * size, part, mapped=self._mapped)
                self.n_read += len(part)
            yield out.view[: end - start]

    def _means(self, job: Compute) -> tuple[Program, Limits]:
        """A job's program and limits; those of the last one are at hand."""
        if self._latest is None or self._latest[0] is not job.recipe:
            limits = limits_of(job.recipe.form, self._memory)
            program = self._programs.of(job.recipe, job.kind, limits.chunk_nbytes)
            self._latest = job.recipe, (program, limits)
        return self._latest[1]

    def _compute(self, job: Compute, out: Buffer) -> None:
        program, _ = self._means(job)  # `parts` found them
        requests = job.recipe.requests
        chosen = [self._place(request) for request in requests]
        places = tuple(place for place, _ in chosen)
        calls = self._calls(program, places, out, keeps=not job.recipe.is_dense)
        reads = iter(zip(requests, chosen, strict=True))
        for call in calls:
            if call is not None:
                call()
                continue
            request, (place, is_held) = next(reads)
            if not is_held:
                self._read(request, self._places[place].view)

    def _compute_there(self, job: Compute, out: Buffer, side: DeviceSide) -> None:
        """The same on a device: what is read is copied there, the result is copied back."""
        from streammap.engine.kernels import bind

        requests = iter(job.recipe.requests)
        there: list[DeviceBuffer] = []
        n_uploaded = 0

        def buffer(place: int) -> DeviceBuffer:
            return {OUT: side.out, WORK: side.work}[place] if place < 0 else there[place]

        with side.stream():
            for op in self._means(job)[0].ops:
                if op.kind != "read":
                    bind(op, buffer, side.matrices.on_device)()
                    continue
                request = next(requests)
                held = side.held(request.key)
                if held is None:
                    if n_uploaded and n_uploaded % N_PLACES == 0:
                        side.wait()  # the places are about to be written again
                    place = self._places[n_uploaded % N_PLACES]
                    self._read(request, place.view)
                    held = side.upload(request.key, place, request.nbytes)
                    n_uploaded += 1
                there.append(held)
            side.download(out, job.nbytes)

    def _place(self, request: ReadRequest) -> tuple[int, bool]:
        """The place for a request, and whether it is there already."""
        wanted = request.key
        for place in self._order:
            if self._held[place] == wanted:
                is_held = True
                break
        else:
            place, is_held = self._order[0], False
            self._held[place] = wanted
        self._order.remove(place)
        self._order.append(place)
        return place, is_held

    def _calls(
        self, program: Program, places: Sequence[int], out: Buffer, *, keeps: bool = True
    ) -> tuple[Call | None, ...]:
        """The calls of a program, kept for the next time."""
        key = (id(program), id(out), places)
        _, calls = self._bound.get(key, (None, None))
        if calls is None:
            calls = self._bind(program, places, out)
            if keeps:
                if len(self._bound) >= _MAX_BOUND:
                    self._bound.clear()
                self._bound[key] = program, calls
        return calls

    def _bind(
        self, program: Program, places: Sequence[int], out: Buffer
    ) -> tuple[Call | None, ...]:
        """The calls of a program; None stands for a read."""
        from streammap.engine.kernels import bind

        special = {OUT: out, WORK: self._work}

        def buffer(place: int) -> Buffer:
            return special[place] if place < 0 else self._places[places[place]]

        return tuple(None if op.kind == "read" else bind(op, buffer, _matrix) for op in program.ops)

    def _read(self, request: ReadRequest, view: memoryview) -> None:
        at = 0
        for found, start, end in request.stretches():
            part = view[at : at + end - start]
            found.source.read_into(found.key, start, part, mapped=self._mapped)
            self.n_read += len(part)
            at += end - start


@final
@dataclass(frozen=True, slots=True)
class Made:
    """A job's bytes, made when they are asked for, either at once or piece by piece."""

    worker: Worker
    job: Job
    out: Buffer

    def whole(self) -> memoryview:
        """All of them."""
        self.worker.do(self.job, self.out)
        return self.out.view[: self.job.nbytes]

    def pieces(self) -> Iterator[memoryview]:
        """Parts as they are best written; a copy's are read one by one, and each is there until the
        next is asked for.
        """
        job, out = self.job, self.out
        if isinstance(job, Copy):
            step = min(ranges.PIECE_NBYTES, self.worker.tile_nbytes)
            for start, end in ranges.pieces(job.places[0].offset, job.nbytes, step):
                view = out.view[: end - start]
                self.worker.copy(job, start, view)
                yield view
            return
        pieces = self.worker.pieces(job, out)
        if pieces is not None:
            yield from pieces
            return
        view = self.whole()
        for start, end in ranges.pieces(job.places[0].offset, job.nbytes):
            yield view[start:end]


def _matrix(m: DenseMap) -> "Tensor":
    return m.matrix
