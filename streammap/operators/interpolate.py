"""Interpolate: (1 - alpha) * target + alpha * source, every tensor.

Source: Zou, Zhang, Deng, ICLR 2024, arXiv:2404.07999.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from streammap.common.declare import Real
from streammap.errors import ArchitectureError, CheckpointError, PlanError, some
from streammap.operators.declare import (
    EXTRAPOLATION,
    Input,
    Operator,
    PlanLike,
    argument,
    declared,
    option,
)
from streammap.planning import graph, planner
from streammap.planning.graph import LinearForm
from streammap.planning.matching import config_difference, pairing
from streammap.planning.matching.config_difference import FieldDifference
from streammap.planning.matching.pairing import Pairing
from streammap.planning.plan import Plan, Promise, Step


@declared
class Interpolate(Operator):
    """Blend two checkpoints of one model: (1 - alpha) * TGT + alpha * SRC."""

    examples: ClassVar[tuple[str, ...]] = ("interpolate grown/ big/ out/ --alpha 0.5",)

    target: PlanLike = argument(
        help="The other checkpoint; the result has its names, dtypes, config.json and files.",
        kind=Input(),
        metavar="TGT",
        kw_only=False,
    )
    alpha: float = option(
        help="Weight of SRC in the result, 0 to 1.",
        group="Blend",
        kind=Real(0.0, 1.0, hint=EXTRAPOLATION),
        metavar="A",
    )
    untie: bool = option(
        default=False,
        help="Give a tied head a tensor of its own, where only one of the two has that.",
        group="Blend",
    )

    def plan(self, source: Plan, *, target: Plan) -> Plan:
        """The blended plan, in the frame of `target`: its names, dtypes, config.json and files.

        Raises:
            PlanError: two checkpoints that are not of one model.
        """
        notes: list[str] = []
        if self.untie:
            source, target = _untied(source, target, notes)
        _check_models(source, target)
        pairs = pairing.pair(target, source)
        kept, added = _extras(source, target, pairs)
        fields = _config_differences(source, target)
        if fields:
            notes.append(f"config.json is the target's; it differs: {'; '.join(map(str, fields))}")
        notes += [*_names(pairs, kept, added), *_dtypes(source, target, pairs)]
        targets = _blend(source, target, self.alpha, pairs)
        if added:
            names = pairing.respelled(pairs, source.model, added)
            targets |= {name: source.targets[key] for key, name in names.items()}
        return replace(
            target,
            targets=targets,
            config=_config(source, target, kept, added),
            sources=tuple(dict.fromkeys((*source.sources, *target.sources))),
            steps=(*source.steps, *target.steps, self._step(fields, notes)),
            levels=source.levels or target.levels,
            request=None,
        )

    def _step(self, fields: Sequence[FieldDifference], notes: Sequence[str]) -> Step:
        promise: Promise = "bit-exact"
        if self.alpha == 0.0:
            reason = "alpha 0 is the target"
        elif self.alpha == 1.0 and fields:
            promise, reason = "approximate", f"the source has another {fields[0].name}"
        elif self.alpha == 1.0:
            reason = "alpha 1 is the source"
        else:
            promise, reason = "approximate", "the mean of two models' weights is a third model"
        options = {"alpha": self.alpha, **({"untie": True} if self.untie else {})}
        return Step(self.name, options, promise, reason, tuple(notes))


def _untied(source: Plan, target: Plan, notes: list[str]) -> tuple[Plan, Plan]:
    """Both, each with a head of its own.

    Raises:
        PlanError: neither has a tied head, or its head can't have a tensor of its own.
    """
    if not source.model.tied and not target.model.tied:
        raise PlanError(
            "--untie, but no head is tied to the embedding",
            hint="leave it out: the heads have tensors of their own",
        )
    both = {"source": source, "target": target}
    for name, one in both.items():
        if one.model.tied:
            both[name], more = planner.untie(one)
            notes += [f"the {name}'s tied head gets a tensor of its own", *more]
    return both["source"], both["target"]


def _check_models(source: Plan, target: Plan) -> None:
    """Equal shapes can hide another number of heads; where a spec is known, sizes must agree.

    Raises:
        PlanError: models of two architectures, or sizes, or heads that are tied in one of them.
    """
    same = (source.config, source.architecture) == (target.config, target.architecture)
    if same and source.targets.keys() == target.targets.keys():
        return  # no spec has to be loaded for it: shapes are checked anyway
    try:
        mine, theirs = source.model, target.model
    except (ArchitectureError, CheckpointError):
        return
    if mine.name != theirs.name and mine.architecture.name != theirs.architecture.name:
        raise PlanError(
            f"the source is a model of type {mine.name}, the target of {theirs.name}",
            hint="blend two checkpoints of one architecture",
        )
    for axis, size in theirs.sizes.items():
        if axis in mine.sizes and mine.sizes[axis] != size:
            raise PlanError(
                f"{axis}: source {mine.sizes[axis]}, target {size}",
                hint="blend two checkpoints of the same size",
            )
    for tied, of_tied, own, of_own in (
        (mine, "source", target, "target"),
        (theirs, "target", source, "source"),
    ):
        heads = [] if own.model.tied else tied.tied_heads
        stored = [key for key in own.targets if any(head.is_head(key) for head in heads)]
        if stored:
            raise PlanError(
                f"the {of_tied}'s head is tied to its embedding, the {of_own} has {stored[0]}",
                hint="give --untie: a tied head gets a tensor of its own",
            )


def _extras(source: Plan, target: Plan, pairs: Pairing) -> tuple[list[str], list[str]]:
    """Tensors of heads that only the target has, and only the source; they are taken as they are.

    Raises:
        PlanError: other tensors that only one of them has.
    """
    missing, surplus = pairs.only
    models = pairing.same_spec(source, target) if missing or surplus else None
    kept: list[str] = []
    added: list[str] = []
    if models is not None:
        mine, theirs = models
        constants = pairing.constants(mine) | pairing.constants(theirs)
        missing = tuple(key for key in missing if key not in constants)
        surplus = tuple(key for key in surplus if key not in constants)
        kept = pairing.of_other_classes(theirs, missing, mine)
        added = pairing.of_other_classes(mine, surplus, theirs)
    missing = tuple(key for key in missing if key not in set(kept))
    surplus = tuple(key for key in surplus if key not in set(added))
    if missing or surplus:
        _refuse(source, target, missing, surplus)
    return kept, added


def _refuse(source: Plan, target: Plan, missing: tuple[str, ...], surplus: tuple[str, ...]) -> None:
    if missing and surplus and _n_elements(target, missing) == _n_elements(source, surplus):
        raise PlanError(
            f"the same numbers in two layouts: the source has {some(surplus)}, the target "
            f"{some(missing)}",
            hint="save one of them again in the other's layout, with the library that wrote it",
        )
    difference = (
        f"lacks {some(missing)}" if missing else f"has {some(surplus)}, which the target lacks"
    )
    raise PlanError(
        f"the source {difference} ({len(missing)} missing, {len(surplus)} surplus of "
        f"{len(target.targets)} tensors)",
        hint="blend two checkpoints of the same model",
    )


def _n_elements(plan: Plan, keys: tuple[str, ...]) -> int:
    return sum(plan.targets[key].spec.n_elements for key in keys)


def _names(pairs: Pairing, kept: list[str], added: list[str]) -> list[str]:
    """Notes on tensors that are called otherwise, or that one of the two lacks."""
    notes = []
    if pairs.renamed:
        key, other = next(iter(pairs.renamed.items()))
        notes.append(
            f"{len(pairs.renamed)} tensors are called otherwise in the source ({other} is {key}): "
            "the result has the target's names"
        )
    if pairs.copies:
        notes.append(f"{some(list(pairs.copies))}: the source's copy of a tied tensor is not used")
    if kept:
        notes.append(f"{some(kept)} (of {len(kept)}): only the target has them; not blended")
    if added:
        notes.append(f"{some(added)} (of {len(added)}): only the source has them; not blended")
    return notes


def _dtypes(source: Plan, target: Plan, pairs: Pairing) -> list[str]:
    """Notes on dtypes that differ."""
    mixed = {
        (other.spec.dtype, form.spec.dtype)
        for key, form in target.targets.items()
        if (other := source.targets.get(pairs.other(key))) is not None
        and other.spec.dtype != form.spec.dtype
    }
    return [f"source {a} and target {b}: the result is {b}" for a, b in sorted(mixed)]


def _config_differences(source: Plan, target: Plan) -> tuple[FieldDifference, ...]:
    if source.config is None or target.config is None or source.config == target.config:
        return ()
    models = pairing.same_spec(source, target)
    spec = None if models is None else models[0].architecture
    return config_difference.differences(source.config, target.config, spec)


def _config(
    source: Plan, target: Plan, kept: list[str], added: list[str]
) -> Mapping[str, object] | None:
    """The target's config.json; the class is the source's where only the source has a head."""
    name = "architectures"
    if target.config is None or source.config is None or kept or not added:
        return target.config
    return {**target.config, name: source.config.get(name, target.config.get(name))}


def _blend(source: Plan, target: Plan, alpha: float, pairs: Pairing) -> dict[str, LinearForm]:
    """(1 - alpha) * target + alpha * source, everywhere; dtypes are the target's.

    Raises:
        PlanError: tensors whose shapes differ, or that are numbers in one of them only.
    """
    constants: set[str] | None = None
    targets: dict[str, LinearForm] = {}
    for key, form in target.targets.items():
        other = source.targets.get(pairs.other(key))
        if other is not None and other.spec.shape != form.spec.shape:
            constants = _constants(target) if constants is None else constants
            if key not in constants:
                raise PlanError(
                    f"{key}: source shape {list(other.spec.shape)}, "
                    f"target shape {list(form.spec.shape)}",
                    hint="blend two checkpoints of the same size",
                )
            other = None
        if other is None or not form.spec.is_float:
            targets[key] = form
            continue
        if not other.spec.is_float:
            raise PlanError(f"{key}: source dtype {other.spec.dtype}, target {form.spec.dtype}")
        parts = [(1.0 - alpha, form), (alpha, other)]
        targets[key] = graph.combine(parts, dtype=form.spec.dtype)
    return targets


def _constants(plan: Plan) -> set[str]:
    try:
        return pairing.constants(plan.model)
    except (ArchitectureError, CheckpointError):
        return set()
