"""TensorSpec: a tensor's dtype and shape, without its bytes.

dtypes go by their safetensors name ("BF16"); only code that moves numbers asks for torch's own.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from streammap.errors import CheckpointError

if TYPE_CHECKING:
    import torch

DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Every dtype of the safetensors format, with the bits of one element."""

FLOATS = ("F16", "BF16", "F32", "F64")
"""The dtypes that streammap computes with; all others are copied byte for byte."""
HALVES = frozenset({"F16", "BF16"})
"""Those of 16 bits."""

_NARROWER: dict[str, tuple[str, ...]] = {
    "F16": ("F8_E4M3", "F8_E5M2"),
    "BF16": ("F8_E4M3", "F8_E5M2"),
    "F32": ("F8_E4M3", "F8_E5M2", "F16", "BF16"),
    "F64": ("F8_E4M3", "F8_E5M2", "F16", "BF16", "F32"),
}


def holds(dtype: str, other: str) -> bool:
    """Whether a dtype has every number of another one."""
    return dtype == other or other in _NARROWER.get(dtype, ())


FROM_TORCH = {
    "float64": "F64",
    "double": "F64",
    "float32": "F32",
    "float": "F32",
    "float16": "F16",
    "half": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "long": "I64",
    "int32": "I32",
    "int": "I32",
    "int16": "I16",
    "short": "I16",
    "int8": "I8",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "bool": "BOOL",
    "complex64": "C64",
    "cfloat": "C64",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
}
"""torch's name of a dtype, or one of its names -> safetensors'."""

TORCH_NAMES = {name: word for word, name in reversed(FROM_TORCH.items())}
"""safetensors' name of a dtype -> torch's."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is: dtype and shape."""

    dtype: str
    """Its safetensors name, a key of DTYPE_BITS."""
    shape: tuple[int, ...]

    @property
    def n_elements(self) -> int:
        """Product of the shape; 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.n_elements * DTYPE_BITS[self.dtype] // 8

    @property
    def is_float(self) -> bool:
        """Whether streammap computes with it; others are copied byte for byte."""
        return self.dtype in FLOATS

    @property
    def accumulator(self) -> str:
        """The dtype sums are kept in: float32, or float64 for float64."""
        return "F64" if self.dtype == "F64" else "F32"

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@cache
def to_torch(name: str) -> "torch.dtype":
    """Torch's dtype for a safetensors name. Imports torch.

    Raises:
        CheckpointError: torch has none.
    """
    import torch

    if name not in TORCH_NAMES:
        raise CheckpointError(f"torch has no dtype {name}", hint="save it in another dtype")
    dtype: torch.dtype = getattr(torch, TORCH_NAMES[name])
    return dtype
