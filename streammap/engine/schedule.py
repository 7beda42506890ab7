"""The order of a run's work: bundles of jobs, each bundle for one thread.

Tensors that read one source tensor go together, and so do their tiles that read the same bytes of
it: these are in one bundle, so that a source is read once. Tiles that are computed alike from the
same bytes (a layer copied to four places, rows that are copies) are one job with several places.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from streammap.common import ranges
from streammap.common.ranges import Range, Tile
from streammap.engine import compiler
from streammap.engine import tiles as tiling
from streammap.engine.memory import Limits, Memory
from streammap.engine.program import Program
from streammap.engine.tile_reads import Recipe, alike
from streammap.engine.tiles import Cut
from streammap.errors import PlanError
from streammap.io.formats.safetensors_header import Slot
from streammap.io.tensor_spec import DTYPE_BITS, TensorSpec
from streammap.planning import graph
from streammap.planning.graph import LinearForm, TensorRef
from streammap.planning.maps import AxisMap, BlockMap, DenseMap

RANGE_NBYTES = 8 * 2**20
"""Bytes of a result that a thread does at once, where it takes memory for a piece of them only."""
_MAX_ITEM_NBYTES = 8


@dataclass(frozen=True, slots=True)
class FileOffset:
    """Where bytes of a result go."""

    file: str
    offset: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Bytes of a source that are bytes of the result."""

    key: str
    """Key of the (first) target."""
    found: TensorRef
    start: int
    """First byte, counted from the tensor's first."""
    nbytes: int
    places: tuple[FileOffset, ...]


