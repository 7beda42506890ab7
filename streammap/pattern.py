"""The small languages of an architecture spec.

Key patterns     "{L}attention.{p:query|key}.weight", where
    {name}       one of the alternatives of the spec's [vars], or an index when it has none
    {name:a|b}   one of the alternatives a, b
    *            anything

Expressions      "3*q", "q+2*kv", "heads*3*head_dim", "kv_heads*(q_group+2)*head_dim"
    A product is ordered, slowest first; a sum is a concatenation: together they say how a
    dimension is laid out in storage. `evaluate` also takes "-", "/" and function calls, for sizes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from streammap.errors import ArchitectureError

INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a key that is a number: a layer, an expert."""
_MAX_ALTERNATIVES = 4096
_MAX_BRACKETS = 32


@dataclass(frozen=True, slots=True)
class KeyPattern:
    """A compiled key pattern."""

    text: str
    """As the spec has it."""
    regex: re.Pattern[str]
    """Named groups are the indices."""
    indices: tuple[str, ...]

    def match(self, key: str) -> dict[str, int] | None:
        """The index values in `key`, or None where the pattern doesn't fit."""
        found = self.regex.fullmatch(key)
        if found is None:
            return None
        return {name: int(found[name]) for name in self.indices}


def compile_pattern(text: str, variables: Mapping[str, Sequence[str]]) -> KeyPattern:
    """Compile one key pattern; `variables` are the alternatives of [vars].

    Raises:
        ArchitectureError: unbalanced braces, or variables that expand without an end.
    """
    indices: list[str] = []
    regex = _regex(text, variables, indices, depth=0)
    return KeyPattern(text, re.compile(regex), tuple(indices))


def _regex(
    text: str, variables: Mapping[str, Sequence[str]], indices: list[str], *, depth: int
) -> str:
    if depth > 8 or len(text) > _MAX_ALTERNATIVES:
        raise ArchitectureError(f"pattern {text[:80]!r}: [vars] expand without an end")
    parts: list[str] = []
    for piece in re.split(r"(\{[^{}]*\}|\*)", text):
        if piece == "*":
            parts.append(".*")
        elif piece.startswith("{") and piece.endswith("}"):
            parts.append(_braces(piece[1:-1], variables, indices, depth=depth))
        elif "{" in piece or "}" in piece:
            raise ArchitectureError(f"pattern {text!r}: unbalanced braces")
        else:
            parts.append(re.escape(piece))
    return "".join(parts)


def _braces(
    inside: str, variables: Mapping[str, Sequence[str]], indices: list[str], *, depth: int
) -> str:
    name, colon, choices = inside.partition(":")
    if colon:
        return f"(?:{'|'.join(re.escape(choice) for choice in choices.split('|'))})"
    if name in variables:
        # Every alternative holds the same indices; count them once.
        expanded: list[str] = []
        found: list[str] = []
        for position, alternative in enumerate(variables[name]):
            own: list[str] = []
            regex = _regex(alternative, variables, own, depth=depth + 1)
            if position == 0:
                found = own
            elif own != found:
                raise ArchitectureError(f"[vars] {name}: alternatives with different indices")
            expanded.append(regex)
        if set(found) & set(indices):
            raise ArchitectureError(f"pattern {{{name}}}: its index stands in the pattern already")
        indices.extend(found)
        if not found:
            return f"(?:{'|'.join(expanded)})"
        if len(expanded) > 1:
            # Two groups of one name are not allowed in a regex: share the index.
            return _shared_index(name, expanded, found)
        return expanded[0]
    if name in indices:
        return f"(?P={name})"
    if not name.isidentifier():
        raise ArchitectureError(f"pattern {{{inside}}}: not a name")
    indices.append(name)
    return f"(?P<{name}>0|[1-9][0-9]{{0,8}})"


def _shared_index(name: str, expanded: Sequence[str], found: Sequence[str]) -> str:
    if len(found) != 1:
        raise ArchitectureError(f"[vars] {name}: several alternatives with several indices")
    group = f"(?P<{found[0]}>0|[1-9][0-9]{{0,8}})"
    sides = [regex.split(group) for regex in expanded]
    if any(len(side) != 2 for side in sides):
        raise ArchitectureError(f"[vars] {name}: an index that stands twice")
    tails = {side[1] for side in sides}
    if len(tails) != 1:
        raise ArchitectureError(f"[vars] {name}: alternatives must end alike after the index")
    return f"(?:{'|'.join(side[0] for side in sides)}){group}{tails.pop()}"


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
class Call:
    """A function of the evaluator's, with its arguments as they were written."""

    function: str
    arguments: tuple[str, ...]


Expression = Name | Number | Operation | Call

_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_]\w*)(\([^()]*\))?|([-+*/()]))")


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
        found = _TOKEN.match(stripped, position)
        if found is None:
            raise ArchitectureError(f"expression {text!r}: can't read {stripped[position:]!r}")
        tokens.append(found[0].strip())
        position = found.end()
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
    if token.isdigit():
        return Number(int(token)), at + 1
    name, bracket, arguments = token.partition("(")
    if bracket:
        return Call(name, tuple(part.strip() for part in arguments[:-1].split(","))), at + 1
    return Name(name), at + 1


class InexactDivisionError(ArchitectureError):
    """A size that would be no whole number; whose it is, the caller says."""


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
        case Call(function, arguments):
            return call(function, arguments)
        case Operation(operator, left, right):
            a, b = evaluate(left, value_of, call), evaluate(right, value_of, call)
            if operator == "+":
                return a + b
            if operator == "-":
                return a - b
            if operator == "*":
                return a * b
            if b == 0 or a % b:
                raise InexactDivisionError(f"{a} does not divide by {b}")
            return a // b
