"""How much memory a run takes: fixed before it begins, whatever the size of the model.

    base       streammap's modules and torch's kernels, once they are used
    tensors    the plan and bookkeeping of the run: for each tensor of a source or of the result
    matrices   dense maps that are no files
    network    a client and what it fetched ahead, where sources are read over one
    workers    each: a few places for parts of sources, a tile of the result, and scratch; where
               tensors are derived, what deriving takes, and a small worker for what it reads;
               where there are dense maps, a block of one, and what products take

The tile is what the budget leaves room for, up to 2 MiB: larger ones are not faster. It is computed
in chunks that stay in a processor's cache. What products of matrices add up to depends on the tile,
so that tiles with dense maps are of one size, whatever the budget.
"""

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import final

from streammap.errors import OutputError
from streammap.io.checkpoint import Checkpoint
from streammap.io.codecs.coded import SCRATCH_NBYTES
from streammap.io.storage.base import Network
from streammap.planning.dense import blocks
from streammap.planning.graph import Derived, LinearForm
from streammap.planning.maps import N_IRREGULAR, BlockMap, DenseMap

DEFAULT_NBYTES = 256 * 2**20
"""What a run may take if no budget is given. Where its least is more, it may take that, and room
for tiles."""
BASE_NBYTES = 14 * 2**20
"""Measured, with room to spare; tests/test_memory.py holds runs to it."""
_SLOT_NBYTES = 1050
"""What is kept for each tensor of a source: its slot, and its form in a plan that changes nothing.
This and the next are measured, see bench/tensors.py, and hold for what is freed in between too."""
_LETTER_NBYTES = 3
"""The same for each letter of its key: as text, in the header, and in the record."""
_TARGET_NBYTES = 1050
"""What is kept for each tensor of the result: its form, its place, its CRC, its line."""
_MAPS_NBYTES = 850
"""The same for each term that has maps."""
_LOAD_NBYTES = 1200
"""The same for each tensor that it is made of but the first."""
_PLACE_NBYTES, _ROW_NBYTES, _PAIR_NBYTES = 8, 56, 108
"""What is kept for a place in a large map, for a row, and for a pair of a row: maps of layers may
have rows and pairs in common, or each their own."""
_SEGMENT_NBYTES, _NUMBER_NBYTES = 240, 250
"""What is kept for a segment of a map that has many, and for a unit that a program names."""
MAX_CALLS, _CALL_NBYTES = 2**12, 2500
"""Calls that a worker keeps, bound to its buffers: an irregular map has thousands."""
MAX_SEGMENTS = MAX_NUMBERS = 2**17
"""Of what is kept: a regular map has a few segments, an order of a layer's own as many as units."""
_LARGE_MAP = 4096
"""Rows; the others are counted with their tensors."""
CLIENT_NBYTES: Mapping[Network, int] = {"none": 0, "ranges": 24 * 2**20, "files": 80 * 2**20}
"""A client for a network, its connections, and what they receive; measured, with room to spare."""
MAX_AHEAD_NBYTES = 64 * 2**20
MIN_AHEAD_NBYTES = 4 * 2**20
MAX_TILE_NBYTES = 2 * 2**20
MIN_TILE_NBYTES = 2**14
CHUNK_NBYTES = 2**20
"""A part of a source in the accumulator's dtype: what a processor's cache holds."""
_SCRATCH_CHUNKS = 4
_TILES_NBYTES = 40 * 2**20
"""All tiles and scratch at most, dense maps aside: if there are many workers, tiles are smaller."""
_INNER_TILE_NBYTES = 2**18
"""The tile of what derived tensors are computed from, at least."""
N_PLACES = 3
"""Parts of sources that a worker keeps."""
_MAX_WORKERS = 8
_MAX_ITEM_NBYTES = 8
_LIBRARY_NBYTES, _MULTIPLYING_NBYTES = 8 * 2**20, 5 * 2**20
"""What the library that multiplies matrices takes, once and in each worker; measured."""
_HEAP_NBYTES = 3 * 2**18
"""What the heap of a thread keeps of scratch that is freed: its blocks are of several sizes;
measured with four threads, whose heaps are their own."""
_STEP_NBYTES = 4096
DENSE_TILE_NBYTES = MAX_TILE_NBYTES
"""A tile of a form with dense maps, and the part of a source that it reads at once."""
DENSE_WORK_NBYTES = 8 * 2**20
"""What it is computed in: four times as much, where it is kept in float64."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one tile may take."""

    out_nbytes: int
    read_nbytes: int
    """A part of one source."""
    chunk_nbytes: int
    """A part of one source in the accumulator's dtype, which is computed with at once."""
    work_nbytes: int


