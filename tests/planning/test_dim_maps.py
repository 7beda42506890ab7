"""Maps of dimensions from maps of axes, against an oracle that goes index by index.

The oracle never builds a product: it walks all units of the result, takes each one's coordinates
(kv head, place in the group, unit ...), and asks for each coordinate by itself where it comes from.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from streammap.architectures import registry
from streammap.architectures.expression import parse_expression
from streammap.architectures.schema import Architecture, Role
from streammap.errors import ArchitectureError
from streammap.planning import maps
from streammap.planning.dim_maps import DimMaps
from streammap.planning.maps import AxisMap, BlockMap, MapPair

F64 = torch.empty(0, dtype=torch.float64)
ROLES: tuple[Role, ...] = ("out", "in")
SPEC = registry.parse(
    """
schema = 1
model_types = ["toy"]
[axes]
heads = "heads"
kv_heads = "kv_heads"
q_group = "=heads/kv_heads"
lv = "lv"
lk = "lk"
g = "=lv/lk"
d = "d"
a = "a"
b = "b"
mlp = "mlp"
layer = "layers"
[axis_kind]
q_group = "group"
g = "group"
d = "frozen"
layer = "depth"
[alias]
q = "kv_heads*q_group*d"
kv = "kv_heads*d"
both = "q+2*kv"
""",
    name="toy",
)
Coordinates = dict[str, int]


@dataclass(frozen=True)
class Change:
    """Maps of heads and kv heads that fit one another, and the sizes on both sides."""

    pairs: Mapping[str, MapPair]
    before: Mapping[str, int]
    after: Mapping[str, int]


@st.composite
def some_maps(draw: st.DrawFn, n_in: int | None = None) -> BlockMap:
    """Any map: rows of any members, some of them empty."""
    n = draw(st.integers(1, 3)) if n_in is None else n_in
    entry = st.tuples(st.integers(0, n - 1), st.sampled_from((1.0, 0.5, 2.0, 0.25)))
    row = st.lists(entry, max_size=2, unique_by=lambda pair: pair[0]).map(tuple)
    return BlockMap(tuple(draw(st.lists(row, min_size=1, max_size=4))), n)


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Random maps of heads over kv heads (two pairs of them), of d, a, b and mlp."""
    before: dict[str, int] = {"layer": 1}
    after: dict[str, int] = {"layer": 1}
    found: dict[str, BlockMap] = {}
    for heads, kv, group in (("heads", "kv_heads", "q_group"), ("lv", "lk", "g")):
        n_kv, n_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        m_kv = draw(some_maps(n_kv))
        new_kv, new_group = len(m_kv.rows), draw(st.integers(1, 3))
        entry = st.tuples(st.integers(0, n_kv * n_group - 1), st.sampled_from((1.0, 0.5, 3.0)))
        row = st.lists(entry, max_size=2, unique_by=lambda pair: pair[0]).map(tuple)
        rows = draw(st.lists(row, min_size=new_kv * new_group, max_size=new_kv * new_group))
        found |= {heads: BlockMap(tuple(rows), n_kv * n_group), kv: m_kv}
        before |= {kv: n_kv, group: n_group, heads: n_kv * n_group}
        after |= {kv: new_kv, group: new_group, heads: new_kv * new_group}
    for axis in ("mlp", "a", "b"):
        found[axis] = draw(some_maps())
        before[axis], after[axis] = found[axis].n_in, found[axis].n_out
    before["d"] = after["d"] = draw(st.integers(1, 3))
    return Change({k: maps.pair_of(m) for k, m in found.items()}, before, after)


def dense(m: AxisMap) -> Tensor:
    return maps.to_matrix(m, like=F64)


def of(change: Change, text: str, role: Role, spec: Architecture = SPEC) -> Tensor | None:
    work = DimMaps(spec, change.pairs, change.before, change.after)
    found = work.of(parse_expression(text), role)
    return None if found is None else dense(found)


