"""One thread's share of a run: reads what a tile needs, and computes it.

A worker keeps the parts of sources that it read last, so that the tiles of a bundle read them once.
Where a file is mapped and a part lies in one piece, kernels read it there, without a copy; parts
that are gathered from several places, and those for a device, are read into buffers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, final

from streammap.common import ranges
from streammap.common.losses import NOTHING, Losses
from streammap.common.ranges import PIECE_NBYTES, Range, Tile
from streammap.common.torch_threads import begin_thread
from streammap.common.weighed_cache import WeighedCache
from streammap.engine import elementwise
from streammap.engine.compiler import Programs
from streammap.engine.devices import DeviceBuffer, DeviceSide, Matrices
from streammap.engine.elementwise import Pieces
from streammap.engine.memory import MAX_CALLS, N_PLACES, Limits, Memory
from streammap.engine.program import OUT, WORK, Op, Program
from streammap.engine.schedule import (
    Compute,
    Copy,
    Grid,
    Job,
    TensorOffset,
    cut_of,
    fits,
    grid_tile,
    limits_of,
    whole_tiles,
)
from streammap.engine.tile_reads import ReadRequest, Recipe, form_key
from streammap.errors import PlanError
from streammap.io.buffers import Buffer
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import DTYPE_BITS
from streammap.io.storage.base import Reader
from streammap.io.storage.mapping import MappedPart
from streammap.planning.dense.blocks import Blocks
from streammap.planning.graph import Derived, LinearForm, TensorRef
from streammap.planning.maps import DenseMap

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Call = Callable[[], object]
Calls = list[Call | None]
"""The calls of a program's operations on buffers; None where it is not bound, or reads."""
Reads = Iterator[tuple[tuple[TensorRef, int], "_Place"]]
Stretch = tuple[TensorRef, int, int]
"""Bytes of a source tensor, from the first to one past the last."""
Piece = tuple[int, memoryview]
"""Bytes of a job: where they begin in it, and they themselves."""
_MAX_BOUND = 256


@final
class _Place:
    """A part of a source: bytes that were read into a buffer, or that are mapped."""

    def __init__(self, nbytes: int) -> None:
        self.buffer, self.mapped = Buffer(nbytes), MappedPart(nbytes)
        self.held: object = None
        """What it holds."""

    @property
    def is_mapped(self) -> bool:
        return self.mapped.is_open

    def typed(self, dtype: str) -> "Tensor":
        """All of it as a one-dimensional tensor."""
        return (self.mapped if self.is_mapped else self.buffer).typed(dtype)

    def let_go(self) -> None:
        """Hold nothing any more."""
        self.held = None
        self.mapped.close()


