"""The two names of a dtype: safetensors' and torch's. The only module that knows both."""

import torch

from streammap.errors import CheckpointError

_TORCH = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


def to_torch(name: str) -> torch.dtype:
    """Torch's dtype for a safetensors name.

    Raises:
        CheckpointError: torch has none.
    """
    if name not in _TORCH:
        raise CheckpointError(f"torch has no dtype {name}", hint="save it in another dtype")
    return _TORCH[name]


def from_torch(dtype: torch.dtype, *, where: str) -> str:
    """The safetensors name of a torch dtype.

    Raises:
        CheckpointError: safetensors has none; `where` says whose it was.
    """
    if dtype not in _NAMES:
        raise CheckpointError(f"{where}: safetensors has no dtype for {dtype}")
    return _NAMES[dtype]
