"""Dimension and size expressions."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.architectures import expression
from streammap.architectures.expression import (
    Expression,
    FunctionCall,
    InexactDivisionError,
    Name,
    Number,
    Operation,
)
from streammap.errors import ArchitectureError


def _value(text: str, **sizes: int) -> int:
    def call(function: str, arguments: tuple[str, ...]) -> int:
        return len(function) + 100 * len(arguments)

    return expression.evaluate(expression.parse_expression(text), sizes.__getitem__, call)


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
    assert expression.parse_expression("heads*3*head_dim") == ordered
    other = Operation("*", Operation("*", three, heads), dim)
    assert expression.parse_expression("3*heads*head_dim") == other
    assert ordered != other


def test_a_sum_keeps_its_order() -> None:
    q, kv = Name("q"), Operation("*", Number(2), Name("kv"))
    assert expression.parse_expression("q+2*kv") == Operation("+", q, kv)
    assert expression.parse_expression("2*kv+q") == Operation("+", kv, q)


def test_a_call_keeps_its_arguments_as_written() -> None:
    call = FunctionCall("shape", ("patch_embed.proj.weight", "0"))
    assert expression.parse_expression("shape(patch_embed.proj.weight, 0)") == call
    assert expression.parse_expression("count(blocks.{layer}.x)") == FunctionCall(
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
        (".b", r"can't read '\.b'"),
        ("a%b", "can't read '%b'"),
        ("a==b", "can't read '==b'"),
        ("1.5", r"can't read '\.5'"),
        ("a" * 401, "401 characters, at most 400"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ArchitectureError, match=expected):
        expression.parse_expression(text)


@pytest.mark.parametrize("text", ["(" * 399, "(" * 199 + "a" + ")" * 199])
def test_brackets_of_any_depth_are_read_or_refused(text: str) -> None:
    with contextlib.suppress(ArchitectureError):
        expression.parse_expression(text)


@pytest.mark.parametrize(("a", "b"), [(7, 2), (1, 2), (5, 0), (0, 0)])
def test_a_division_with_a_rest_is_refused(a: int, b: int) -> None:
    with pytest.raises(InexactDivisionError, match=f"{a} does not divide by {b}"):
        _value("a/b", a=a, b=b)


def _text(tree: Expression) -> str:
    match tree:
        case Number(value):
            return str(value)
        case Name(name):
            return name
        case Operation(operator, left, right):
            return f"({_text(left)}{operator}{_text(right)})"
        case FunctionCall(function, arguments):
            return f"{function}({', '.join(arguments)})"


LEAVES = st.integers(0, 99).map(Number) | st.sampled_from(["q", "kv", "head_dim"]).map(Name)
TREES: st.SearchStrategy[Expression] = st.recursive(
    LEAVES,
    lambda inner: st.builds(Operation, st.sampled_from("+-*/"), inner, inner),
    max_leaves=8,
)


@given(TREES)
def test_a_written_expression_parses_to_itself(tree: Expression) -> None:
    assert expression.parse_expression(_text(tree)) == tree


@given(st.text(alphabet="ab12+-*/() .,", max_size=30) | st.text(max_size=20))
def test_any_text_parses_or_is_refused(text: str) -> None:
    with contextlib.suppress(ArchitectureError):
        expression.parse_expression(text)


# Names.


def test_a_name_may_be_dotted() -> None:
    assert expression.parse_expression("text.embed") == Name("text.embed")
    assert expression.parse_expression("2*text.embed") == Operation(
        "*", Number(2), Name("text.embed")
    )


def test_the_names_of_an_expression_stand_in_order() -> None:
    tree = expression.parse_expression("q+2*kv-shape(x.weight, 0)/swiglu8(embed, ratio)")
    assert list(expression.names(tree)) == ["q", "kv", "embed", "ratio"]


def test_names_are_scoped_and_renamed() -> None:
    tree = expression.parse_expression("embed*2+shape(x.0.weight, 0)-swiglu8(embed, ratio)")
    found = expression.scoped(tree, "text.", {"text.embed": "vision.out"})
    inner = Operation(
        "+",
        Operation("*", Name("vision.out"), Number(2)),
        FunctionCall("shape", ("x.0.weight", "0")),
    )
    assert found == Operation("-", inner, FunctionCall("swiglu8", ("vision.out", "text.ratio")))
    assert expression.scoped(tree, "", {}) == tree


@given(TREES)
def test_an_expression_in_a_scope_has_its_names_there(tree: Expression) -> None:
    found = expression.scoped(tree, "a.", {})
    assert list(expression.names(found)) == [f"a.{name}" for name in expression.names(tree)]
