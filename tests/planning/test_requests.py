"""Requests on single axes: every form, and every refusal."""

import contextlib
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.errors import SchemeError
from streammap.planning import requests
from streammap.planning.requests import AxisRequest

PAIRS = ((0, 2), (1, 3))
HINT = r"\n  hint: .*"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, AxisRequest(factor=2)),
        ("2", AxisRequest(factor=2)),
        (" 3 ", AxisRequest(factor=3)),
        ("=768", AxisRequest(size=768)),
        (" =1", AxisRequest(size=1)),
        ("to:768", AxisRequest(size=768)),
        ("x2", AxisRequest(factor=2)),
        (" x048", AxisRequest(factor=48)),
        ([[0, 2], [1, 3]], AxisRequest(groups=PAIRS)),
        (((0, 2), (1, 3)), AxisRequest(groups=PAIRS)),
        ("[[0, 2], [1, 3]]", AxisRequest(groups=PAIRS)),
        ({"factor": 2}, AxisRequest(factor=2)),
        ({"factor": 2, "grouping": "adjacent"}, AxisRequest(factor=2, grouping="adjacent")),
        ('{"factor": 2, "grouping": "stacked"}', AxisRequest(factor=2, grouping="stacked")),
        ({"size": 768}, AxisRequest(size=768)),
        ({"groups": [[0, 2], [1, 3]]}, AxisRequest(groups=PAIRS)),
        (AxisRequest(size=5), AxisRequest(size=5)),
    ],
    ids=itertools.count(),
)
def test_a_request_is_a_factor_a_size_or_groups(value: object, expected: AxisRequest) -> None:
    assert requests.parse_request(value, "mlp") == expected


@pytest.mark.parametrize(
    "value",
    [
        {"groups": [{"members": [0, 2], "weights": [3, 1]}, [1, 3]]},
        [{"members": [0, 2], "weights": [0.75, 0.25]}, {"members": [1, 3], "weights": [7, 7]}],
        '[{"members": [0, 2], "weights": [6, 2.0]}, [1, 3]]',
    ],
    ids=["table", "list", "text"],
)
def test_members_may_have_weights_that_are_made_to_add_up_to_1(value: object) -> None:
    found = requests.parse_request(value, "heads")
    assert found == AxisRequest(groups=PAIRS, weights=((0.75, 0.25), (0.5, 0.5)))


def test_a_weight_may_be_zero() -> None:
    value = [{"members": [0, 1], "weights": [1, 0]}]
    assert requests.parse_request(value, "heads").weights == ((1.0, 0.0),)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "mlp is 0, expected 1 or more"),
        (-2, "mlp is -2, expected 1 or more"),
        ("-2", "mlp is -2, expected 1 or more"),
        *(
            (
                value,
                rf"mlp: '.*' is not a request{HINT}a factor such as 2 or x2, a size such as to:768",
            )
            for value in (
                None,
                True,
                2.0,
                "",
                "two",
                "=",
                "=0",
                "=-1",
                "=1.5",
                "= 7",
                "=٣",
                "==7",
                "2x",
                "x",
                "x0",
                "x-2",
                "x1.5",
                "to:",
                "to: 7",
                "to:0",
                "to:=7",
                "to:x7",
                "9" * 13,
                "=" + "9" * 5_000,
            )
        ),
        ("=1099511627777", "mlp is 1099511627777, at most 1099511627776"),
        (10**13, "mlp is 10000000000000, at most 1099511627776"),
        ({"size": 10**4000}, "mlp: size is a number of more than 20 digits, at most 1099511627776"),
        ({"factor": 2**41}, "mlp: factor is 2199023255552, at most 1099511627776"),
        ('{"factor": 2, "factor": 2}', "mlp: not JSON: 'factor' twice"),
        ("[[0, 1]", "mlp: not JSON"),
        ("{factor: 2}", "mlp: not JSON"),
        ("[" * 100_000, "mlp: not JSON"),
        ([], r"mlp: expected a list of groups such as \[\[0, 6\], \[1, 7\]\]"),
        ("[]", "mlp: expected a list of groups"),
        ({}, "mlp: expected one of factor, size and groups"),
        ({"grouping": "stacked"}, "mlp: expected one of factor, size and groups"),
        ({"factor": 2, "size": 7}, "mlp: expected one of factor, size and groups"),
        ({"factor": 2, "way": 1}, rf"mlp: unknown key 'way'{HINT}factor, size, groups, grouping"),
        ({"factor": 2, "grouping": "x"}, "mlp: grouping 'x', expected stacked or adjacent"),
        ({"factor": 2, "grouping": None}, "mlp: grouping None, expected stacked or adjacent"),
        ({"factor": 0}, "mlp: factor is 0, expected 1 or more"),
        ({"factor": True}, "mlp: factor is True, expected 1 or more"),
        ({"factor": "2"}, "mlp: factor is '2', expected 1 or more"),
        ({"size": 0}, "mlp: size is 0, expected 1 or more"),
        ({"size": 7.0}, "mlp: size is 7.0, expected 1 or more"),
        ({"groups": 3}, "mlp: expected a list of groups"),
        ({"groups": []}, "mlp: expected a list of groups"),
    ],
    ids=itertools.count(),
)
def test_what_is_no_request_is_refused(value: object, expected: str) -> None:
    with pytest.raises(SchemeError, match=expected):
        requests.parse_request(value, "mlp")


