"""Two checkpoints of one model, tensor beside tensor: one of them is the frame, by whose names,
dtypes and config.json the other is seen.

Refused is what can't be one model: other architectures, sizes, layouts, a tied head beside one of
its own. What may differ is told in notes: names, dtypes, heads that only one has, fields of
config.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammap.errors import ArchitectureError, CheckpointError, PlanError, some
from streammap.planning import planner
from streammap.planning.graph import LinearForm
from streammap.planning.matching import config_difference, pairing
from streammap.planning.matching.config_difference import FieldDifference
from streammap.planning.matching.pairing import Pairing
from streammap.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Words:
    """What messages call the two."""

    source: str = "the source"
    target: str = "the target"
    """The frame."""

    @property
    def bare(self) -> tuple[str, str]:
        """Both without their article."""
        return self.source.removeprefix("the "), self.target.removeprefix("the ")


@dataclass(frozen=True, slots=True)
class Match:
    """A checkpoint in the frame of another."""

    pairs: Pairing
    """Of the frame (the first) and the checkpoint (the second)."""
    kept: tuple[str, ...]
    """Keys of a head or pooler that only the frame has."""
    added: Mapping[str, str]
    """Keys of those that only the checkpoint has -> the same as the frame would spell them."""
    fields: tuple[FieldDifference, ...]
    """Of config.json, where equal weights would compute something else."""
    notes: tuple[str, ...]
    forms: Mapping[str, LinearForm]
    """Key of the frame -> the checkpoint's tensor; float tensors that both have."""


def match(source: Plan, target: Plan, words: Words) -> Match:
    """See `source` in the frame of `target`.

    Raises:
        PlanError: two checkpoints that are not of one model.
    """
    _check_models(source, target, words)
    pairs = pairing.pair(target, source)
    kept, added = _extras(source, target, pairs, words)
    fields = _config_differences(source, target)
    notes = []
    if fields:
        told = "; ".join(field.told(words.source, words.target) for field in fields)
        notes.append(f"config.json is {words.target}'s; it differs: {told}")
    notes += [*_names(pairs, kept, added, words), *_dtypes(source, target, pairs, words)]
    respelled = pairing.respelled(pairs, source.model, added) if added else {}
    forms = _forms(source, target, pairs, words)
    return Match(pairs, tuple(kept), respelled, fields, tuple(notes), forms)


def untied(plans: Mapping[str, Plan]) -> tuple[tuple[Plan, ...], tuple[str, ...]]:
    """All of them with heads of their own, and notes.

    Args:
        plans: By the words for them.

    Raises:
        PlanError: none has a tied head, or its head can't have a tensor of its own.
    """
    if not any(plan.model.tied for plan in plans.values()):
        raise PlanError(
            "--untie, but no head is tied to the embedding",
            hint="leave it out: the heads have tensors of their own",
        )
    made, notes = [], []
    for name, plan in plans.items():
        if plan.model.tied:
            plan, more = planner.untie(plan)
            notes += [f"{name}'s tied head gets a tensor of its own", *more]
        made.append(plan)
    return tuple(made), tuple(notes)


def config_of(source: Plan, target: Plan, match: Match) -> Mapping[str, object] | None:
    """The frame's config.json; the class is the source's where only the source has a head."""
    name = "architectures"
    if target.config is None or source.config is None or match.kept or not match.added:
        return target.config
    return {**target.config, name: source.config.get(name, target.config.get(name))}


def _check_models(source: Plan, target: Plan, words: Words) -> None:
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
            f"{words.source} is a model of type {mine.name}, {words.target} of {theirs.name}",
            hint="blend two checkpoints of one architecture",
        )
    for axis, size in theirs.sizes.items():
        if axis in mine.sizes and mine.sizes[axis] != size:
            one, other = words.bare
            hint = "blend two checkpoints of the same size"
            if axis == "vocab":
                largest = max(size, mine.sizes[axis])
                hint += (
                    f"; if only padding is missing: streammap convert MODEL OUT --vocab {largest}"
                )
            raise PlanError(
                f"{axis}: {one} {mine.sizes[axis]}, {other} {size}",
                hint=hint,
            )
    for tied, of_tied, own, of_own in (
        (mine, words.source, target, words.target),
        (theirs, words.target, source, words.source),
    ):
        heads = [] if own.model.tied else tied.tied_heads
        stored = [key for key in own.targets if any(head.is_head(key) for head in heads)]
        if stored:
            raise PlanError(
                f"{of_tied}'s head is tied to its embedding, {of_own} has {stored[0]}",
                hint="give --untie: a tied head gets a tensor of its own; in a recipe, name what "
                "streammap convert MODEL OUT --untie makes of it",
            )


