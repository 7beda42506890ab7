"""What an operator is: a class whose fields are its options, and a `plan` that makes a plan.

    @declared
    class Scale(Operator):
        \"\"\"Multiply some tensors by a number.\"\"\"

        key: str = option(help="Keys to scale, with * for any text.", metavar="GLOB")
        by: float = option(help="The factor.")

        def plan(self, source: Plan) -> Plan: ...

With a line in registry.py it is a command with its `plan` twin, a Python call, and an entry of
records that `apply` and `verify --recompute` can repeat. Inputs beside the source are fields too:
`plan` gets them as plans, by name. CONTRIBUTING.md walks through an example.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Union, final

from streammap.common.declare import Declared, argument, check, declared, option, options_of
from streammap.common.kinds import Kind, shown
from streammap.errors import PlanError

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.planning.map_file import MapLevel
    from streammap.planning.plan import Plan, Search

__all__ = [
    "Apply",
    "HasPlan",
    "Input",
    "Operator",
    "PlanLike",
    "argument",
    "check",
    "declared",
    "inputs_of",
    "option",
]


class HasPlan(Protocol):
    """An opened or planned checkpoint."""

    @property
    def plan(self) -> "Plan":
        """Its plan."""
        ...


PlanLike = Union[str, Path, "Plan", HasPlan]  # one of them is not imported
"""A checkpoint as an operator's input: where it is, or what was opened or planned."""


Apply = Callable[["Operator", "Plan"], "Plan"]
"""Makes the plan of an operator, with its record."""


class Operator(ABC):
    """Turns plans into a plan. Subclasses are `declared`; they are values and never change."""

    name: ClassVar[str]
    """What commands, calls and records call it: the class's name, in lower case with dashes."""
    examples: ClassVar[tuple[str, ...]] = ()
    """Command lines, without the program's name, for the help text."""

    def __init_subclass__(cls) -> None:
        """Name the operator after its class."""
        cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()

    def completed(self, source: "Plan", *more: Any, **inputs: Any) -> "Operator":
        """The operator with what it finds for itself, which its record has to hold."""
        return self

    def arranged(
        self, apply: "Apply", source: "Plan", **inputs: Any
    ) -> "tuple[Operator, Plan, Mapping[str, Any]]":
        """The operator and its inputs, where these are to be changed by operators of their own.

        Their records hold those, so that what is asked for here is left out of this one's.
        """
        return self, source, inputs

    def search(self, source: "Plan", *more: Any, **inputs: Any) -> "Search | None":
        """What has to be found by reading before it can be run; None where nothing has to."""
        return None

    def found(self, level: "MapLevel") -> "Operator":
        """The operator with what its search found."""
        raise NotImplementedError

    @abstractmethod
    def plan(self, source: "Plan", *more: Any, **inputs: Any) -> "Plan":
        """The plan of the result. A subclass names its own inputs, as keywords.

        Raises:
            StreammapError: the options do not fit the model.
        """


@final
class Input(Kind):
    """A checkpoint that the operator reads beside its source, or several."""

    in_json = False  # it is a call of its own, inside the operator's

    def __init__(self, *, many: bool = False, adapter: bool = False) -> None:
        """What is given by its place is opened.

        Args:
            many: Any number of them, as a sequence.
            adapter: They are adapters, which are no models by themselves.
        """
        self.many, self.adapter = many, adapter
        if many:
            self.form = "many"

    def parse(self, value: Any, name: str) -> Any:
        """A path, a plan, or what has one."""
        from streammap.planning.plan import Plan

        several = value if self.many and isinstance(value, list | tuple) else (value,)
        for one in several:
            if not isinstance(one, str | Path | Plan) and not isinstance(
                getattr(one, "plan", None), Plan
            ):
                raise PlanError(f"{name} is {shown(one)}, expected a checkpoint")
        return tuple(several) if self.many else value


def inputs_of(operator: Operator | type[Operator]) -> Iterator[Declared]:
    """The inputs beside the source."""
    cls = operator if isinstance(operator, type) else type(operator)
    return (one for one in options_of(cls) if isinstance(one.kind, Input))


def is_adapter(one: Declared) -> bool:
    """Whether an input is an adapter, or several."""
    return isinstance(one.kind, Input) and one.kind.adapter


def settled(operator: Operator, source: "Plan") -> Mapping[str, object]:
    """Values that could only be read with the source at hand; the others are read already."""
    values = {}
    for one in options_of(type(operator)):
        value = getattr(operator, one.name)
        if isinstance(one.kind, OfSource) and value is not one.default:
            values[one.name] = one.kind.settle(value, source)
    return values


class OfSource(Kind):
    """A kind whose values depend on the source."""

    def settle(self, value: Any, source: "Plan") -> object:
        """The value for this source."""
        raise NotImplementedError