def units(layout: Sequence[object], sizes: Mapping[str, int]) -> Iterator[tuple[object, ...]]:
    """All units of a layout in their order: a list of factors, slowest first.

    A factor is an axis, a number, or a dict {name: layout} that stands for a sum.
    """
    if not layout:
        yield ()
        return
    first, rest = layout[0], layout[1:]
    if isinstance(first, dict):
        heads = [(name, *u) for name, inner in first.items() for u in units(inner, sizes)]
    else:
        n = first if isinstance(first, int) else sizes[str(first)]
        heads = [(str(first), i) for i in range(n)]
    for head in heads:
        for tail in units(rest, sizes):
            yield (*head, *tail)


def coordinates(unit: Sequence[object]) -> tuple[tuple[str, ...], Coordinates]:
    """What of the sums a unit is in, and its index along each axis."""
    parts: list[str] = []
    found: Coordinates = {}
    at = 0
    while at < len(unit):
        name = unit[at]
        assert isinstance(name, str)
        if at + 1 < len(unit) and isinstance(unit[at + 1], int):
            index = unit[at + 1]
            assert isinstance(index, int)
            found[name] = index
            at += 2
        else:
            parts.append(name)
            at += 1
    return tuple(parts), found


JOINT = (("heads", "kv_heads", "q_group"), ("lv", "lk", "g"))


def oracle(change: Change, layout: Sequence[object], role: Role) -> Tensor:
    """Entry (i, j): the product over the coordinates of what comes from where."""
    rows = [coordinates(u) for u in units(layout, change.after)]
    columns = [coordinates(u) for u in units(layout, change.before)]
    matrices = {k: dense(p.out if role == "out" else p.into) for k, p in change.pairs.items()}
    found = torch.zeros(len(rows), len(columns), dtype=torch.float64)
    for i, (part, to) in enumerate(rows):
        for j, (other, source) in enumerate(columns):
            if part == other:
                found[i, j] = _entry(matrices, change, to, source)
    return found


def _entry(
    matrices: Mapping[str, Tensor], change: Change, to: Coordinates, source: Coordinates
) -> float:
    value, done = 1.0, set()
    for heads, kv, group in JOINT:
        if group in to:
            # Query head i of kv head k is head k * group + i.
            row = to[kv] * change.after[group] + to[group]
            column = source[kv] * change.before[group] + source[group]
            value *= float(matrices[heads][row, column])
            done |= {kv, group}
    for name in to.keys() - done:
        if name in matrices:
            value *= float(matrices[name][to[name], source[name]])
        else:
            value *= float(to[name] == source[name])
    return value


Q = {"q": ["q_group"], "k": [1], "v": [1]}
LAYOUTS: dict[str, Sequence[object]] = {
    "kv_heads*(q_group+2)*d": ["kv_heads", {"q": ["q_group"], "kv": [2]}, "d"],
    "kv_heads*(q_group+1+1)*d": ["kv_heads", Q, "d"],
    "heads*3*d": ["heads", 3, "d"],
    "3*heads*d": [3, "heads", "d"],
    "lk*(2*a+2*g*b)": ["lk", {"qk": [2, "a"], "vz": [2, "g", "b"]}],
    "kv_heads*q_group*2*d": ["kv_heads", "q_group", 2, "d"],
    "kv_heads*2*q_group*d": ["kv_heads", 2, "q_group", "d"],
    "q": ["kv_heads", "q_group", "d"],
    "q+2*kv": [{"q": ["kv_heads", "q_group", "d"], "kv": [2, "kv_heads", "d"]}],
    "both": [{"q": ["kv_heads", "q_group", "d"], "kv": [2, "kv_heads", "d"]}],
    "2*mlp": [2, "mlp"],
    "mlp*2": ["mlp", 2],
    "mlp*a": ["mlp", "a"],
    "a*kv_heads*q_group": ["a", "kv_heads", "q_group"],
    "lk*g*a+kv_heads*q_group*d+d": [
        {"l": ["lk", "g", "a"], "q": ["kv_heads", "q_group", "d"], "d": ["d"]}
    ],
    "kv_heads*q_group*(a+d)": ["kv_heads", "q_group", {"a": ["a"], "d": ["d"]}],
}


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("role", ROLES)
@given(change=changes())
def test_the_map_of_a_dimension_is_that_of_each_of_its_units(
    text: str, role: Role, change: Change
) -> None:
    wanted = oracle(change, LAYOUTS[text], role)
    found = of(change, text, role)
    if found is None:
        assert torch.equal(wanted, torch.eye(len(wanted), dtype=torch.float64))
    else:
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("role", ROLES)
def test_what_does_not_change_has_no_map(role: Role) -> None:
    sizes = {"heads": 4, "kv_heads": 2, "q_group": 2, "d": 3, "mlp": 5}
    work = DimMaps(SPEC, {"mlp": maps.pair_of(maps.identity(5))}, sizes, sizes)
    for text in ("kv_heads*(q_group+2)*d", "q", "2*mlp", "7"):
        assert work.of(parse_expression(text), role) is None


