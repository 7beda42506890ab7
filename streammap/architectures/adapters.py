"""LoRA adapters: recognised by their keys, and refused until they are merged.

    base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight
    base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight

The model's weight is base_layer + scale * lora_B . lora_A, and a product is not linear in its
factors: a mean of two adapters is not the adapter of the mean.
"""

from collections.abc import Collection

from streammap.errors import CheckpointError
from streammap.io import key_wrappers


def has_adapter(keys: Collection[str]) -> bool:
    """Whether `check` refuses them."""
    return any(map(key_wrappers.is_of_adapter, keys))


def check(keys: Collection[str]) -> None:
    """Refuse an adapter, alone or inside a model.

    Raises:
        CheckpointError: naming one of its tensors.
    """
    of_adapter = [key for key in keys if key_wrappers.is_of_adapter(key)]
    if not of_adapter:
        return
    alone = len(of_adapter) == len(keys)
    what = "a LoRA adapter without its model" if alone else "a model with a LoRA that is not merged"
    raise CheckpointError(
        f"{of_adapter[0]}: {what} ({len(of_adapter)} of {len(keys)} tensors are the adapter's)",
        hint="name the model and the adapter's folder: MODEL+ADAPTER"
        if alone
        else "merge it first, with peft: model.merge_and_unload().save_pretrained(folder)",
    )
