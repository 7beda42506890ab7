"""A request as JSON: what a record holds, and what `apply` reads.

    {"operator": "interpolate", "alpha": 0.5,
     "source": {"operator": "decoalesce", "rule": "reference",
                "source": {"operator": "open", "path": "/models/small", "id": 0, "maps": "eJy..."}},
     "target": {"operator": "open", "path": "/models/big", "id": 1, "maps": ""}}

Options are those that were given and are not the default; schemes, groups and configs stand in it
as values, so that nothing can drift but the sources. Inputs stand under their names. Two opens with
one id were one opened source. "maps" are the maps saved with a source, or given by --map: a map
file's bytes, packed; where they are large, their digests ({"sha256": [...]}), to be found in the
result's own map file. Without the entry (in a tree written by hand), those saved with the source
count.
"""

import base64
import binascii
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, final

from streammap.common.declare import options_of
from streammap.errors import PlanError, SchemeError
from streammap.operators import registry
from streammap.operators.declare import Input, inputs_of
from streammap.planning import map_file
from streammap.planning.map_file import MapLevel
from streammap.planning.request import MapDigests, OperatorCall

_MAX_CALLS = 200
_MAX_INLINE = 256 * 1024
"""Longest text of maps; larger ones go by digest."""
_MAX_DENSE_NBYTES = 4 * 2**20
_MAX_MAPS_NBYTES = 64 * 2**20


def as_json(call: OperatorCall) -> dict[str, object] | None:
    """The tree; None where it is too long to be written down."""
    if not _is_short(call):
        return None
    numbers = {id(opened): n for n, opened in enumerate(call.opens())}
    return _encoded(call, numbers)


def parse(content: object, *, recorded: bool = False) -> OperatorCall:
    """A tree from JSON that may be anything.

    Args:
        recorded: Whether it stands in a record, which an earlier version may have written.

    Raises:
        PlanError: not a valid request.
        SchemeError: maps that are not a valid map file.
    """
    return _Parser(recorded).call(content, "request", 0)


def _is_short(call: OperatorCall) -> bool:
    """Whether there are few enough calls; shared ones count each time they are read."""
    waiting, n = [call], 0
    while waiting and n < _MAX_CALLS:
        n += 1
        waiting += waiting.pop().inner()
    return not waiting


def _encoded(call: OperatorCall, numbers: Mapping[int, int]) -> dict[str, object]:
    content: dict[str, object] = {"operator": call.operator}
    for name, value in call.options.items():
        content[name] = _packed(value, call.operator) if name == "maps" else value
    if call.operator == "open":
        content["id"] = numbers[id(call)]
    for name, calls in call.inputs.items():
        if isinstance(calls, tuple):
            content[name] = [_encoded(each, numbers) for each in calls]
        else:
            content[name] = _encoded(calls, numbers)
    return content


def _packed(maps: object, operator: str) -> object:
    if isinstance(maps, MapDigests):
        return {"sha256": list(maps.sha256)}
    if not isinstance(maps, tuple) or not maps:
        return ""
    if map_file.dense_nbytes(maps) > _MAX_DENSE_NBYTES:
        return {"sha256": [level.digest for level in maps]}
    text = base64.b64encode(zlib.compress(map_file.encode(maps), 9)).decode()
    # Orders that were found are nowhere but here: a result's map file has those that it shrank by.
    if len(text) > _MAX_INLINE and operator != "align":
        return {"sha256": [level.digest for level in maps]}
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
        return tuple(replace(level, where="") for level in map_file.load(Path(file.name)))


@final
class _Parser:
    """Knows the opened sources that it has met."""

    def __init__(self, recorded: bool) -> None:
        self._opened: dict[int, OperatorCall] = {}
        self._n, self._recorded = 0, recorded

    def call(self, content: object, where: str, depth: int) -> OperatorCall:
        """One call with its inputs."""
        self._n += 1
        if depth > _MAX_CALLS or self._n > _MAX_CALLS:
            raise PlanError(f"{where[:60]}: more than {_MAX_CALLS} calls")
        if not isinstance(content, Mapping):
            raise PlanError(f"{where}: expected an object, found {type(content).__name__}")
        known = ("open", *registry.names())
        operator = next((name for name in known if name == content.get("operator")), None)
        if operator is None:
            raise PlanError(
                f"{where}: operator {str(content.get('operator'))[:40]!r}",
                hint=f"expected one of {', '.join(known)}",
            )
        inputs = {
            name: self._calls(content[name], f"{where}.{name}", depth + 1, many=many)
            for name, many in self._inputs(operator, content, where)
        }
        options = {
            str(name): _maps(value, where) if name == "maps" else value
            for name, value in content.items()
            if name not in ("operator", "id", *inputs) and (name, value) != ("maps", None)
        }
        if self._recorded and operator != "open":
            for one in options_of(registry.load(operator)):
                value = one.kind.upgrade(options.get(one.json))
                if value is not None:
                    options[one.json] = value
        made = OperatorCall(operator, options, inputs)
        number = content.get("id")
        if operator != "open" or type(number) is not int:
            return made
        first = self._opened.setdefault(number, made)
        if first.options != made.options:
            raise PlanError(f"{where}: id {number} is another source already")
        return first

    def _calls(
        self, content: object, where: str, depth: int, *, many: bool
    ) -> OperatorCall | tuple[OperatorCall, ...]:
        if not many:
            return self.call(content, where, depth)
        if not isinstance(content, list):
            raise PlanError(f"{where}: expected a list, found {type(content).__name__}")
        return tuple(self.call(one, f"{where}[{i}]", depth) for i, one in enumerate(content))

    def _inputs(
        self, operator: str, content: Mapping[Any, object], where: str
    ) -> list[tuple[str, bool]]:
        """(name, whether there may be many) of the inputs that are given; all that must be are."""
        if operator == "open":
            wanted = []
        else:
            wanted = [("source", False, True)]
            for one in inputs_of(registry.load(operator)):
                assert isinstance(one.kind, Input)
                wanted.append((one.name, one.kind.many, one.is_required))
        known = [name for name, _, _ in wanted]
        missing = [name for name, _, is_required in wanted if is_required and name not in content]
        surplus = [
            name
            for name in ("source", "target")
            if name not in known and isinstance(content.get(name), Mapping)
        ]
        if missing or surplus:
            what = f"lacks {missing[0]}" if missing else f"has a {surplus[0]}"
            raise PlanError(
                f"{where}: {operator} {what}", hint=f"its inputs: {', '.join(known) or 'none'}"
            )
        return [(name, many) for name, many, _ in wanted if name in content]


def _maps(value: object, where: str) -> object:
    """Maps, or their digests."""
    if isinstance(value, str):
        return _unpacked(value)
    digests = value.get("sha256") if isinstance(value, Mapping) else None
    if not isinstance(digests, Sequence) or not all(isinstance(d, str) for d in digests):
        raise PlanError(f"{where}: maps: expected packed maps, or their digests")
    return MapDigests(tuple(digests))
