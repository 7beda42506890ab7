"""What tiles are made of, and which tiles go together, against dense matrices."""

import itertools
import math
from collections.abc import Iterator, Sequence
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammap.common.ranges import Range, Tile
from streammap.engine import pullback, tiles
from streammap.engine.pullback import Pullback
from streammap.engine.tiles import Cut
from streammap.planning import maps
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.segments import Segment
from tests.support import oracle

MAX_GAP_NBYTES = 32 * 2**10
COEFFICIENTS = (1.0, 1.0, 0.5, -2.0, 0.25, 0.0)
MANY = 160
"""Rows of a shuffled map: more than 64 runs."""
Rows = list[dict[int, float]]
"""A matrix: of each row, the columns that are not 0."""


def matrix(m: BlockMap) -> Rows:
    dense: list[list[float]] = oracle.from_rows(m.rows, m.n_in_blocks, m.block).tolist()
    return [{j: value for j, value in enumerate(row) if value != 0.0} for row in dense]


@st.composite
def any_maps(draw: st.DrawFn) -> BlockMap:
    """Rows of any members."""
    n_in, block = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    member = st.tuples(st.integers(0, n_in - 1), st.sampled_from(COEFFICIENTS))
    rows = draw(st.lists(st.lists(member, max_size=3).map(tuple), min_size=1, max_size=12))
    return BlockMap(tuple(rows), n_in, block)


@st.composite
def regular_maps(draw: st.DrawFn) -> BlockMap:
    """Groups of heads, merged or grown, or one of each; neighbours, or far apart."""
    n_small, times = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    block, n = draw(st.integers(1, 5)), n_small * times
    groups = [list(range(i, n, n_small)) for i in range(n_small)]
    if draw(st.booleans()):
        groups = [list(range(i * times, (i + 1) * times)) for i in range(n_small)]
    m = maps.merging(groups, n, block=block)
    made = draw(st.sampled_from((m, maps.growing(m), maps.first_of(m), maps.transposed(m))))
    assert isinstance(made, BlockMap)
    return made


@st.composite
def shuffled_maps(draw: st.DrawFn) -> BlockMap:
    """More runs than are kept as segments of the whole."""
    n = draw(st.integers(MANY, MANY + 20))
    chance = Random(draw(st.integers(0, 99)))
    order = chance.sample(range(n), n)
    rows = tuple(((j, chance.choice(COEFFICIENTS)),) for j in order)
    m = BlockMap(rows, n, draw(st.integers(1, 3)))
    assert not m.is_regular
    return m


ALL_MAPS = st.one_of(any_maps(), regular_maps(), shuffled_maps())


@st.composite
def pulls(draw: st.DrawFn) -> tuple[BlockMap, int, int]:
    """A map and a range of its result, that may begin and end inside of blocks."""
    m = draw(ALL_MAPS)
    start = draw(st.integers(0, m.n_out - 1))
    return m, start, draw(st.integers(start + 1, m.n_out))


def unit_sizes(m: BlockMap) -> Iterator[int]:
    """Bytes of a unit such that gaps of the map are a little less, or more, than are read."""
    yield from (1, 2**20)
    gaps = {1, m.block, *(s.in_step - s.length for s in m.segments if s.count > 1)}
    for gap in sorted(gap for gap in gaps if gap > 0)[:8]:
        yield from (MAX_GAP_NBYTES // gap, MAX_GAP_NBYTES // gap + 1)


def moved(segments: Sequence[Segment], n_out: int, n_in: int) -> Rows:
    """The matrix of segments, each of which writes once or adds to what was written."""
    found: list[dict[int, float] | None] = [None] * n_out
    for s in segments:
        for k, i in itertools.product(range(s.count), range(s.length)):
            to, at = s.out_start + k * s.out_step + i, s.in_start + k * s.in_step + i
            assert to >= 0
            row = found[to]
            assert (row is not None) == s.adds
            row = found[to] = {} if row is None else row
            if s.coefficient != 0.0:
                assert 0 <= at < n_in
                row[at] = row.get(at, 0.0) + s.coefficient
    assert None not in found
    return [
        {j: value for j, value in row.items() if value != 0.0} for row in found if row is not None
    ]


def product(pulled: Pullback, n_out: int) -> Rows:
    """The matrix of what is read, side by side, and then moved."""
    taken = [unit for start, end in pulled.ranges for unit in range(start, end)]
    assert len(taken) == pulled.n_in
    if pulled.segments is None:
        return [{unit: 1.0} for unit in taken]
    rows = moved(pulled.segments, n_out, pulled.n_in)
    return [{taken[j]: value for j, value in row.items()} for row in rows]


@given(pulls())
@settings(max_examples=settings().max_examples * 4)
def test_a_range_is_pulled_back_to_the_rows_of_the_matrix(
    pull: tuple[BlockMap, int, int],
) -> None:
    m, start, end = pull
    wanted = matrix(m)[start:end]
    for unit_nbytes in unit_sizes(m):
        pulled = pullback.pull(m, start, end, unit_nbytes)
        assert product(pulled, end - start) == wanted
        assert_few_reads(pulled, m, (start, end), unit_nbytes)


def assert_few_reads(pulled: Pullback, m: BlockMap, rows: Range, unit_nbytes: int) -> None:
    """Ranges are apart, in order, and hold no more than short gaps beside what is needed."""
    used = {j for i in range(*rows) for j, value in m.members(i) if value != 0.0}
    reached = -1
    for start, end in pulled.ranges:
        assert reached < start < end <= m.n_in
        reached = end
        gap = 0
        for unit in range(start, end):
            gap = 0 if unit in used else gap + 1
            assert gap * unit_nbytes <= MAX_GAP_NBYTES or not used
    assert used or pulled.ranges == ((0, 1),)


@given(pulls(), st.data())
@settings(max_examples=settings().max_examples * 4)
def test_a_part_of_a_range_is_made_of_what_was_pulled_for_all_of_it(
    pull: tuple[BlockMap, int, int], data: st.DataObject
) -> None:
    m, start, end = pull
    pulled = pullback.pull(m, start, end, data.draw(st.sampled_from((1, 2**20))))
    assert pulled.segments is not None
    whole = moved(pulled.segments, end - start, pulled.n_in)
    first = data.draw(st.integers(0, end - start - 1))
    last = data.draw(st.integers(first + 1, end - start))
    assert product(pullback.within(pulled, first, last), last - first) == whole[first:last]
    cut = pullback.clipped(pulled.segments, first, last)
    assert moved(cut, last - first, pulled.n_in) == whole[first:last]


@given(ALL_MAPS)
def test_all_of_a_dimension_is_the_whole_matrix(m: BlockMap) -> None:
    pulled = pullback.whole(m, m.n_in)
    assert pulled.ranges == ((0, m.n_in),)
    assert product(pulled, m.n_out) == matrix(m)


@pytest.mark.parametrize(
    "groups",
    [
        [[i, i + MANY] for i in range(MANY)],
        [[2 * i, 2 * i + 1] for i in range(MANY)],
    ],
)
def test_groups_of_any_number_are_regular(groups: list[list[int]]) -> None:
    m = maps.merging(groups, 2 * MANY)
    grown = maps.growing(m)
    assert isinstance(grown, BlockMap)
    assert len(m.segments) == len(grown.segments) == 2


def test_a_dimension_without_a_map_is_read_as_it_is() -> None:
    pulled = pullback.pull(None, 3, 7, 4)
    assert pulled == Pullback(((3, 7),), None)
    assert pullback.within(pulled, 1, 2) == Pullback(((1, 2),), None)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[AxisMap | None]], Cut]:
    """A shape, the maps of terms that make it, and a way to cut it."""
    terms: list[list[AxisMap | None]] = [[] for _ in range(draw(st.integers(1, 2)))]
    shape = []
    for _ in range(draw(st.integers(1, 3))):
        m = draw(st.one_of(any_maps(), regular_maps(), st.none()))
        n = draw(st.integers(1, 9)) if m is None else m.n_out
        shape.append(n)
        for term in terms:
            term.append(draw(st.sampled_from((m, None))))
    dim = draw(st.integers(0, len(shape) - 1))
    return tuple(shape), terms, Cut(dim, draw(st.integers(1, shape[dim] + 1)))


