"""What wrappers of modules write into keys, taken off: the keys are those of the model inside.

module._orig_mod.model.norm.weight                 ->  model.norm.weight
model.layers.0._fsdp_wrapped_module.mlp.up.weight  ->  model.layers.0.mlp.up.weight
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

_ANYWHERE = {
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning Fabric",
}
"""Parts of a key that no model has: each block may be wrapped on its own."""
_LEADING = {"module.": "DataParallel", "base_model.model.": "PEFT"}
"""Beginnings that a model might have too, so that they count only where all keys have them."""
_DOUBLED = "model."
_ADAPTER = (".lora_A", ".lora_B", ".lora_embedding_", ".lora_magnitude_", ".base_layer.")


@dataclass(frozen=True, slots=True)
class PlainKeys:
    """Keys without what wrappers wrote into them."""

    plain: Mapping[str, str] = field(default_factory=dict)
    """Key of the file -> the model's own; empty where nothing is taken off."""
    wrappers: tuple[str, ...] = ()
    """What was taken off, each with what writes it: "_orig_mod. (torch.compile)"."""

    def key(self, stored: str) -> str:
        """The model's own name of a key of the file."""
        return self.plain.get(stored, stored)

    @property
    def clashes(self) -> Iterator[tuple[str, str, str]]:
        """Two keys of the file that are one of the model, and that one."""
        first: dict[str, str] = {}
        for stored, plain in self.plain.items():
            other = first.setdefault(plain, stored)
            if other != stored:
                yield other, stored, plain


def is_of_adapter(key: str) -> bool:
    """Whether a key is of a LoRA adapter, or of a layer that one is put around."""
    return any(part in key for part in _ADAPTER)


def unwrap(keys: Collection[str]) -> PlainKeys:
    """Find what wrappers wrote into the keys of a checkpoint."""
    # Nothing is copied for the many checkpoints whose keys are plain.
    names: Collection[str] = keys
    found: dict[str, str] = {}
    if any(f"{part}." in key for key in keys for part in _ANYWHERE):
        parts = {part for key in keys for part in key.split(".")[:-1] if part in _ANYWHERE}
        found |= {f"{part}.": who for part, who in _ANYWHERE.items() if part in parts}
        names = [_without(key, parts) for key in keys]
    while (leading := _leading(names)) is not None:
        prefix, who = leading
        found[prefix] = who
        names = [name.removeprefix(prefix) for name in names]
    if not found:
        return PlainKeys()
    wrappers = tuple(f"{text} ({who})" for text, who in found.items())
    return PlainKeys(dict(zip(keys, names, strict=True)), wrappers)


def _without(key: str, parts: Collection[str]) -> str:
    *modules, name = key.split(".")
    return ".".join((*(module for module in modules if module not in parts), name))


def _leading(names: Collection[str]) -> tuple[str, str] | None:
    """A wrapper's beginning that all names have."""
    if not names:
        return None
    for prefix, who in _LEADING.items():
        # An adapter that is not merged keeps the names that PEFT gave it, and is refused by them.
        if _all_begin(names, prefix) and not any(map(is_of_adapter, names)):
            return prefix, who
    # Of its own, "model." is the name that many models have for what is inside them.
    if _all_begin(names, _DOUBLED) and any(name.startswith(2 * _DOUBLED) for name in names):
        return _DOUBLED, "Lightning"
    return None


def _all_begin(names: Iterable[str], prefix: str) -> bool:
    return all(name.startswith(prefix) and name != prefix for name in names)
