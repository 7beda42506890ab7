"""Key patterns: "{L}attention.{p:query|key}.weight".

    {name}       one of the spellings that the spec's [vars] list, or an index when it has none
    {name:a|b}   one of the names a, b, which are different tensors
    {name@size}  an index that counts to the expression `size`
    {name=last}  an index, only where it is the last
    *            anything

A variable whose alternatives hold indices makes several patterns of one text.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property

from streammap.architectures.expression import Expression, parse_expression
from streammap.errors import ArchitectureError

INDEX = re.compile(r"(?<![^.])\d+(?![^.])")
"""A part of a key that is a number: a layer, an expert."""
_PIECE = re.compile(r"(\{[^{}]*\}|\*)")
_LITERAL = re.compile(r"(?<=[.|:()])\d+(?=[\\|)]|$)")
_NUMBER = "0|[1-9][0-9]{0,8}"
_MAX_LENGTH = 4096
_MAX_PATTERNS = 256
_MAX_EXPANSIONS = 2_000
_MAX_NESTED = 8
_MAX_REGEX = 50_000
_MAX_WAYS = 10_000_000
"""Of matching one key: a regular expression may try them all."""
_STAR_WAYS = 1000
_INDEX_WAYS = 9
Identity = tuple[str, str, tuple[str, ...], tuple[str, ...]]
"""Scope and text of a pattern, its indices, and which of the names in its braces a key has."""


@dataclass(frozen=True, eq=False)
class KeyPattern:
    """A key pattern; its regular expressions are compiled when they are first asked for."""

    text: str
    """As the spec has it."""
    written: str
    """As a regular expression."""
    indices: tuple[str, ...]
    """Names of the indices, in the order of the regex' groups; dotted inside an included spec."""
    counts: Mapping[str, Expression]
    """Index -> how many there are, for those that are not an axis."""
    last: tuple[str, ...]
    """Indices of which only the last counts."""
    sample: str
    scope: str = ""
    """What the names of its indices begin with."""

    @cached_property
    def regex(self) -> re.Pattern[str]:
        """What a key must match."""
        return re.compile(self.written)

    @cached_property
    def loose(self) -> re.Pattern[str]:
        """The regex with any number in place of each number of the text."""
        return re.compile(_LITERAL.sub(r"\\d+", self.written))

    def match(self, key: str) -> dict[str, int] | None:
        """The index values in `key`, or None where the pattern doesn't fit."""
        groups = self.regex.fullmatch(key)
        if groups is None:
            return None
        return {name: int(groups[f"i{at}"]) for at, name in enumerate(self.indices)}

    def identity(self, key: str) -> Identity:
        """What `key` is, however the variables of the text are spelled in it; it must match.

        Patterns of one text have equal identities for the same tensor, but for its indices.
        """
        groups = self.regex.fullmatch(key)
        assert groups is not None
        numbers = self.regex.groupindex.values()
        chosen = (text or "" for at, text in enumerate(groups.groups(), 1) if at not in numbers)
        return self.scope, self.text, self.indices, tuple(chosen)