@given(tensors())
@settings(max_examples=settings().max_examples * 4)
def test_bundles_cover_every_element_once(
    drawn: tuple[tuple[int, ...], list[list[AxisMap | None]], Cut],
) -> None:
    shape, terms, cut = drawn
    numbers = torch.arange(math.prod(shape)).view(shape)
    seen: list[int] = []
    for bundle in tiles.bundles(shape, terms, cut):
        offsets = [tile.offset for tile in bundle]
        assert offsets == sorted(set(offsets))
        assert len({tile.shape for tile in bundle}) == 1
        for tile in bundle:
            assert 0 < tile.end - tile.start <= cut.rows
            content = part(numbers, tile)
            assert content.shape == tile.shape
            assert content.flatten().tolist() == list(
                range(tile.offset, tile.offset + tile.n_elements)
            )
            seen += content.flatten().tolist()
    assert sorted(seen) == list(range(numbers.numel()))
    if not any(m for term in terms for m in term):
        assert seen == sorted(seen)


def part(x: Tensor, tile: Tile) -> Tensor:
    return x[tile.prefix][tile.start : tile.end]


@st.composite
def copies(draw: st.DrawFn) -> BlockMap:
    """Growth of groups whose copies stand apart, in runs of whole copies."""
    n, times, block = draw(st.integers(2, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    groups = [list(range(i, n * times, n)) for i in range(n)]
    m = maps.growing(maps.merging(groups, n * times, block=block))
    assert isinstance(m, BlockMap)
    return m


@given(st.data(), copies(), copies())
@settings(max_examples=settings().max_examples * 4)
def test_tiles_in_a_bundle_are_made_of_the_same_units(
    data: st.DataObject, rows: BlockMap, columns: BlockMap
) -> None:
    """And no other tile is, however many rows a tile has."""
    dims = (rows, columns)
    shape = (rows.n_out, columns.n_out)
    dim = data.draw(st.integers(0, 1))
    cut = Cut(dim, data.draw(st.integers(1, shape[dim])))
    read: set[tuple[int, int]] = set()
    for bundle in tiles.bundles(shape, [dims], cut):
        first, *others = [sources(tile, dims) for tile in bundle]
        assert all(other == first for other in others)
        assert not read & first
        read |= first
    assert len(read) == rows.n_in * columns.n_in


def sources(tile: Tile, dims: Sequence[BlockMap]) -> set[tuple[int, int]]:
    """Elements of the source that a tile is made of."""
    ranges = [*((i, i + 1) for i in tile.prefix), (tile.start, tile.end), (0, dims[-1].n_out)]
    rows, columns = (
        {j for i in range(*found) for j, _ in m.members(i)}
        for m, found in zip(dims, ranges, strict=False)
    )
    return set(itertools.product(rows, columns))


def test_a_tensor_without_elements_has_no_bundles() -> None:
    for shape in ((0,), (3, 0), (0, 3), (2, 0, 2)):
        assert list(tiles.bundles(shape, [[None] * len(shape)], Cut(0, 1))) == []
    assert list(tiles.bundles((), [[]], Cut(0, 1))) == [(Tile((), 0, 1, 0, ()),)]