@final
class Worker:
    """Buffers of one thread. Not to be used by two at once."""

    def __init__(
        self,
        memory: Memory,
        programs: Programs,
        *,
        grid: Grid,
        reader: Reader = "pread",
        matrices: Matrices | None = None,
    ) -> None:
        """Buffers become resident as they are used.

        Args:
            grid: How the bytes of each target are taken.
            reader: How files of this machine are read.
            matrices: Dense maps on the device to compute on; None for the processor.
        """
        begin_thread()
        self._memory, self._programs = memory, programs
        self._grid, self._reader = grid, reader
        limits = memory.largest
        self._blocks = Blocks()
        self._out = Buffer(limits.out_nbytes)
        self._places = [_Place(limits.read_nbytes) for _ in range(N_PLACES)]
        self._order = list(range(N_PLACES))
        """The places, least recently used first."""
        self._work = Buffer(limits.work_nbytes)
        self.n_read = 0
        """Bytes read so far."""
        self._losses = NOTHING
        self._latest: tuple[Recipe, tuple[Program, Limits]] | None = None
        self._bound = WeighedCache[tuple[Program, Calls]](
            most=_MAX_BOUND, heaviest=MAX_CALLS, weight=lambda bound: len(bound[1])
        )
        """The program is kept with its calls, so that no other one gets its id."""
        self._pieces: dict[object, Pieces | None] = {}
        """How flat forms are computed, by what they have in common."""
        self._forms: WorkerReader | None = None
        self._side = None
        if matrices is not None:
            self._side = DeviceSide(limits, matrices)
            for place in self._places:
                self._side.pin(place.buffer)

    def close(self) -> None:
        """Give back what is mapped, and what is on a device."""
        self.begin()
        if self._forms is not None:
            self._forms.close()
        if self._side is not None:
            self._side.close()

    def begin(self) -> None:
        """Forget what was read: a bundle follows, which shares no reads with the last one.

        It starts with the first places again, which are in the processor's cache.
        """
        for place in self._places:
            place.let_go()
        self._order = list(range(N_PLACES))

    def losses(self) -> Losses:
        """What was lost since this was asked last."""
        lost, self._losses = self._losses, NOTHING
        return lost

    def _note(self, lost: Losses) -> None:
        self._losses = self._losses.plus(lost)

    def split(self, job: Job) -> Iterator[Job]:
        """The job; or smaller ones, if it takes more memory than the first of its tensor."""
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
                f"{job.places[0].key}: a row of its tile takes {program.work_nbytes} bytes of "
                "scratch",
                hint="give the run more memory",
            )
        for half in halves:
            yield from self.split(half)

    def compute(self, job: Job) -> Iterator[Piece]:
        """The job's bytes in order: in one piece, or cut where its writer's grid is.

        Each piece is valid until the next one is asked for.
        """
        first = job.places[0]
        start = self._grid(first.key)
        grid = None if start is None else start + first.offset
        if isinstance(job, Copy):
            return self._copied(job, grid)
        pieces = None if grid is None else self._pieces_of(job)
        if grid is not None and pieces is not None:
            return self._by_pieces(job, pieces, grid)
        return self._whole(job, grid)

    def _copied(self, job: Copy, grid: int | None) -> Iterator[Piece]:
        """Read and given piece by piece, so that a piece is written from the cache.

        A mapping holds several pieces: as much as a tile. What is decoded is done in one go, in the
        largest buffer: its parts may be spread over all of its tensor.
        """
        load, place, cuts, n = job.source, self._places[0], [(0, job.nbytes)], 1
        is_decoded = decodes(load)
        if grid is not None:
            step = min(PIECE_NBYTES, self._memory.tile_nbytes)
            room = self._memory.limits.work_nbytes if is_decoded else self._memory.tile_nbytes
            cuts, n = list(ranges.pieces(grid, job.nbytes, step)), max(1, room // step)
        for run in (cuts[i : i + n] for i in range(0, len(cuts), n)):
            first = run[0][0]
            last = run[-1][1]
            is_mapped = self._map(place, load, job.start + first, job.start + last)
            if is_decoded:
                whole = self._work.view[: last - first]
                load.source.read_into(load.key, job.start + first, whole)
                for start, end in run:
                    yield start, whole[start - first : end - first]
                continue
            for start, end in run:
                if is_mapped:
                    yield start, place.mapped.view[start - first : end - first]
                    continue
                view = self._out.view[: end - start]
                self.read(load, job.start + start, view)
                yield start, view
            place.mapped.check()
            place.mapped.close()

    def _whole(self, job: Compute, grid: int | None) -> Iterator[Piece]:
        """Computed in one go; given in pieces, if there is a grid."""
        if self._side is None:
            self._compute_here(job)
        else:
            self._compute_there(job, self._side)
        if grid is None:
            yield 0, self._out.view[: job.nbytes]
            return
        for start, end in ranges.pieces(grid, job.nbytes):
            yield start, self._out.view[start:end]

    def _pieces_of(self, job: Compute) -> Pieces | None:
        form = job.recipe.form
        key = elementwise.flat_key(form) if self._side is None else None
        if key is not None and key not in self._pieces:
            if len(self._pieces) >= _MAX_BOUND:
                self._pieces.clear()
            self._pieces[key] = elementwise.pieces_of(form, self._memory.limits)
        return self._pieces.get(key)

    def _by_pieces(self, job: Compute, pieces: Pieces, grid: int) -> Iterator[Piece]:
        """Computed and given piece by piece.

        The calls are bound once, to buffers of a whole piece. Where less is left, they compute
        numbers from what the buffers held before, and nobody reads these; but where numbers are
        counted, there is a program for these.
        """
        form = job.recipe.form
        numbers = range(N_PLACES)
        calls = self._calls(pieces.program, numbers)
        item = DTYPE_BITS[form.spec.dtype] // 8
        loads = [(load, DTYPE_BITS[load.spec.dtype] // 8) for load in elementwise.loads_of(form)]
        for start, end in ranges.pieces(grid - grid % item, job.nbytes, pieces.nbytes):
            self.begin()
            first, n = job.recipe.tile.start + start // item, (end - start) // item
            reads = iter(zip(loads, self._places, strict=False))
            program = pieces.program
            if program.counts and n * item < pieces.nbytes:
                program = elementwise.program_of(form, n, self._memory.limits)

            def read(first: int = first, n: int = n, reads: Reads = reads) -> None:
                (load, size), place = next(reads)
                is_whole = n * item == pieces.nbytes  # what is bound may be a whole piece
                self._fill(place, [(load, first * size, (first + n) * size)], maps=is_whole)

            is_bound = program is pieces.program
            self._run(program, numbers, calls if is_bound else _unbound(program), read)
            yield start, self._out.view[: end - start]

    def _means(self, job: Compute) -> tuple[Program, Limits]:
        """A job's program and limits; those of the last job are kept."""
        if self._latest is None or self._latest[0] is not job.recipe:
            limits = limits_of(job.recipe.form, self._memory)
            program = self._programs.of(job.recipe, job.form_key, limits.chunk_nbytes)
            self._latest = job.recipe, (program, limits)
        return self._latest[1]

    def _compute_here(self, job: Compute) -> None:
        program, _ = self._means(job)
        requests = job.recipe.requests
        chosen = [self._place(request) for request in requests]
        numbers = tuple(number for number, _ in chosen)
        # Each tile cuts its matrices at another place. What they are multiplied with is not mapped:
        # how a product is rounded depends on where in a cache line its operands begin, too.
        is_dense = job.recipe.is_dense
        calls = self._calls(program, numbers, keeps=not is_dense)
        reads = iter(zip(requests, chosen, strict=True))

        def read() -> None:
            request, (number, is_held) = next(reads)
            if not is_held:
                self._fill(self._places[number], request.stretches(), maps=not is_dense)

        self._run(program, numbers, calls, read)

    def _run(
        self, program: Program, numbers: Sequence[int], calls: Calls, read: Callable[[], None]
    ) -> None:
        """Do what a program says.

        Args:
            numbers: The place of each of its requests.
            calls: Those that were bound before.
            read: Does the next request.
        """
        for i, op in enumerate(program.ops):
            if op.kind == "read":
                read()
                continue
            call = calls[i]
            if any(v.place >= 0 and self._places[numbers[v.place]].is_mapped for v in op.sources):
                call = self._bind(op, numbers)  # for this tile: the next one lies elsewhere
            elif call is None:
                call = calls[i] = self._bind(op, numbers)
            call()
        for number in numbers:
            self._places[number].mapped.check()

    def _compute_there(self, job: Compute, side: DeviceSide) -> None:
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
                    bind(op, buffer, side.matrices.part, self._note)()
                    continue
                request = next(requests)
                held = side.held(request.cache_key)
                if held is None:
                    if n_uploaded and n_uploaded % N_PLACES == 0:
                        side.wait()  # the places are about to be written again
                    place = self._places[n_uploaded % N_PLACES]
                    self._fill(place, request.stretches(), maps=False)
                    held = side.upload(request.cache_key, place.buffer, request.nbytes)
                    n_uploaded += 1
                there.append(held)
            side.download(self._out, job.nbytes)

    def _place(self, request: ReadRequest) -> tuple[int, bool]:
        """The place for a request, and whether it holds what is asked for."""
        key = request.cache_key
        for number in self._order:
            if self._places[number].held == key:
                is_held = True
                break
        else:
            number, is_held = self._order[0], False
            self._places[number].held = key
        self._order.remove(number)
        self._order.append(number)
        return number, is_held

    def _calls(self, program: Program, numbers: Sequence[int], *, keeps: bool = True) -> Calls:
        """The calls of a program on its places' buffers, kept for the next time."""
        key = id(program), numbers
        if not keeps:
            return _unbound(program)
        # The program is kept with its calls, so that no other one gets its id.
        return self._bound.of(key, lambda: (program, _unbound(program)))[1]

    def _bind(self, op: Op, numbers: Sequence[int]) -> Call:
        """The call of an operation, on buffers and on what is mapped."""
        from streammap.engine.kernels import bind

        special = {OUT: self._out, WORK: self._work}

        def buffer(request: int) -> "Buffer | _Place":
            return special[request] if request < 0 else self._places[numbers[request]]

        return bind(op, buffer, self._part, self._note)

    def _part(self, m: DenseMap, rows: Range, columns: Range, dtype: "torch.dtype") -> "Tensor":
        """Rows and columns of a dense map, valid until it is asked again."""
        return self._blocks.part(m.matrix, rows, columns, dtype)

    def _fill(self, place: _Place, stretches: Iterable[Stretch], *, maps: bool = True) -> None:
        """Read stretches of bytes, one after the other; a single one may be mapped instead."""
        place.mapped.check()
        place.mapped.close()
        parts = list(stretches)
        if maps and len(parts) == 1 and self._map(place, *parts[0]):
            return
        offset = 0
        for load, start, end in parts:
            view = place.buffer.view[offset : offset + end - start]
            self.read(load, start, view)
            offset += end - start

    def read(self, load: TensorRef, start: int, view: memoryview) -> None:
        """Fill `view` with bytes of a source tensor, from its byte `start` on."""
        if isinstance(load.source, Derived):
            if self._forms is None:
                self._forms = WorkerReader(self._memory, reader=self._reader)
            before = self._forms.n_read
            self._forms.fill(load.source, start, view)
            self.n_read += self._forms.n_read - before
        else:
            load.source.read_into(load.key, start, view)
            self.n_read += len(view)

    def _map(self, place: _Place, load: TensorRef, start: int, end: int) -> bool:
        if self._reader == "pread":
            return False
        is_mapped = load.source.map_into(load.key, start, end, place.mapped, self._reader)
        self.n_read += (end - start) * is_mapped
        return is_mapped


@final
class WorkerReader:
    """The FormReader of one worker, which reads for derived tensors.

    A stored tensor is read straight into what is to be filled. Any other form is computed by a
    worker of its own, whose tiles are small: its buffers come on top of those of the first.
    """

    def __init__(self, memory: Memory, *, reader: Reader) -> None:
        """Take nothing yet; `memory` is that of the worker it reads for."""
        self.kept: dict[object, object] = {}
        self._owner: Derived | None = None
        self._memory = memory.inner
        self._worker = Worker(memory.inner, Programs(), grid=whole_tiles, reader=reader)

    @property
    def n_read(self) -> int:
        """Bytes read so far."""
        return self._worker.n_read

    def fill(self, made: Derived, start: int, view: memoryview) -> None:
        """Fill `view` with bytes of a derived tensor, from its byte `start` on."""
        if self._owner is not made:
            self.kept.clear()
            self._owner = made
        if len(view):
            made.fill(start * 8 // DTYPE_BITS[made.tensor.dtype], view, self)

    def __call__(self, form: LinearForm, start: int, view: memoryview) -> None:
        """See FormReader."""
        bits = DTYPE_BITS[form.spec.dtype]
        bare = form.bare
        if bare is not None:
            self._worker.read(bare, start * bits // 8, view)
            return
        shared, end = form_key(form), start + len(view) * 8 // bits
        for tile in self._tiles(form, start, end):
            self._worker.begin()
            at = (tile.offset - start) * bits // 8
            for part in self._worker.split(
                Compute(shared, Recipe(form, tile), (TensorOffset("", 0),))
            ):
                first = at + part.places[0].offset
                for offset, piece in self._worker.compute(part):
                    low, high = max(0, first + offset), min(len(view), first + offset + len(piece))
                    if low < high:
                        view[low:high] = piece[low - first - offset : high - first - offset]

    def _tiles(self, form: LinearForm, start: int, end: int) -> Iterator[Tile]:
        """Tiles that have elements of a form; of products, those that have the same in each run."""
        if not form.is_dense:
            yield from ranges.boxes(form.spec.shape, start, end)
            return
        cut = cut_of(form, limits_of(form, self._memory))
        while start < end:
            tile = grid_tile(form, cut, start)
            yield tile
            start = tile.offset + tile.n_elements

    def close(self) -> None:
        """Give back what is mapped."""
        self._worker.close()


def _unbound(program: Program) -> Calls:
    return [None] * len(program.ops)


def decodes(load: TensorRef) -> bool:
    """Whether a tensor is computed from stored parts as it is read."""
    return isinstance(load.source, Checkpoint) and load.key in load.source.parts_of