def test_growth_copies_and_readers_share() -> None:
    m = maps.pair_of(maps.growing(maps.merging([[0, 2], [1, 3]], 4)))
    sizes = {"mlp": 2}, {"mlp": 4}
    work = DimMaps(SPEC, {"mlp": m}, *sizes)
    out, into = (work.of(parse_expression("2*mlp"), role) for role in ROLES)
    assert out is not None
    assert into is not None
    assert out.describe() == "copy x2"
    assert into.describe() == "copy / 2"


def test_an_axis_that_nothing_maps_must_keep_its_size() -> None:
    work = DimMaps(SPEC, {}, {"mlp": 2}, {"mlp": 4})
    with pytest.raises(ArchitectureError, match="mlp changes its size, but has no map"):
        work.of(parse_expression("2*mlp"), "out")


@pytest.mark.parametrize("text", ["mlp/2", "mlp-1", "swiglu8(mlp, a)"])
def test_only_sums_of_products_have_a_map(text: str) -> None:
    m = maps.pair_of(maps.growing(maps.merging([[0, 2], [1, 3]], 4)))
    work = DimMaps(SPEC, {"mlp": m}, {"mlp": 2, "a": 1}, {"mlp": 4, "a": 1})
    with pytest.raises(ArchitectureError, match="a dimension is a sum of products"):
        work.of(parse_expression(text), "out")


def test_something_that_is_no_sum_between_kv_heads_and_their_group_is_refused() -> None:
    m = maps.pair_of(maps.identity(2))
    sizes = {"heads": 4, "kv_heads": 2, "q_group": 2, "mlp": 3}
    pairs = {"heads": maps.pair_of(maps.merging([[1], [0], [2], [3]], 4)), "kv_heads": m}
    work = DimMaps(SPEC, pairs, sizes, sizes)
    with pytest.raises(ArchitectureError, match="stands between kv heads and their group"):
        work.of(parse_expression("kv_heads*mlp*q_group"), "out")


def test_groups_of_query_heads_are_known_by_their_expression() -> None:
    found = {(shared.kv, shared.group, shared.heads) for shared in SPEC.shared_heads}
    assert found == {("kv_heads", "q_group", "heads"), ("lk", "g", "lv")}
    text = """
schema = 1
model_types = ["toy"]
[axes]
heads = "heads"
group = "group"
layer = "layers"
[axis_kind]
group = "group"
layer = "depth"
"""
    with pytest.raises(ArchitectureError, match=r"toy\.toml: group is a group, expected '=heads"):
        _ = registry.parse(text, name="toy").shared_heads


def test_query_heads_may_change_places_alone() -> None:
    swapped = BlockMap((((1, 1.0),), ((0, 1.0),), ((2, 1.0),), ((3, 1.0),)), 4)
    sizes = {"heads": 4, "kv_heads": 2, "q_group": 2, "d": 3}
    dims = DimMaps(SPEC, {"heads": maps.pair_of(swapped)}, sizes, sizes)
    m = dims.of(parse_expression("q"), "out")
    assert m is not None
    assert torch.equal(
        maps.to_matrix(m, like=F64), maps.to_matrix(maps.kron(swapped, maps.identity(3)), like=F64)
    )
    assert dims.of(parse_expression("kv"), "out") is None
