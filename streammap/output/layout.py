"""How tensors lie in shards, byte by byte, and the index that says which shard has which.

Shards are filled in the order of the targets, as the Hub does: a tensor that would make a shard
larger than allowed begins the next one. Inside a shard the widest dtype comes first: the format
allows no padding, so that order keeps every tensor aligned.
"""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot

METADATA = {"format": "pt"}
INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of the result."""

    name: str
    head: bytes
    """The bytes before the tensors: length and header."""
    slots: tuple[Slot, ...]
    tail_nbytes: int = 0
    """Bytes after the last tensor."""
    around: Callable[[], Iterable[tuple[int, bytes]]] | None = None
    """(offset, bytes) of all that is in the file but the tensors; None for the head alone."""

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return (self.slots[-1].end if self.slots else len(self.head)) + self.tail_nbytes

    def left_nbytes(self, written: Container[str]) -> int:
        """Bytes of the tensors whose keys are not among the `written` ones."""
        return sum(slot.spec.nbytes for slot in self.slots if slot.key not in written)


def arrange(
    specs: Mapping[str, TensorSpec], *, max_shard_nbytes: int, single: str | None = None
) -> tuple[Shard, ...]:
    """The shards of a result.

    Args:
        single: Name of the only file, whatever its size; by default the Hub's names.
    """
    parts = groups(specs, max_shard_nbytes=max_shard_nbytes, is_single=single is not None)
    named = names("model", ".safetensors", len(parts), single)
    return tuple(_shard(name, part, specs) for name, part in zip(named, parts, strict=True))


def groups(
    specs: Mapping[str, TensorSpec], *, max_shard_nbytes: int, is_single: bool
) -> list[list[str]]:
    """The keys of each shard."""
    parts: list[list[str]] = [[]]
    room = max_shard_nbytes
    for key, spec in specs.items():
        if not is_single and spec.nbytes > room and parts[-1]:
            parts.append([])
            room = max_shard_nbytes
        parts[-1].append(key)
        room -= spec.nbytes
    return parts


def names(stem: str, ending: str, n: int, single: str | None) -> list[str]:
    """Names of `n` shards, as loaders look for them; `single` names the only one."""
    if n == 1:
        return [single or stem + ending]
    return [f"{stem}-{i:05d}-of-{n:05d}{ending}" for i in range(1, n + 1)]


def holding(shards: Sequence[Shard], keys: Container[str]) -> list[Shard]:
    """The shards that have some of these tensors, or none at all."""
    return [s for s in shards if not s.slots or any(slot.key in keys for slot in s.slots)]


def index(shards: Sequence[Shard]) -> bytes:
    """model.safetensors.index.json."""
    weight_map = {slot.key: shard.name for shard in shards for slot in shard.slots}
    slots = [slot for shard in shards for slot in shard.slots]
    metadata = {
        "total_parameters": sum(slot.spec.n_elements for slot in slots),
        "total_size": sum(slot.spec.nbytes for slot in slots),
    }
    content = {"metadata": metadata, "weight_map": weight_map}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _shard(name: str, keys: Sequence[str], specs: Mapping[str, TensorSpec]) -> Shard:
    ordered = sorted(keys, key=lambda key: -DTYPE_BITS[specs[key].dtype])
    head = safetensors_header.encode([(key, specs[key]) for key in ordered], METADATA)
    slots = []
    offset = len(head)
    for key in ordered:
        slots.append(Slot(key, specs[key], offset))
        offset += specs[key].nbytes
    return Shard(name, head, tuple(slots))
