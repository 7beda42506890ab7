"""Where the tensors of a plan stand in its model: at which depth, and of which kinds."""

from collections.abc import Iterable, Iterator

from streammap.architectures import axis_facts, key_pattern
from streammap.architectures.model import Family, Model
from streammap.errors import ArchitectureError, CheckpointError, PlanError
from streammap.planning.merging.settings import Place, Setting
from streammap.planning.plan import Plan


def places_of(plan: Plan, settings: Iterable[Setting]) -> dict[str, Place]:
    """Key -> place, as far as these settings ask for it.

    Raises:
        PlanError: a list over depth, or a kind, and no spec says what the tensors are.
    """
    if not any(setting.asks_spec for setting in settings):
        return {key: Place(key) for key in plan.targets}
    try:
        model = plan.model
    except (ArchitectureError, CheckpointError) as error:
        raise PlanError(
            f"numbers over depth, or by kind, ask for the model's layers: {error.message}",
            hint="give numbers by filter alone, which is a part of a key; or --arch",
        ) from error
    return dict(_places(model))


def _places(model: Model) -> Iterator[tuple[str, Place]]:
    for family in model.families:
        kinds = kinds_of(model, family)
        for values, key in family.members.items():
            yield key, Place(key, depth_of(model, family, values), kinds)


def depth_of(model: Model, family: Family, values: tuple[int, ...]) -> float:
    """0 for a tensor of the first layer, 1 for one of the last; 0 for one of no layer."""
    for index, value in zip(family.indices, values, strict=True):
        if index in model.architecture.depth_axes:
            n = model.sizes[index]
            return min(value / (n - 1), 1.0) if n > 1 else 1.0
    return 0.0


def kinds_of(model: Model, family: Family) -> frozenset[str]:
    """What a family's tensors are; a norm is a norm alone, whatever it normalises."""
    spec = model.architecture
    if family.rule.kind in ("norm", "embedding"):
        return frozenset([family.rule.kind])
    key = next(iter(family.members.values()))
    if any(key_pattern.first_match(head.head, key) is not None for head in spec.heads):
        return frozenset(["head"])
    axes, found = axis_facts.axes_of(model, family), set()
    of_heads = {*spec.spaces.get("heads", ()), *spec.spaces.get("kv_heads", ())}
    if axes & of_heads or "attn" in key or "attention" in key:
        found.add("attention")
    elif any(axis_facts.is_expert(spec, axis) for axis in axes):
        found.add("experts")
    if axes & set(spec.spaces.get("mlp", ())) or ".mlp." in key:
        found.add("mlp")
    return frozenset(found)
