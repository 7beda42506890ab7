"""Changes to an input that keep its form, so that what is behind a parser is reached too."""

import copy
import json
import random
from collections.abc import Callable

Bytes = Callable[[bytes, random.Random], bytes]


def _nested(depth: int, *, as_list: bool) -> object:
    found: object = 0
    for _ in range(depth):
        found = [found] if as_list else {"a": found}
    return found


NASTY: tuple[object, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3,
    7,
    2**31,
    2**40,
    2**62,
    2**63,
    10**9,
    10**30,
    0.5,
    -0.0,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "a",
    "=7",
    "=0",
    "\x1b[2J",
    "\ud800",
    "\u202e",
    "0",
    "../x",
    "x" * 3000,
    [],
    {},
    [[]],
    [0],
    [[0, 0]],
    [1] * 70,
    {"a": {"a": {}}},
    *(_nested(depth, as_list=as_list) for depth in (50, 62, 300) for as_list in (True, False)),
)


def json_text(data: bytes, chance: random.Random) -> bytes:
    """A JSON text with some of its values changed; other bytes where it is none."""
    if chance.random() < 0.1:
        return raw(data, chance)
    try:
        value = json.loads(data)
        for _ in range(chance.choice((1, 1, 1, 2, 4))):
            value = json_value(value, chance)
        return json.dumps(value).encode()
    except (ValueError, RecursionError):  # no JSON, or of a depth that it can't be written in
        return raw(data, chance)


def json_value(value: object, chance: random.Random) -> object:
    """A JSON value with one value in it changed, removed, repeated, or put elsewhere."""
    places: list[tuple[dict[str, object] | list[object], str | int]] = []
    _collect(value, places)
    if not places:
        return copy.deepcopy(chance.choice(NASTY))
    inside, at = chance.choice(places)
    if chance.random() < 0.1:
        _restructure(inside, at, places, chance)
    else:
        _assign(inside, at, _changed(_at(inside, at), places, chance))
    return value


def _collect(
    value: object, places: list[tuple[dict[str, object] | list[object], str | int]]
) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            places.append((value, key))
            _collect(inner, places)
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            places.append((value, i))
            _collect(inner, places)


def _at(inside: dict[str, object] | list[object], at: str | int) -> object:
    return inside[at]  # type: ignore[index]


def _assign(inside: dict[str, object] | list[object], at: str | int, value: object) -> None:
    inside[at] = value  # type: ignore[index]


def _changed(
    value: object,
    places: list[tuple[dict[str, object] | list[object], str | int]],
    chance: random.Random,
) -> object:
    if type(value) is int and chance.random() < 0.6:
        return chance.choice((value + 1, value - 1, -value, value * 2, value // 2, value * 1000))
    if isinstance(value, str) and chance.random() < 0.4:
        return raw(value.encode("utf-8", "surrogatepass"), chance).decode("latin-1")
    if chance.random() < 0.3:
        return json.loads(json.dumps(_at(*chance.choice(places))))
    return copy.deepcopy(chance.choice(NASTY))


def _restructure(
    inside: dict[str, object] | list[object],
    at: str | int,
    places: list[tuple[dict[str, object] | list[object], str | int]],
    chance: random.Random,
) -> None:
    other = json.loads(json.dumps(_at(*chance.choice(places))))
    if isinstance(inside, list):
        assert isinstance(at, int)
        if chance.random() < 0.5:
            del inside[at]
        else:
            inside.insert(at, other)
    elif chance.random() < 0.5:
        del inside[str(at)]
    else:
        inside[f"{at}{chance.choice(('', '.0', '.1', 'x', '²'))}"] = other


def lines(words: tuple[str, ...]) -> Bytes:
    """Changes to a text line by line, with `words` to put in."""

    def change(data: bytes, chance: random.Random) -> bytes:
        if chance.random() < 0.15:
            return raw(data, chance)
        text = data.decode("utf-8", "replace").split("\n")
        for _ in range(chance.choice((1, 1, 2, 3))):
            at = chance.randrange(len(text))
            match chance.randrange(6):
                case 0:
                    del text[at]
                    text = text or [""]
                case 1:
                    text.insert(at, text[chance.randrange(len(text))])
                case 2:
                    other = chance.randrange(len(text))
                    text[at], text[other] = text[other], text[at]
                case _:
                    parts = text[at].split(" ")
                    parts[chance.randrange(len(parts))] = chance.choice(words)
                    text[at] = " ".join(parts)
        return "\n".join(text).encode("utf-8", "replace")

    return change


def raw(data: bytes, chance: random.Random) -> bytes:
    """Some bytes set, removed, repeated or put in."""
    content = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(content) + 1)
        match chance.randrange(4):
            case 0 if at < len(content):
                content[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
            case 1:
                del content[at : at + chance.randrange(1, 9)]
            case 2:
                content[at:at] = content[at : at + chance.randrange(1, 40)]
            case _:
                content[at:at] = chance.choice(
                    (b"0", b"9" * 30, b"-", b'"', b"[" * 30, b",", b"{", b"\n", b"1e999", b"\xff")
                )
    return bytes(content)
