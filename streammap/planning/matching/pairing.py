"""Which tensors of two checkpoints of one model are the same, whatever each calls them.

    transformer.h.0.ln_1.weight     h.0.ln_1.weight                 a class with a head, and without
    embeddings.LayerNorm.weight     bert.embeddings.LayerNorm.gamma new names, and old ones
    lm_head.weight                  transformer.wte.weight          a stored copy of a tied head

Equal keys are one tensor. Of the others, those are one that the spec knows as one: of one family,
with equal indices. Without a spec that serves both, keys are all there is.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from streammap.architectures.key_pattern import Identity
from streammap.architectures.model import Family, Model
from streammap.errors import ArchitectureError, CheckpointError
from streammap.planning.plan import Plan

_CONSTANTS = ("buffer", "drop")
_OF_THE_BASE = ("norm", "embedding", "tensor")
"""Kinds of which a base model lacks none; a pooler, which is linear, it may lack."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """The tensors of two checkpoints, side by side."""

    renamed: Mapping[str, str] = field(default_factory=dict)
    """Key of the first -> key of the same tensor in the second, where that is another key."""
    only: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    """Keys of tensors that only the first has, and only the second."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Key of a further copy of a tied tensor in the second -> the first's key of that tensor."""

    def other(self, key: str) -> str:
        """The second's key of a tensor that both have."""
        return self.renamed.get(key, key)


def pair(first: Plan, second: Plan) -> Pairing:
    """Match the tensors of two checkpoints of one model."""
    left = [key for key in first.targets if key not in second.targets]
    right = [key for key in second.targets if key not in first.targets]
    if not left and not right:
        return Pairing()
    models = same_spec(first, second)
    if models is None:
        return Pairing(only=(tuple(left), tuple(right)))
    renamed = _by_identity(_identities(models[0], left), _identities(models[1], right))
    taken = set(renamed.values())
    there = [key for key in left if key not in renamed]
    here = [key for key in right if key not in taken]
    # A key of `there` may be a copy of a tensor that `second` has under one name only, or none.
    for key in there:
        for original in _originals(models[0], key, first.targets):
            if (other := renamed.get(original, original)) in second.targets:
                renamed[key] = other
                break
    back = {other: key for key, other in renamed.items()}
    copies: dict[str, str] = {}
    for key in here:
        for original in _originals(models[1], key, second.targets):
            if (own := back.get(original, original)) in first.targets:
                copies[key] = own
                break
    for key, other in _ends(models, there, here):
        if key not in renamed and other not in copies:
            renamed[key] = other
    taken = {*renamed.values(), *copies}
    only = (
        tuple(key for key in there if key not in renamed),
        tuple(key for key in here if key not in taken),
    )
    return Pairing(renamed, only, copies)


def same_spec(first: Plan, second: Plan) -> tuple[Model, Model] | None:
    """Both as their spec sees them; None where none serves them, or two different ones do."""
    try:
        models = first.model, second.model
    except (ArchitectureError, CheckpointError):
        return None
    return models if models[0].architecture.name == models[1].architecture.name else None


def constants(model: Model) -> set[str]:
    """Keys that the spec calls buffers, or drops: a checkpoint may have them or not."""
    return {
        key
        for family in model.families
        if family.rule.kind in _CONSTANTS
        for key in family.members.values()
    }


def of_other_classes(model: Model, keys: Iterable[str], other: Model) -> list[str]:
    """Of tensors that only `model` has, those of a head or pooler that the other's class lacks.

    These are whole modules outside of the layers; all that a base model has is none.
    """
    wanted = set(keys)
    modules = {_module(family) for family in other.families}
    has_base = any(_is_in_base(f) for f in model.families if not f.indices)
    return [
        key
        for family in model.families
        if not family.indices and _module(family) not in modules
        if family.rule.kind not in _OF_THE_BASE or (has_base and not _is_in_base(family))
        for key in family.members.values()
        if key in wanted
    ]


def respelled(pairs: Pairing, model: Model, keys: Iterable[str]) -> dict[str, str]:
    """Keys of the second, whose spec's view is `model` -> the same as the first would spell them.

    A first checkpoint with "encoder.layer.0...." has "pooler.dense", not "bert.pooler.dense".
    """
    in_base = {key for f in model.families if _is_in_base(f) for key in f.members.values()}
    ours, theirs = next(_prefixes(pairs.renamed), ("", ""))
    return {
        key: ours + key.removeprefix(theirs) if key in in_base and key.startswith(theirs) else key
        for key in keys
    }


def _prefixes(renamed: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Where one of two keys is the other behind a prefix: what each of them begins with."""
    for key, other in renamed.items():
        if key.endswith(f".{other}"):
            yield key.removesuffix(other), ""
        elif other.endswith(f".{key}"):
            yield "", other.removesuffix(key)


def _by_identity(
    first: Mapping[tuple[Identity, tuple[int, ...]], str | None],
    second: Mapping[tuple[Identity, tuple[int, ...]], str | None],
) -> dict[str, str]:
    return {
        key: other
        for identity, key in first.items()
        if key is not None and (other := second.get(identity)) is not None
    }


def _identities(
    model: Model, keys: Iterable[str]
) -> dict[tuple[Identity, tuple[int, ...]], str | None]:
    """What each of some keys is -> the key; None where two keys of them are one."""
    wanted = set(keys)
    found: dict[tuple[Identity, tuple[int, ...]], str | None] = {}
    for family in model.families:
        members = [(values, key) for values, key in family.members.items() if key in wanted]
        identity = family.identity if members else None
        for values, key in members:
            assert identity is not None
            place = identity, values
            found[place] = None if place in found else key
    return found


def _originals(model: Model, key: str, keys: Collection[str]) -> Iterator[str]:
    """The tensors of its own checkpoint that `key` is tied to."""
    if any(tied.is_head(key) for tied in model.tied_heads):
        yield from (k for k in keys if any(tied.is_embedding(k) for tied in model.tied_heads))
    for head in model.architecture.heads:
        for end, other in head.copies.items():
            original = key.removesuffix(end) + other
            if key.endswith(end) and original in keys:
                yield original


def _ends(
    models: tuple[Model, Model], first: list[str], second: list[str]
) -> Iterator[tuple[str, str]]:
    """Keys of tensors that are tied, of which each checkpoint has another one."""
    copies = {
        pair for model in models for tied in model.tied_heads for pair in tied.head.copies.items()
    }
    for one, two in sorted({*copies, *((b, a) for a, b in copies)}):
        left = [key for key in first if key.endswith(one)]
        right = [key for key in second if key.endswith(two)]
        if len(left) == len(right) == 1:
            yield left[0], right[0]


def _module(family: Family) -> tuple[str, str, tuple[str, ...]]:
    scope, text, _, names = family.identity
    return scope, text.rpartition(".")[0], names


def _is_in_base(family: Family) -> bool:
    """Whether keys begin with a variable of the spec: "{base}pooler.dense", not "lm_head"."""
    text = family.rule.pattern.text.removeprefix("{ prefix}")
    return text.startswith("{") and ":" not in text.partition("}")[0]
