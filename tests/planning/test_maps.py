"""Maps against dense matrices."""

import itertools
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streammap.planning import maps
from streammap.planning.dense.matrix import Held
from streammap.planning.maps import AxisMap, BlockMap, DenseMap
from streammap.planning.segments import Segment
from tests.support import oracle

F64 = torch.empty(0, dtype=torch.float64)
DYADIC = (1.0, 0.5, 0.25, 2.0, 3.0)
ANY = (*DYADIC, 1 / 3, -1.0, 0.0)
Windows = list[tuple[int, int]]


@st.composite
def groupings(draw: st.DrawFn, n_large: int) -> list[list[int]]:
    """Groups of 0 .. n_large - 1: they may overlap, leave some out, and be of any size."""
    group = st.lists(st.integers(0, n_large - 1), min_size=1, max_size=n_large, unique=True)
    return draw(st.lists(group, min_size=1, max_size=n_large))


@st.composite
def block_maps(
    draw: st.DrawFn,
    *,
    values: Sequence[float] = ANY,
    n_in_blocks: int | None = None,
    blocks: Sequence[int] = (1, 2, 3, 4, 6),
) -> BlockMap:
    """Block maps with empty rows, repeated members and members in any order."""
    n_in = draw(st.integers(1, 6)) if n_in_blocks is None else n_in_blocks
    entry = st.tuples(st.integers(0, n_in - 1), st.sampled_from(values))
    rows = draw(st.lists(st.lists(entry, max_size=4).map(tuple), min_size=1, max_size=7))
    return BlockMap(tuple(rows), n_in, draw(st.sampled_from(blocks)))


@st.composite
def regular_maps(draw: st.DrawFn) -> BlockMap:
    """Maps as schemes make them: few long runs."""
    factor, n_small = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    block = draw(st.integers(1, 5))
    if draw(st.booleans()):
        groups = [list(range(i * factor, (i + 1) * factor)) for i in range(n_small)]
    else:
        groups = [list(range(i, n_small * factor, n_small)) for i in range(n_small)]
    groups = groups[: draw(st.integers(1, n_small))] + draw(groupings(n_small * factor))[:2]
    merging = maps.merging(groups, n_small * factor, block=block)
    m = draw(st.sampled_from((merging, maps.growing(merging), maps.pair_of(merging).into)))
    assert isinstance(m, BlockMap)
    return m


def matrices(n_out: int, n_in: int, values: Sequence[float] = ANY) -> st.SearchStrategy[Tensor]:
    rows = st.lists(st.sampled_from(values), min_size=n_in, max_size=n_in)
    return st.lists(rows, min_size=n_out, max_size=n_out).map(
        lambda content: torch.tensor(content, dtype=torch.float64)
    )


@st.composite
def axis_maps(draw: st.DrawFn, *, values: Sequence[float] = ANY) -> AxisMap:
    """Block maps and dense ones."""
    if draw(st.booleans()):
        return draw(block_maps(values=values, blocks=(1, 2, 3)))
    n_out, n_in = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    return DenseMap(Held(draw(matrices(n_out, n_in, values))))


@st.composite
def windows(draw: st.DrawFn, n: int) -> Windows:
    """[0, n) cut anywhere."""
    cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=6))})
    return list(itertools.pairwise(cuts))


def dense(m: AxisMap) -> Tensor:
    """The matrix, from the definition."""
    if isinstance(m, DenseMap):
        return m.matrix.read((0, m.n_out), (0, m.n_in))
    return oracle.from_rows(m.rows, m.n_in_blocks, m.block)


def moves(pieces: Iterator[Segment] | Sequence[Segment]) -> list[tuple[int, int]]:
    """All (out, in) places of segments, one by one."""
    return sorted(
        (piece.out_start + k * piece.out_step + at, piece.in_start + k * piece.in_step + at)
        for piece in pieces
        for k in range(piece.count)
        for at in range(piece.length)
    )


