"""Kinds of options that operators on axes share: requests, schemes, map files, sizes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, cast, final, runtime_checkable

from streammap.common.kinds import Choice, Form, Kind, Table, Whole, shown
from streammap.errors import PlanError
from streammap.operators.declare import OfSource
from streammap.planning import requests
from streammap.planning.copies import shares
from streammap.planning.copies.shares import Split
from streammap.planning.requests import AxisRequest

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.planning.map_file import MapLevel
    from streammap.planning.plan import Plan
    from streammap.planning.scheme import Scheme

RequestLike = int | str | list[object] | tuple[object, ...] | Mapping[Any, object] | AxisRequest
"""A factor, "to:SIZE", groups, or a table of these (also by layer): see planning/requests.py."""
SchemeLike = Union[str, Path, Mapping[str, object], "Scheme"]  # not imported here
TopK = Literal["keep", "scale"] | int
SplitLike = float | str | list[float] | tuple[float, ...] | Split
MapsLike = Union[str, Path, "tuple[MapLevel, ...]"]


@runtime_checkable
class HasSizes(Protocol):
    """An opened checkpoint, as far as a target goes."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Axis -> size."""
        ...


@final
@dataclass(frozen=True, slots=True)
class AxisSizes:
    """Sizes that a result must have."""

    sizes: Mapping[str, int]


TargetLike = str | Path | Mapping[str, object] | HasSizes | AxisSizes


@final
class OneAxis(Kind):
    """A request on one axis."""

    def parse(self, value: Any, name: str) -> AxisRequest:
        """From any form that a user may give."""
        return requests.parse_request(value, f"--{name.replace('_', '-')}")

    def decode(self, value: Any, name: str) -> AxisRequest:
        """From its JSON form."""
        return _decoded(value, name)

    def encode(self, value: Any) -> object:
        """Its JSON form."""
        return _encoded(value)

    def upgrade(self, value: object) -> object:
        """As it was meant: a number alone is a factor in records."""
        return requests.explicit(value)


@final
class Factor(Kind):
    """A factor on several axes together."""

    def __init__(self, *, instead: str) -> None:
        """`instead` is what asks for a size, for messages."""
        self._instead = instead

    def check_typed(self, text: str, name: str) -> None:
        """A factor; what is none is wrong usage, as a number is that is no number."""
        self.parse(text, name)

    def parse(self, value: Any, name: str) -> AxisRequest:
        """From any form that a user may give."""
        return requests.parse_factor(value, f"--{name}", instead=self._instead)

    def encode(self, value: Any) -> object:
        """Its JSON form."""
        return _encoded(value)

    def upgrade(self, value: object) -> object:
        """As it was meant: a number alone is a factor in records."""
        return requests.explicit(value)


@final
class GroupingOf(Kind):
    """Which units make a group; "usual" is what records of earlier versions mean by nothing."""

    form: Form = "choice"
    choices = requests.GROUPINGS

    def parse(self, value: Any, name: str) -> str:
        """One of the words."""
        if value == requests.USUAL:
            return requests.USUAL
        return Choice(*self.choices).parse(value, name)

    def encode(self, value: Any) -> object:
        """As records have it."""
        return None if value == requests.USUAL else value

    def upgrade(self, value: object) -> object:
        """Records were made with the usual grouping where they name none."""
        return requests.USUAL if value is None else value


@final
class TopKOf(Kind):
    """What becomes of the number of experts that a token takes."""

    def parse(self, value: Any, name: str) -> TopK:
        """keep, scale, or a number: 4 or "=4"."""
        if value in ("keep", "scale"):
            return cast("TopK", value)
        text = str(value).removeprefix("=")
        if not isinstance(value, bool) and re.fullmatch(r"0*[1-9][0-9]{0,6}", text):
            return int(text)
        raise PlanError(
            f"{name} is {shown(value)}, expected keep, scale or =N", hint="give --top-k keep"
        )


@final
class SplitOf(Kind):
    """The shares that readers of copies have in each."""

    def check_typed(self, text: str, name: str) -> None:
        """Shares; what are none is wrong usage, as a number is that is no number."""
        self.parse(text, name)

    def parse(self, value: Any, name: str) -> Split:
        """A share, a list of shares (0.5,0.3,0.2), or remainder."""
        return shares.parse(value, f"--{name}")

    def encode(self, value: Any) -> object:
        """A number, a list, or the word."""
        return value.as_json()


@final
class ManyAxes(Kind):
    """Axis -> request."""

    form: Form = "many"

    def parse(self, value: Any, name: str) -> Mapping[str, AxisRequest]:
        """From a mapping, or from texts "NAME=R"."""
        table = value if isinstance(value, Mapping) else _table_of(value)
        return {str(axis): requests.parse_request(r, str(axis)) for axis, r in table.items()}

    def decode(self, value: Any, name: str) -> Mapping[str, AxisRequest]:
        """From its JSON form."""
        return {str(axis): _decoded(r, str(axis)) for axis, r in Table().parse(value, name).items()}

    def encode(self, value: Any) -> object:
        """Its JSON form."""
        return {axis: _encoded(request) for axis, request in value.items()}

    def upgrade(self, value: object) -> object:
        """As it was meant: a number alone is a factor in records."""
        return _upgraded(value, value)


