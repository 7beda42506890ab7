"""Key patterns."""

import contextlib
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.architectures import key_pattern
from streammap.architectures.expression import Name, Number, Operation
from streammap.errors import ArchitectureError

VARS = {"base": ["bert.", ""], "L": ["{base}layer.{i}."]}


def _match(
    text: str, key: str, variables: Mapping[str, Sequence[str]] = VARS
) -> dict[str, int] | None:
    return key_pattern.first_match(key_pattern.compile_patterns(text, variables), key)


def test_text_matches_itself_and_nothing_else() -> None:
    assert _match("a.b+c[0]$", "a.b+c[0]$") == {}
    for key in ("axb+c[0]$", "a.b+c[0]", "xa.b+c[0]$", "a.bbc[0]$", "a.b+c[0]$\n"):
        assert _match("a.b+c[0]$", key) is None


def test_a_name_is_an_index() -> None:
    assert _match("h.{layer}.ln", "h.12.ln") == {"layer": 12}
    assert _match("h.{layer}.ln", "h.0.ln") == {"layer": 0}
    assert _match("{l}.e.{expert}", "3.e.40") == {"l": 3, "expert": 40}


@pytest.mark.parametrize("index", ["", "01", "-1", "+1", "1.0", "x", " 1", "1 ", "٣", "1" * 11])
def test_only_plain_numbers_are_indices(index: str) -> None:
    assert _match("h.{layer}.ln", f"h.{index}.ln") is None


def test_an_index_that_stands_twice_is_one() -> None:
    assert _match("{i}.{i}", "7.7") == {"i": 7}
    assert _match("{i}.{i}", "7.8") is None
    assert _match("{L}x.{i}", "layer.2.x.2") == {"i": 2}
    assert _match("{L}x.{i}", "layer.2.x.3") is None


def test_alternatives_are_text() -> None:
    (compiled,) = key_pattern.compile_patterns("{n:query|key.a|v*}.weight", {})
    assert compiled.indices == ()
    assert compiled.text == "{n:query|key.a|v*}.weight"
    for name in ("query", "key.a", "v*"):
        assert compiled.match(f"{name}.weight") == {}
    for name in ("", "keyxa", "value", "query|key.a"):
        assert compiled.match(f"{name}.weight") is None


def test_an_alternative_may_be_empty() -> None:
    assert _match("{p:model.|}x", "model.x") == {}
    assert _match("{p:model.|}x", "x") == {}


def test_variables_are_alternatives_and_nest() -> None:
    for base in ("bert.", ""):
        assert _match("{base}pooler", f"{base}pooler") == {}
        assert _match("{L}dense", f"{base}layer.5.dense") == {"i": 5}
    assert _match("{L}dense", "gpt.layer.5.dense") is None


def test_a_variable_whose_alternatives_hold_indices_makes_several_patterns() -> None:
    variables = {"base": ["vit.", ""], "L": ["{base}encoder.layer.{i}.", "{base}layers.{i}."]}
    compiled = key_pattern.compile_patterns("{L}x", variables)
    assert [(one.text, one.indices) for one in compiled] == [("{L}x", ("i",))] * 2
    for before in ("vit.encoder.layer.", "encoder.layer.", "vit.layers.", "layers."):
        assert key_pattern.first_match(compiled, f"{before}4.x") == {"i": 4}
    assert key_pattern.first_match(compiled, "vit.4.x") is None


@pytest.mark.parametrize(
    ("alternatives", "keys"),
    [
        (["a.{i}", "b"], {"a.3.": {"i": 3}, "b.": {}}),
        (["a.{i}", "b.{j}"], {"a.3.": {"i": 3}, "b.4.": {"j": 4}}),
        (["a.{i}.{j}", "b.{j}"], {"a.3.5.": {"i": 3, "j": 5}, "b.4.": {"j": 4}}),
        (["a.{i}.x", "b.{i}.y"], {"a.3.x.": {"i": 3}, "b.4.y.": {"i": 4}}),
        (["{w}", "c.{i}"], {"a.3.": {"i": 3}, "b.": {}, "c.4.": {"i": 4}}),
    ],
)
def test_alternatives_may_have_different_indices_and_tails(
    alternatives: list[str], keys: Mapping[str, Mapping[str, int]]
) -> None:
    variables = {"v": alternatives, "w": ["a.{i}", "b"]}
    for key, values in keys.items():
        assert _match("{v}.", key, variables) == values
    compiled = key_pattern.compile_patterns("{v}.", variables)
    assert sum(one.match(key) is not None for one in compiled for key in keys) == len(keys)
    for key in ("a.", "a.3.b.", "b.x.", "a.3.x.y."):
        assert _match("{v}.", key, variables) is None


def test_an_index_in_a_variable_and_behind_it_is_one() -> None:
    variables = {"v": ["a.{i}.", "b.{j}."]}
    assert _match("{v}x.{i}", "a.2.x.2", variables) == {"i": 2}
    assert _match("{v}x.{i}", "a.2.x.3", variables) is None
    assert _match("{v}x.{i}", "b.2.x.3", variables) == {"j": 2, "i": 3}


def test_an_index_may_have_a_size_of_its_own() -> None:
    (compiled,) = key_pattern.compile_patterns("norms.{head@kv_heads*2}.{layer}.weight", {})
    assert compiled.match("norms.3.1.weight") == {"head": 3, "layer": 1}
    assert compiled.counts == {"head": Operation("*", Name("kv_heads"), Number(2))}
    assert compiled.last == ()


