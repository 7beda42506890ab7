"""Two checkpoints of one model that spell their keys otherwise: which tensors are the same."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.architectures.model import Family, Model
from streammap.io.checkpoint import Checkpoint
from streammap.io.formats.safetensors_header import Slot
from streammap.planning import plan
from streammap.planning.matching import pairing
from streammap.planning.plan import Plan
from tests.architectures.test_labels import cases, lazy

_PIECE = re.compile(r"(\{[^{}]*\}|\*)")
_OLD = {".weight": ".gamma", ".bias": ".beta"}


def included(include: Mapping[str, Any]) -> str:
    """The spec of a part of a model whose config.json names no other."""
    name = include.get("spec", include.get("model_type"))
    name = name["default"] if isinstance(name, dict) else name
    return name if "spec" in include else registry.model_types()[name]


def variables(model: Model, family: Family) -> Mapping[str, Sequence[str]]:
    """The spellings of [vars] where a family's rule stands."""
    tables = registry._merged(model.architecture.name)
    scope = family.rule.pattern.scope.removesuffix(".")
    prefixes: Sequence[str] = [""]
    while scope:
        first, _, scope = scope.partition(".")
        include = next(one for one in tables["include"] if one["as"] == first)  # type: ignore[attr-defined]
        prefixes = include["prefix"]
        tables = registry._merged(included(include))
    found: dict[str, Sequence[str]] = dict(tables.get("vars", {}))  # type: ignore[call-overload]
    return {**found, " prefix": prefixes}


def spellings(text: str, known: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """A pattern with each spelling of its variables in their places."""
    for piece in _PIECE.findall(text):
        if piece[1:-1] in known:
            for spelling in known[piece[1:-1]]:
                yield from spellings(text.replace(piece, spelling, 1), known)
            return
    yield text


def parts(text: str, key: str) -> list[str] | None:
    """What stands in a key for the indices, names and stars of a pattern without variables."""
    pieces = _PIECE.split(text)
    written = ""
    for piece in pieces:
        inner = piece[1:-1]
        if piece == "*":
            written += "(.*)"
        elif not _PIECE.fullmatch(piece):
            written += re.escape(piece)
        elif ":" in inner:
            choices = inner.partition(":")[2].split("|")
            written += f"({'|'.join(map(re.escape, choices))})"
        else:
            written += r"(\d+)"
    found = re.fullmatch(written, key)
    return None if found is None else list(found.groups())


def indices(text: str) -> list[str]:
    return [
        piece[1:-1].partition("@")[0].partition("=")[0]
        for piece in _PIECE.findall(text)
        if piece != "*" and ":" not in piece
    ]


def respelled(model: Model, family: Family, key: str, n: int) -> str:
    """A key with another spelling of each variable, the n-th behind its own."""
    known = variables(model, family)
    texts = list(spellings(family.rule.pattern.text, known))
    own = next(text for text in texts if parts(text, key) is not None)
    others = [text for text in texts if indices(text) == indices(own)]
    chosen = others[(others.index(own) + n) % len(others)]
    values = iter(parts(own, key) or ())
    name = "".join(
        next(values) if _PIECE.fullmatch(piece) else piece for piece in _PIECE.split(chosen)
    )
    if family.rule.kind == "norm" and n % 2:
        for end, old in _OLD.items():
            if name.endswith(end):
                return name.removesuffix(end) + old
    return name


def with_keys(name: str, keys: Mapping[str, str]) -> Plan:
    """A checkpoint of labels.json with other keys."""
    case = cases()[name]
    slots = {keys[key]: Slot(keys[key], spec, 0) for key, spec in case.specs.items()}
    source = Checkpoint(Path("other"), (), slots, {}, case.config)
    return plan.from_checkpoint(source, (), architecture=case.arch)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("name", cases())
def test_each_other_spelling_of_a_key_is_the_same_tensor(name: str, n: int) -> None:
    model = lazy(name).plan.model
    keys = {
        key: respelled(model, family, key, n)
        for family in model.families
        for key in family.members.values()
    }
    if len(set(keys.values())) < len(keys):
        pytest.fail(f"two keys with one spelling: {keys}")
    other = with_keys(name, keys)
    pairs = pairing.pair(lazy(name).plan, other)
    assert pairs.only == ((), ())
    assert {key: pairs.other(key) for key in keys} == keys


@pytest.mark.parametrize("name", cases())
def test_a_blend_of_two_spellings_is_that_of_one(name: str) -> None:
    model = lazy(name).plan.model
    keys = {
        key: respelled(model, family, key, 1)
        for family in model.families
        for key in family.members.values()
    }
    target = lazy(name)
    source = LazyCheckpoint(with_keys(name, keys))
    blended = source.interpolate(target, alpha=0.25).plan
    assert list(blended.targets) == list(target.plan.targets)
    for key, form in blended.targets.items():
        read = {ref.key for ref in form.loads()}
        assert read == {key, keys[key]}, key
    notes = " ".join(blended.notes)
    assert ("called otherwise in the source" in notes) == any(a != b for a, b in keys.items())