@final
class SchemeOf(Kind):
    """A scheme: a file, or its content."""

    from_file = True

    def parse(self, value: Any, name: str) -> "Scheme":
        """The scheme, read."""
        from streammap.planning import scheme

        return scheme.load_scheme(value)

    def decode(self, value: Any, name: str) -> "Scheme":
        """From its content."""
        from streammap.planning import scheme

        content = Table().parse(value, name)
        read = scheme.load_scheme(content)
        axes = Table().parse(content.get("axes", {}), "axes")
        return replace(
            read,
            spaces={axis: _decoded(content[axis], r.where) for axis, r in read.spaces.items()},
            axes={axis: _decoded(axes[axis], r.where) for axis, r in read.axes.items()},
        )

    def encode(self, value: Any) -> object:
        """Its content."""
        content = value.as_json()
        content |= {axis: _encoded(request) for axis, request in value.spaces.items()}
        if value.axes:
            content["axes"] = {axis: _encoded(request) for axis, request in value.axes.items()}
        for name, one in value.copies.items():
            content[name] = one.as_json() if isinstance(one, Split) else one
        return content | {name: [] for name in value.unused}

    def upgrade(self, value: object) -> object:
        """As it was meant: a number alone is a factor in records."""
        from streammap.planning import scheme

        if isinstance(value, Mapping) and "axes" in value:
            value = {**value, "axes": _upgraded(value["axes"], value["axes"])}
        return _upgraded(value, scheme.SPACES)


@final
class Maps(Kind):
    """A map file, or a folder that holds one; a record holds the maps themselves."""

    from_file = True

    def parse(self, value: Any, name: str) -> "tuple[MapLevel, ...]":
        """The maps, read."""
        from streammap.planning import map_file

        return value if isinstance(value, tuple) else map_file.load(value)

    def decode(self, value: Any, name: str) -> "tuple[MapLevel, ...]":
        """Maps that were unpacked from a record."""
        if not isinstance(value, tuple):
            raise PlanError(f"{name}: expected packed maps, or their digests")
        return value


@final
class Sizes(OfSource):
    """Sizes of the result: config.json, or an opened checkpoint."""

    from_file = True

    def parse(self, value: Any, name: str) -> "AxisSizes | Mapping[str, object]":
        """The sizes of a checkpoint, or the content of a config.json."""
        from streammap.io.json_files import read_config

        if isinstance(value, AxisSizes | Mapping):
            return value
        if isinstance(value, str | Path):
            return read_config(value)
        if isinstance(value, HasSizes):
            return AxisSizes(dict(value.sizes))
        raise PlanError(f"{name} is {shown(value)}, expected a config.json or a checkpoint")

    def settle(self, value: Any, source: "Plan") -> AxisSizes:
        """The sizes, where a config.json has to be read by the source's spec."""
        from streammap.architectures import axis_sizes

        if isinstance(value, AxisSizes):
            return value
        return AxisSizes(axis_sizes.of_config(source.model.architecture, value))

    def decode(self, value: Any, name: str) -> AxisSizes:
        """From axis -> size."""
        table = Table().parse(value, name)
        return AxisSizes(
            {axis: Whole().parse(size, f"{name}: {axis}") for axis, size in table.items()}
        )

    def encode(self, value: Any) -> object:
        """Axis -> size."""
        return dict(value.sizes)


def _table_of(texts: object) -> Mapping[str, str]:
    """Axis -> what stands behind the equals sign."""
    if not isinstance(texts, list | tuple):
        raise PlanError(f"axes is {shown(texts)}, expected a table of axes")
    table = {}
    for text in texts:
        name, equals, value = str(text).partition("=")
        if not equals or not name or not value:
            raise PlanError(f"--axis {text}: expected NAME=R, such as moe_mlp=2")
        table[name] = value
    return table


def _encoded(request: AxisRequest) -> object:
    if request.layers is not None:
        return {layer: _encoded(one) for layer, one in request.layers}
    if request.taken is not None:
        return request.taken.as_json()
    if request.groups is not None and request.weights is None:
        return [list(group) for group in request.groups]
    if request.groups is not None and request.weights is not None:
        pairs = zip(request.groups, request.weights, strict=True)
        return {"groups": [{"members": list(m), "weights": list(w)} for m, w in pairs]}
    what = "factor" if request.factor is not None else "size"
    number = request.factor if request.factor is not None else request.size
    if request.grouping is not None:
        return {what: number, "grouping": request.grouping}
    return requests.explicit(number) if what == "factor" else f"={number}"


def _upgraded(table: object, names: Any) -> object:
    """A table of a record, whose entries of these names are requests."""
    if not isinstance(table, Mapping):
        return table
    return {k: requests.explicit(v) if k in names else v for k, v in table.items()}


def _decoded(value: object, where: str) -> AxisRequest:
    """As parsed, but weights as they stand: making their sum 1 again would round them again."""
    read = requests.parse_request(value, where)
    if read.layers is not None and isinstance(value, Mapping):
        own = tuple((layer, _decoded(value[layer], one.where)) for layer, one in read.layers)
        return replace(read, layers=own)
    if read.weights is None or not isinstance(value, Mapping):
        return read
    groups = [g for g in value["groups"] if isinstance(g, Mapping)]
    if len(groups) != len(read.weights):
        return read
    if any(abs(sum(g["weights"]) - 1.0) > 1e-9 for g in groups):
        return read
    return replace(read, weights=tuple(tuple(float(w) for w in g["weights"]) for g in groups))
