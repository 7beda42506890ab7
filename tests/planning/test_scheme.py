"""Schemes: the original's form, uniform groups, and what is refused."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import streammap
from streammap.errors import PlanError, SchemeError
from streammap.planning import requests, scheme
from streammap.planning.requests import AxisRequest, Grouping
from streammap.planning.scheme import Scheme
from tests.support import tiny

H4 = {"width_scheme": [[0, 2], [1, 3]]}
L4 = {"depth_scheme": [[0, 1], [2, 3]]}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 12)
    | st.integers()
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)
KEYS = st.sampled_from(["width_scheme", "depth_scheme", "reserved_heads", "reserved_layers"])
GROUPS = st.lists(st.lists(st.integers(-1, 9) | JSON, max_size=4), max_size=4)


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> streammap.LazyCheckpoint:
    """A BERT of 4 heads and 4 layers."""
    sizes = tiny.Sizes()
    folder = tmp_path_factory.mktemp("big")
    return streammap.open(tiny.write(folder, tiny.bert(sizes), tiny.bert_config(sizes)))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> streammap.LazyCheckpoint:
    """A BERT of 2 heads and 2 layers."""
    sizes = tiny.Sizes(heads=2, layers=2)
    folder = tmp_path_factory.mktemp("small")
    return streammap.open(tiny.write(folder, tiny.bert(sizes), tiny.bert_config(sizes)))


# The form.


@pytest.mark.parametrize("content", [H4, L4, {**H4, **L4}])
def test_a_scheme_has_groups_of_heads_or_layers_or_both(
    tmp_path: Path, content: Mapping[str, object]
) -> None:
    found = scheme.load_scheme(tiny.file(tmp_path / "s.json", json.dumps(content)))
    assert found.width == (((0, 2), (1, 3)) if "width_scheme" in content else None)
    assert found.depth == (((0, 1), (2, 3)) if "depth_scheme" in content else None)
    assert found.as_json() == content
    assert scheme.load_scheme(found) is found
    assert scheme.load_scheme(content) == found == scheme.load_scheme(str(tmp_path / "s.json"))


def test_a_schemes_text_is_the_scheme(tmp_path: Path) -> None:
    found = scheme.load_scheme({**H4, **L4})
    assert scheme.load_scheme(tiny.file(tmp_path / "s.json", found.as_text())) == found


def test_groups_may_be_uneven_overlap_and_leave_members_out() -> None:
    groups = ((0, 2, 5), (2,), (7, 1))
    found = scheme.load_scheme({"width_scheme": groups})
    assert found.width == groups


def test_null_stands_for_none() -> None:
    assert scheme.load_scheme({"width_scheme": None, "depth_scheme": None}) == Scheme()
    assert scheme.load_scheme({}) == Scheme()


def test_reserved_entries_are_accepted_and_reported(big: streammap.LazyCheckpoint) -> None:
    content = {**H4, "reserved_heads": [0], "reserved_layers": {"any": "thing"}}
    assert scheme.load_scheme(content).unused == ("reserved_heads", "reserved_layers")
    plan = big.coalesce(scheme=content).plan
    assert "reserved_heads, reserved_layers: accepted, and not used" in plan.notes
    assert big.coalesce(scheme=H4).plan.notes == ()


def test_heads_left_out_or_used_twice_are_reported(big: streammap.LazyCheckpoint) -> None:
    notes = big.coalesce(scheme={"width_scheme": [[0, 1], [1, 3]]}).plan.notes
    assert notes == ("heads 2 of 4: in no group, dropped", "heads 1: in more than one group")


def test_a_scheme_has_entries_for_spaces_and_axes(big: streammap.LazyCheckpoint) -> None:
    content = {
        "hidden": 2,
        "heads": {"factor": 2, "grouping": "adjacent"},
        "mlp": "=6",
        "layers": [[0, 1], [2, 3]],
        "axes": {"types": "=2"},
    }
    found = scheme.load_scheme(content)
    assert found.spaces == {
        "hidden": AxisRequest(factor=2),
        "heads": AxisRequest(factor=2, grouping="adjacent"),
        "mlp": AxisRequest(size=6),
        "layers": AxisRequest(groups=((0, 1), (2, 3))),
    }
    assert found.axes == {"types": AxisRequest(size=2)}
    shrunk = big.coalesce(scheme={key: content[key] for key in ("heads", "mlp", "layers")})
    assert {k: shrunk.sizes[k] for k in ("embed", "heads", "mlp", "layer")} == {
        "embed": 4,
        "heads": 2,
        "mlp": 6,
        "layer": 2,
    }


def test_width_in_a_scheme_is_what_the_option_is(big: streammap.LazyCheckpoint) -> None:
    one, two = big.coalesce(scheme={"width": 2}), big.coalesce(width=2)
    tiny.assert_same(dict(one.tensors()), dict(two.tensors()))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"heads": 0}, "scheme: heads is 0, expected 1 or more"),
        ({"mlp": "=0"}, "scheme: mlp: '=0' is not a request"),
        ({"layers": [[0, 0]]}, r"scheme: layers\[0\]: member 0 is listed twice"),
        ({"axes": 3}, "scheme: axes is 3, expected a table of axes"),
        ({"axes": {"embed": None}}, "scheme: axes: embed: 'None' is not a request"),
    ],
)
def test_an_entry_that_is_no_request_is_refused(
    content: Mapping[str, object], expected: str
) -> None:
    with pytest.raises(SchemeError, match=expected):
        scheme.load_scheme(content)


def test_an_entry_that_the_model_lacks_is_refused(big: streammap.LazyCheckpoint) -> None:
    with pytest.raises(PlanError, match=r"bert has no kv heads\n.*it has hidden, heads"):
        big.coalesce(scheme={"kv_heads": 2})
    with pytest.raises(PlanError, match=r"bert has no axis 'width'\n.*its axes are .*heads"):
        big.coalesce(scheme={"axes": {"width": 2}})


def test_every_shipped_scheme_loads() -> None:
    files = sorted((Path(__file__).parents[2] / "schemes").glob("*.json"))
    assert files
    for file in files:
        found = scheme.load_scheme(file)
        assert found.width or found.depth, file.name


# Uniform groups.


def test_uniform_groups_are_stacked_or_adjacent() -> None:
    assert requests.uniform(12, 2, "stacked", units="heads") == (
        (0, 6),
        (1, 7),
        (2, 8),
        (3, 9),
        (4, 10),
        (5, 11),
    )
    assert requests.uniform(12, 2, "adjacent", units="heads") == (
        (0, 1),
        (2, 3),
        (4, 5),
        (6, 7),
        (8, 9),
        (10, 11),
    )
    assert requests.uniform(6, 3, "stacked", units="heads") == ((0, 2, 4), (1, 3, 5))
    assert requests.uniform(6, 3, "adjacent", units="heads") == ((0, 1, 2), (3, 4, 5))
    assert requests.uniform(3, 1, "stacked", units="heads") == ((0,), (1,), (2,))
    assert requests.uniform(3, 3, "adjacent", units="heads") == ((0, 1, 2),)


def test_the_originals_template_pairs_what_it_can() -> None:
    assert scheme.template(4, 2) == ((0, 2), (1, 3))
    assert scheme.template(5, 3) == ((0, 3), (1, 4), (2,))
    assert scheme.template(7, 3) == ((0, 3), (1, 4), (2, 5))


@given(st.integers(1, 12), st.integers(1, 6), st.sampled_from(requests.GROUPINGS))
def test_uniform_groups_hold_each_member_once(n: int, factor: int, grouping: Grouping) -> None:
    groups = requests.uniform(n * factor, factor, grouping, units="heads")
    assert len(groups) == n
    assert {len(group) for group in groups} == {factor}
    assert sorted(member for group in groups for member in group) == list(range(n * factor))


@pytest.mark.parametrize("factor", [0, -1, 5, 7, 13, 24])
def test_a_factor_that_does_not_divide_is_refused(factor: int) -> None:
    expected = rf"12 heads do not divide into groups of {factor}\n.*factor of 12 \(2, 3, 4, 6, 12\)"
    with pytest.raises(SchemeError, match=expected):
        requests.uniform(12, factor, "stacked", units="heads")


def test_a_factor_that_does_not_divide_a_model_is_refused(big: streammap.LazyCheckpoint) -> None:
    with pytest.raises(SchemeError, match="4 heads do not divide into groups of 3"):
        big.coalesce(width=3)
    with pytest.raises(SchemeError, match="4 layers do not divide into groups of 8"):
        big.coalesce(depth=8)
    with pytest.raises(SchemeError, match="width is 0, expected 1 or more"):
        big.coalesce(width=0)


# Refusals.


@pytest.mark.parametrize("text", ["", "{", "[[0, 1]", '{"width_scheme": [[0 1]]}', "\x00", "{}{}"])
def test_what_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SchemeError, match=r"s\.json: not JSON"):
        scheme.load_scheme(tiny.file(tmp_path / "s.json", text))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=r"s\.json: No such file"):
        scheme.load_scheme(tmp_path / "s.json")
    with pytest.raises(SchemeError, match="Is a directory"):
        scheme.load_scheme(tmp_path)


@pytest.mark.parametrize(
    ("text", "kind"), [("[[0, 1]]", "list"), ("null", "NoneType"), ("3", "int"), ('"a"', "str")]
)
def test_json_that_is_no_object_is_refused(tmp_path: Path, text: str, kind: str) -> None:
    with pytest.raises(SchemeError, match=f"expected a JSON object, found {kind}"):
        scheme.load_scheme(tiny.file(tmp_path / "s.json", text))


@pytest.mark.parametrize("key", ["with_scheme", "widths", "", "WIDTH_SCHEME", "comment"])
def test_an_unknown_key_is_refused(key: str) -> None:
    expected = f"unknown key '{key}'\n.*known are width_scheme, depth_scheme"
    with pytest.raises(SchemeError, match=expected):
        scheme.load_scheme({**H4, key: []})


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    text = '{"width_scheme": [[0, 1]], "width_scheme": [[0, 2], [1, 3]]}'
    with pytest.raises(SchemeError, match="'width_scheme' twice"):
        scheme.load_scheme(tiny.file(tmp_path / "s.json", text))


@pytest.mark.parametrize("groups", [[], {}, 3, "[[0, 1]]", True, 0.5, {"0": [0, 1]}])
@pytest.mark.parametrize("key", ["width_scheme", "depth_scheme"])
def test_a_scheme_that_is_no_list_of_groups_is_refused(key: str, groups: object) -> None:
    with pytest.raises(SchemeError, match=rf"{key}: expected a list of groups such as \[\[0, 6\]"):
        scheme.load_scheme({key: groups})


@pytest.mark.parametrize("group", [3, "01", None, 0.5, True])
def test_a_group_that_is_no_list_is_refused(group: object) -> None:
    with pytest.raises(SchemeError, match=r"width_scheme\[1\]: expected a list of numbers such as"):
        scheme.load_scheme({"width_scheme": [[0], group]})


def test_a_group_that_is_a_table_has_members_and_weights() -> None:
    expected = r"width_scheme\[1\]: expected members and weights, found \['0'\]"
    with pytest.raises(SchemeError, match=expected):
        scheme.load_scheme({"width_scheme": [[0], {"0": 1}]})
    weighted = {"width_scheme": [[0], {"members": [1, 2], "weights": [1, 3]}]}
    with pytest.raises(SchemeError, match=r"width_scheme: weighted members\n.*\"heads\"") as told:
        scheme.load_scheme(weighted)
    assert '"groups": [...]' in (told.value.hint or "")


def test_an_empty_group_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"depth_scheme\[2\]: an empty group"):
        scheme.load_scheme({"depth_scheme": [[0], [1], []]})


def test_a_member_that_stands_twice_in_its_group_is_refused() -> None:
    with pytest.raises(SchemeError, match=r"width_scheme\[1\]: member 4 is listed twice"):
        scheme.load_scheme({"width_scheme": [[0], [4, 2, 4]]})


@pytest.mark.parametrize(
    "member", [-1, True, False, "0", 0.0, 1.5, None, [0], {}, float("nan"), 1_000_001, 10**30]
)
def test_a_member_that_is_no_index_is_refused(member: object) -> None:
    with pytest.raises(
        SchemeError, match=r"width_scheme\[3\]: .* is not an index, expected 0, 1, 2"
    ):
        scheme.load_scheme({"width_scheme": [[0], [1], [2], [3, member]]})


def test_a_member_out_of_range_is_refused_by_name(big: streammap.LazyCheckpoint) -> None:
    wide = {"width_scheme": [[0], [1], [2], [3, 4]]}
    expected = r"\[3\]: .*4 is out of range, the large model has 4 .*\(0 to 3\)\n.*hint"
    with pytest.raises(SchemeError, match=expected):
        big.coalesce(scheme=wide)
    deep = {"depth_scheme": [[0, 9], [1]]}
    expected = r"depth_scheme\[0\]: 9 is out of range, the large model has 4 \(0 to 3\)\n.*hint"
    with pytest.raises(SchemeError, match=expected):
        big.coalesce(scheme=deep)


def test_a_member_that_the_target_lacks_is_refused(
    big: streammap.LazyCheckpoint, small: streammap.LazyCheckpoint
) -> None:
    groups = {"width_scheme": [[0, 2], [1, 4]], **L4}
    with pytest.raises(SchemeError, match=r"\[1\]: .*4 is out of range, the large model has 4"):
        small.decoalesce(scheme=groups, target=big)


def test_a_wrong_number_of_groups_is_refused(
    big: streammap.LazyCheckpoint, small: streammap.LazyCheckpoint
) -> None:
    three = {"width_scheme": [[0], [1], [2, 3]], **L4}
    with pytest.raises(SchemeError, match="3 groups, the small model has 2"):
        small.decoalesce(scheme=three)
    with pytest.raises(SchemeError, match="3 groups, the small model has 2"):
        big.coalesce(scheme=three, target=small)
    one = {**H4, "depth_scheme": [[0, 1, 2, 3]]}
    with pytest.raises(SchemeError, match="1 groups, the small model has 2 layers"):
        big.coalesce(scheme=one, target=small)


def test_a_scheme_without_groups_is_refused(big: streammap.LazyCheckpoint) -> None:
    with pytest.raises(PlanError, match="neither a width_scheme nor a depth_scheme"):
        big.coalesce(scheme={})
    with pytest.raises(PlanError, match="no target size given"):
        big.coalesce()


def test_a_scheme_that_misses_what_the_target_needs_is_refused(
    big: streammap.LazyCheckpoint, small: streammap.LazyCheckpoint
) -> None:
    with pytest.raises(PlanError, match="layer would be 4, the target says 2"):
        big.coalesce(scheme=H4, target=small)


def test_a_scheme_and_a_factor_are_refused(big: streammap.LazyCheckpoint) -> None:
    with pytest.raises(PlanError, match="both a scheme and --width"):
        big.coalesce(scheme=H4, width=2)
    with pytest.raises(PlanError, match="both a scheme and --depth"):
        big.coalesce(scheme=H4, depth=2)


def test_nesting_of_any_depth_is_refused(tmp_path: Path) -> None:
    for depth in (10, 100, *range(900, 1000, 7), 5_000, 1_000_000):
        text = '{"width_scheme": [' + '{"a":' * depth + "0" + "}" * depth + "]}"
        with pytest.raises(SchemeError, match=r"s\.json"):
            scheme.load_scheme(tiny.file(tmp_path / "s.json", text))


@given(JSON | st.dictionaries(KEYS, GROUPS | JSON))
def test_any_json_is_read_or_refused(scratch: Path, value: object) -> None:
    file = tiny.file(scratch / "s.json", json.dumps(value))
    try:
        found = scheme.load_scheme(file)
    except SchemeError:
        return
    for groups in (found.width, found.depth):
        assert groups is None or all(min(group) >= 0 for group in groups)


@given(st.dictionaries(KEYS | st.text(max_size=3), GROUPS | JSON))
def test_any_dict_is_read_or_refused(value: dict[str, object]) -> None:
    with contextlib.suppress(SchemeError):
        scheme.load_scheme(value)


@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(scratch: Path, content: bytes) -> None:
    with contextlib.suppress(SchemeError):
        scheme.load_scheme(tiny.file(scratch / "s.json", content))
