"""The order of a run's work: bundles of jobs, each bundle for one thread.

Tensors that read one source tensor go together, and so do their tiles that read the same bytes of
it: these are in one bundle, so that a source is read once. Tiles that are computed alike from the
same bytes (a layer copied to four places, rows that are copies) are one job with several places.

Places are keys, and offsets within tensors: where in which file these are is the sink's business.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from streammap.common import ranges
from streammap.common.ranges import Range, Tile
from streammap.engine import compiler
from streammap.engine import tiles as tiling
from streammap.engine.memory import Limits, Memory
from streammap.engine.program import Program
from streammap.engine.tile_reads import Recipe, form_key
from streammap.engine.tiles import Cut
from streammap.errors import PlanError
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.planning import graph
from streammap.planning.graph import LinearForm, TensorRef
from streammap.planning.maps import AxisMap, BlockMap

RANGE_NBYTES = 8 * 2**20
"""Bytes of a job that is read or computed piece by piece: it takes memory for one piece only."""
_MAX_ITEM_NBYTES = 8


@dataclass(frozen=True, slots=True)
class TensorOffset:
    """Where bytes of a result go: from which byte of which tensor on."""

    key: str
    offset: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of a source that are bytes of the result."""

    source: TensorRef
    start: int
    """First byte, counted from the source tensor's first."""
    nbytes: int
    places: tuple[TensorOffset, ...]


