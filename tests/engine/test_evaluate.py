"""Forms computed tile by tile against dense float64 products, and the algebra of forms."""

import gc
import itertools
import math
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammap.common import ranges
from streammap.engine import (
    compiler,
    evaluate,
    group_sums,
    memory,
    schedule,
    tile_reads,
    tiles,
    worker,
)
from streammap.engine.compiler import Programs
from streammap.engine.memory import Limits, Memory
from streammap.engine.program import OUT, WORK, Op, Program, View
from streammap.engine.schedule import Compute, Job
from streammap.engine.tiles import Cut
from streammap.engine.worker import Worker
from streammap.errors import PlanError
from streammap.io.buffers import Buffer
from streammap.io.dtypes import DTYPE_BITS, FLOATS, FROM_TORCH, TensorSpec, to_torch
from streammap.io.storage.base import Reader
from streammap.io.storage.mapping import MappedPart
from streammap.planning import graph, maps
from streammap.planning.dense import matrix as matrices
from streammap.planning.dense import stored
from streammap.planning.dense.matrix import Matrix
from streammap.planning.graph import LinearForm, TensorRef, Term
from streammap.planning.maps import AxisMap, BlockMap, DenseMap
from streammap.planning.segments import Row
from tests.support import oracle, tiny

STRIP = 2
"""Units that a dense map takes in at once, here."""
SIMPLE = (1.0, 0.5, 2.0, -1.0)
"""Coefficients that float32 computes with exactly, given small integers."""
ANY = (*SIMPLE, 1 / 3, 0.1, 0.0)


@dataclass(frozen=True)
class Room:
    """Bytes that a tile is given, or what one number takes where that is more."""

    tile: int
    chunk: int
    dense: int = 0


ROOMS = (
    Room(1, 1),
    Room(1, 1, 256),
    Room(200, 1),
    Room(256, 64),
    Room(256, 256, 512),
    Room(1000, 100),
    Room(4096, 512),
    Room(1 << 20, 300),
    Room(1 << 20, 1 << 20, 1 << 21),
)
AMPLE = ROOMS[-1]


