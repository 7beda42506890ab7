"""Numbered shards: model-00001-of-00003.safetensors and the two others are one whole set."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_NAME = re.compile(r"(?P<stem>.*?)-?(?P<n>\d{1,6})-of-(?P<of>\d{1,6})(?P<end>\.[a-z]+)", re.ASCII)
_MOST = 10_000
"""Shards of a set: a name can claim any number of them."""
_USUAL = ("model", "pytorch_model")
"""What transformers calls its shards."""


@dataclass(frozen=True, slots=True)
class ShardSet:
    """The shards of one numbering that a folder has, by number."""

    stem: str
    n_shards: int
    """Of the whole set, by their names."""
    there: dict[int, str]

    @property
    def names(self) -> tuple[str, ...]:
        """Their files, in order."""
        return tuple(self.there[number] for number in sorted(self.there))

    @property
    def is_whole(self) -> bool:
        """Whether all are there, counted from 1 or from 0, and no other."""
        return not self.missing and len(self.there) == self.n_shards

    @property
    def missing(self) -> tuple[str, ...]:
        """The files that are not there."""
        first = 0 if 0 in self.there else 1
        numbers = range(first, first + self.n_shards)
        shown = self.names[0]
        match = _NAME.fullmatch(shown)
        assert match is not None
        start, end = match.span("n")
        width = end - start
        return tuple(
            f"{shown[:start]}{number:0{width}d}{shown[end:]}"
            for number in numbers
            if number not in self.there
        )

    @property
    def is_usual(self) -> bool:
        """Whether transformers would give its shards such names."""
        return self.stem in _USUAL


def find(names: Iterable[str]) -> tuple[ShardSet, ...]:
    """The sets that these files are of, whole or not; those of transformers' names first."""
    groups: dict[tuple[str, str, str], dict[int, str]] = {}
    for name, match in _matches(names):
        key = (match["stem"], match["of"], match["end"])
        groups.setdefault(key, {})[int(match["n"])] = name
    sets = [ShardSet(stem, int(of), there) for (stem, of, _), there in groups.items()]
    return tuple(sorted(sets, key=lambda one: (not one.is_usual, one.names)))


def _matches(names: Iterable[str]) -> Iterator[tuple[str, re.Match[str]]]:
    for name in sorted(names):
        match = _NAME.fullmatch(name)
        if match is not None and 1 <= int(match["of"]) <= _MOST:
            yield name, match