@dataclass(frozen=True)
class Memory:
    """The memory of a run."""

    n_workers: int
    """Threads."""
    tensors_nbytes: int
    """What is kept for each tensor, together."""
    tile_nbytes: int
    block_nbytes: int | None
    """Room for a block of a dense map in each worker; None where there is no dense map."""
    matrices_nbytes: int
    """Dense maps that are held."""
    ahead_nbytes: int = 0
    """What is fetched ahead of its use, if sources are read over a network."""
    client_nbytes: int = 0
    """What a client for that network takes."""
    sink_nbytes: int = 0
    """What the sink takes for each worker, and the calls that it keeps."""
    derived_nbytes: int = 0
    """What deriving a tensor takes in each worker; 0 where none is derived."""
    inner_tile_nbytes: int = 0
    """The tile of what derived tensors are computed from."""
    inner_block_nbytes: int | None = None
    """The same as `block_nbytes` for these."""
    decode_nbytes: int = 0
    """What decoding quantised tensors takes for each worker."""

    @cached_property
    def inner(self) -> "Memory":
        """For what derived tensors are computed from: a worker within each of these."""
        tile, block = self.inner_tile_nbytes, self.inner_block_nbytes
        return Memory(1, 0, tile, block, 0, inner_tile_nbytes=tile, inner_block_nbytes=block)

    @cached_property
    def limits(self) -> Limits:
        """For forms without dense maps."""
        chunk = min(CHUNK_NBYTES, self.tile_nbytes)
        return Limits(self.tile_nbytes, self.tile_nbytes, chunk, _SCRATCH_CHUNKS * chunk)

    @cached_property
    def dense_limits(self) -> Limits:
        """For forms with dense maps: the same in all runs."""
        work = DENSE_WORK_NBYTES
        return Limits(DENSE_TILE_NBYTES, DENSE_TILE_NBYTES, work, work)

    @cached_property
    def largest(self) -> Limits:
        """For all forms of the run."""
        a, b = self.limits, self.limits if self.block_nbytes is None else self.dense_limits
        return Limits(
            max(a.out_nbytes, b.out_nbytes),
            max(a.read_nbytes, b.read_nbytes),
            max(a.chunk_nbytes, b.chunk_nbytes),
            max(a.work_nbytes, b.work_nbytes),
        )

    @property
    def fixed_nbytes(self) -> int:
        """What is taken whatever the tiles are."""
        is_dense = self.block_nbytes is not None
        each = self.sink_nbytes + self.derived_nbytes + self.decode_nbytes
        each += (self.block_nbytes or 0) + _MULTIPLYING_NBYTES * is_dense
        network = self.client_nbytes + self.ahead_nbytes
        held = self.tensors_nbytes + self.matrices_nbytes
        base = BASE_NBYTES + _LIBRARY_NBYTES * is_dense
        return base + held + network + each * self.n_workers

    @property
    def peak_nbytes(self) -> int:
        """What the run adds to a process that has imported torch, at most."""
        return _peak(self)

    def room(self, budget: int) -> int:
        """The tile that a budget has room for."""
        each = (budget - self.fixed_nbytes) // self.n_workers
        tile = max(
            each // (N_PLACES + 1 + _SCRATCH_CHUNKS),  # a chunk is a tile
            (each - _SCRATCH_CHUNKS * CHUNK_NBYTES) // (N_PLACES + 1),
        )
        return tile // _STEP_NBYTES * _STEP_NBYTES


def _peak(m: Memory) -> int:
    limits = m.largest
    each = N_PLACES * limits.read_nbytes + limits.out_nbytes + limits.work_nbytes
    return m.fixed_nbytes + m.n_workers * each