@dataclass(eq=False)
class Held:
    """Tensors in memory as a graph reads them."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    name: str = "held"

    def add(self, x: Tensor) -> str:
        key = str(len(self.tensors))
        self.tensors[key] = x
        return key

    def load(self, x: Tensor) -> LinearForm:
        return graph.load(self, self.add(x))

    def spec(self, key: str) -> TensorSpec:
        x = self.tensors[key]
        return TensorSpec(FROM_TORCH[str(x.dtype).removeprefix("torch.")], tuple(x.shape))

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        content = tiny.bits(self.tensors[key])
        assert 0 <= start < start + len(view) <= len(content)
        view[:] = content[start : start + len(view)]

    def map_into(self, key: str, start: int, end: int, part: MappedPart, reader: Reader) -> bool:
        return False


@dataclass(frozen=True)
class Drawn:
    """A form, what it is, and how much rounding can move it."""

    form: LinearForm
    wanted: Tensor
    slack: Tensor


@dataclass(frozen=True)
class Kind:
    """What forms are drawn from."""

    coefficients: Sequence[float]
    has_dense: bool
    is_exact: bool
    """Whether sums in float32 are exact: small integers, simple coefficients."""


RANDOM = Kind(ANY, has_dense=True, is_exact=False)
BLOCKS = Kind(ANY, has_dense=False, is_exact=False)
EXACT = Kind(SIMPLE, has_dense=False, is_exact=True)


def _lying(x: Tensor, lies: str) -> Matrix:
    """A matrix in memory, or in a file row by row or column by column."""
    if lies == "held":
        return matrices.Held(x)
    by_columns = lies == "columns"
    plain = (x.T if by_columns else x).contiguous()
    spool = stored.Spool()
    spool.append(stored.view_of(plain))
    shape = (plain.shape[0], plain.shape[1])
    made = stored.Stored(spool, 0, shape, "F64" if x.dtype == torch.float64 else "F32")
    return made.transposed() if by_columns else made


@st.composite
def maps_to(draw: st.DrawFn, n: int, kind: Kind) -> tuple[AxisMap | None, int]:
    """A map that makes n units, or None, and the units that it reads."""
    which = draw(st.integers(0, 3 if kind.has_dense else 2))
    if which == 0:
        return None, n
    if which == 3:
        n_in, seed = draw(st.integers(1, 5)), draw(st.integers(0, 99))
        matrix = torch.randn(n, n_in, generator=torch.Generator().manual_seed(seed))
        kept = matrix.double() if draw(st.booleans()) else matrix
        lies = draw(st.sampled_from(("held", "stored", "columns")))
        return DenseMap(_lying(kept, lies)), n_in
    block = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    n_in_blocks = draw(st.integers(1, 4))
    entry = st.tuples(st.integers(0, n_in_blocks - 1), st.sampled_from(kind.coefficients))
    row = st.lists(entry, max_size=3).map(tuple)
    rows = draw(st.lists(row, min_size=n // block, max_size=n // block))
    return BlockMap(tuple(rows), n_in_blocks, block), n_in_blocks * block


@st.composite
def drawn_forms(draw: st.DrawFn, kind: Kind) -> Drawn:
    """Sums of mapped blends, of any float dtype and rank 0 to 4, read from mixed dtypes."""
    shape = tuple(draw(st.lists(st.integers(1, 6), max_size=4)))
    dtype = draw(st.sampled_from(FLOATS))
    torch.manual_seed(draw(st.integers(0, 999)))
    source = Held()
    offset = draw(st.sampled_from((0.0, 0.0, 1.5)))
    wanted = torch.full(shape, offset, dtype=torch.float64)
    size = wanted.abs()
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        pairs = [draw(maps_to(n, kind)) for n in shape]
        dims = tuple(m for m, _ in pairs)
        blend = []
        for _ in range(draw(st.integers(1, 3))):
            taken = draw(st.sampled_from((dtype, dtype, *FLOATS)))
            x = torch.randn([n for _, n in pairs])
            x = (x * 3).round().clamp(-8, 8) if kind.is_exact else x
            key = source.add(x.to(to_torch(taken)))
            coefficient = draw(st.sampled_from(kind.coefficients))
            blend.append((coefficient, TensorRef(source, key, source.spec(key))))
            held = source.tensors[key].double()
            wanted = wanted + coefficient * _mapped(held, dims, absolute=False)
            size = size + abs(coefficient) * _mapped(held.abs(), dims, absolute=True)
        terms.append(Term(dims, tuple(blend)))
    unit = torch.finfo(torch.float64 if dtype == "F64" else torch.float32).eps
    slack = torch.zeros_like(size) if kind.is_exact else size * 16 * unit
    form = LinearForm(TensorSpec(dtype, shape), tuple(terms))
    return Drawn(graph.shift(form, offset) if offset else form, wanted, slack)


def _mapped(x: Tensor, dims: Sequence[AxisMap | None], *, absolute: bool) -> Tensor:
    for dim, m in enumerate(dims):
        if m is not None:
            x = oracle.along(x, _matrix(m, absolute=absolute), dim)
    return x


def _matrix(m: AxisMap, *, absolute: bool = False) -> Tensor:
    if isinstance(m, DenseMap):
        matrix = maps.to_matrix(m, like=torch.zeros(0, dtype=torch.float64))
        return matrix.abs() if absolute else matrix
    rows = [[(j, abs(value) if absolute else value) for j, value in row] for row in m.rows]
    return oracle.from_rows(rows, m.n_in_blocks, m.block)


def poisoned(nbytes: int) -> Buffer:
    """Memory that holds NaNs of any dtype: what is read before it is written shows."""
    made = Buffer(nbytes)
    made.view[:] = b"\xff" * len(made.view)
    return made


def read_whole(form: LinearForm, room: Memory) -> Tensor:
    """All of a form, as a new tensor."""
    out = torch.empty(form.spec.shape, dtype=to_torch(form.spec.dtype))
    evaluate.read_into(form, ranges.whole(form.spec.shape), out, room)
    return out


def _read(form: LinearForm, room: Room = AMPLE) -> Tensor:
    with pytest.MonkeyPatch.context() as patch:
        return read_whole(form, _patched(patch, form, room))


def _patched(patch: pytest.MonkeyPatch, form: LinearForm, room: Room) -> Memory:
    """The memory for tiles as small as `room`, but one number's members fit."""
    least = 128
    for term in form.terms:
        members = [m.longest if isinstance(m, BlockMap) else STRIP for m in term.maps if m]
        least = max(least, 2 * 8 * math.prod(members))
    patch.setattr(memory, "CHUNK_NBYTES", max(room.chunk, least))
    patch.setattr(tile_reads, "STRIP", STRIP)
    patch.setattr(group_sums, "MIN_RUN", 1)
    patch.setattr(worker, "Buffer", poisoned)
    if room.dense:
        patch.setattr(memory, "DENSE_TILE_NBYTES", max(room.dense, least))
        patch.setattr(memory, "DENSE_WORK_NBYTES", 4 * max(room.dense, least))
        patch.setattr(matrices, "BLOCK", max(2, room.dense // 64))
    return _memory(max(room.tile, least))


def _memory(tile_nbytes: int) -> Memory:
    return Memory(
        n_workers=1,
        tensors_nbytes=0,
        tile_nbytes=tile_nbytes,
        block_nbytes=0,
        matrices_nbytes=0,
    )


def assert_rounded_once(got: Tensor, drawn: Drawn) -> None:
    """`got` is the true value, moved by the accumulator's rounding and rounded to its dtype."""
    assert got.dtype == to_torch(drawn.form.spec.dtype)
    assert got.shape == drawn.wanted.shape
    low = (drawn.wanted - drawn.slack).to(got.dtype)
    high = (drawn.wanted + drawn.slack).to(got.dtype)
    assert bool(((low <= got) & (got <= high)).all()), (got, drawn.wanted)


@given(drawn_forms(RANDOM), st.sampled_from(ROOMS))
@settings(max_examples=settings().max_examples * 3)
def test_a_form_read_by_tiles_is_the_dense_product(drawn: Drawn, room: Room) -> None:
    assert_rounded_once(_read(drawn.form, room), drawn)


@given(drawn_forms(EXACT), st.sampled_from(ROOMS))
@settings(max_examples=settings().max_examples * 3)
def test_where_sums_are_exact_the_result_is_too(drawn: Drawn, room: Room) -> None:
    got = _read(drawn.form, room)
    assert torch.equal(got, drawn.wanted.to(got.dtype))


@given(drawn_forms(BLOCKS))
def test_tiles_of_any_size_give_the_same_bits(drawn: Drawn) -> None:
    wanted = tiny.bits(_read(drawn.form))
    for room in ROOMS:
        assert tiny.bits(_read(drawn.form, room)) == wanted


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), (2, 0, 2)])
def test_a_tensor_without_elements_has_no_tiles(shape: tuple[int, ...]) -> None:
    assert list(tiles.bundles(shape, (), Cut(0, 1))) == []
    halved = graph.scale(Held().load(torch.empty(shape)), 0.5)
    for grid in (schedule.whole_tiles, lambda key: 8):
        assert list(schedule.bundles({"": halved}, _memory(64), grid=grid, rows={})) == []
    assert _read(halved).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_scalar_is_computed_like_any_tensor(dtype: torch.dtype) -> None:
    source = Held()
    a, b = source.load(torch.tensor(3.0, dtype=dtype)), source.load(torch.tensor(5.0))
    got = _read(graph.combine([(0.5, a), (2.0, b)]))
    assert torch.equal(got, torch.tensor(11.5, dtype=dtype))


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("n_in", [1, 2, 3, 4, 5, 6, 7, 9])
def test_a_dense_map_takes_its_source_in_strips(n_in: int, dim: int) -> None:
    torch.manual_seed(n_in)
    shape = [3, 4, 2]
    shape[dim] = n_in
    matrix = torch.randint(-4, 5, (5, n_in)).float()
    m = DenseMap(matrices.Held(matrix))
    for dtype in (torch.float32, torch.bfloat16):
        source = Held()
        parts = [torch.randint(-4, 5, shape).to(dtype) for _ in range(2)]
        dims = [m if d == dim else None for d in range(3)]
        one = graph.map_dims(source.load(parts[0]), dims)
        two = graph.combine([(0.5, one), (0.5, graph.map_dims(source.load(parts[1]), dims))])
        for form, x in ((one, parts[0].double()), (two, (parts[0].double() + parts[1]) / 2)):
            wanted = oracle.along(x, matrix.double(), dim).to(dtype)
            for room in ROOMS:
                assert torch.equal(_read(form, room), wanted)


