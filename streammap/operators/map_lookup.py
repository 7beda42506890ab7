"""Which map a model grows by: one saved with it, or where else a user would expect it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from streammap.architectures.model import Model
from streammap.operators.resize_options import Resize
from streammap.planning import map_search
from streammap.planning.map_file import MapLevel
from streammap.planning.map_search import Searched
from streammap.planning.plan import Plan

R = TypeVar("R", bound=Resize)
Sizes = Mapping[str, int] | None
"""Axis -> size that the result must have; None where any will do."""


def fitting_level(
    levels: tuple[MapLevel, ...], model: Model, target: Sizes, *, grows: bool
) -> MapLevel | None:
    """The last level whose large (or small) side is this model."""
    side = 1 if grows else 0
    for level in reversed(levels):
        fits = True
        for axis, pair in level.sizes.items():
            own = model.sizes.get(axis, _alias_size(model, axis))
            fits = fits and pair[side] == own
            if target is not None and axis in target:
                fits = fits and pair[1 - side] == target[axis]
        if fits:
            return level
    return None


def completed(op: R, source: Plan, target: Sizes) -> R:
    """A request to grow with the map that it needs, if that is not beside the source but found."""
    only_unties = op.untie and target is None
    if op.levels is not None or op.is_explicit or only_unties or op.grouping is not None:
        return op
    if fitting_level(source.levels, source.model, target, grows=True) is not None:
        return op
    found = _searched(source, target)
    return replace(op, map=found.levels) if found is not None and found.levels else op


def told(source: Plan, target: Sizes) -> tuple[str, str]:
    """Where a map was looked for, and the option that would name it, for messages."""
    found = _searched(source, target)
    if found is None:
        return "the source", "--map FOLDER (with the map that was saved when it was made)"
    if found.near is not None:
        return ", ".join(found.looked), f"--map {found.near} (it has a map of these sizes)"
    return ", ".join(found.looked), "--map FOLDER (the folder that coalesce wrote)"


def _searched(source: Plan, target: Sizes) -> Searched | None:
    """What is found for an opened checkpoint; a chain has the maps that it was made by."""
    if source.steps or len(source.sources) != 1 or source.sources[0].place is None:
        return None
    model, axes = source.model, source.model.architecture.axes

    def fits(levels: tuple[MapLevel, ...]) -> bool:
        level = fitting_level(levels, model, target, grows=True)
        if level is None or not level.named:
            return False
        # A map of the depth alone would leave the widths as they are.
        left = {
            name: size
            for name, size in (target or {}).items()
            if name in axes and axes[name].kind in ("width", "depth", "expert")
        }
        named = level.sizes.keys() & model.sizes.keys()
        return all(
            name in named or model.sizes.get(name, size) == size for name, size in left.items()
        )

    return map_search.search(source.sources[0], fits)


def _alias_size(model: Model, name: str) -> int | None:
    alias = model.architecture.aliases.get(name)
    return None if alias is None else model.size(alias)
