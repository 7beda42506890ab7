"""What an optimizer's state is, wherever it is stored."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from streammap.errors import CheckpointError, some
from streammap.io.checkpoint import Checkpoint
from streammap.io.formats.safetensors_header import Slot

PREFIX = "optim.state."
"""Begins the keys of state in plans and records."""
STEP = "step"
_ADAM: Mapping[str, Literal[1, 2]] = {"exp_avg": 1, "exp_avg_sq": 2}
_KINDS: tuple[Mapping[str, Literal[1, 2]], ...] = (
    _ADAM,
    {**_ADAM, "max_exp_avg_sq": 2},
    {"exp_avg": 1},
    {"momentum_buffer": 1},
)
"""What optimizers keep of a parameter -> the power of gradients that it is a mean of: Adam and
AdamW, both with amsgrad, Lion, SGD with momentum."""
_FRESH = "leave --optimizer out: the optimizer starts fresh"


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Parameters with the same options."""

    names: tuple[str, ...]
    options: Mapping[str, object] = field(default_factory=dict)
    """lr, betas, eps, weight_decay ..."""


@final
@dataclass(frozen=True, slots=True)
class Form:
    """How a state dict is stored, so that the result's is found by the same code."""

    kind: Literal["dcp", "torch"]
    nest: str = "optim"
    """What it stands under in a DCP folder."""
    is_flat: bool = False
    """Of a DCP folder: whether torch's flatten_optimizer_state_dict wrote it."""
    is_named: bool = True
    """Of a torch file: whether it has the names of its parameters."""


@final
@dataclass(frozen=True, slots=True)
class OptimizerFile:
    """A stored state; numbers are read when they are used."""

    checkpoint: Checkpoint
    """Its tensors, by `key_of`."""
    entries: Mapping[str, Mapping[str, float | None]]
    """Parameter -> what is kept of it: a number, or None for a tensor. Parameters that have no
    names are called by their numbers: "0", "1" ..."""
    groups: tuple[Group, ...]
    form: Form

    @property
    def moments(self) -> Mapping[str, Literal[1, 2]]:
        """What is kept of each parameter -> the power of gradients that it is a mean of."""
        kept = next(iter(self.entries.values())).keys() - {STEP}
        return next(kind for kind in _KINDS if kind.keys() == kept)


def key_of(name: str, entry: str) -> str:
    """The key of an entry of a parameter's state."""
    return f"{PREFIX}{name}.{entry}"


def check(where: str, entries: Mapping[str, Iterable[str]], groups: Iterable[Group]) -> None:
    """Refuse a state that is not whole, or of an optimizer whose state has no map.

    Raises:
        CheckpointError: naming parameters, and what is kept of them.
    """
    names = [name for group in groups for name in group.names]
    missing = [name for name in names if name not in entries]
    if missing or not entries:
        raise CheckpointError(
            f"{where}: no state of {len(missing)} of {len(names)} parameters: {some(missing)}",
            hint=f"save it after a step in which all parameters have gradients, or {_FRESH}",
        )
    counts = Counter(names)
    loose = [name for name in entries if name not in counts]
    twice = [name for name, n in counts.items() if n > 1]
    if loose or twice:
        told = f"state of {some(loose)}, in no group" if loose else f"{some(twice)} in two groups"
        raise CheckpointError(f"{where}: {told}", hint="save the optimizer's state again")
    first, kept = next((name, set(found) - {STEP}) for name, found in entries.items())
    if not any(kind.keys() == kept for kind in _KINDS):
        known = "; ".join(", ".join(kind) for kind in _KINDS)
        raise CheckpointError(
            f"{where}: {first} has {some(sorted(kept)) or 'no moments'}, expected one of: {known}",
            hint=f"only means of whole gradients have maps, not 8-bit or factored ones: {_FRESH}",
        )
    for name, found in entries.items():
        if set(found) - {STEP} != kept:
            raise CheckpointError(
                f"{where}: {name} has {some(sorted(found)) or 'nothing'}, and {first} has "
                f"{some(sorted(kept))}",
                hint=f"save the optimizer's state again, or {_FRESH}",
            )


def digest_of(slots: Iterable[Slot]) -> str:
    """What locates the tensors, as records have it of weight files."""
    text = repr([(slot.key, slot.spec, slot.start) for slot in slots]).encode()
    return hashlib.sha256(text).hexdigest()
