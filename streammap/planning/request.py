"""What was asked for a plan, as a tree of calls: operators, their options, and what they read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from streammap.errors import PlanError, some
from streammap.io.storage.resolve import PathLike

Moved = Mapping[str, PathLike] | PathLike | None
"""Path of a source in the record -> where it is now; or where the only source is."""
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


def paths_of(call: OperatorCall) -> tuple[str, ...]:
    """The sources' paths as recorded, each once."""
    return tuple(dict.fromkeys(str(opened.options.get("path")) for opened in call.opens()))


def moved(call: OperatorCall, sources: Moved) -> dict[str, PathLike]:
    """Recorded path -> where that source is now, for those that have moved.

    Raises:
        PlanError: a path that is not in the record, or one new place for several sources.
    """
    paths = paths_of(call)
    if sources is None:
        return {}
    if not isinstance(sources, Mapping):
        if len(paths) != 1:
            raise PlanError(
                f"{sources}: which of {len(paths)} sources is it ({some(paths)})",
                hint="give OLD=NEW for each source that has moved",
            )
        return {paths[0]: sources}
    places: dict[str, PathLike] = {}
    for old, new in sources.items():
        known = next((path for path in paths if path in (old, str(Path(old).absolute()))), None)
        if known is None:
            raise PlanError(f"{old}: no source of this result", hint=f"it has {some(paths)}")
        places[known] = new
    return places