@final
class _Needs:
    """Counts what forms need."""

    def __init__(self) -> None:
        self.matrices: dict[int, int] = {}
        """Bytes of each matrix that is held."""
        self.block_nbytes: int | None = None
        self.inner_block_nbytes: int | None = None
        self.inner_tile_nbytes = 0
        self._targets_nbytes = self._scratch_nbytes = self._depth = 0
        self._n_elements = self._n_by_small_calls = 0
        self._sources: dict[int, Checkpoint] = {}
        self._large: dict[int, BlockMap] = {}

    def add(self, form: LinearForm, depth: int = 0) -> None:
        """Count a tensor of the result, and take note of its sources.

        Args:
            depth: How many derived tensors it is inside of.
        """
        if not depth:
            self._n_elements += form.spec.n_elements
            if any(made.by_small_calls for made in form.derived()):
                self._n_by_small_calls += form.spec.n_elements
        n_loads = sum(len(term.blend) for term in form.terms)
        self._targets_nbytes += _TARGET_NBYTES + _LOAD_NBYTES * (n_loads - 1)
        for term in form.terms:
            self._targets_nbytes += _MAPS_NBYTES * any(m is not None for m in term.maps)
            for m in term.maps:
                if isinstance(m, DenseMap):
                    self._add_dense(m, form.accumulator, depth)
                elif m is not None and len(m.rows) > _LARGE_MAP:
                    self._large[id(m)] = m
            for _, ref in term.blend:
                if isinstance(ref.source, Checkpoint):
                    self._sources[id(ref.source)] = ref.source
                elif isinstance(ref.source, Derived):
                    self._add_derived(ref.source, depth + 1)

    def _add_dense(self, m: DenseMap, accumulator: str, depth: int) -> None:
        self.matrices |= {id(tensor): tensor.nbytes for tensor in m.matrix.held()}
        nbytes = blocks.room(m.matrix, accumulator)
        if depth:
            self.inner_block_nbytes = max(self.inner_block_nbytes or 0, nbytes)
            self.inner_tile_nbytes = max(self.inner_tile_nbytes, DENSE_TILE_NBYTES)
        else:
            self.block_nbytes = max(self.block_nbytes or 0, nbytes)

    def _add_derived(self, made: Derived, depth: int) -> None:
        self._depth = max(self._depth, depth)
        self._targets_nbytes += made.kept_nbytes
        self._scratch_nbytes = max(self._scratch_nbytes, made.scratch_nbytes)
        computed = [form for form in made.inputs if form.bare is None]
        if computed:  # others are read where they are wanted
            tiles = (_INNER_TILE_NBYTES, *map(_least, computed))
            self.inner_tile_nbytes = max(self.inner_tile_nbytes, *tiles)
        for form in made.inputs:
            self.add(form, depth)

    @property
    def is_for_one(self) -> bool:
        """Whether one thread is as fast as several, and takes less of the processor."""
        return 2 * self._n_by_small_calls > self._n_elements

    @property
    def derived_nbytes(self) -> int:
        """What a worker takes for derived tensors: scratch, and a worker for each level of them."""
        inner = (N_PLACES + 1 + _SCRATCH_CHUNKS) * self.inner_tile_nbytes
        if self.inner_block_nbytes is not None:
            inner += self.inner_block_nbytes + _LIBRARY_NBYTES + _MULTIPLYING_NBYTES
        heap = _HEAP_NBYTES * (self._scratch_nbytes > 0)
        return self._depth * (self._scratch_nbytes + heap + inner)

    @cached_property
    def _has_irregular(self) -> bool:
        """Whether a large map has many segments; asked once all forms are there."""
        return not all(m.is_regular for m in self._large.values())

    @property
    def calls_nbytes(self) -> int:
        """What each worker keeps of the calls of such maps."""
        return self._has_irregular * MAX_CALLS * _CALL_NBYTES

    @property
    def decodes(self) -> bool:
        """Whether a source has tensors that are decoded as they are read."""
        return any(source.parts_of for source in self._sources.values())

    @property
    def nbytes(self) -> int:
        """All of it: sources keep what no tensor of the result reads, too."""
        keys = [key for source in self._sources.values() for key in _keys(source)]
        letters = sum(map(len, keys))
        n_members = max((len(m.rows) * m.longest for m in self._large.values()), default=0)
        maps_nbytes = _rows_nbytes(self._large.values())
        if self._has_irregular:
            n_segments = N_IRREGULAR * n_members + MAX_SEGMENTS
            maps_nbytes += _SEGMENT_NBYTES * n_segments + _NUMBER_NBYTES * MAX_NUMBERS
        tensors_nbytes = self._targets_nbytes + _SLOT_NBYTES * len(keys) + _LETTER_NBYTES * letters
        return tensors_nbytes + maps_nbytes


