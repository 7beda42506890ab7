"""Expressions: the sizes and the storage layout of a dimension.

"3*q", "q+2*kv", "heads*3*head_dim", "kv_heads*(q_group+2)*head_dim": a product is ordered, slowest
first; a sum is a concatenation. `evaluate` also takes "-", "/" and function calls, for sizes. A
name may be dotted: "text.embed" is the axis embed of the part that is included as text.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from streammap.errors import ArchitectureError

_MAX_BRACKETS = 32
_MAX_VALUE = 2**63 - 1
"""No tensor has more elements."""


@dataclass(frozen=True, slots=True)
class Name:
    """An axis or alias by name."""

    name: str


@dataclass(frozen=True, slots=True)
class Number:
    """A literal."""

    value: int


@dataclass(frozen=True, slots=True)
class Operation:
    """Two expressions under one operator."""

    operator: Literal["+", "-", "*", "/"]
    left: "Expression"
    right: "Expression"


@dataclass(frozen=True, slots=True)
class FunctionCall:
    """A function of the evaluator's, with its arguments as they were written."""

    function: str
    arguments: tuple[str, ...]


Expression = Name | Number | Operation | FunctionCall

MEASURES = ("shape", "count", "entries")
"""Functions whose arguments are keys."""
_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.]*)(\([^()]*\))?|([-+*/()]))")


def parse_expression(text: str) -> Expression:
    """Parse a dimension or size expression.

    Raises:
        ArchitectureError: anything that is not one.
    """
    tokens = _tokens(text)
    tree, rest = _sum(tokens, 0, text)
    if rest != len(tokens):
        raise ArchitectureError(f"expression {text!r}: {tokens[rest]!r} is out of place")
    return tree


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position = 0
    stripped = text.rstrip()
    if len(stripped) > 400:
        raise ArchitectureError(f"expression of {len(stripped)} characters, at most 400")
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if match is None:
            raise ArchitectureError(f"expression {text!r}: can't read {stripped[position:]!r}")
        tokens.append(match[0].strip())
        position = match.end()
    if tokens.count("(") > _MAX_BRACKETS:
        raise ArchitectureError(f"expression {text[:40]!r}: more than {_MAX_BRACKETS} brackets")
    return tokens


def _sum(tokens: Sequence[str], at: int, text: str) -> tuple[Expression, int]:
    tree, at = _product(tokens, at, text)
    while at < len(tokens) and tokens[at] in "+-":
        operator = tokens[at]
        right, at = _product(tokens, at + 1, text)
        tree = Operation("+" if operator == "+" else "-", tree, right)
    return tree, at


def _product(tokens: Sequence[str], at: int, text: str) -> tuple[Expression, int]:
    tree, at = _atom(tokens, at, text)
    while at < len(tokens) and tokens[at] in "*/":
        operator = tokens[at]
        right, at = _atom(tokens, at + 1, text)
        tree = Operation("*" if operator == "*" else "/", tree, right)
    return tree, at


def _atom(tokens: Sequence[str], at: int, text: str) -> tuple[Expression, int]:
    if at >= len(tokens) or tokens[at] in "+-*/)":
        raise ArchitectureError(f"expression {text!r}: a name or number is missing")
    token = tokens[at]
    if token == "(":
        tree, at = _sum(tokens, at + 1, text)
        if at >= len(tokens) or tokens[at] != ")":
            raise ArchitectureError(f"expression {text!r}: a bracket is not closed")
        return tree, at + 1
    if token.isdecimal():
        if int(token) > _MAX_VALUE:
            raise ArchitectureError(f"expression {text!r}: a number of more than {_MAX_VALUE}")
        return Number(int(token)), at + 1
    name, bracket, arguments = token.partition("(")
    if bracket:
        return FunctionCall(name, tuple(part.strip() for part in arguments[:-1].split(","))), at + 1
    return Name(name), at + 1


class InexactDivisionError(ArchitectureError):
    """A size that would not be a whole number; the caller adds which one."""


def evaluate(
    tree: Expression,
    value_of: Callable[[str], int],
    call: Callable[[str, tuple[str, ...]], int],
) -> int:
    """The whole number that `tree` stands for.

    Raises:
        ArchitectureError: a division that leaves a rest.
    """
    match tree:
        case Number(value):
            return value
        case Name(name):
            return value_of(name)
        case FunctionCall(function, arguments):
            return call(function, arguments)
        case Operation(operator, left, right):
            a, b = evaluate(left, value_of, call), evaluate(right, value_of, call)
            if operator == "+":
                return _bounded(a + b)
            if operator == "-":
                return a - b
            if operator == "*":
                return _bounded(a * b)
            if b == 0 or a % b:
                raise InexactDivisionError(f"{a} does not divide by {b}")
            return a // b


def _bounded(value: int) -> int:
    if value > _MAX_VALUE:
        raise InexactDivisionError(f"a size of more than {_MAX_VALUE}")
    return value


def names(tree: Expression) -> Iterator[str]:
    """Each axis or alias that stands in `tree`, in order."""
    match tree:
        case Name(name):
            yield name
        case Operation(_, left, right):
            yield from names(left)
            yield from names(right)
        case FunctionCall(function, arguments) if function not in MEASURES:
            yield from (part for part in arguments if part.isidentifier())
        case _:
            pass


def is_measured(expression: Expression) -> bool:
    """Whether it reads shapes, or the entries of a list: resized ones give the new size."""
    match expression:
        case Operation(_, left, right):
            return is_measured(left) or is_measured(right)
        case FunctionCall(function):
            return function in MEASURES
        case _:
            return False


def scoped(tree: Expression, scope: str, same: Mapping[str, str]) -> Expression:
    """`tree` with each name inside `scope` ("text." before it), or as `same` renames it."""
    match tree:
        case Name(name):
            return Name(same.get(scope + name, scope + name))
        case Operation(operator, left, right):
            return Operation(operator, scoped(left, scope, same), scoped(right, scope, same))
        case FunctionCall(function, arguments) if function not in MEASURES:
            return FunctionCall(function, tuple(same.get(scope + a, scope + a) for a in arguments))
        case _:
            return tree
