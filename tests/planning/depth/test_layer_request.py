"""Which layers a request names: Python's own slices, and the tables that papers print."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.errors import SchemeError
from streammap.planning.depth import layer_request

PUBLISHED: dict[str, tuple[dict[str, int], int, list[int]]] = {
    # Kim et al., arXiv:2312.15166: 32 to 48, 8 cut at the end of one copy, 8 at the other's start.
    "solar": ({}, 32, [*range(24), *range(8, 32)]),
    # Wu et al., arXiv:2401.02415: 32 to 40, eight groups of four, each with a copy of its last.
    "llama-pro": ({}, 32, [j for end in range(4, 33, 4) for j in (*range(end - 4, end), end - 1)]),
    # Du et al., arXiv:2405.15319: 6 layers four times are 24.
    "g_stack": ({"times": 4}, 6, [*range(6)] * 4),
    # Saunshi et al., arXiv:2409.19044: of three blocks the second; of two the first.
    "midas": ({}, 12, [*range(8), *range(4, 12)]),
    "MIDAS": ({}, 8, [*range(4), *range(8)]),
    # Kapl et al., arXiv:2512.08819: the four layers in the middle of eight.
    "lidas": ({"block": 4}, 8, [*range(6), *range(2, 8)]),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_published_layers(name: str) -> None:
    parameters, n, expected = PUBLISHED[name]
    request = layer_request.parse({"recipe": name, **parameters}, "layers")
    assert list(request.layers(n, "layers")) == expected
    assert layer_request.parse(request.as_json(), "layers") == request


def test_a_recipe_leaves_no_layer_out() -> None:
    request = layer_request.parse({"recipe": "llama_pro", "expand_every": 8}, "layers")
    assert list(request.layers(10, "layers")) == [*range(8), 7, 8, 9]


BOUND = st.none() | st.integers(-6, 6)


@given(BOUND, BOUND, st.none() | st.sampled_from([-2, -1, 1, 2, 3]))
def test_slices_are_those_of_python(start: int | None, end: int | None, step: int | None) -> None:
    text = ":".join("" if one is None else str(one) for one in (start, end, step))
    text = text.removesuffix(":") if step is None else text
    expected = list(range(6))[start:end:step]
    request = layer_request.parse(text, "layers")
    if not expected:
        with pytest.raises(SchemeError, match="has no layers"):
            request.layers(6, "layers")
        return
    assert list(request.layers(6, "layers")) == expected
    assert layer_request.parse([slice(start, end, step)], "layers").layers(6, "") == tuple(expected)
    dropped = layer_request.parse({"drop": text}, "layers")
    rest = [i for i in range(6) if i not in expected]
    if rest:
        assert list(dropped.layers(6, "layers")) == rest
    kept = layer_request.parse({"keep": text}, "layers")
    assert list(kept.layers(6, "layers")) == sorted(expected)
    for one in (request, dropped, kept):
        assert layer_request.parse(one.as_json(), "layers") == one


REFUSED: tuple[tuple[object, str], ...] = (
    ("0:40", r"0:40 reaches to 40: the source has 8 layers \(0 to 7, or -8 to -1\)"),
    ("0,8", "layer 8: the source has 8 layers"),
    ("4:4", "4:4 has no layers"),
    ("0:4:0", "a step of 0"),
    ("3", "can be read in two ways: layer 3 alone, or a factor"),
    ("0:4,x", "'x' is neither a layer nor a slice"),
    ("", "0 entries, expected 1 to"),
    ([[0, 4]], "neither a layer nor a slice"),
    ([True], "neither a layer nor a slice"),
    ({"drop": ":"}, "none of 8 layers is left"),
    ({"drop": "1", "keep": "2"}, "expected one of slices, drop, keep, recipe"),
    ({"recipe": "sola"}, "no recipe 'sola'"),
    ({"recipe": "solar", "times": 2}, "solar has no parameter 'times'"),
    ({"recipe": "solar", "trim": 4}, "trim is 4, expected 0 to 3, less than half of them"),
    ({"recipe": "solar", "trim": "8"}, "trim is '8', expected 0 to"),
    ({"recipe": "midas", "block": 3}, "block is 3, expected blocks of one size: 1, 2, 4, 8"),
    ({"recipe": "lidas", "block": 9}, "block is 9, expected 1 to 8"),
    ({"recipe": "llama-pro", "expand_every": 9}, "expand_every is 9, expected 1 to 8"),
    ({"recipe": "g_stack", "times": 10_000}, "more than 10000 layers"),
    (",".join(["0:8"] * 2000), "more than 10000 layers"),
)


@pytest.mark.parametrize(("value", "match"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_is_refused_says_what_was_expected(value: object, match: str) -> None:
    with pytest.raises(SchemeError, match=match) as refusal:
        layer_request.parse(value, "layers").layers(8, "layers")
    assert str(refusal.value).startswith("layers")
    assert refusal.value.hint