def natural(key: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", key)
    return tuple((0, int(part)) if part.isdecimal() else (1, part) for part in parts)


def first_match(patterns: Iterable[KeyPattern], key: str) -> dict[str, int] | None:
    """The index values in `key` by the first pattern that fits it."""
    for pattern in patterns:
        values = pattern.match(key)
        if values is not None:
            return values
    return None


def sample(pattern: KeyPattern) -> str:
    """A key that a pattern fits: the first of each alternatives, indices 0, nothing for "*"."""
    return pattern.sample


def compile_patterns(
    text: str, variables: Mapping[str, Sequence[str]], *, scope: str = ""
) -> tuple[KeyPattern, ...]:
    """Compile a key pattern; `variables` are the alternatives of [vars].

    Args:
        scope: What the names of indices begin with: "text." inside an included spec.

    Raises:
        ArchitectureError: unbalanced braces, or variables that expand without an end.
    """
    return _cached(
        text, tuple((name, tuple(alternatives)) for name, alternatives in variables.items()), scope
    )


@cache
def _cached(
    text: str, variables: tuple[tuple[str, tuple[str, ...]], ...], scope: str
) -> tuple[KeyPattern, ...]:
    known = dict(variables)
    return tuple(_compiled(text, one, known, scope) for one in _expanded(text, known))


def _expanded(text: str, variables: Mapping[str, Sequence[str]]) -> list[str]:
    """`text` without variables that hold indices: one text for each of their alternatives."""
    known: dict[str, bool] = {}
    texts: list[str] = []
    waiting = [text]
    for _ in range(_MAX_EXPANSIONS):
        if not waiting:
            return texts
        one = waiting.pop()
        if len(one) > _MAX_LENGTH or len(texts) >= _MAX_PATTERNS:
            break
        for piece in _PIECE.findall(one):
            name = piece[1:-1]
            if name in variables and _holds_index(name, variables, known, 0):
                waiting += [one.replace(piece, a, 1) for a in reversed(variables[name])]
                break
        else:
            texts.append(one)
    raise _endless(text)


def _holds_index(
    name: str, variables: Mapping[str, Sequence[str]], known: dict[str, bool], depth: int
) -> bool:
    """Whether a variable has an index in one of its alternatives, or in what they stand for."""
    if depth > _MAX_NESTED:
        raise _endless(name)
    if name not in known:
        names = (
            piece[1:-1]
            for alternative in variables[name]
            for piece in _PIECE.findall(alternative)
            if piece != "*" and ":" not in piece
        )
        known[name] = any(
            inner not in variables or _holds_index(inner, variables, known, depth + 1)
            for inner in names
        )
    return known[name]


def _endless(text: str) -> ArchitectureError:
    return ArchitectureError(f"pattern {text[:80]!r}: [vars] expand without an end")


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of a pattern, compiled."""

    regex: str
    sample: str
    ways: int = 1
    """The number of ways it can match the beginning of a text."""


# Groups with a name are indices, and those without one tell tensors of one pattern apart.
_STAR = _Part("(.*)", "*", _STAR_WAYS)


def _compiled(
    whole: str, text: str, variables: Mapping[str, Sequence[str]], scope: str
) -> KeyPattern:
    indices: list[str] = []
    counts: dict[str, Expression] = {}
    last: list[str] = []
    parts: list[_Part] = []
    pieces = _PIECE.split(text)
    for at, piece in enumerate(pieces):
        if piece == "*":
            parts.append(_STAR)
        elif not _PIECE.fullmatch(piece):
            parts.append(_literal(piece, whole))
        elif ":" in piece or piece[1:-1] in variables:
            parts.append(_alternatives(piece, variables, whole, depth=0))
        else:
            name, sign, size = piece[1:-1].partition("@")
            name, equals, which = name.partition("=")
            if not name.isidentifier() or (equals and which != "last"):
                raise ArchitectureError(f"pattern {piece}: not a name")
            name = scope + name
            if name in indices:
                parts.append(_Part(f"(?P=i{indices.index(name)})", "0"))
                continue
            # Before a letter an index has one end; before another piece, one after each digit.
            ways = 1 if not pieces[at + 2 :][:1] or pieces[at + 1] else _INDEX_WAYS
            parts.append(_Part(f"(?P<i{len(indices)}>{_NUMBER})", "0", ways))
            indices.append(name)
            if sign:
                counts[name] = parse_expression(size)
            if which:
                last.append(name)
    joined = _joined(parts, whole)
    return KeyPattern(
        whole, joined.regex, tuple(indices), counts, tuple(last), joined.sample, scope
    )


def _literal(text: str, whole: str) -> _Part:
    if "{" in text or "}" in text:
        raise ArchitectureError(f"pattern {whole!r}: unbalanced braces")
    return _Part(re.escape(text), text)


def _joined(parts: Sequence[_Part], whole: str) -> _Part:
    ways = math.prod(part.ways for part in parts)
    if ways > _MAX_WAYS:
        raise ArchitectureError(
            f"pattern {whole[:80]!r}: a key could be matched in {ways} ways, at most {_MAX_WAYS}",
            hint='write it with fewer alternatives and fewer "*"',
        )
    if sum(len(part.regex) for part in parts) > _MAX_REGEX:
        raise _endless(whole)
    return _Part(
        "".join(part.regex for part in parts), "".join(part.sample for part in parts), ways
    )


def _either(parts: Sequence[_Part]) -> _Part:
    regex = f"(?:{'|'.join(part.regex for part in parts)})"
    return _Part(regex, parts[0].sample if parts else "", max(1, sum(p.ways for p in parts)))


def _alternatives(
    piece: str, variables: Mapping[str, Sequence[str]], whole: str, *, depth: int
) -> _Part:
    """A piece in braces that holds no index, as a regex."""
    if depth > _MAX_NESTED:
        raise _endless(whole)
    name, colon, choices = piece[1:-1].partition(":")
    if colon:
        either = _either([_Part(re.escape(choice), choice) for choice in choices.split("|")])
        return replace(either, regex=f"({either.regex.removeprefix('(?:')}")
    parts = []
    for alternative in variables[name]:
        inner = []
        for part in _PIECE.split(alternative):
            if part == "*":
                inner.append(_STAR)
            elif _PIECE.fullmatch(part):
                inner.append(_alternatives(part, variables, whole, depth=depth + 1))
            else:
                inner.append(_literal(part, whole))
        parts.append(_joined(inner, whole))
    return _either(parts)