@pytest.mark.parametrize("entry", [{"factor": 2}, {"size": 7}, {"groups": [[0]]}])
def test_only_a_factor_has_a_grouping_and_it_is_kept_or_refused(entry: dict[str, object]) -> None:
    try:
        found = requests.parse_request({**entry, "grouping": "adjacent"}, "mlp")
    except SchemeError:
        assert "factor" not in entry
        return
    assert found.grouping == "adjacent"


@pytest.mark.parametrize(
    ("group", "expected"),
    [
        (3, r"heads\[1\]: expected a list of numbers such as \[0, 6\], found 3"),
        ("01", r"heads\[1\]: expected a list of numbers such as \[0, 6\], found '01'"),
        ([], rf"heads\[1\]: an empty group{HINT}remove it, or give it a member"),
        ([-1], r"heads\[1\]: -1 is not an index, expected 0, 1, 2"),
        ([1.0], r"heads\[1\]: 1.0 is not an index"),
        ([True], r"heads\[1\]: True is not an index"),
        (["1"], r"heads\[1\]: '1' is not an index"),
        ([1_000_001], r"heads\[1\]: 1000001 is not an index"),
        ([4, 2, 4], rf"heads\[1\]: member 4 is listed twice{HINT}name each member once"),
        ({}, r"heads\[1\]: expected members and weights, found \[\]"),
        ({"members": [1]}, r"heads\[1\]: expected members and weights, found \['members'\]"),
        (
            {"members": [1], "weights": [1], "a": 1},
            r"heads\[1\]: expected members and weights, found \['a', 'members', 'weights'\]",
        ),
        ({"members": [], "weights": []}, r"heads\[1\]: an empty group"),
        ({"members": [1, 1], "weights": [1, 1]}, r"heads\[1\]: member 1 is listed twice"),
        ({"members": [1, 2], "weights": [1]}, r"heads\[1\]: expected 2 weights, found \[1\]"),
        ({"members": [1, 2], "weights": 1}, r"heads\[1\]: expected 2 weights, found 1"),
        (
            {"members": [1], "weights": ["1"]},
            r"heads\[1\]: '1' is not a weight, expected 0 or more",
        ),
        ({"members": [1], "weights": [True]}, r"heads\[1\]: True is not a weight"),
        ({"members": [1], "weights": [-0.5]}, r"heads\[1\]: -0.5 is not a weight"),
        ({"members": [1], "weights": [float("nan")]}, r"heads\[1\]: nan is not a weight"),
        ({"members": [1], "weights": [float("inf")]}, r"heads\[1\]: inf is not a weight"),
        ({"members": [1, 2], "weights": [0, 0]}, r"heads\[1\]: the weights add up to 0"),
    ],
    ids=itertools.count(),
)
def test_what_is_no_group_is_refused(group: object, expected: str) -> None:
    with pytest.raises(SchemeError, match=expected):
        requests.parse_groups([[0], group], "heads")


