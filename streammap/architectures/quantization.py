"""Quantised checkpoints: recognised by their tensors, and refused.

Their numbers mean something only together with scales, so no axis of them can be averaged or split.
config.json alone proves nothing: its quantization_config is often left over where the weights were
saved in bfloat16 again. Then it goes, as do the scales of a quantised KV cache, which belong to the
server's cache and not to the weights.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from streammap.errors import CheckpointError, some
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TensorSpec

_KEYS = (
    (re.compile(r".*\.weight_scale(_inv|_2)?|.*\.input_scale"), "fp8 with scales"),
    (re.compile(r".*\.(qweight|qzeros|g_idx|scales)"), "GPTQ or AWQ"),
    (re.compile(r".*_proj_(blocks|scales)"), "MXFP4"),
    (re.compile(r".*\.weight\.(absmax|quant_map|quant_state\..*)"), "bitsandbytes"),
    (re.compile(r".*\.weight_(packed|shape|zero_point)"), "compressed-tensors"),
)
_PLAIN = (".weight", ".bias")
"""Endings that no key of a quantised tensor has."""
_DTYPES = (
    "F8_E5M2",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E4M3FNUZ",
    "F8_E5M2FNUZ",
    "F4",
    "F6_E2M3",
    "F6_E3M2",
)
_PACKED = ("I8", "I16", "I32", "U8", "U16", "U32")
"""Dtypes of packed weights, where config.json says that they are quantised."""
_BUFFERS = ("position_ids", ".bias", ".masked_bias")
"""Endings of masks and numbers that are no weights, whatever their dtype."""
_CACHE = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale", "_proj.output_scale")
_FIELD = "quantization_config"
_HINT = "dequantise it first: load it with transformers and save it in bfloat16"


def is_quantized(specs: Mapping[str, TensorSpec], config: Mapping[str, object]) -> bool:
    """Whether `check` refuses it."""
    try:
        check(specs, config)
    except CheckpointError:
        return True
    return False


def check(specs: Mapping[str, TensorSpec], config: Mapping[str, object]) -> None:
    """Refuse a quantised checkpoint.

    Raises:
        CheckpointError: naming the method and a tensor.
    """
    method = _method(config)
    for key, spec in specs.items():
        # A cheap look first: a plan of 100,000 tensors asks this several times.
        for pattern, usual in () if key.endswith(_PLAIN) else _KEYS:
            if pattern.fullmatch(key):
                raise CheckpointError(
                    f"{key}: quantised ({method or usual}), its weights can't be resized",
                    hint=_HINT,
                )
        is_packed = method is not None and spec.dtype in _PACKED and not key.endswith(_BUFFERS)
        if spec.dtype in _DTYPES or is_packed:
            by = "" if method is None else f" ({method})"
            raise CheckpointError(
                f"{key}: dtype {spec.dtype} is quantised{by} and can't be resized", hint=_HINT
            )


def without_leftovers(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint of plain weights without what quantisation has left beside them.

    Its quantization_config goes, and so do the scales of a quantised KV cache; a note says so. One
    whose weights are quantised stays as it is.
    """
    scales = [key for key, slot in checkpoint.slots.items() if _is_of_cache(key, slot.spec)]
    config = checkpoint.config or {}
    if not scales and _method(config) is None:
        return checkpoint
    slots = {key: slot for key, slot in checkpoint.slots.items() if key not in set(scales)}
    if is_quantized({key: slot.spec for key, slot in slots.items()}, config):
        return checkpoint
    notes = list(checkpoint.notes)
    method = _method(config)
    if method is not None:
        notes.append(
            f"config.json: quantization_config ({method}) is left out: no weight is quantised"
        )
        plain = _without(config)
        checkpoint = replace(checkpoint, config=plain, config_text=None)
    if scales:
        notes.append(
            f"{some(scales)}: scales of a quantised KV cache, left out: they are calibrated for "
            "one model (servers take 1.0 where there are none)"
        )
        checkpoint = replace(checkpoint, slots=slots)
    return replace(checkpoint, notes=tuple(notes))


def _is_of_cache(key: str, spec: TensorSpec) -> bool:
    return key.endswith(_CACHE) and spec.n_elements == 1


def _method(config: Mapping[str, object]) -> str | None:
    """The method of a quantization_config, of the model or of a part of it; None without one."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            if name == _FIELD:
                return str(value.get("quant_method", "unknown"))[:40]
            if (inner := _method(value)) is not None:
                return inner
    return None


def _without(config: Mapping[str, object]) -> dict[str, object]:
    """The config without a quantization_config anywhere."""
    return {
        name: _without(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not (name == _FIELD and isinstance(value, Mapping))
    }
