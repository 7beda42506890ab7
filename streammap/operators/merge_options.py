"""Kinds of the options that only a blend has: slices, parameters of methods, dtypes.

--slices '[[0, 0, 24], [1, 8, 32]]'        source, first layer, one past the last
--slices '[{"sources": [{"source": 0, "layers": [0, 4], "parameters": {"weight": 0.5}},
                        {"source": 1, "layers": [2, 6], "parameters": {"weight": 0.5}}],
            "parameters": {"normalize": 1}}]'
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from streammap.architectures.limits import MAX_LAYERS
from streammap.common.kinds import Choice, Form, Kind, shown
from streammap.errors import PlanError
from streammap.operators import numbers
from streammap.planning.merging import settings
from streammap.planning.merging.merge import CONFIG_DTYPES, PROMOTED
from streammap.planning.merging.settings import Setting
from streammap.planning.merging.slices import Slice, Span

_HINT = "give [[0, 0, 24], [1, 8, 32]]: source, first layer, one past the last"


@final
class Slices(Kind):
    """Layers to stack; as they are, as JSON, or a file of JSON."""

    from_file = True

    def is_file(self, value: object) -> bool:
        """Whether it is no JSON."""
        return isinstance(value, Path) or (
            isinstance(value, str) and not value.strip().startswith("[")
        )

    def check_typed(self, text: str, name: str) -> None:
        """JSON, or a file that is there."""
        numbers.check_typed(text, name, "JSON")

    def parse(self, value: Any, name: str) -> tuple[Slice, ...]:
        """The slices."""
        if isinstance(value, str | Path):
            value = numbers.from_text(str(value), name)
        return self.decode(value, name)

    def decode(self, value: Any, name: str) -> tuple[Slice, ...]:
        """From JSON."""
        if not isinstance(value, list | tuple) or not value:
            raise PlanError(f"{name} is {shown(value)}, expected a list of slices", hint=_HINT)
        slices = tuple(
            one if isinstance(one, Slice) else _slice(one, f"{name}[{i}]")
            for i, one in enumerate(value)
        )
        n_layers = sum(one.n_layers for one in slices)
        if n_layers > MAX_LAYERS:
            raise PlanError(
                f"{name}: {n_layers} layers, at most {MAX_LAYERS}", hint="ask for fewer"
            )
        return slices

    def encode(self, value: Any) -> object:
        """JSON, short where a slice is layers alone."""
        return [_encoded(one) for one in value]

    def slices(self, value: Any) -> tuple[Slice, ...]:
        """What `parse` gave."""
        return () if value is None else value


@final
class Shared(Kind):
    """Parameter -> numbers; as they are, as JSON, or a file of JSON."""

    from_file = True

    def is_file(self, value: object) -> bool:
        """Whether it is no JSON."""
        return isinstance(value, Path) or (
            isinstance(value, str) and not value.strip().startswith("{")
        )

    def check_typed(self, text: str, name: str) -> None:
        """JSON, or a file that is there."""
        numbers.check_typed(text, name, "JSON")

    def parse(self, value: Any, name: str) -> Mapping[str, Setting]:
        """A setting for each parameter; true is 1."""
        if isinstance(value, str | Path):
            value = numbers.from_text(str(value), name)
        return self.decode(value, name)

    def decode(self, value: Any, name: str) -> Mapping[str, Setting]:
        """From JSON."""
        if not isinstance(value, Mapping):
            raise PlanError(f"{name} is {shown(value)}, expected an object")
        return {
            str(one): settings.parse(_number(given), what=f"{name}.{str(one)[:40]}")
            for one, given in value.items()
        }

    def encode(self, value: Any) -> object:
        """Its JSON form."""
        return {name: setting.as_json() for name, setting in value.items()}

    def settings(self, value: Any) -> Mapping[str, Setting]:
        """What `parse` gave."""
        return {} if value is None else value


@final
class Each(Kind):
    """Parameter -> numbers, for each source."""

    form: Form = "object"

    def parse(self, value: Any, name: str) -> tuple[Mapping[str, Setting], ...]:
        """Of each source."""
        if not isinstance(value, list | tuple):
            raise PlanError(f"{name} is {shown(value)}, expected a list")
        return tuple(Shared().parse(one, f"{name}[{i}]") for i, one in enumerate(value))

    def encode(self, value: Any) -> object:
        """Its JSON form."""
        return [Shared().encode(one) for one in value]

    def settings(self, value: Any) -> Sequence[Mapping[str, Setting]]:
        """What `parse` gave."""
        return () if value is None else value


@final
class _Dtype(Kind):
    """A dtype by its name in safetensors."""

    form: Form = "object"

    def parse(self, value: Any, name: str) -> str:
        """One that is computed with."""
        return Choice(*CONFIG_DTYPES, PROMOTED).parse(value, name)


DTYPES = _Dtype()


def _number(value: object) -> object:
    return float(value) if isinstance(value, bool) else value


def _slice(value: object, name: str) -> Slice:
    if isinstance(value, list | tuple) and len(value) == 3:
        return Slice((_span({"source": value[0], "layers": value[1:]}, name),))
    if not isinstance(value, Mapping) or not value.keys() <= {"sources", "parameters"}:
        raise PlanError(
            f"{name} is {shown(value)}, expected [source, first, end] or an object with sources "
            "and parameters",
            hint=_HINT,
        )
    sources = value.get("sources")
    if not isinstance(sources, list | tuple) or not sources:
        raise PlanError(f"{name}.sources is {shown(sources)}, expected a list", hint=_HINT)
    spans = tuple(_span(one, f"{name}.sources[{i}]") for i, one in enumerate(sources))
    return Slice(spans, Shared().parse(value.get("parameters", {}), f"{name}.parameters"))


def _span(value: object, name: str) -> Span:
    if not isinstance(value, Mapping) or not value.keys() <= {"source", "layers", "parameters"}:
        raise PlanError(f"{name} is {shown(value)}, expected source and layers", hint=_HINT)
    layers, source = value.get("layers"), value.get("source")
    bounds = list(layers) if isinstance(layers, list | tuple) else []
    whole = all(type(one) is int and 0 <= one <= 10**6 for one in (*bounds, source))
    if len(bounds) != 2 or not whole or bounds[0] >= bounds[1]:
        raise PlanError(
            f"{name}: source {shown(source)} and layers {shown(layers)}, expected numbers, and "
            "layers as [first, one past the last]",
            hint=_HINT,
        )
    assert isinstance(source, int)
    parameters = Shared().parse(value.get("parameters", {}), f"{name}.parameters")
    return Span(source, bounds[0], bounds[1], parameters)


def _encoded(one: Slice) -> object:
    spans = [
        {
            "source": span.source,
            "layers": [span.start, span.end],
            **({"parameters": Shared().encode(span.parameters)} if span.parameters else {}),
        }
        for span in one.spans
    ]
    if len(spans) == 1 and not one.parameters and not one.spans[0].parameters:
        return [one.spans[0].source, one.spans[0].start, one.spans[0].end]
    return {
        "sources": spans,
        **({"parameters": Shared().encode(one.parameters)} if one.parameters else {}),
    }