def test_a_dense_map_is_forgotten_with_its_form() -> None:
    """It can be large: no cache of the process holds it."""
    m = DenseMap(matrices.Held(torch.randn(3, 4)))
    matrix = weakref.ref(m.matrix)
    form = graph.map_dims(Held().load(torch.randn(4, 4)), [m, m])
    assert _read(form).shape == (3, 3)
    del m, form
    gc.collect()
    assert matrix() is None


@pytest.mark.parametrize("dims", [(0,), (1,), (0, 1)])
def test_rows_of_many_and_of_few_members_are_cut_alike(dims: tuple[int, ...]) -> None:
    rows: tuple[Row, ...] = (
        (),
        ((3, 1.0),),
        ((0, 1.0), (5, 1.0)),
        tuple((j, 0.5) for j in (*range(8),)),
    )
    x = torch.arange(64 * 8.0).view(8, 64)
    x = x.T if dims == (1,) else x
    maps_of = [BlockMap(rows, 8, x.shape[d] // 8) if d in dims else None for d in (0, 1)]
    form = graph.map_dims(Held().load(x), maps_of)
    wanted = _mapped(x.double(), maps_of, absolute=False)
    for room in ROOMS:
        assert torch.equal(_read(form, room).double(), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    """Masks are full of infinities, and blended like all else."""
    source = Held()
    x = torch.tensor([math.inf, -math.inf, 1.0, math.inf, math.nan, -0.0], dtype=dtype)
    y = torch.tensor([1.0, -math.inf, math.inf, -math.inf, 1.0, -0.0], dtype=dtype)
    form = graph.combine([(0.75, source.load(x)), (0.25, source.load(y))])
    wanted = (0.75 * x.double() + 0.25 * y.double()).to(dtype)
    torch.testing.assert_close(_read(form), wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_a_blend_is_rounded_once_and_its_numbers_stand_for_themselves(
    dtype: torch.dtype, alpha: float
) -> None:
    """Of the float64 blend at most the last bit differs, whatever stands beside a number."""
    torch.manual_seed(0)
    x, y = (torch.randn(1000, dtype=torch.float64).to(dtype) for _ in range(2))
    largest = torch.finfo(dtype).max
    x[::50], y[::50] = largest, -largest  # their difference overflows, their blend does not
    source = Held()
    form = graph.combine([(1 - alpha, source.load(x)), (alpha, source.load(y))])
    got = _read(form)
    exact = (1 - alpha) * x.double() + alpha * y.double()
    unit = torch.finfo(dtype).eps
    assert bool(((got.double() - exact).abs() <= 0.51 * unit * exact.abs() + 1e-7).all())
    with_infinity = x.clone()
    with_infinity[500] = math.inf
    form = graph.combine([(1 - alpha, source.load(with_infinity)), (alpha, source.load(y))])
    for room in (Room(200, 1), AMPLE):
        beside = _read(form, room)
        assert beside[500] == math.inf
        beside[500] = got[500]
        assert torch.equal(beside, got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [3, 5000])
def test_float64_is_rounded_once_next_to_each_tie(dtype: torch.dtype, n: int) -> None:
    """Halfway between two numbers the even one; a float64 further, the one on that side."""
    infinity = int(torch.tensor(math.inf, dtype=dtype).view(torch.int16))
    generator = torch.Generator().manual_seed(n)
    bits = torch.randint(0, infinity - 1, (n,), generator=generator, dtype=torch.int16)
    bits[::3] %= 300  # zero, numbers below the least normal one, and a few above
    lower, upper = bits.view(dtype), (bits + 1).view(dtype)
    tie = (lower.double() + upper.double()) / 2
    even = torch.where(bits % 2 == 0, lower, upper)
    above, below = torch.nextafter(tie, upper.double()), torch.nextafter(tie, lower.double())
    for sign in (1.0, -1.0):
        for x, wanted in ((tie, even), (above, upper), (below, lower), (lower.double(), lower)):
            form = graph.combine(
                [(sign, Held().load(x))], dtype=FROM_TORCH[str(dtype).removeprefix("torch.")]
            )
            assert torch.equal(_read(form), wanted * sign)


@st.composite
def groups(draw: st.DrawFn, n_members: int) -> BlockMap:
    """Sums of groups that are neighbours, or stand a stretch apart, or anywhere."""
    n, block = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    coefficient = draw(st.sampled_from((1.0, 0.5, 0.25)))
    units = list(range(n * n_members))
    found = [units[i * n_members : (i + 1) * n_members] for i in range(n)]
    how = draw(st.integers(0, 3))
    if how == 1:
        found = [units[i::n] for i in range(n)]
    if how == 2:
        found = [draw(st.permutations(units))[:n_members] for _ in range(n)]
    if how == 3 and n > 1:  # neighbours first, then those a stretch apart
        later = units[n_members:]
        found = [found[0], *(later[i :: n - 1] for i in range(n - 1))]
    rows = tuple(tuple((j, coefficient) for j in group) for group in found)
    return BlockMap(rows, n * n_members, block)


@given(st.data())
@settings(max_examples=settings().max_examples * 2)
def test_sums_of_groups_are_added_up_in_one_order_whatever_the_tile(data: st.DataObject) -> None:
    """From +0 on: each source, each member of its first dimension, with all of the second."""
    rank = data.draw(st.integers(1, 4))
    mapped = sorted(data.draw(st.sets(st.integers(0, rank - 1), min_size=1, max_size=2)))
    dtype = data.draw(st.sampled_from(("F64", "F32", "F16", "BF16")))
    # float32 sums of more than 4 are kept in float64: these are not of this kind.
    n_sources = data.draw(st.integers(1, 3 if dtype != "F32" else 4 >> len(mapped)))
    most = 2 if len(mapped) > 1 or dtype == "F32" else 4
    dims: list[BlockMap | None] = [None] * rank
    for d in mapped:
        dims[d] = data.draw(groups(data.draw(st.integers(2, most))))
    shape = [data.draw(st.integers(1, 3)) if m is None else m.n_in for m in dims]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    source = Held()
    sources = [torch.randn(shape).mul(torch.randn(shape).mul(3).exp()) for _ in range(n_sources)]
    sources = [x.to(to_torch(dtype)) for x in sources]
    blend = graph.combine([(0.5, source.load(x)) for x in sources])
    form = graph.map_dims(blend, dims)
    inner = dims[mapped[-1]]
    outer = dims[mapped[0]] if len(mapped) > 1 else None
    assert inner is not None
    wanted = torch.zeros(form.spec.shape, dtype=torch.float64 if dtype == "F64" else torch.float32)
    for x, a in itertools.product(sources, range(1 if outer is None else outer.longest)):
        part = x if outer is None else x.index_select(mapped[0], _members(outer, a))
        for b in range(inner.longest):
            wanted = wanted + part.index_select(mapped[-1], _members(inner, b))
    wanted *= 0.5 * math.prod(m.common or 1.0 for m in dims if m is not None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_sums, "MIN_RUN", 1)
        for room in ROOMS:
            assert tiny.bits(_read(form, room)) == tiny.bits(wanted.to(sources[0].dtype)), room
        tile = ranges.tile_at(form.spec.shape, (), 0, form.spec.shape[0])
        found = compiler.program(tile_reads.Recipe(form, tile), 1)
        assert {op.kind for op in found.ops} <= {"read", "copy", "pool"}


def _members(m: BlockMap, slot: int) -> Tensor:
    return torch.tensor([m.members(unit)[slot][0] for unit in range(m.n_out)])


@pytest.mark.parametrize("layout", ["apart", "neighbours"])
def test_groups_of_long_runs_take_one_kernel_and_no_scratch(layout: str) -> None:
    pairs = [(i, i + 4) if layout == "apart" else (2 * i, 2 * i + 1) for i in range(4)]
    m = maps.merging(pairs, 8, block=32)
    x = torch.randn(256, 256).to(torch.bfloat16)
    form = graph.map_dims(Held().load(x), [m, m])
    found = compiler.program(tile_reads.Recipe(form, ranges.tile_at((128, 128), (), 0, 128)), 2**20)
    assert [op.kind for op in found.ops] == ["read", "pool"]
    assert found.work_nbytes == 0


def _jobs(form: LinearForm, given: Memory, of: Worker) -> Iterator[Job]:
    for bundle in schedule.bundles({"": form}, given, grid=schedule.whole_tiles, rows={}):
        for job in bundle:
            yield from of.split(job)


@given(drawn_forms(RANDOM), st.sampled_from(ROOMS))
@settings(max_examples=settings().max_examples * 3)
def test_every_part_of_a_job_stays_within_its_limits(drawn: Drawn, room: Room) -> None:
    form = drawn.form
    with pytest.MonkeyPatch.context() as patch:
        given = _patched(patch, form, room)
        limits = schedule.limits_of(form, given)
        at_work = Worker(given, Programs(), grid=schedule.whole_tiles)
        written = torch.zeros(form.spec.nbytes, dtype=torch.uint8)
        for job in _jobs(form, given, at_work):
            assert job.nbytes <= limits.out_nbytes
            if isinstance(job, Compute):
                found = compiler.program(job.recipe, limits.chunk_nbytes)
                assert found.read_nbytes <= limits.read_nbytes
                assert found.work_nbytes <= limits.work_nbytes
                _follow(found, job, limits)
            for place in job.places:
                written[place.offset : place.offset + job.nbytes] += 1
        assert bool((written == 1).all())


def _follow(found: Program, job: Compute, limits: Limits) -> None:
    """Follow a program byte by byte: it stays inside of what it is given, reads only what it wrote
    or asked for, and writes all of its tile.
    """
    requests = job.recipe.requests
    assert sum(op.kind == "read" for op in found.ops) == len(requests)
    assert all(request.nbytes <= limits.read_nbytes for request in requests)
    buffers = {OUT: _unwritten(job.nbytes), WORK: _unwritten(found.work_nbytes)}
    for op in found.ops:
        if op.kind == "read":
            assert op.out.place == len(buffers) - 2
            request = requests[op.out.place]
            assert op.out.shape == request.shape
            assert sum(end - start for _, start, end in request.stretches()) == request.nbytes
            buffers[op.out.place] = _unwritten(request.nbytes)
        assert all(bool((_at(buffers, view) == -1).all()) for view in _sources(op)), op
        _at(buffers, op.out).fill_(-1)
    assert bool((buffers[OUT] == -1).all())


def _unwritten(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.int8)


def _sources(op: Op) -> tuple[View, ...]:
    """What an operation reads: some change what is there."""
    return (*op.sources, op.out) if op.kind in ("put", "clear", "scale") else op.sources


def _at(buffers: dict[int, Tensor], view: View) -> Tensor:
    """The elements of a view as integers; an error where they reach out of their buffer."""
    whole = buffers[view.place]
    item = DTYPE_BITS[view.dtype] // 8
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    whole = whole[: len(whole) // item * item].view(sizes[item])
    return whole.as_strided(view.shape, view.strides, view.offset)


def test_a_number_that_no_tile_has_room_for_is_refused() -> None:
    source = Held()
    form = graph.map_dims(
        source.load(torch.ones(64)), [BlockMap((tuple((j, 1.0) for j in range(64)),), 64)]
    )
    assert read_whole(form, _memory(4096)).tolist() == [64.0]
    with pytest.raises(PlanError, match=r"a number of F32 \[1\] takes more than 128 bytes"):
        read_whole(form, _memory(128))


def test_a_bare_load_is_copied() -> None:
    source = Held()
    form = source.load(torch.randn(3, 4))
    same = maps.identity(3)
    for unchanged in (
        form,
        graph.scale(form, 1.0),
        graph.combine([(1.0, form)]),
        graph.combine([(0.25, form), (0.75, form)]),
        graph.combine([(1.0, form), (0.0, source.load(torch.randn(3, 4)))]),
        graph.map_dims(form, [same, None]),
        graph.map_dims(
            graph.map_dims(form, [_turned(3, 1), None]), [_turned(3, 2), maps.identity(2, block=2)]
        ),
        graph.scale(graph.scale(form, 0.5), 2.0),
    ):
        assert unchanged.copied == form.terms[0].blend[0][1]
    for changed in (
        graph.scale(form, 0.5),
        graph.shift(form, 1.0),
        graph.combine([(1.0, form)], dtype="BF16"),
        graph.map_dims(form, [_turned(3, 1), None]),
        graph.combine([(1.0, form), (1.0, source.load(torch.randn(3, 4)))]),
    ):
        assert changed.copied is None


def _turned(n: int, by: int) -> BlockMap:
    return BlockMap(tuple((((i + by) % n, 1.0),) for i in range(n)), n)


def test_a_copied_tensor_keeps_its_bits() -> None:
    bits = torch.tensor([0x7FC00001, -1, 1, -(2**31)], dtype=torch.int32)
    got = _read(Held().load(bits.view(torch.float32)))
    assert torch.equal(got.view(torch.int32), bits)


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=3))
def test_maps_of_maps_are_one_map(data: st.DataObject, shape: list[int]) -> None:
    last = [data.draw(maps_to(n, EXACT)) for n in shape]
    first = [data.draw(maps_to(n, EXACT)) for _, n in last]
    x = torch.randn([n for _, n in first])
    form = Held().load(x)
    inner, outer = ([_plain(m) for m, _ in pairs] for pairs in (first, last))
    both = [
        maps.compose(b, a) if a is not None and b is not None else a or b
        for a, b in zip(inner, outer, strict=True)
    ]
    steps = graph.map_dims(graph.map_dims(form, inner), outer)
    assert steps == graph.map_dims(form, both)
    assert steps.spec == TensorSpec("F32", tuple(shape))
    wanted = _mapped(_mapped(x.double(), inner, absolute=False), outer, absolute=False)
    torch.testing.assert_close(_read(steps).double(), wanted, rtol=1e-4, atol=1e-4)


def _plain(m: AxisMap | None) -> AxisMap | None:
    """The same map without repeated members, in the order that `compose` gives them."""
    return None if m is None else maps.compose(m, maps.identity(m.n_in))


def test_equal_loads_and_equal_maps_are_merged() -> None:
    source = Held()
    a, b = (source.load(torch.randn(4, 6)) for _ in range(2))
    pair = maps.merging([[0, 2], [1, 3]], 4)
    again = maps.merging([[0, 2], [1, 3]], 4)
    mapped = graph.map_dims(a, [pair, None])

    twice = graph.combine([(0.5, a), (0.25, a)])
    assert [(c, found.key) for c, found in twice.terms[0].blend] == [(0.75, "0")]
    both = graph.combine([(0.5, a), (0.5, b)])
    assert [len(term.blend) for term in both.terms] == [2]
    alike = graph.combine([(0.5, mapped), (0.5, graph.map_dims(b, [again, None]))])
    assert [len(term.blend) for term in alike.terms] == [2]
    assert alike == graph.map_dims(both, [pair, None])
    apart = graph.combine([(0.5, mapped), (0.5, source.load(torch.randn(2, 6)))])
    assert [len(term.blend) for term in apart.terms] == [1, 1]
    other = graph.combine([(0.5, mapped), (0.5, graph.map_dims(b, [_first(4, 2), None]))])
    assert [len(term.blend) for term in other.terms] == [1, 1]
    assert sum(1 for _ in other.loads()) == 2


def _first(n: int, kept: int) -> BlockMap:
    return BlockMap(tuple(((i, 1.0),) for i in range(kept)), n)


def test_what_cancels_leaves_zeros() -> None:
    source = Held()
    form = source.load(torch.tensor([math.inf, 1.0]))
    for nothing in (
        graph.combine([(1.0, form), (-1.0, form)]),
        graph.scale(form, 0.0),
        graph.map_dims(form, [BlockMap(((), ()), 2)]),
    ):
        assert torch.equal(_read(nothing), torch.zeros(2))


def test_the_first_part_or_the_caller_says_the_dtype() -> None:
    source = Held()
    half, whole = source.load(torch.ones(2).half()), source.load(torch.ones(2))
    assert graph.combine([(0.5, half), (0.5, whole)]).spec.dtype == "F16"
    assert graph.combine([(0.5, half), (0.5, whole)], dtype="F32").spec.dtype == "F32"
    # 1 + 2^-11 is no float16; a sum kept in float16 would lose it twice.
    small = source.load(torch.tensor([2.0**-11, 0.0]))
    total = graph.combine([(1.0, half), (1.0, small), (1.0, small)])
    assert _read(total).tolist() == [1 + 2.0**-10, 1.0]


@pytest.mark.parametrize("rows", [(((0, 0.5), (1, 0.5)),), (((0, 1.0), (1, 1.0)),), ((),)])
def test_a_map_takes_a_constant_along(rows: tuple[Row, ...]) -> None:
    shifted = graph.shift(Held().load(torch.tensor([1.0, 3.0])), 10.0)
    m = BlockMap(rows, 2)
    wanted = _matrix(m) @ torch.tensor([11.0, 13.0], dtype=torch.float64)
    assert _read(graph.map_dims(shifted, [m])).tolist() == wanted.tolist()
