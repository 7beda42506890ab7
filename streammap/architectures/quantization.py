"""Quantised checkpoints: recognised by config.json or by their tensors, and refused.

Their numbers mean something only together with scales, so no axis of them can be averaged or split.
"""

import re
from collections.abc import Mapping

from streammap.errors import CheckpointError
from streammap.io.dtypes import TensorSpec

_KEYS = (
    (re.compile(r".*\.weight_scale(_inv|_2)?|.*\.(input|k|v)_scale"), "fp8 with scales"),
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
    how = config.get("quantization_config")
    if isinstance(how, Mapping):
        method = str(how.get("quant_method", "unknown"))[:40]
        raise CheckpointError(
            f"config.json: quantization_config ({method}): quantised weights can't be resized",
            hint=_HINT,
        )
    for key, spec in specs.items():
        # A cheap look first: a plan of 100,000 tensors asks this several times.
        for pattern, method in () if key.endswith(_PLAIN) else _KEYS:
            if pattern.fullmatch(key):
                raise CheckpointError(
                    f"{key}: quantised ({method}), its weights can't be resized", hint=_HINT
                )
        if spec.dtype in _DTYPES:
            raise CheckpointError(
                f"{key}: dtype {spec.dtype} is quantised and can't be resized", hint=_HINT
            )
