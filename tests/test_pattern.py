"""Key patterns and dimension expressions."""

import contextlib
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap import pattern
from streammap.errors import ArchitectureError
from streammap.pattern import Call, Expression, Name, Number, Operation

VARS = {"base": ["bert.", ""], "L": ["{base}layer.{i}."]}


def _match(
    text: str, key: str, variables: Mapping[str, Sequence[str]] = VARS
) -> dict[str, int] | None:
    return pattern.compile_pattern(text, variables).match(key)


def _value(text: str, **sizes: int) -> int:
    def call(function: str, arguments: tuple[str, ...]) -> int:
        return len(function) + 100 * len(arguments)

    return pattern.evaluate(pattern.parse_expression(text), sizes.__getitem__, call)


# Key patterns.


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
    compiled = pattern.compile_pattern("{n:query|key.a|v*}.weight", {})
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


def test_variables_share_their_index() -> None:
    variables = {"base": ["vit.", ""], "L": ["{base}encoder.layer.{i}.", "{base}layers.{i}."]}
    compiled = pattern.compile_pattern("{L}x", variables)
    assert compiled.indices == ("i",)
    for before in ("vit.encoder.layer.", "encoder.layer.", "vit.layers.", "layers."):
        assert compiled.match(f"{before}4.x") == {"i": 4}
    assert compiled.match("vit.4.x") is None


def test_a_star_is_anything() -> None:
    assert _match("a.*.b", "a.x.y.b") == {}
    assert _match("a.*", "a.") == {}
    assert _match("*", "") == {}
    assert _match("{i}*", "3x") == {"i": 3}
    assert _match("a.*", "b.x") is None


@pytest.mark.parametrize(
    "text", ["{a", "a}", "a{", "}{", "{{a}}", "{a{b}}", "{base}{i", "{i}}", "{"]
)
def test_unbalanced_braces_are_refused(text: str) -> None:
    with pytest.raises(ArchitectureError, match="unbalanced braces"):
        pattern.compile_pattern(text, VARS)


@pytest.mark.parametrize("text", ["{}", "{1}", "{a b}", "{a|b}", "{a-b}", "x.{*}"])
def test_names_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ArchitectureError, match=r"not a name|unbalanced"):
        pattern.compile_pattern(text, VARS)


def test_variables_without_an_end_are_refused() -> None:
    with pytest.raises(ArchitectureError, match="expand without an end"):
        pattern.compile_pattern("{a}", {"a": ["x{a}"]})
    with pytest.raises(ArchitectureError, match="expand without an end"):
        pattern.compile_pattern("{a}", {"a": ["{b}"], "b": ["{a}"]})
    with pytest.raises(ArchitectureError, match="expand without an end"):
        pattern.compile_pattern("x" * 5000, {})


@pytest.mark.parametrize(
    ("alternatives", "expected"),
    [
        (["a.{i}", "b"], "alternatives with different indices"),
        (["a.{i}", "b.{j}"], "alternatives with different indices"),
        (["a.{i}.{j}", "b.{i}.{j}"], "several alternatives with several indices"),
        (["a.{i}.x", "b.{i}.y"], "alternatives must end alike"),
    ],
)
def test_variables_whose_indices_differ_are_refused(alternatives: list[str], expected: str) -> None:
    with pytest.raises(ArchitectureError, match=expected):
        pattern.compile_pattern("{v}", {"v": alternatives})


@pytest.mark.parametrize("text", ["{L}{L}", "{i}.{L}"])
def test_an_index_in_two_variables_is_one_or_refused(text: str) -> None:
    try:
        compiled = pattern.compile_pattern(text, VARS)
    except ArchitectureError:
        return
    assert compiled.match("2.layer.3." if text.startswith("{i}") else "layer.2.layer.3.") is None


@given(st.text(alphabet="ab{}:|*.0\\[(", max_size=20))
def test_any_text_compiles_or_is_refused(text: str) -> None:
    with contextlib.suppress(ArchitectureError):
        pattern.compile_pattern(text, {"a": ["x.{b}.", "y"], "b": ["{ab}"]})