def _rows_nbytes(large: Iterable[BlockMap]) -> int:
    """What the rows of maps take together."""
    seen: set[int] = set()
    nbytes = 0
    for m in large:
        nbytes += _PLACE_NBYTES * len(m.rows)
        for row in m.rows:
            if id(row) in seen:
                continue
            seen.add(id(row))
            new = {id(pair) for pair in row} - seen
            seen |= new
            nbytes += _ROW_NBYTES + _PLACE_NBYTES * len(row) + _PAIR_NBYTES * len(new)
    return nbytes


def _least(form: LinearForm) -> int:
    """A tile that has room for one number with all that it is made of."""
    least = MIN_TILE_NBYTES
    for term in form.terms:
        members = math.prod(m.longest for m in term.maps if isinstance(m, BlockMap))
        least = max(least, len(term.blend) * members * _MAX_ITEM_NBYTES)
    return least


def _keys(source: Checkpoint) -> Iterator[str]:
    """A source's tensors; of one that is decoded, those that are stored too."""
    yield from source.file_of
    yield from source.parts_of
    if source.stored is not None:
        yield from source.stored.file_of


def n_processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def fit(
    forms: Iterable[LinearForm],
    *,
    budget: int | None,
    n_workers: int | None,
    networks: Collection[Network] = (),
    n_sharing: int = 1,
    sink_nbytes: int = 0,
) -> Memory:
    """The memory of a run within a budget.

    Args:
        budget: Bytes that the run may add to the process; None for the default.
        n_workers: Threads; by default one a processor, but two at least, and fewer where the
            budget is small; one where most is computed by many small calls.
        networks: How sources come over a network.
        n_sharing: Processes that have the processors together.
        sink_nbytes: What the sink takes for each worker.

    Raises:
        OutputError: no tile fits, or no thread is asked for.
    """
    if n_workers is not None and n_workers < 1:
        raise OutputError(f"{n_workers} threads: expected at least 1", hint="pass --threads 1")
    needs, least = _Needs(), MIN_TILE_NBYTES
    for form in forms:
        needs.add(form)
        least = max(least, _least(form))
    is_dense = needs.block_nbytes is not None
    least = max(least, DENSE_TILE_NBYTES * is_dense)
    several = 1 if needs.is_for_one else min(max(2, n_processors() // n_sharing), _MAX_WORKERS)
    wanted = n_workers or several
    ahead = 0
    if "ranges" in networks:
        ahead = max(min(MAX_AHEAD_NBYTES, (budget or 2**40) // 4), MIN_AHEAD_NBYTES)
    client = sum(CLIENT_NBYTES[network] for network in set(networks))
    memory = Memory(
        wanted,
        needs.nbytes,
        least,
        needs.block_nbytes,
        sum(needs.matrices.values()),
        ahead,
        client,
        sink_nbytes + needs.calls_nbytes,
        needs.derived_nbytes,
        needs.inner_tile_nbytes,
        needs.inner_block_nbytes,
        SCRATCH_NBYTES if needs.decodes else 0,
    )
    if budget is None:
        fewest = memory if n_workers else replace(memory, n_workers=1)
        fits_default = fewest.peak_nbytes <= DEFAULT_NBYTES
        budget = DEFAULT_NBYTES if fits_default else memory.peak_nbytes + 4 * _TILES_NBYTES
    # Fewer workers rather than tiles so small that each costs more than it holds.
    while n_workers is None and memory.n_workers > 1:
        fits = memory.peak_nbytes <= budget if is_dense else memory.room(budget) >= 8 * least
        if fits:
            break
        memory = replace(memory, n_workers=memory.n_workers - 1)
    if memory.peak_nbytes > budget:
        needed = -(-memory.peak_nbytes // 2**20)
        raise OutputError(
            f"memory {budget / 2**20:.0f} MiB: this run takes at least {needed} MiB on top of "
            "torch itself",
            hint=f"pass --memory {needed}MiB, or more",
        )
    tile = min(memory.room(min(budget, memory.fixed_nbytes + _TILES_NBYTES)), MAX_TILE_NBYTES)
    return replace(memory, tile_nbytes=max(least, tile))
