"""A number by place: one for all tensors, others by the depth of a layer, by name or by kind.

    0.5                                             everywhere
    [0.2, 0.8]                                      over depth, between them in a straight line
    [{"filter": "mlp", "value": [0, 1]}, 0.5]       the first rule that takes a tensor counts
    [{"kind": "norm", "value": 0}, 0.5]             by what the spec says of a tensor (places.py)

A filter is a part of a key, or a pattern where it has a `*`. Depth runs from 0 at the first layer
to 1 at the last, and is 1 where there is one layer; what is in no layer has depth 0. Filters and
lists are mergekit's (its 0.1.5), so that its parameters mean the same here; patterns and kinds are
not.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from streammap.errors import PlanError

KINDS = ("attention", "embedding", "experts", "head", "mlp", "norm")
"""Kinds of tensors; one may be of several, of experts and mlp say."""
_HINT = 'give a number, a list over depth such as [0, 1], or [{"filter": "mlp", "value": 0.5}, 1]'
_MAX_RULES = 10_000
_MOST = 1e30


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in its model."""

    key: str
    depth: float = 0.0
    """Of its layer: 0 for the first, 1 for the last."""
    kinds: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Rule:
    """The numbers of the tensors that a filter takes."""

    filter: str | None
    """A part of their keys, or a pattern; None takes all."""
    values: tuple[float, ...]
    """Over depth; one for all."""
    kind: str | None = None
    """What they must be, too."""

    def takes(self, place: Place) -> bool:
        """Whether a tensor is of this rule."""
        if self.kind is not None and self.kind not in place.kinds:
            return False
        if self.filter is None or self.filter == "*":
            return True
        return (
            fnmatchcase(place.key, self.filter)
            if "*" in self.filter
            else (self.filter in place.key)
        )

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
        first = self.rules[0]
        everywhere = first.filter in {None, "*"} and first.kind is None
        if everywhere and len(set(first.values)) == 1:
            return first.values[0]
        return None

    @property
    def numbers(self) -> tuple[float, ...]:
        """All numbers that it names."""
        return tuple(value for rule in self.rules for value in rule.values)

    @property
    def asks_spec(self) -> bool:
        """Whether the key of a tensor is not enough."""
        return any(rule.kind is not None or len(set(rule.values)) > 1 for rule in self.rules)

    def at(self, place: Place) -> float | None:
        """The number of a tensor; None if no rule takes it."""
        return next((rule.at(place.depth) for rule in self.rules if rule.takes(place)), None)

    def as_json(self) -> object:
        """The shortest form that `parse` reads as this."""
        if len(self.rules) == 1 and (self.rules[0].filter, self.rules[0].kind) == (None, None):
            return _listed(self.rules[0].values)
        return [
            {
                **({} if rule.filter is None else {"filter": rule.filter}),
                **({} if rule.kind is None else {"kind": rule.kind}),
                "value": _listed(rule.values),
            }
            for rule in self.rules
        ]

    def __str__(self) -> str:
        if self.number is not None:
            return f"{self.number:g}"
        parts = []
        for rule in self.rules:
            values = " ".join(f"{value:g}" for value in rule.values)
            of = " ".join(one for one in (rule.filter, rule.kind) if one is not None)
            parts.append(f"{of or 'else'}: {values}" if len(self.rules) > 1 or of else values)
        return f"({', '.join(parts)})"


def constant(number: float) -> Setting:
    """One number for all tensors."""
    return Setting((Rule(None, (number,)),))


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
        if len(value) > _MAX_RULES:
            raise PlanError(f"{what}: {len(value)} rules, at most {_MAX_RULES}")
        return Setting(tuple(_rule(each, what) for each in value))
    return Setting((Rule(None, _numbers(value, what)),))


def _listed(values: tuple[float, ...]) -> object:
    return values[0] if len(values) == 1 else list(values)


def _rule(value: object, what: str) -> Rule:
    if not isinstance(value, Mapping):
        return Rule(None, _numbers(value, what))
    unknown = sorted(str(name) for name in value.keys() - {"filter", "kind", "value"})
    if unknown or "value" not in value:
        problem = f"has {', '.join(unknown)}" if unknown else "has no value"
        raise PlanError(f"{what}: a rule {problem}, expected filter, kind and value", hint=_HINT)
    pattern, kind = value.get("filter"), value.get("kind")
    if pattern is not None and not isinstance(pattern, str):
        raise PlanError(f"{what}: filter {pattern!r}, expected a part of a key", hint=_HINT)
    if kind is not None and kind not in KINDS:
        raise PlanError(f"{what}: kind {kind!r}, expected one of {', '.join(KINDS)}", hint=_HINT)
    return Rule(pattern, _numbers(value["value"], what), kind)


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
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PlanError(f"{what}: {str(value)[:60]!r}, expected a number", hint=_HINT)
    if not abs(value) <= _MOST:  # so is NaN
        raise PlanError(f"{what}: a number beyond {_MOST:g}, or none", hint=_HINT)
    return float(value)