def test_the_size_of_an_index_may_stand_in_a_variable() -> None:
    variables = {"v": ["a.{head@n+1}.", "b."]}
    one, two = key_pattern.compile_patterns("{v}x", variables)
    assert (list(one.counts), list(two.counts)) == (["head"], [])


@pytest.mark.parametrize("text", ["{head@}", "{head@2*}", "{head@a b}", "{head@(a}"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ArchitectureError, match="expression"):
        key_pattern.compile_patterns(text, {})


def test_an_index_may_be_the_last_only() -> None:
    (compiled,) = key_pattern.compile_patterns("h.{layer=last}.ln.{i}", {})
    assert compiled.last == ("layer",)
    assert compiled.indices == ("layer", "i")
    # Which one is the last, the caller knows.
    assert compiled.match("h.3.ln.1") == {"layer": 3, "i": 1}


@pytest.mark.parametrize("text", ["{x=first}", "{x=}", "{x=last=last}", "{=last}", "{x=3}"])
def test_an_index_that_is_something_else_than_last_is_refused(text: str) -> None:
    with pytest.raises(ArchitectureError, match="not a name"):
        key_pattern.compile_patterns(text, {})


def test_indices_have_a_scope() -> None:
    variables = {"L": ["h.{layer}."]}
    (compiled,) = key_pattern.compile_patterns("{L}e.{expert@n}.{i=last}", variables, scope="text.")
    assert compiled.indices == ("text.layer", "text.expert", "text.i")
    assert list(compiled.counts) == ["text.expert"]
    assert compiled.last == ("text.i",)
    assert compiled.match("h.1.e.2.3") == {"text.layer": 1, "text.expert": 2, "text.i": 3}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("h.{layer}.x", "h.0.x"),
        ("{L}dense", "bert.layer.0.dense"),
        ("{p:query|key}.weight", "query.weight"),
        ("e.{i}.{i}", "e.0.0"),
        ("{base}a+b", "bert.a+b"),
    ],
)
def test_a_sample_is_a_key_that_fits(text: str, key: str) -> None:
    (compiled,) = key_pattern.compile_patterns(text, VARS)
    assert key_pattern.sample(compiled) == key
    assert compiled.match(key) is not None


def test_a_star_is_anything() -> None:
    assert _match("a.*.b", "a.x.y.b") == {}
    assert _match("a.*", "a.") == {}
    assert _match("*", "") == {}
    assert _match("{i}*", "3x") == {"i": 3}
    assert _match("a.*", "b.x") is None


@pytest.mark.parametrize(
    "text",
    [
        "{a",
        "{ab",
        "{a:b|c",
        "{base}{layer",
        "a}",
        "a{",
        "}{",
        "{{a}}",
        "{a{b}}",
        "{base}{i",
        "{i}}",
        "{",
    ],
)
def test_unbalanced_braces_are_refused(text: str) -> None:
    with pytest.raises(ArchitectureError, match="unbalanced braces"):
        key_pattern.compile_patterns(text, VARS)


@pytest.mark.parametrize("text", ["{}", "{1}", "{a b}", "{a|b}", "{a-b}", "x.{*}"])
def test_names_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ArchitectureError, match=r"not a name|unbalanced"):
        key_pattern.compile_patterns(text, VARS)


def test_variables_without_an_end_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="expand without an end"):
        key_pattern.compile_patterns("{a}", {"a": ["x{a}"]})
    with pytest.raises(ArchitectureError, match="expand without an end"):
        key_pattern.compile_patterns("{a}", {"a": ["{b}"], "b": ["{a}"]})
    with pytest.raises(ArchitectureError, match="expand without an end"):
        key_pattern.compile_patterns("x" * 5000, {})


def test_too_many_patterns_of_one_text_are_refused() -> None:
    variables = {"v": ["a.{i}.", "b.{i}."]}
    assert len(key_pattern.compile_patterns("{v}" * 8, variables)) == 256
    with pytest.raises(ArchitectureError, match="expand without an end"):
        key_pattern.compile_patterns("{v}" * 9, variables)


@pytest.mark.parametrize("text", ["{L}{L}", "{i}.{L}"])
def test_an_index_in_two_variables_is_one(text: str) -> None:
    key = "2.layer." if text.startswith("{i}") else "layer.2.layer."
    assert _match(text, f"{key}2.") == {"i": 2}
    assert _match(text, f"{key}3.") is None


@pytest.mark.parametrize("text", ["{p}3.w", "m.3.w", "{p:m.}3.w"])
def test_a_number_of_the_text_may_be_any_in_the_loose_form(text: str) -> None:
    (pattern,) = key_pattern.compile_patterns(text, {"p": ["m.", "n.m."]})
    assert pattern.match("m.3.w") == {}
    assert pattern.match("m.0.w") is None
    assert pattern.loose.fullmatch("m.0.w")


@given(st.text(alphabet="ab{}:|*.0\\[(@=", max_size=20))
def test_any_text_compiles_or_is_refused(text: str) -> None:
    with contextlib.suppress(ArchitectureError):
        key_pattern.compile_patterns(text, {"a": ["x.{b}.", "y"], "b": ["{ab}"]})
