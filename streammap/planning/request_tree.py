"""What was asked for a plan, as a tree of calls, and its JSON form.

    {"operator": "interpolate", "alpha": 0.5,
     "source": {"operator": "decoalesce", "rule": "reference",
                "source": {"operator": "open", "path": "/models/small", "id": 0, "maps": "eJy..."}},
     "target": {"operator": "open", "path": "/models/big", "id": 1, "maps": ""}}

Options are those that were given and are no default; schemes, groups and configs stand in it as
values, so that nothing can drift but the sources. Two opens with one id were one opened source.
"maps" are the maps saved with a source, or given by --map: a map file's bytes, packed; where they
are large, their digests ({"sha256": [...]}), to be found in the result's own map file. Where the
entry is missing (a tree written by hand), those saved with the source count.
"""

import base64
import binascii
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, final

from streammap.errors import PlanError, SchemeError
from streammap.planning import map_file
from streammap.planning.map_file import MapLevel

Operator = Literal["open", "coalesce", "decoalesce", "interpolate", "configure"]
OPERATORS: tuple[Operator, ...] = ("open", "coalesce", "decoalesce", "interpolate", "configure")
"""configure: config.json is another one, as the original's front saves the target's."""
_OWN = ("operator", "id", "maps", "source", "target")
_MAX_CALLS = 200
_MAX_INLINE = 256 * 1024
"""Longest text of maps; larger ones go by digest."""
_MAX_MAPS_NBYTES = 64 * 2**20


@final
@dataclass(frozen=True, eq=False, slots=True)
class OperatorCall:
    """One call. The same object stands for the same call: an opened source that is used twice."""

    operator: Operator
    options: Mapping[str, object] = field(default_factory=dict)
    """Values of JSON."""
    maps: tuple[MapLevel, ...] | None = None
    """None: those saved with the source."""
    digests: tuple[str, ...] = ()
    """Of maps that are too large to stand here, instead of them."""
    source: "OperatorCall | None" = None
    target: "OperatorCall | None" = None
    """What it is blended with."""

    def opens(self) -> Iterator["OperatorCall"]:
        """The opened sources, each once, in the order of the tree."""
        return iter({id(call): call for call in self._all() if call.operator == "open"}.values())

    def _all(self) -> Iterator["OperatorCall"]:
        yield self
        for inner in (self.source, self.target):
            if inner is not None:
                yield from inner._all()


def as_json(call: OperatorCall) -> dict[str, object] | None:
    """The tree; None where it is too long to be written down."""
    for n, _ in enumerate(_limited(call)):
        if n >= _MAX_CALLS:
            return None
    numbers = {id(opened): n for n, opened in enumerate(call.opens())}
    return _encoded(call, numbers)


def parse(content: object) -> OperatorCall:
    """A tree from JSON that may be anything.

    Raises:
        PlanError: it is none.
        SchemeError: maps that are none.
    """
    return _Parser().call(content, "request", 0)


def _limited(call: OperatorCall) -> Iterator[OperatorCall]:
    """Calls of the tree; of a long one, not all."""
    waiting, n = [call], 0
    while waiting and n <= _MAX_CALLS:
        at = waiting.pop()
        n += 1
        yield at
        waiting += [inner for inner in (at.source, at.target) if inner is not None]


def _encoded(call: OperatorCall, numbers: Mapping[int, int]) -> dict[str, object]:
    found: dict[str, object] = {"operator": call.operator, **call.options}
    if call.operator == "open":
        found["id"] = numbers[id(call)]
    if call.digests:
        found["maps"] = {"sha256": list(call.digests)}
    elif call.maps is not None:
        found["maps"] = _packed(call.maps)
    for name, inner in (("source", call.source), ("target", call.target)):
        if inner is not None:
            found[name] = _encoded(inner, numbers)
    return found


def _packed(levels: tuple[MapLevel, ...]) -> object:
    if not levels:
        return ""
    text = base64.b64encode(zlib.compress(map_file.encode(levels), 9)).decode()
    if len(text) > _MAX_INLINE:
        return {"sha256": [level.digest for level in levels]}
    return text


def _unpacked(text: str) -> tuple[MapLevel, ...]:
    if not text:
        return ()
    try:
        packed = zlib.decompressobj()
        content = packed.decompress(base64.b64decode(text, validate=True), _MAX_MAPS_NBYTES)
        if packed.unconsumed_tail or not packed.eof:
            raise SchemeError(f"request: maps: more than {_MAX_MAPS_NBYTES} bytes, or cut short")
    except (ValueError, binascii.Error, zlib.error) as error:
        raise SchemeError(f"request: maps: not packed as expected: {error}") from error
    import tempfile

    with tempfile.NamedTemporaryFile(suffix=map_file.SUFFIX) as file:
        file.write(content)
        file.flush()
        return map_file.load(Path(file.name))


@final
class _Parser:
    """Knows the opened sources that it has met."""

    def __init__(self) -> None:
        self._opened: dict[int, OperatorCall] = {}
        self._n = 0

    def call(self, content: object, where: str, depth: int) -> OperatorCall:
        self._n += 1
        if depth > _MAX_CALLS or self._n > _MAX_CALLS:
            raise PlanError(f"{where[:60]}: more than {_MAX_CALLS} calls")
        if not isinstance(content, Mapping):
            raise PlanError(f"{where}: expected an object, found {type(content).__name__}")
        operator = next((name for name in OPERATORS if name == content.get("operator")), None)
        if operator is None:
            raise PlanError(
                f"{where}: operator {str(content.get('operator'))[:40]!r}",
                hint=f"expected one of {', '.join(OPERATORS)}",
            )
        wanted = {"open": (), "interpolate": ("source", "target")}.get(operator, ("source",))
        missing = [name for name in wanted if name not in content]
        surplus = [name for name in ("source", "target") if name in content and name not in wanted]
        if missing or surplus:
            told = f"lacks {missing[0]}" if missing else f"has a {surplus[0]}"
            raise PlanError(f"{where}: {operator} {told}", hint=f"it takes {wanted or 'neither'}")
        inner = {name: self.call(content[name], f"{where}.{name}", depth + 1) for name in wanted}
        maps, digests = _maps(content, where)
        options = {str(name): value for name, value in content.items() if name not in _OWN}
        made = OperatorCall(
            operator, options, maps, digests, inner.get("source"), inner.get("target")
        )
        number = content.get("id")
        if operator != "open" or type(number) is not int:
            return made
        known = self._opened.setdefault(number, made)
        if known.options != made.options:
            raise PlanError(f"{where}: id {number} is another source already")
        return known


def _maps(
    content: Mapping[str, object], where: str
) -> tuple[tuple[MapLevel, ...] | None, tuple[str, ...]]:
    value = content.get("maps")
    if value is None:
        return None, ()
    if isinstance(value, str):
        return _unpacked(value), ()
    digests = value.get("sha256") if isinstance(value, Mapping) else None
    if not isinstance(digests, Sequence) or not all(isinstance(d, str) for d in digests):
        raise PlanError(f"{where}: maps: expected packed maps, or their digests")
    return None, tuple(digests)