@dataclass(frozen=True)
class Compute:
    """A tile to compute, once for all of its places."""

    form_key: object
    """See tile_reads.form_key."""
    recipe: Recipe
    places: tuple[TensorOffset, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tile."""
        spec = self.recipe.form.spec
        return self.recipe.tile.n_elements * DTYPE_BITS[spec.dtype] // 8

    def halves(self) -> "tuple[Compute, Compute] | None":
        """The same as two smaller tiles; None if it is a single number."""
        tiles = self.recipe.tile.halves()
        if tiles is None:
            return None
        first, second = (Recipe(self.recipe.form, tile) for tile in tiles)
        one = Compute(self.form_key, first, self.places)
        later = tuple(TensorOffset(p.key, p.offset + one.nbytes) for p in self.places)
        return one, Compute(self.form_key, second, later)


Job = Copy | Compute
Bundle = tuple[Job, ...]
Grid = Callable[[str], int | None]
"""Key -> where the tensor begins on its writer's grid of pieces, in bytes. None if its bytes are
wanted in whole tiles."""


def whole_tiles(key: str) -> None:
    """The grid of a sink that takes whole tiles."""


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the result; several, if their forms are equal."""

    keys: tuple[str, ...]
    form: LinearForm
    rows: Range | None
    """What is wanted of the first dimension; None for all of it."""

    def places(self, offset: int) -> tuple[TensorOffset, ...]:
        """The byte `offset` of each of the tensors."""
        return tuple(TensorOffset(key, offset) for key in self.keys)


def bundles(
    targets: Mapping[str, LinearForm], memory: Memory, *, grid: Grid, rows: Mapping[str, Range]
) -> Iterator[Bundle]:
    """All work, in the order of the targets.

    Args:
        grid: How the bytes of a target are taken. On a grid, a job may be larger than a tile where
            no map moves a number: it is read or computed piece by piece.
        rows: Key -> what is wanted of the first dimension, if not all of it.
    """
    cuts: dict[object, Cut] = {}
    for family in _families(targets, rows):
        groups: dict[object, list[Target]] = {}
        for target in family:
            start = grid(target.keys[0])
            flat = None
            if start is not None and len(family) == 1 and target.rows is None:
                flat = graph.flat(target.form)
            if target.form.bare is not None:
                yield from _copies(target, start, memory)
            elif start is not None and flat is not None:
                yield from _ranges(replace(target, form=flat), start)
            else:
                groups.setdefault(form_key(target.form), []).append(target)
        for shared, group in groups.items():
            if shared not in cuts:
                form = group[0].form
                cuts[shared] = cut_of(form, limits_of(form, memory))
            yield from _tiles(group, shared, cuts[shared])


def _families(
    targets: Mapping[str, LinearForm], rows: Mapping[str, Range]
) -> Iterator[list[Target]]:
    """Targets that read a tensor in common, equal ones as one; in the order of their first."""
    keys = list(targets)
    # A forest of indices into `keys`: those that share a source, directly or not, share a root.
    parent = list(range(len(keys)))
    first: dict[TensorRef, int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, form in enumerate(targets.values()):
        for load in form.loads():
            if not graph.is_constant(load):
                a, b = root(first.setdefault(load, i)), root(i)
                parent[max(a, b)] = min(a, b)
    members: dict[int, list[str]] = {}
    for i, key in enumerate(keys):
        members.setdefault(root(i), []).append(key)
    for group in members.values():
        yield _merged(group, targets, rows)


def _merged(
    group: Sequence[str], targets: Mapping[str, LinearForm], rows: Mapping[str, Range]
) -> list[Target]:
    """A family's targets; those with equal forms are one, computed once."""
    merged: list[tuple[LinearForm, Range | None, list[str]]] = []
    for key in group:
        form, wanted = targets[key], rows.get(key)
        for other, same, keys in merged:
            if other == form and same == wanted:
                keys.append(key)
                break
        else:
            merged.append((form, wanted, [key]))
    return [Target(tuple(keys), form, wanted) for form, wanted, keys in merged]


def _copies(target: Target, grid: int | None, memory: Memory) -> Iterator[Bundle]:
    source = target.form.bare
    assert source is not None
    start, end = 0, source.spec.nbytes
    if target.rows is not None:
        row = end // source.spec.shape[0]
        start, end = target.rows[0] * row, target.rows[1] * row
    step = memory.tile_nbytes if grid is None else RANGE_NBYTES
    for first, last in _steps(start, end, step, grid or 0):
        yield (Copy(source, first, last - first, target.places(first)),)


def _ranges(target: Target, grid: int) -> Iterator[Bundle]:
    """Ranges of a flat target."""
    form, (n,) = target.form, target.form.spec.shape
    shared, item = form_key(form), DTYPE_BITS[form.spec.dtype] // 8
    for start, end in _steps(0, n * item, RANGE_NBYTES, grid):
        recipe = Recipe(form, ranges.tile_at((n,), (), start // item, end // item))
        yield (Compute(shared, recipe, target.places(start)),)


def _steps(start: int, end: int, step: int, grid: int) -> Iterator[Range]:
    """Bytes from `start` to `end` of a tensor, cut where its writer's grid is.

    No number is torn apart: if the tensor begins in the middle of one, the cuts move with it.
    """
    offset = start + grid - grid % _MAX_ITEM_NBYTES
    for a, b in ranges.pieces(offset, end - start, step):
        yield start + a, start + b


def _tiles(group: list[Target], shared: object, cut: Cut) -> Iterator[Bundle]:
    """The tiles of targets with one form key."""
    form = group[0].form
    item = DTYPE_BITS[form.spec.dtype] // 8
    for tiles in tiling.bundles(form.spec.shape, _maps(form), cut):
        # Tiles of one target with one key read the same and compute the same: rows that are copies.
        jobs: dict[tuple[int, object], tuple[Recipe, list[TensorOffset]]] = {}
        for number, target in enumerate(group):
            for tile in _wanted(tiles, target):
                recipe = Recipe(target.form, tile)
                same = number, recipe.reads_key if len(tiles) > 1 else 0
                _, places = jobs.setdefault(same, (recipe, []))
                places += target.places(tile.offset * item)
        if jobs:
            yield tuple(Compute(shared, recipe, tuple(places)) for recipe, places in jobs.values())


def _wanted(tiles: tuple[Tile, ...], target: Target) -> Iterator[Tile]:
    """The parts of tiles that are in the target's rows; of products the tiles, so that they are
    multiplied as in every run.
    """
    if target.rows is None:
        yield from tiles
        return
    for tile in tiles:
        part = ranges.clipped(tile, target.form.spec.shape, *target.rows)
        if part is not None:
            yield tile if target.form.is_dense else part


def _maps(form: LinearForm) -> tuple[tuple[AxisMap | None, ...], ...]:
    return tuple(term.maps for term in form.terms)


def limits_of(form: LinearForm, memory: Memory) -> Limits:
    """What a tile of the form may take."""
    return memory.dense_limits if form.is_dense else memory.limits


def cut_of(form: LinearForm, limits: Limits) -> Cut:
    """The largest cut whose tiles stay within the limits.

    Raises:
        PlanError: a single number takes more.
    """
    spec = form.spec
    if not spec.shape or spec.n_elements == 0:
        return Cut(0, 1)
    heaviest = [_heaviest([maps[d] for maps in _maps(form)]) for d in range(len(spec.shape))]
    for dim, n in enumerate(spec.shape):
        rows = _rows(spec, dim, limits)
        while rows:
            start = min(heaviest[dim], n - rows)
            tile = ranges.tile_at(spec.shape, tuple(heaviest[:dim]), start, start + rows)
            if fits(compiler.program(Recipe(form, tile), limits.chunk_nbytes), limits):
                return Cut(dim, _aligned(form, dim, rows))
            rows //= 2
    raise PlanError(
        f"a number of {spec} takes more than {limits.read_nbytes} bytes",
        hint="give the run more memory",
    )


def grid_tile(form: LinearForm, cut: Cut, element: int) -> Tile:
    """The tile of a cut that has an element of a form, counted from the form's first."""
    shape, index, rest = form.spec.shape, [], element
    for d in range(cut.dim + 1):
        inner = math.prod(shape[d + 1 :])
        index.append(rest // inner)
        rest %= inner
    start = index[-1] // cut.rows * cut.rows
    end = min(start + cut.rows, shape[cut.dim])
    return ranges.tile_at(shape, tuple(index[:-1]), start, end)


def _heaviest(dims: list[AxisMap | None]) -> int:
    """The unit that is made of the most source units."""
    counts: dict[int, int] = {}
    for m in dims:
        if isinstance(m, BlockMap) and m.longest > 1:
            for i, row in enumerate(m.rows):
                counts[i * m.block] = counts.get(i * m.block, 0) + len(row)
    return max(counts, key=counts.__getitem__, default=0)


def fits(program: Program, limits: Limits) -> bool:
    """Whether a tile stays within the limits."""
    return program.read_nbytes <= limits.read_nbytes and program.work_nbytes <= limits.work_nbytes


def _rows(spec: TensorSpec, dim: int, limits: Limits) -> int:
    row = TensorSpec(spec.dtype, spec.shape[dim + 1 :]).nbytes
    return min(spec.shape[dim], limits.out_nbytes // row)


def _aligned(form: LinearForm, dim: int, rows: int) -> int:
    """Rows, rounded down to whole groups of neighbours that share a source."""
    steps = [
        segment.out_step
        for maps in _maps(form)
        for m in maps[dim : dim + 1]
        if isinstance(m, BlockMap) and m.is_regular
        for segment in m.segments
        if segment.count > 1
    ]
    step = max((step for step in steps if step <= rows), default=1)
    return rows - rows % step
