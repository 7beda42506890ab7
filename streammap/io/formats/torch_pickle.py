"""What the pickle of a torch file describes: the tensors, each as a view of a named storage.

The pickle is read by safe_pickle.py. In its table the calls that make a tensor become a
StoredTensor, which says where the bytes are; harmless things that training scripts keep beside the
model are skipped; any other name is an error.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

from streammap.errors import CheckpointError
from streammap.io.dtypes import FROM_TORCH
from streammap.io.formats import safe_pickle
from streammap.io.formats.safe_pickle import Name

MAX_NBYTES = 100_000_000
_MAX_STEPS = 10_000_000
"""A tensor takes about 40."""
_STORAGES = {
    "Double": "F64",
    "Float": "F32",
    "Half": "F16",
    "BFloat16": "BF16",
    "Long": "I64",
    "Int": "I32",
    "Short": "I16",
    "Char": "I8",
    "Byte": "U8",
    "Bool": "BOOL",
    "ComplexFloat": "C64",
    "ComplexDouble": "complex128",
    "QInt8": "qint8",
    "QUInt8": "quint8",
    "QInt32": "qint32",
    "QUInt4x2": "quint4x2",
    "QUInt2x4": "quint2x4",
    "Untyped": "U8",
}


@dataclass(frozen=True, slots=True)
class Dtype:
    """A dtype by its safetensors name; by torch's own where there is none."""

    name: str


@dataclass(frozen=True, slots=True)
class _StorageKind:
    """A storage class, by the dtype that it implies."""

    dtype: str


@dataclass(frozen=True, slots=True)
class Storage:
    """Bytes of the file that tensors are views of."""

    key: str
    """Names the file's entry: archive/data/KEY."""
    dtype: str


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A view of a storage."""

    storage: Storage
    dtype: str
    """Its safetensors name; torch's own where there is none."""
    offset: int
    """In elements, as the strides are."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class UnsupportedTensor:
    """A tensor that is not its bytes: sparse, quantised, conjugate, on no device ..."""


def read(content: bytes, *, file: str) -> object:
    """What a torch file's data.pkl describes: dicts, lists, atoms, and the classes above.

    Raises:
        CheckpointError: broken, too large, or a name in it that is not about tensors.
    """
    if len(content) > MAX_NBYTES:
        raise CheckpointError(
            f"{file}: a pickle of {len(content)} bytes, at most {MAX_NBYTES} are read",
            hint="save the state dict alone, as safetensors",
        )
    try:
        return safe_pickle.read(content, _NAMES, refer=_storage, max_steps=_MAX_STEPS)
    except safe_pickle.UnknownNameError as error:
        raise CheckpointError(
            f"{file}: its pickle asks for more than tensors: {error}",
            hint="only load files you trust; save the state dict alone, as safetensors",
        ) from error
    except safe_pickle.BrokenPickleError as error:
        raise CheckpointError(
            f"{file}: not a torch checkpoint: its pickle is broken ({error})",
            hint="download or save the file again",
        ) from error


def _storage(pid: object) -> Storage:
    """A persistent id: ("storage", class, key, device, number of elements)."""
    match pid:
        case ("storage" | b"storage", Name(value=_StorageKind(dtype)), str(key), _, int()):
            return Storage(key, dtype)
        case ("storage" | b"storage", Name(value=_StorageKind(dtype)), bytes(key), _, int()):
            return Storage(key.decode(), dtype)
    raise ValueError("a reference to something that is not a storage")


# Stand-ins for torch's functions.


def _rebuild_tensor(
    storage: object, offset: object, shape: object, strides: object
) -> StoredTensor:
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise TypeError("a tensor that is not a view of a storage")
    if offset < 0 or not _are_sizes(shape) or not _are_sizes(strides):
        raise ValueError("a tensor of negative sizes or strides")
    if len(shape) != len(strides):
        raise ValueError(f"{len(shape)} sizes and {len(strides)} strides")
    return StoredTensor(storage, storage.dtype, offset, shape, strides)


def _rebuild_tensor_v2(*arguments: object) -> StoredTensor | UnsupportedTensor:
    view, (_, _, *metadata) = _rebuild_tensor(*arguments[:4]), arguments[4:]
    return UnsupportedTensor() if any(metadata) else view  # conjugate, negated


def _rebuild_tensor_v3(*arguments: object) -> StoredTensor | UnsupportedTensor:
    view, (_, _, dtype, *metadata) = _rebuild_tensor(*arguments[:4]), arguments[4:]
    if not isinstance(dtype, Name) or not isinstance(dtype.value, Dtype):
        raise TypeError("a tensor without a dtype")
    return UnsupportedTensor() if any(metadata) else replace(view, dtype=dtype.value.name)


def _are_sizes(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )


def _rebuild_parameter(tensor: object, *more: object) -> StoredTensor | UnsupportedTensor:
    if not isinstance(tensor, StoredTensor | UnsupportedTensor):
        raise TypeError("a parameter that is not a tensor")
    return tensor


def _rebuild_from_type(function: object, kind: object, arguments: object, state: object) -> object:
    # Not itself again: the recursion would be as deep as the pickle likes.
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise TypeError("_rebuild_from_type_v2 with other arguments than tensors have")
    if function.call is _rebuild_from_type:  # a pickle could nest the call without end
        raise ValueError("_rebuild_from_type_v2 of itself")
    return function.call(*arguments)


def _unsupported(*arguments: object) -> UnsupportedTensor:
    return UnsupportedTensor()


_FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "collections.OrderedDict": safe_pickle.ordered_dict,
    "torch._tensor._rebuild_from_type_v2": _rebuild_from_type,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
_UNSUPPORTED = (
    "sparse_tensor",
    "sparse_csr_tensor",
    "qtensor",
    "nested_tensor",
    "wrapper_subclass",
    "meta_tensor_no_storage",
    "device_tensor_from_numpy",
    "device_tensor_from_cpu_tensor",
)
_HARMLESS = (
    "collections.Counter",
    "torch.Size",
    "torch.device",
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.set",
    "builtins.complex",
    "argparse.Namespace",
    "torch.per_tensor_affine",
    "torch.per_tensor_symmetric",
    "torch.per_channel_affine",
    "torch.per_channel_symmetric",
    "torch.per_channel_affine_float_qparams",
)
_UNKNOWN_DTYPES = (
    "complex128",
    "complex32",
    "qint8",
    "quint8",
    "qint32",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
"""Dtypes of torch that safetensors does not have, or this reader does not know."""
DTYPE_NAMES: Mapping[str, Name] = {
    f"torch.{word}": Name(value=Dtype(name))
    for word, name in (*FROM_TORCH.items(), *zip(_UNKNOWN_DTYPES, _UNKNOWN_DTYPES, strict=True))
}
_NAMES: Mapping[str, Name] = {
    **DTYPE_NAMES,
    **{
        f"{module}.{word}Storage": Name(value=_StorageKind(dtype))
        for module in ("torch", "torch.storage")
        for word, dtype in _STORAGES.items()
    },
    **{f"torch._utils._rebuild_{word}": Name(_unsupported) for word in _UNSUPPORTED},
    **{name: Name() for name in _HARMLESS},
    **{name: Name(function) for name, function in _FUNCTIONS.items()},
}
