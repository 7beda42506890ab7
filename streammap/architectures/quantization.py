"""Quantised checkpoints: read as plain ones where their format is known, refused by name otherwise.

Codes mean something only together with scales, so no axis of them can be averaged or split: formats
that are read are decoded under the checkpoint (io/codecs). config.json alone proves nothing: its
quantization_config is often left over where the weights were saved in bfloat16 again. Then it goes,
as do the scales of a quantised KV cache, which belong to the server's cache and not to the weights.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

from streammap.errors import CheckpointError, some
from streammap.io.checkpoint import Checkpoint
from streammap.io.codecs import opened, quantization_config
from streammap.io.dtypes import TensorSpec

_DEQUANTISE = (
    "dequantise it first: load it with transformers and the library that wrote it, and save it in "
    "bfloat16 (model.dequantize() where it has that)"
)
_CODES = (
    "resize it before --keep-quantised, which stands last; or dequantise it first: load it with "
    "transformers and save it in bfloat16"
)
_MLX = "dequantise it first: mlx_lm.convert --hf-path MODEL --mlx-path OUT --dequantize"
_KEYS = (
    (re.compile(r".*\.weight_scale(_inv|_2)?|.*\.input_scale"), "fp8 with scales", _CODES),
    (re.compile(r".*\.weight\.(absmax|quant_map|quant_state\..*)"), "bitsandbytes", _DEQUANTISE),
    (re.compile(r".*\.W_q"), "HQQ", _DEQUANTISE),
    (re.compile(r".*\.codebooks"), "AQLM", _DEQUANTISE),
    (re.compile(r".*\.(q_weight|q_scale(_max)?|q_groups|q_invperm|q_perm)"), "EXL2", _DEQUANTISE),
    (re.compile(r".*\.(trellis|suh|svh)"), "EXL3", _DEQUANTISE),
    (re.compile(r".*\.Qidxs(_.*)?"), "QuIP#", _DEQUANTISE),
    (re.compile(r".*\.weight\._(data|scale|shift)"), "quanto", _DEQUANTISE),
    (re.compile(r".*\.weight_scales"), "EETQ", _DEQUANTISE),
    (re.compile(r".*\.biases"), "MLX", _MLX),
    (re.compile(r".*\.pre_quant_scale"), "AWQ of ModelOpt", _DEQUANTISE),
    (re.compile(r".*\.(qweight|qzeros|g_idx|scales)"), "GPTQ or AWQ", _CODES),
    (re.compile(r".*_proj_(blocks|scales)"), "MXFP4", _CODES),
    (re.compile(r".*\.weight_(packed|shape|zero_point)"), "compressed-tensors", _CODES),
)
_BESIDE = {"AQLM": "codes", "MLX": "weight"}
"""What stands beside a key of a format, packed; other models have such keys too."""
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


def is_quantized(specs: Mapping[str, TensorSpec], config: Mapping[str, object]) -> bool:
    """Whether `check` refuses it."""
    try:
        check(specs, config)
    except CheckpointError:
        return True
    return False


def check(specs: Mapping[str, TensorSpec], config: Mapping[str, object]) -> None:
    """Refuse tensors that are codes.

    Raises:
        CheckpointError: naming the method and a tensor.
    """
    method = _method(config)
    for key, spec in specs.items():
        # A cheap look first: a plan of 100,000 tensors asks this several times.
        for pattern, usual, hint in () if key.endswith(_PLAIN) else _KEYS:
            if pattern.fullmatch(key) and _has_codes(key, usual, specs):
                raise CheckpointError(
                    f"{key}: quantised ({method or usual}), its weights can't be resized", hint=hint
                )
        is_packed = method is not None and spec.dtype in _PACKED and not key.endswith(_BUFFERS)
        if spec.dtype in _DTYPES or is_packed:
            by = "" if method is None else f" ({method})"
            raise CheckpointError(
                f"{key}: dtype {spec.dtype} is quantised{by} and can't be resized",
                hint=_CODES if spec.dtype in ("F8_E4M3", "F8_E5M2") else _DEQUANTISE,
            )


def _has_codes(key: str, name: str, specs: Mapping[str, TensorSpec]) -> bool:
    """Whether the codes of a format are beside one of its keys, if it is known by both."""
    if name not in _BESIDE:
        return True
    codes = specs.get(f"{key.rpartition('.')[0]}.{_BESIDE[name]}")
    return codes is not None and codes.dtype in _PACKED


def as_plain(checkpoint: Checkpoint, *, decodes: bool = True) -> Checkpoint:
    """A checkpoint as one of plain weights: decoded, without what quantisation left beside them.

    Its quantization_config goes, and so do the scales of a quantised KV cache; a note says so. One
    with codes that are not read keeps both.

    Args:
        decodes: Whether codes are decoded; otherwise one with codes stays as it is.

    Raises:
        CheckpointError: codes without their scales, or of shapes that don't fit.
    """
    stored = checkpoint
    scales = [key for key, slot in checkpoint.slots.items() if _is_of_cache(key, slot.spec)]
    checkpoint = opened.decoded(checkpoint) if decodes else checkpoint
    config = checkpoint.config or {}
    is_decoded = checkpoint is not stored
    if not scales and _method(config) is None and not is_decoded:
        return checkpoint
    slots = {key: slot for key, slot in checkpoint.slots.items() if key not in set(scales)}
    if is_quantized({key: slot.spec for key, slot in slots.items()}, config):
        return checkpoint
    notes = list(checkpoint.notes)
    method = _method(config)
    if method is not None:
        why = "" if is_decoded else ": no weight is quantised"
        notes.append(f"config.json: quantization_config ({method}) is left out{why}")
        plain = quantization_config.without(config)
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
    """The method of a quantization_config; None without one."""
    table = quantization_config.find(config)
    return None if table is None else str(table.get("quant_method", "unknown"))[:40]