@dataclass(frozen=True)
class Compute:
    """A tile to compute."""

    key: str
    kind: object
    """What its form is like, see program.alike."""
    recipe: Recipe
    places: tuple[FileOffset, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the tile."""
        spec = self.recipe.form.spec
        return self.recipe.tile.n_elements * DTYPE_BITS[spec.dtype] // 8

    def halves(self) -> "tuple[Compute, Compute] | None":
        """The same as two smaller tiles; None where it is one row already."""
        tiles = self.recipe.tile.halves()
        if tiles is None:
            return None
        first, second = (Recipe(self.recipe.form, tile) for tile in tiles)
        one = Compute(self.key, self.kind, first, self.places)
        later = tuple(FileOffset(p.file, p.offset + one.nbytes) for p in self.places)
        return one, Compute(self.key, self.kind, second, later)


Job = Copy | Compute
Bundle = tuple[Job, ...]


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor of the result and its places: one, or several for equal tensors."""

    key: str
    form: LinearForm
    places: tuple[FileOffset, ...]
    rows: Range | None = None
    """What is wanted of the first dimension; None for all of it."""


def bundles(
    targets: Mapping[str, LinearForm],
    slots: Iterable[tuple[str, Slot]],
    memory: Memory,
    *,
    rows: Mapping[str, Range] | None = None,
    by_pieces: bool = False,
) -> Iterator[Bundle]:
    """All work, in the order of the slots.

    Args:
        slots: (file, slot) of every target.
        rows: Key -> what is wanted of the first dimension, where that is not all of it.
        by_pieces: Whether bytes are wanted piece by piece only: where no map moves a number, jobs
            are larger than a tile then.
    """
    cuts: dict[object, Cut] = {}
    for family in _families(targets, slots, rows or {}):
        groups: dict[object, list[Target]] = {}
        for target in family:
            one = graph.flat(target.form) if by_pieces and len(family) == 1 else None
            if target.form.copied is not None:
                yield from _copies(target, RANGE_NBYTES if by_pieces else memory.tile_nbytes)
            elif one is not None and target.rows is None:
                yield from _ranges(replace(target, form=one))
            else:
                groups.setdefault(alike(target.form), []).append(target)
        for kind, group in groups.items():
            if kind not in cuts:
                form = group[0].form
                cuts[kind] = cut_of(form, limits_of(form, memory))
            yield from _tiles(group, kind, cuts[kind])


def _families(
    targets: Mapping[str, LinearForm],
    slots: Iterable[tuple[str, Slot]],
    rows: Mapping[str, Range],
) -> Iterator[tuple[Target, ...]]:
    """Targets that read a tensor in common, equal ones as one; in the order of their first."""
    order = [(file, slot) for file, slot in slots]
    parent = list(range(len(order)))
    first: dict[TensorRef, int] = {}

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, (_, slot) in enumerate(order):
        for found in targets[slot.key].loads():
            if not graph.is_constant(found):
                a, b = root(first.setdefault(found, i)), root(i)
                parent[max(a, b)] = min(a, b)
    members: dict[int, list[int]] = {}
    for i in range(len(order)):
        members.setdefault(root(i), []).append(i)
    for group in members.values():
        yield tuple(_merged([order[i] for i in group], targets, rows))


def _merged(
    group: list[tuple[str, Slot]], targets: Mapping[str, LinearForm], rows: Mapping[str, Range]
) -> Iterator[Target]:
    alike: list[tuple[Slot, LinearForm, list[FileOffset]]] = []
    for file, slot in group:
        form, place = targets[slot.key], FileOffset(file, slot.start)
        for first, other, places in alike:
            if other == form and rows.get(first.key) == rows.get(slot.key):
                places.append(place)
                break
        else:
            alike.append((slot, form, [place]))
    for slot, form, places in alike:
        yield Target(slot.key, form, tuple(places), rows.get(slot.key))


def _copies(target: Target, step: int) -> Iterator[Bundle]:
    found = target.form.copied
    assert found is not None
    start, end = 0, found.spec.nbytes
    if target.rows is not None:
        row = end // found.spec.shape[0]
        start, end = target.rows[0] * row, target.rows[1] * row
    for at, until in _steps(target, start, end, step):
        places = tuple(FileOffset(p.file, p.offset + at) for p in target.places)
        yield (Copy(target.key, found, at, until - at, places),)


def _ranges(target: Target) -> Iterator[Bundle]:
    """Ranges of a flat target."""
    form, (n,) = target.form, target.form.spec.shape
    kind, item = alike(form), DTYPE_BITS[form.spec.dtype] // 8
    for start, end in _steps(target, 0, n * item, RANGE_NBYTES):
        places = tuple(FileOffset(p.file, p.offset + start) for p in target.places)
        recipe = Recipe(form, ranges.tile_at((n,), (), start // item, end // item))
        yield (Compute(target.key, kind, recipe, places),)


def _steps(target: Target, start: int, end: int, step: int) -> Iterator[Range]:
    """Bytes from `start` to `end` in steps: but for the first they begin at multiples in a file."""
    offset = target.places[0].offset
    offset += start - offset % _MAX_ITEM_NBYTES
    for a, b in ranges.pieces(offset, end - start, step):
        yield start + a, start + b


def _tiles(group: list[Target], kind: object, cut: Cut) -> Iterator[Bundle]:
    """The tiles of targets that are alike."""
    form = group[0].form
    item = DTYPE_BITS[form.spec.dtype] // 8
    for tiles in tiling.bundles(form.spec.shape, _maps(form), cut):
        jobs: dict[tuple[int, object], tuple[str, Recipe, list[FileOffset]]] = {}
        for number, target in enumerate(group):
            for tile in _wanted(tiles, target):
                recipe = Recipe(target.form, tile)
                _, _, places = jobs.setdefault(
                    (number, recipe.key if len(tiles) > 1 else 0), (target.key, recipe, [])
                )
                places += (FileOffset(p.file, p.offset + tile.offset * item) for p in target.places)
        if jobs:
            yield tuple(
                Compute(key, kind, recipe, tuple(places)) for key, recipe, places in jobs.values()
            )


def _wanted(tiles: tuple[Tile, ...], target: Target) -> Iterator[Tile]:
    """The parts of tiles that are in the target's rows."""
    if target.rows is None:
        yield from tiles
        return
    for tile in tiles:
        found = ranges.clipped(tile, target.form.spec.shape, *target.rows)
        if found is not None:
            yield found


def _maps(form: LinearForm) -> tuple[tuple[AxisMap | None, ...], ...]:
    return tuple(term.maps for term in form.terms)


def limits_of(form: LinearForm, memory: Memory) -> Limits:
    """What a tile of the form may take."""
    dense = any(isinstance(m, DenseMap) for maps in _maps(form) for m in maps)
    return memory.dense_limits if dense else memory.limits


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


def _heaviest(dims: list[AxisMap | None]) -> int:
    """The unit that is made of the most."""
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
    """Rows such that no pair of neighbours that share a source is torn apart."""
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
