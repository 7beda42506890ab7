"""The keys of an adapter, sorted by the layer of the model that they are for.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight            r x in
base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight    out x r
base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector    out (DoRA)
base_model.model.model.embed_tokens.lora_embedding_A                      r x vocabulary
base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight      inside another one
base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias          replaces the bias
base_model.model.lm_head.weight                                           replaces the weight
base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta  replaces rows
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

from streammap.errors import CheckpointError, some

Part = Literal["A", "B", "embedding_A", "embedding_B", "magnitude_vector"]
_PREFIX = "base_model.model."
_INSIDE = ".base_layer"
_LORA = re.compile(
    r"(?P<module>.+?)(?P<inside>(?:\.base_layer)*)"
    r"\.lora_(?P<part>embedding_A|embedding_B|magnitude_vector|A|B)"
    r"(?:\.(?P<name>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<end>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")
_SAVED = re.compile(r"\.modules_to_save\.[^.]+(?=\.)")
_OTHERS = {
    ".lora_E": "singular values (AdaLoRA)",
    ".lora_down.": "a LoRA of another library than peft",
    ".lora_up.": "a LoRA of another library than peft",
    ".hada_": "a LoHa adapter",
    ".lokr_": "a LoKr adapter",
    ".ia3_": "an IA3 adapter",
    ".vera_": "a VeRA adapter",
    ".oft_": "an OFT adapter",
}
"""Part of a key -> what it is of; it can't be merged."""


@final
@dataclass(frozen=True, slots=True)
class Layer:
    """The matrices for one layer of the model."""

    module: str
    """Its name in the model; of a parameter of a module, the module's."""
    depth: int
    """Adapters of the same module that are around this one: 0 for the outermost."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """A, B, embedding_A, embedding_B, magnitude_vector, B.bias -> key in the adapter."""

    @property
    def factors(self) -> tuple[str, str]:
        """The keys of A and B."""
        is_embedding = "embedding_A" in self.parts
        names = ("embedding_A", "embedding_B") if is_embedding else ("A", "B")
        return self.parts[names[0]], self.parts[names[1]]

    @property
    def is_embedding(self) -> bool:
        """Whether it is for the rows of an embedding."""
        return "embedding_A" in self.parts


@final
@dataclass(frozen=True, slots=True)
class Content:
    """All of an adapter."""

    layers: tuple[Layer, ...]
    whole: Mapping[str, str]
    """Key in the model -> key in the adapter of the tensor that replaces it."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Module of an embedding -> key in the adapter of the rows that it has for some tokens."""


def sort(keys: Iterable[str], *, adapter: str) -> Content:
    """Sort an adapter's keys.

    Args:
        adapter: Its name, for messages.

    Raises:
        CheckpointError: tensors of something else, several adapters in one file, or A without B.
    """
    found: dict[tuple[str, int], dict[str, str]] = {}
    names: set[str | None] = set()
    whole: dict[str, str] = {}
    tokens: dict[str, str] = {}
    for key in keys:
        other = next((what for part, what in _OTHERS.items() if part in key), None)
        if other is not None:
            raise CheckpointError(
                f"{adapter}: {key}: {other}, expected lora_A and lora_B",
                hint="merge it with peft (merge_and_unload)",
            )
        match = _LORA.fullmatch(key)
        of_tokens = _TOKENS.fullmatch(key)
        if of_tokens is not None:
            tokens[_plain(of_tokens["module"])] = key
        elif match is None:
            if ".original_module." not in key:
                whole[_plain(_SAVED.sub("", key).replace(_INSIDE, ""))] = key
        else:
            place = _plain(match["module"]), match["inside"].count(_INSIDE)
            part = match["part"] + (".bias" if match["end"] == "bias" else "")
            parts = found.setdefault(place, {})
            names.add(match["name"])
            if part in parts and len(names) == 1:
                raise CheckpointError(f"{adapter}: {key} and {parts[part]} are one tensor")
            parts[part] = key
    if len(names) > 1:
        told = some(sorted(str(name or "one without a name") for name in names))
        raise CheckpointError(
            f"{adapter}: {len(names)} adapters in one file ({told}), expected one",
            hint="save each by itself: model.save_pretrained(folder, selected_adapters=[name])",
        )
    layers = tuple(Layer(module, depth, parts) for (module, depth), parts in found.items())
    for layer in layers:
        _check_whole(layer, adapter)
    if not layers and not whole and not tokens:
        raise CheckpointError(f"{adapter}: no tensors", hint="was its training saved?")
    return Content(layers, whole, tokens)


def _check_whole(layer: Layer, adapter: str) -> None:
    """Refuse half a product."""
    for first, second in (("A", "B"), ("embedding_A", "embedding_B")):
        if (first in layer.parts) != (second in layer.parts):
            there, missing = (first, second) if first in layer.parts else (second, first)
            raise CheckpointError(
                f"{adapter}: {layer.parts[there]} has no lora_{missing} beside it",
                hint="copy the adapter again: a part of it is missing",
            )
    if not {"A", "embedding_A"} & layer.parts.keys():
        raise CheckpointError(
            f"{adapter}: {next(iter(layer.parts.values()))} without lora_A and lora_B",
            hint="copy the adapter again: a part of it is missing",
        )


def _plain(name: str) -> str:
    """A name without what peft writes before it."""
    while name.startswith(_PREFIX):
        name = name.removeprefix(_PREFIX)
    return name
