"""What was asked for a plan, as a tree of calls: operators, their options, and what they read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

Inputs = Mapping[str, "OperatorCall | tuple[OperatorCall, ...]"]


@final
@dataclass(frozen=True, eq=False, slots=True)
class OperatorCall:
    """One call. The same object stands for the same call: an opened source that is used twice."""

    operator: str
    """Its name; "open" for a checkpoint, which is where a tree ends."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Values of JSON; under "maps" a tuple of MapLevel, or a MapDigests."""
    inputs: Inputs = field(default_factory=dict)
    """Name of an input -> the call that makes it, or several."""

    def inner(self) -> Iterator["OperatorCall"]:
        """The calls that make the inputs."""
        for calls in self.inputs.values():
            yield from calls if isinstance(calls, tuple) else (calls,)

    def opens(self) -> Iterator["OperatorCall"]:
        """The opened sources, each once, in the order of the tree."""
        return iter({id(call): call for call in self._all() if call.operator == "open"}.values())

    def _all(self) -> Iterator["OperatorCall"]:
        yield self
        for call in self.inner():
            yield from call._all()


@final
@dataclass(frozen=True, slots=True)
class MapDigests:
    """Maps that are too large for a record: they are found by their digests."""

    sha256: tuple[str, ...]