def applied(pieces: Sequence[Segment], x: Sequence[float], n_out: int) -> list[float | None]:
    """Do the moves as the format of a Segment says; None where nothing was written."""
    out: list[float | None] = [None] * n_out
    for piece in pieces:
        for k in range(piece.count):
            for at in range(piece.length):
                to = piece.out_start + k * piece.out_step + at
                source = piece.in_start + k * piece.in_step + at
                assert 0 <= to < n_out
                assert piece.coefficient == 0.0 or 0 <= source < len(x)
                value = piece.coefficient * x[source] if piece.coefficient else 0.0
                held = out[to]
                assert (held is not None) == piece.adds
                out[to] = value if held is None else held + value
    return out


def same(m: AxisMap, matrix: Tensor) -> None:
    assert (m.n_out, m.n_in) == matrix.shape
    torch.testing.assert_close(dense(m), matrix, rtol=1e-14, atol=1e-15)
    assert torch.equal(maps.to_matrix(m, like=F64), dense(m))


@given(st.data(), st.integers(1, 7), st.integers(1, 4))
def test_merging_and_growing_are_f_and_t(data: st.DataObject, n_large: int, block: int) -> None:
    groups = data.draw(groupings(n_large))
    merging = maps.merging(groups, n_large, block=block)
    same(merging, oracle.merging(groups, n_large, block))
    same(maps.growing(merging), oracle.growing(oracle.merging(groups, n_large, block)))


@given(st.data(), st.integers(1, 7), st.integers(1, 3))
def test_readers_take_in_of_m(data: st.DataObject, n_large: int, block: int) -> None:
    groups = data.draw(groupings(n_large))
    merging = maps.merging(groups, n_large, block=block)
    for m in (merging, maps.growing(merging)):
        pair = maps.pair_of(m)
        assert pair.out is m
        same(pair.into, oracle.into(dense(m)).T)


@given(axis_maps(values=DYADIC))
def test_in_of_any_map_without_negative_entries(m: AxisMap) -> None:
    same(maps.pair_of(m).into, oracle.into(dense(m)).T)
    same(maps.row_normalized(m), oracle.rownorm(dense(m)))


def test_a_row_that_sums_to_zero_stays() -> None:
    matrix = torch.tensor([[1.0, 3.0], [0.0, 0.0]], dtype=torch.float64)
    wanted = torch.tensor([[0.25, 0.75], [0.0, 0.0]], dtype=torch.float64)
    same(maps.row_normalized(DenseMap(Held(matrix))), wanted)
    same(maps.row_normalized(BlockMap((((0, 1.0), (1, 3.0)), ()), 2)), wanted)


@given(axis_maps())
def test_transposed_and_scaled(m: AxisMap) -> None:
    same(maps.transposed(m), dense(m).T)
    same(maps.scaled(m, -0.75), dense(m) * -0.75)


@given(block_maps(), st.data())
def test_reblocked_is_the_same_map(m: BlockMap, data: st.DataObject) -> None:
    block = data.draw(st.sampled_from([d for d in range(1, m.block + 1) if m.block % d == 0]))
    fine = maps.reblocked(m, block)
    assert fine.block == block
    same(fine, dense(m))