# Expressions.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("q", 5),
        ("3*q", 15),
        ("q+2*kv", 11),
        ("2*kv+q", 11),
        ("(q+2)*kv", 21),
        ("q-kv-1", 1),
        ("q-(kv-1)", 3),
        ("12/kv/2", 2),
        ("12/(kv*2)", 2),
        ("2*q/5*kv", 6),
        ("  q  +\tkv ", 8),
        ("((q))", 5),
        ("f(a, b)", 201),
        ("2*gg(x.0.*)+q", 209),
        ("1-2", -1),
    ],
)
def test_expressions_have_the_usual_precedence(text: str, value: int) -> None:
    assert _value(text, q=5, kv=3) == value


def test_a_product_keeps_its_order() -> None:
    heads, three, dim = Name("heads"), Number(3), Name("head_dim")
    ordered = Operation("*", Operation("*", heads, three), dim)
    assert pattern.parse_expression("heads*3*head_dim") == ordered
    other = Operation("*", Operation("*", three, heads), dim)
    assert pattern.parse_expression("3*heads*head_dim") == other
    assert ordered != other


def test_a_sum_keeps_its_order() -> None:
    q, kv = Name("q"), Operation("*", Number(2), Name("kv"))
    assert pattern.parse_expression("q+2*kv") == Operation("+", q, kv)
    assert pattern.parse_expression("2*kv+q") == Operation("+", kv, q)


def test_a_call_keeps_its_arguments_as_written() -> None:
    call = Call("shape", ("patch_embed.proj.weight", "0"))
    assert pattern.parse_expression("shape(patch_embed.proj.weight, 0)") == call
    assert pattern.parse_expression("count(blocks.{layer}.x)") == Call(
        "count", ("blocks.{layer}.x",)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a name or number is missing"),
        ("  ", "a name or number is missing"),
        ("a+", "a name or number is missing"),
        ("*a", "a name or number is missing"),
        ("a**b", "a name or number is missing"),
        ("a*-b", "a name or number is missing"),
        ("()", "a name or number is missing"),
        ("(a", "a bracket is not closed"),
        ("(a*(b+c)", "a bracket is not closed"),
        ("a)", r"'\)' is out of place"),
        ("a b", "'b' is out of place"),
        ("2a", "'a' is out of place"),
        ("f(a", r"'\(' is out of place"),
        ("a.b", r"can't read '\.b'"),
        ("a%b", "can't read '%b'"),
        ("a==b", "can't read '==b'"),
        ("1.5", r"can't read '\.5'"),
        ("a" * 401, "401 characters, at most 400"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ArchitectureError, match=expected):
        pattern.parse_expression(text)


@pytest.mark.parametrize("text", ["(" * 399, "(" * 199 + "a" + ")" * 199])
def test_brackets_of_any_depth_are_read_or_refused(text: str) -> None:
    with contextlib.suppress(ArchitectureError):
        pattern.parse_expression(text)


@pytest.mark.parametrize(("a", "b"), [(7, 2), (1, 2), (5, 0), (0, 0)])
def test_a_division_with_a_rest_is_refused(a: int, b: int) -> None:
    with pytest.raises(ArchitectureError, match=f"{a} does not divide by {b}"):
        _value("a/b", a=a, b=b)


def _text(tree: Expression) -> str:
    match tree:
        case Number(value):
            return str(value)
        case Name(name):
            return name
        case Operation(operator, left, right):
            return f"({_text(left)}{operator}{_text(right)})"
        case Call(function, arguments):
            return f"{function}({', '.join(arguments)})"


LEAVES = st.integers(0, 99).map(Number) | st.sampled_from(["q", "kv", "head_dim"]).map(Name)
TREES: st.SearchStrategy[Expression] = st.recursive(
    LEAVES,
    lambda inner: st.builds(Operation, st.sampled_from("+-*/"), inner, inner),
    max_leaves=8,
)


@given(TREES)
def test_a_written_expression_parses_to_itself(tree: Expression) -> None:
    assert pattern.parse_expression(_text(tree)) == tree


@given(st.text(alphabet="ab12+-*/() .,", max_size=30) | st.text(max_size=20))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(ArchitectureError):
        pattern.parse_expression(text)
