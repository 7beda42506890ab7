"""A number by place: one for all tensors, others by the depth of a layer, others by name.

    0.5                                             everywhere
    [0.2, 0.8]                                      over depth, between them in a straight line
    [{"filter": "mlp", "value": [0, 1]}, 0.5]       the first filter in a tensor's key counts

A filter is a part of a key, or a pattern where it has a `*`. Depth runs from 0 at the first layer
to 1 at the last; what is in no layer has depth 0. These are mergekit's rules (its 0.1.5), so that
its parameters mean the same here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import isfinite

from streammap.errors import PlanError

_HINT = 'give a number, a list over depth such as [0, 1], or [{"filter": "mlp", "value": 0.5}, 1]'


@dataclass(frozen=True, slots=True)
class Rule:
    """The numbers of the tensors that a filter takes."""

    filter: str | None
    """A part of their keys, or a pattern; None takes all."""
    values: tuple[float, ...]
    """Over depth; one for all."""

    def takes(self, key: str) -> bool:
        """Whether a tensor is of this rule."""
        if self.filter is None or self.filter == "*":
            return True
        return fnmatchcase(key, self.filter) if "*" in self.filter else self.filter in key

    def at(self, depth: float) -> float:
        """The number at a depth of 0 to 1."""
        place = depth * (len(self.values) - 1)
        first = int(place)
        last = min(first + 1, len(self.values) - 1)
        rest = place - first
        return (1 - rest) * self.values[first] + rest * self.values[last]


@dataclass(frozen=True, slots=True)
class Setting:
    """Rules, of which the first that takes a tensor counts."""

    rules: tuple[Rule, ...]

    @property
    def number(self) -> float | None:
        """The one number of all tensors; None where it depends on the place."""
        everywhere = len(self.rules) == 1 and self.rules[0].filter in {None, "*"}
        if everywhere and len(set(self.rules[0].values)) == 1:
            return self.rules[0].values[0]
        return None

    @property
    def numbers(self) -> tuple[float, ...]:
        """All numbers that it names."""
        return tuple(value for rule in self.rules for value in rule.values)

    def at(self, key: str, depth: float) -> float | None:
        """The number of a tensor; None if no rule takes it."""
        return next((rule.at(depth) for rule in self.rules if rule.takes(key)), None)


def parse(value: object, *, what: str) -> Setting:
    """A setting as JSON, YAML or Python has it.

    Args:
        what: Its name, for messages.

    Raises:
        PlanError: it is of another form, or has a number that is not finite.
    """
    if isinstance(value, Setting):
        return value
    if isinstance(value, Mapping):
        return Setting((_rule(value, what),))
    if isinstance(value, list | tuple) and any(isinstance(each, Mapping) for each in value):
        return Setting(tuple(_rule(each, what) for each in value))
    return Setting((Rule(None, _numbers(value, what)),))


def _rule(value: object, what: str) -> Rule:
    if not isinstance(value, Mapping):
        return Rule(None, _numbers(value, what))
    unknown = sorted(str(name) for name in value.keys() - {"filter", "value"})
    if unknown or "value" not in value:
        problem = f"has {', '.join(unknown)}" if unknown else "has no value"
        raise PlanError(f"{what}: a rule {problem}, expected filter and value", hint=_HINT)
    pattern = value.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        raise PlanError(f"{what}: filter {pattern!r}, expected a part of a key", hint=_HINT)
    return Rule(pattern, _numbers(value["value"], what))


def _numbers(value: object, what: str) -> tuple[float, ...]:
    given: Iterable[object] = value if isinstance(value, list | tuple) else (value,)
    numbers = tuple(_number(each, what) for each in given)
    if not numbers:
        raise PlanError(f"{what}: an empty list", hint=_HINT)
    return numbers


def _number(value: object, what: str) -> float:
    if isinstance(value, str):
        # YAML reads 1e-3 as text.
        try:
            value = float(value)
        except ValueError:
            raise PlanError(f"{what}: {value!r}, expected a number", hint=_HINT) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        raise PlanError(f"{what}: {value!r}, expected a number", hint=_HINT)
    return float(value)
