"""Heads that share the embedding's tensor: one tensor instead of two, where these are equal."""

import copy
from collections.abc import Mapping
from dataclasses import replace

from streammap.architectures.config_fields import set_field
from streammap.architectures.key_pattern import first_match
from streammap.architectures.schema import LMHead
from streammap.errors import PlanError
from streammap.io.dtypes import DTYPE_BITS
from streammap.planning import graph
from streammap.planning.graph import Derived, LinearForm, TensorRef
from streammap.planning.plan import Plan, Promise

_PIECE_NBYTES = 2**20


def tie(plan: Plan) -> tuple[Plan, tuple[Promise, str], tuple[str, ...]]:
    """The plan whose head reads the embedding, what that promises, and notes.

    Both are read here, to see that they are one.

    Raises:
        PlanError: no head of its own, a head that is another tensor, or one that was computed.
        CheckpointError: a source can't be read.
    """
    model = plan.model
    targets, fields, notes = dict(plan.targets), list[str](), list[str]()
    for head in model.architecture.heads:
        own = [key for key in targets if first_match(head.head, key) is not None]
        shared = [key for key in targets if first_match(head.embed, key) is not None]
        if not own or not shared:
            continue
        for key in own:
            if plan.moment is None:
                _check_equal(plan, key, shared[0])
            elif (
                plan.moment.of_gradients is not None
            ):  # the gradient of one tensor in two places is the sum of both
                both = [(1.0, targets[shared[0]]), (1.0, targets[key])]
                targets[shared[0]] = graph.combine(both)
            del targets[key]
        notes.append(f"{own[0]} is {shared[0]}, bit for bit: the head is tied to it")
        fields.append(_field(head, plan.config))
    if not fields:
        tied = "it is tied to the embedding already" if model.tied else "there is none"
        raise PlanError(
            f"{model.name}: --tie, but no head has a tensor of its own: {tied}",
            hint="leave --tie out",
        )
    config = None if plan.config is None else copy.deepcopy(dict(plan.config))
    if config is not None:
        for name in fields:
            set_field(config, name, True)
    made = replace(plan, targets=targets, config=config, request=None)
    return made, ("bit-exact", "the head is the embedding"), tuple(notes)


def _field(head: LMHead, config: Mapping[str, object] | None) -> str:
    """Where config.json says whether the head is tied: where it stands, or at the top."""
    inner = f"{head.path}tie_word_embeddings"
    if config is not None and head.path and "tie_word_embeddings" in config:
        return "tie_word_embeddings"
    return inner


def _check_equal(plan: Plan, key: str, embedding: str) -> None:
    head, embed = plan.targets[key], plan.targets[embedding]
    if head.spec != embed.spec:
        raise PlanError(
            f"--tie: {key} is {head.spec}, {embedding} is {embed.spec}",
            hint="only a head that is equal to the embedding can be tied to it",
        )
    pairs = _alike(head, embed)
    if pairs is None:
        raise PlanError(
            f"--tie: {key} and {embedding} are computed in two ways",
            hint="save the result first, then tie the head: streammap convert RESULT OUT --tie",
        )
    for one, other in pairs:
        at = _difference(one, other)
        if at is not None:
            place = [at // one.spec.shape[-1], at % one.spec.shape[-1]]
            raise PlanError(
                f"--tie: {key} differs from {embedding} at {place}, the first of all differences",
                hint="this head is not tied: leave --tie out",
            )


def _alike(head: LinearForm, embed: LinearForm) -> list[tuple[TensorRef, TensorRef]] | None:
    """The stored tensors that must be equal for the forms to be; None where that does not tell."""
    pairs: list[tuple[TensorRef, TensorRef]] = []
    if len(head.terms) != len(embed.terms):
        return None
    for one, other in zip(head.terms, embed.terms, strict=True):
        if one.maps != other.maps or [c for c, _ in one.blend] != [c for c, _ in other.blend]:
            return None
        pairs += [(a, b) for (_, a), (_, b) in zip(one.blend, other.blend, strict=True) if a != b]
    derived = any(isinstance(ref.source, Derived) for pair in pairs for ref in pair)
    return None if derived or any(a.spec != b.spec for a, b in pairs) else pairs


def _difference(one: TensorRef, other: TensorRef) -> int | None:
    """The first element at which two stored tensors differ; None where none does."""
    item = max(1, DTYPE_BITS[one.spec.dtype] // 8)
    for start in range(0, one.spec.nbytes, _PIECE_NBYTES):
        n = min(_PIECE_NBYTES, one.spec.nbytes - start)
        pieces = bytearray(n), bytearray(n)
        for ref, piece in zip((one, other), pieces, strict=True):
            ref.source.read_into(ref.key, start, memoryview(piece))
        if pieces[0] != pieces[1]:
            return (start + next(i for i in range(n) if pieces[0][i] != pieces[1][i])) // item
    return None