@given(block_maps(), st.data())
def test_compose_is_the_product(before: BlockMap, data: st.DataObject) -> None:
    n = before.n_out
    block = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    after = data.draw(block_maps(n_in_blocks=n // block, blocks=(block,)))
    product = dense(after) @ dense(before)
    both = maps.compose(after, before)
    same(both, product)
    assert isinstance(both, BlockMap)
    assert all(value != 0.0 for row in both.rows for _, value in row)
    left, right = DenseMap(Held(dense(after))), DenseMap(Held(dense(before)))
    for a, b in ((left, before), (after, right), (left, right)):
        same(maps.compose(a, b), product)


@given(axis_maps(), axis_maps())
def test_kron_is_the_kronecker_product(left: AxisMap, right: AxisMap) -> None:
    same(maps.kron(left, right), torch.kron(dense(left), dense(right)))


@given(axis_maps(), st.integers(1, 4), st.integers(1, 3))
def test_kron_with_an_identity_keeps_rows_whole(m: AxisMap, n: int, block: int) -> None:
    still = maps.identity(n, block=block)
    eye = torch.eye(n * block, dtype=torch.float64)
    product = maps.kron(m, still)
    same(product, torch.kron(dense(m), eye))
    if isinstance(m, BlockMap):
        assert isinstance(product, BlockMap)
        assert product.block == m.block * n * block
    same(maps.kron(still, m), torch.kron(eye, dense(m)))


@given(st.lists(axis_maps(), min_size=1, max_size=4))
def test_concatenated_is_block_diagonal(parts: list[AxisMap]) -> None:
    wanted = torch.zeros(sum(p.n_out for p in parts), sum(p.n_in for p in parts)).double()
    row = column = 0
    for part in parts:
        wanted[row : row + part.n_out, column : column + part.n_in] = dense(part)
        row, column = row + part.n_out, column + part.n_in
    same(maps.concatenated(parts), wanted)


@given(block_maps())
def test_from_matrix_keeps_the_values(m: BlockMap) -> None:
    found = maps.from_matrix(Held(dense(m)))
    assert torch.equal(dense(found), dense(m))
    few = int(dense(m).count_nonzero()) <= 4 * max(m.n_out, m.n_in)
    assert isinstance(found, BlockMap if few else DenseMap)


def test_from_matrix_of_a_full_matrix_is_dense() -> None:
    matrix = torch.arange(1.0, 82.0).view(9, 9)
    found = maps.from_matrix(Held(matrix))
    assert isinstance(found, DenseMap)
    assert torch.equal(dense(found), matrix)


@given(st.data(), st.integers(1, 6), st.sampled_from((2, 4, 64)))
def test_from_matrix_finds_the_blocks(data: st.DataObject, n_large: int, block: int) -> None:
    groups = data.draw(groupings(n_large))
    merging = oracle.merging(groups, n_large, block).float()
    found = maps.from_matrix(Held(merging))
    if isinstance(found, BlockMap):
        assert found.block % block == 0
    assert torch.equal(maps.to_matrix(found, like=merging), merging)


@given(block_maps() | regular_maps(), st.data())
def test_segments_are_the_matrix(m: BlockMap, data: st.DataObject) -> None:
    x = data.draw(st.lists(st.integers(-9, 9), min_size=m.n_in, max_size=m.n_in))
    out = applied(m.segments, x, m.n_out)
    assert None not in out
    wanted = dense(m) @ torch.tensor(x, dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(out, dtype=torch.float64), wanted)


@given(block_maps() | regular_maps(), st.data())
def test_clipped_segments_are_the_slices(m: BlockMap, data: st.DataObject) -> None:
    x = [2.0**i for i in range(m.n_in)]
    whole = applied(m.segments, x, m.n_out)
    for start, end in data.draw(windows(m.n_out)):
        pieces = [piece for s in m.segments for piece in s.clipped(start, end)]
        assert applied(pieces, x, end - start) == whole[start:end]


@pytest.mark.parametrize(
    "groups",
    [[[0, 1], [2, 3], [4]], [[4], [0, 1], [2, 3]], [[0, 2], [1, 3, 4]], [[0], [1, 2], [3], [4]]],
)
def test_every_window_of_uneven_groups(groups: list[list[int]]) -> None:
    merging = maps.merging(groups, 5, block=3)
    grown = maps.growing(merging)
    for m in (merging, grown, maps.pair_of(merging).into, maps.pair_of(grown).into):
        assert isinstance(m, BlockMap)
        x = [2.0**i for i in range(m.n_in)]
        whole = applied(m.segments, x, m.n_out)
        for start, end in itertools.combinations(range(m.n_out + 1), 2):
            pieces = [piece for s in m.segments for piece in s.clipped(start, end)]
            assert applied(pieces, x, end - start) == whole[start:end]


@settings(max_examples=10 * settings().max_examples)
@given(
    st.integers(0, 9),
    st.integers(0, 5),
    st.integers(0, 9),
    st.integers(0, 9),
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 40),
    st.integers(0, 40),
)
def test_a_clipped_segment_has_the_moves_of_the_window(
    out_start: int,
    gap: int,
    in_start: int,
    in_step: int,
    count: int,
    length: int,
    start: int,
    size: int,
) -> None:
    whole = Segment(out_start, length + gap, in_start, in_step, count, length, 0.5, adds=True)
    pieces = list(whole.clipped(start, start + size))
    wanted = [(to - start, at) for to, at in moves([whole]) if start <= to < start + size]
    assert moves(pieces) == sorted(wanted)
    assert all(piece.coefficient == 0.5 and piece.adds for piece in pieces)
    assert len(pieces) <= 3


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("adjacent", [False, True])
def test_a_uniform_scheme_is_a_few_runs(factor: int, *, adjacent: bool) -> None:
    n = 12 // factor
    stacked = [list(range(i, 12, n)) for i in range(n)]
    groups = [list(range(i, i + factor)) for i in range(0, 12, factor)] if adjacent else stacked
    merging = maps.merging(groups, 12, block=64)
    growing = maps.growing(merging)
    for m in (merging, growing, maps.pair_of(merging).into, maps.pair_of(growing).into):
        assert isinstance(m, BlockMap)
        assert len(m.segments) <= factor


@given(axis_maps())
def test_members_are_the_non_zeros_of_a_row(m: AxisMap) -> None:
    for unit, row in enumerate(dense(m)):
        found = torch.zeros_like(row)
        for j, value in m.members(unit):
            found[j] += value
        torch.testing.assert_close(found, row)


def test_only_the_identity_is_one() -> None:
    assert maps.identity(3, block=2).is_identity
    assert not maps.identity(0).rows
    for rows, n_in in (
        ((((1, 1.0),), ((0, 1.0),)), 2),
        ((((0, 1.0),), ((1, 0.5),)), 2),
        ((((0, 1.0),), ((1, 1.0),)), 3),
        ((((0, 1.0),), ((1, 1.0), (0, 1.0))), 2),
    ):
        assert not BlockMap(rows, n_in).is_identity


def test_a_member_that_is_not_there_is_refused() -> None:
    for j in (-1, 2):
        with pytest.raises(IndexError, match=str(j)):
            BlockMap((((j, 1.0),),), 2)


def test_maps_in_words() -> None:
    pairs = maps.merging([[0, 2], [1, 3]], 4, block=64)
    grown = maps.growing(pairs)
    uneven = maps.merging([[0], [1, 2, 3]], 4)
    left_out = maps.merging([[0, 1]], 3)
    weighted = BlockMap((((0, 0.25), (1, 0.75)),), 2)
    for m, words in (
        (pairs, "mean of 2"),
        (maps.pair_of(pairs).into, "sum of 2"),
        (grown, "copy x2"),
        (maps.pair_of(grown).into, "copy / 2"),
        (maps.merging([[0, 1, 2]], 3), "mean of 3"),
        (uneven, "mean of 1-3"),
        (maps.growing(uneven), "copy x1-3"),
        (maps.pair_of(maps.growing(uneven)).into, "copy / 1-3"),
        (maps.growing(left_out), "copy x2, zeros where nothing maps"),
        (weighted, "weighted sum of 2"),
        (maps.scaled(pairs, 0.5), "weighted sum of 2"),
        (maps.scaled(grown, 3.0), "scaled copy"),
        (BlockMap((((1, 1.0),), ((0, 1.0),)), 2), "permutation"),
        (BlockMap((((1, 1.0),),), 2), "selection"),
        (BlockMap(((), ()), 2), "zeros"),
        (DenseMap(Held(torch.ones(2, 3))), "dense 2x3"),
    ):
        assert m.describe() == words