def test_a_table_in_the_place_of_members_is_refused() -> None:
    # Each level that is looked into twice would double the time: 30 levels are no joke.
    inner: object = [0]
    for _ in range(12):
        inner = {"members": inner, "weights": [1]}
    with pytest.raises(SchemeError, match=r"heads\[0\]"):
        requests.parse_groups([inner], "heads")


# Numbers that may be sizes.


@pytest.mark.parametrize(
    ("value", "grows", "expected"),
    [
        (
            12,
            True,
            (
                "--layers 12 can be read in two ways: 12 layers, or 12 times the 64 layers, which "
                "is 768\n  hint: give to:12 for 12 layers, x12 for 768"
            ),
        ),
        (
            "32",
            False,
            (
                "--layers 32 can be read in two ways: 32 layers, or 1/32 of the 64 layers, which "
                "is 2\n  hint: give to:32 for 32 layers, x32 for 2"
            ),
        ),
        (9, True, "9 layers, or 9 times the 64 layers, which is 576"),
        (8, True, None),
        ("8", False, None),
        ("x12", True, None),
        ("to:12", True, None),
        ({"factor": 12}, True, None),
        ([[0]], True, None),
    ],
)
def test_a_number_alone_is_a_factor_up_to_8_and_ambiguous_above(
    value: object, grows: bool, expected: str | None
) -> None:
    request = requests.parse_request(value, "--layers")
    with contextlib.ExitStack() as refused:
        if expected is not None:
            refused.enter_context(pytest.raises(SchemeError, match=re.escape(expected)))
        requests.check_bare(request, 64, "layers", grows=grows, size="to:")


# Groups from sizes.


@given(st.integers(1, 40), st.integers(1, 40))
def test_groups_made_from_sizes_hold_each_member_once_and_are_even(a: int, b: int) -> None:
    large, small = max(a, b), min(a, b)
    for groups in (requests.near_even(large, small), requests.cyclic(large, small)):
        assert len(groups) == small
        assert sorted(member for group in groups for member in group) == list(range(large))
        sizes = {len(group) for group in groups}
        assert max(sizes) - min(sizes) <= 1
    flat = [member for group in requests.near_even(large, small) for member in group]
    assert flat == sorted(flat)
    assert all(
        member % small == i for i, g in enumerate(requests.cyclic(large, small)) for member in g
    )


@given(st.integers(1, 40), st.integers(1, 40))
def test_whole_copies_leave_out_what_is_over(a: int, b: int) -> None:
    large, small = max(a, b), min(a, b)
    groups = requests.copies(large, small)
    times = large // small
    assert [len(group) for group in groups] == [times] * small
    assert sorted(member for group in groups for member in group) == list(range(times * small))


def test_a_member_that_the_large_model_lacks_is_refused() -> None:
    requests.check_members(PAIRS, 4, "heads")
    expected = r"heads\[1\]: 3 is out of range, the large model has 3 \(0 to 2\)"
    with pytest.raises(SchemeError, match=expected + HINT):
        requests.check_members(PAIRS, 3, "heads")


# Any value.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["factor", "size", "groups", "grouping", "members", "weights"]), inner
        )
    ),
    max_leaves=12,
)


@given(JSON)
def test_any_value_is_a_request_or_refused(value: object) -> None:
    for given_as in (value, json.dumps(value)):
        try:
            found = requests.parse_request(given_as, "mlp")
        except SchemeError:
            continue
        given_parts = [found.factor, found.size, found.groups]
        assert sum(part is not None for part in given_parts) == 1
        for weights in found.weights or ():
            assert sum(weights) == pytest.approx(1)


@given(st.text(max_size=20) | st.text(alphabet="[]{}=0123,: ", max_size=20))
def test_any_text_is_a_request_or_refused(text: str) -> None:
    with contextlib.suppress(SchemeError):
        requests.parse_request(text, "mlp")
