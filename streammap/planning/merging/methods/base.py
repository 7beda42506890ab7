"""What a method of merging is: parameters, and the form that it makes of one tensor's sources."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from streammap.planning.graph import LinearForm


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number of a method, which may depend on the place of a tensor."""

    scope: Literal["source", "shared"] = "shared"
    """Whether each source has its own, or the tensor one."""
    default: float | None = None
    """None where it must be given."""
    is_flag: bool = False
    """Whether it says yes or no: 1 or 0."""


@dataclass(frozen=True, slots=True)
class Part:
    """One source's tensor, and its parameters there."""

    form: LinearForm
    numbers: Mapping[str, float]


class Method(ABC):
    """A way to make one tensor of several."""

    name: ClassVar[str]
    parameters: ClassVar[Mapping[str, Parameter]]
    takes_base: ClassVar[bool] = False
    """Whether it reads a base, which the others are compared with."""
    needs_base: ClassVar[bool] = True
    """Whether it does not without, if it takes one."""
    max_sources: ClassVar[int | None] = None
    """Beside the base; None for any number."""

    @abstractmethod
    def form(
        self,
        key: str,
        parts: Sequence[Part],
        base: LinearForm | None,
        numbers: Mapping[str, float],
    ) -> LinearForm:
        """The tensor of the result, in any dtype.

        Args:
            key: Its name, for messages.
            parts: In the order of the sources; one at least.
            base: Where the method takes one.
            numbers: The shared parameters there.

        Raises:
            PlanError: numbers that make no sense together.
        """