def _extras(
    source: Plan, target: Plan, pairs: Pairing, words: Words
) -> tuple[list[str], list[str]]:
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
        _refuse(source, target, missing, surplus, words)
    return kept, added


def _refuse(
    source: Plan, target: Plan, missing: tuple[str, ...], surplus: tuple[str, ...], words: Words
) -> None:
    if missing and surplus and _n_elements(target, missing) == _n_elements(source, surplus):
        raise PlanError(
            f"the same numbers in two layouts: {words.source} has {some(surplus)}, {words.target} "
            f"{some(missing)}",
            hint="save one of them again in the other's layout, with the library that wrote it",
        )
    difference = (
        f"lacks {some(missing)}" if missing else f"has {some(surplus)}, which {words.target} lacks"
    )
    raise PlanError(
        f"{words.source} {difference} ({len(missing)} missing, {len(surplus)} surplus of "
        f"{len(target.targets)} tensors)",
        hint="blend two checkpoints of the same model",
    )


def _n_elements(plan: Plan, keys: tuple[str, ...]) -> int:
    return sum(plan.targets[key].spec.n_elements for key in keys)


def _names(pairs: Pairing, kept: Sequence[str], added: Sequence[str], words: Words) -> list[str]:
    """Notes on tensors that are called otherwise, or that one of the two lacks."""
    notes = []
    if pairs.renamed:
        key, other = next(iter(pairs.renamed.items()))
        notes.append(
            f"{len(pairs.renamed)} tensors are called otherwise in {words.source} ({other} is "
            f"{key}): the result has {words.target}'s names"
        )
    if pairs.copies:
        notes.append(
            f"{some(list(pairs.copies))}: {words.source}'s copy of a tied tensor is not used"
        )
    if kept:
        notes.append(f"{some(kept)} (of {len(kept)}): only {words.target} has them; not blended")
    if added:
        notes.append(f"{some(added)} (of {len(added)}): only {words.source} has them; not blended")
    return notes


def _dtypes(source: Plan, target: Plan, pairs: Pairing, words: Words) -> list[str]:
    """Notes on dtypes that differ."""
    mixed = {
        (other.spec.dtype, form.spec.dtype)
        for key, form in target.targets.items()
        if (other := source.targets.get(pairs.other(key))) is not None
        and other.spec.dtype != form.spec.dtype
    }
    one, other_ = words.bare
    return [f"{one} {a} and {other_} {b}: the result is {b}" for a, b in sorted(mixed)]


def _config_differences(source: Plan, target: Plan) -> tuple[FieldDifference, ...]:
    if source.config is None or target.config is None or source.config == target.config:
        return ()
    models = pairing.same_spec(source, target)
    spec = None if models is None else models[0].architecture
    return config_difference.differences(source.config, target.config, spec)


def _forms(source: Plan, target: Plan, pairs: Pairing, words: Words) -> dict[str, LinearForm]:
    """The source's float tensors by the target's keys.

    Raises:
        PlanError: tensors whose shapes differ, or that are numbers in one of them only.
    """
    constants: set[str] | None = None
    forms: dict[str, LinearForm] = {}
    one, other_ = words.bare
    for key, form in target.targets.items():
        other = source.targets.get(pairs.other(key))
        if other is None:
            continue
        if other.spec.shape != form.spec.shape:
            constants = _constants(target) if constants is None else constants
            if key in constants:
                continue
            raise PlanError(
                f"{key}: {one} shape {list(other.spec.shape)}, "
                f"{other_} shape {list(form.spec.shape)}",
                hint="blend two checkpoints of the same size",
            )
        if not form.spec.is_float:
            continue
        if not other.spec.is_float:
            raise PlanError(f"{key}: {one} dtype {other.spec.dtype}, {other_} {form.spec.dtype}")
        forms[key] = other
    return forms


def _constants(plan: Plan) -> set[str]:
    try:
        return pairing.constants(plan.model)
    except (ArchitectureError, CheckpointError):
        return set()
