"""The pickle of a torch file, read into plain values; nothing of it ever runs.

A pickle is a program. torch.save writes it in few instructions and calls few functions, so these
are all that is read here: a call that makes a tensor becomes a StoredTensor, which says where the
bytes are; a call of something harmless that training scripts keep beside the model becomes an
Opaque, without being made; any other name is refused, and told.

Time and memory are bounded by the pickle's size: no call is made, no memo is sized by an index,
and no key is hashed that could hold others.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard, final

from streammap.errors import CheckpointError

MAX_NBYTES = 100_000_000
_MAX_STEPS = 10_000_000
"""A tensor takes about 40."""
DTYPES = {
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
"""torch's name of a dtype -> safetensors'."""
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
_DTYPE_WORDS = (
    *DTYPES,
    "complex128",
    "complex32",
    "qint8",
    "quint8",
    "qint32",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_MAKERS = {
    "torch._utils._rebuild_tensor": 4,
    "torch._utils._rebuild_tensor_v2": 6,
    "torch._utils._rebuild_tensor_v3": 7,
}
"""Function that makes a plain tensor -> how many arguments it takes at least."""
_WRAPPERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_TYPED = "torch._tensor._rebuild_from_type_v2"
_ODD = tuple(
    f"torch._utils._rebuild_{name}"
    for name in (
        "sparse_tensor",
        "sparse_csr_tensor",
        "qtensor",
        "nested_tensor",
        "wrapper_subclass",
        "meta_tensor_no_storage",
        "device_tensor_from_numpy",
        "device_tensor_from_cpu_tensor",
    )
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
_DICT = "collections.OrderedDict"


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


@dataclass(frozen=True, slots=True)
class Skipped:
    """A value of no interest, not made."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A function or class that the pickle names."""

    text: str


_OPAQUE = Skipped()
Atom = str | bytes | int | float | None


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
        return _Reader(content, file).read()
    except (IndexError, KeyError, ValueError, TypeError, struct.error) as error:
        what = f"{type(error).__name__} {error}"
        raise CheckpointError(
            f"{file}: not a torch checkpoint: its pickle is broken ({what})",
            hint="download or save the file again",
        ) from error


@final
class _Reader:
    def __init__(self, content: bytes, file: str) -> None:
        self._content, self._file = content, file
        self._at = 0
        self._stack: list[object] = []
        self._marks: list[int] = []
        self._memo: dict[int, object] = {}

    def read(self) -> object:
        steps: dict[int, Callable[[], None]] = {
            code[0]: step
            for code, step in (
                (b"\x80", self._protocol),
                (b"(", self._mark),
                (b"c", self._global),
                (b"R", self._reduce),
                (b"\x81", self._reduce),
                (b"b", self._build),
                (b"Q", self._stored),
                (b"q", self._put1),
                (b"r", self._put4),
                (b"h", self._get1),
                (b"j", self._get4),
                (b"X", self._unicode),
                (b"U", self._bytes),
                (b"\x8a", self._long),
                (b"K", self._int1),
                (b"M", self._int2),
                (b"J", self._int4),
                (b"G", self._float),
                (b"t", self._tuple),
                (b"\x85", self._tuple1),
                (b"\x86", self._tuple2),
                (b"\x87", self._tuple3),
                (b"a", self._append),
                (b"e", self._appends),
                (b"s", self._set),
                (b"u", self._sets),
            )
        }
        makers: dict[int, Callable[[], object]] = {
            ord("N"): lambda: None,
            0x88: lambda: True,
            0x89: lambda: False,
            ord(")"): tuple,
            ord("]"): list,
            ord("}"): dict,
        }
        for _ in range(_MAX_STEPS):
            code = self._content[self._at]
            self._at += 1
            if code in steps:
                steps[code]()
            elif code in makers:
                self._stack.append(makers[code]())
            elif code == ord("."):
                return self._stack.pop()
            else:
                raise ValueError(f"instruction {bytes([code])!r} at byte {self._at - 1}")
        raise ValueError(f"more than {_MAX_STEPS} instructions")

    def _taken(self, n: int) -> bytes:
        found = self._content[self._at : self._at + n]
        if len(found) < n:
            raise ValueError("it ends early")
        self._at += n
        return found

    def _number(self, form: str, n: int) -> int:
        found: int = struct.unpack(form, self._taken(n))[0]
        return found

    def _line(self) -> str:
        end = self._content.index(b"\n", self._at, self._at + 1000)
        found = self._content[self._at : end].decode()
        self._at = end + 1
        return found

    def _since_mark(self) -> list[object]:
        mark = self._marks.pop()
        found = self._stack[mark:]
        del self._stack[mark:]
        return found

    # Atoms.

    def _protocol(self) -> None:
        version = self._taken(1)[0]
        if version > 5:
            raise ValueError(f"protocol {version}")

    def _unicode(self) -> None:
        self._stack.append(self._taken(self._number("<I", 4)).decode())

    def _bytes(self) -> None:
        self._stack.append(self._taken(self._taken(1)[0]))

    def _long(self) -> None:
        self._stack.append(int.from_bytes(self._taken(self._taken(1)[0]), "little", signed=True))

    def _int1(self) -> None:
        self._stack.append(self._taken(1)[0])

    def _int2(self) -> None:
        self._stack.append(self._number("<H", 2))

    def _int4(self) -> None:
        self._stack.append(self._number("<i", 4))

    def _float(self) -> None:
        self._stack.append(struct.unpack(">d", self._taken(8))[0])

    # The stack and the memo.

    def _mark(self) -> None:
        self._marks.append(len(self._stack))

    def _put1(self) -> None:
        self._memo[self._taken(1)[0]] = self._stack[-1]

    def _put4(self) -> None:
        self._memo[self._number("<I", 4)] = self._stack[-1]

    def _get1(self) -> None:
        self._stack.append(self._memo[self._taken(1)[0]])

    def _get4(self) -> None:
        self._stack.append(self._memo[self._number("<I", 4)])

    # Tuples, lists, dicts.

    def _tuple(self) -> None:
        self._stack.append(tuple(self._since_mark()))

    def _tuple1(self) -> None:
        self._last(1)

    def _tuple2(self) -> None:
        self._last(2)

    def _tuple3(self) -> None:
        self._last(3)

    def _last(self, n: int) -> None:
        if len(self._stack) < n:
            raise IndexError("nothing to make a tuple of")
        self._stack[-n:] = [tuple(self._stack[-n:])]

    def _append(self) -> None:
        self._extend([self._stack.pop()])

    def _appends(self) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[object]) -> None:
        found = self._stack[-1]
        if not isinstance(found, list):
            raise TypeError(f"{type(found).__name__} where a list is expected")
        found += items

    def _set(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])

    def _sets(self) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[object]) -> None:
        found = self._stack[-1]
        if isinstance(found, Skipped):
            return
        if not isinstance(found, dict) or len(items) % 2:
            raise TypeError(f"{type(found).__name__} where a dict is expected")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # A tuple that holds itself many times takes for ever to hash; nothing asks for it.
            found[key if isinstance(key, Atom) else object()] = value

    # Calls.

    def _global(self) -> None:
        module, name = self._line(), self._line()
        module = "builtins" if module == "__builtin__" else module
        self._stack.append(_Name(self._checked(f"{module}.{name}")))

    def _checked(self, text: str) -> str:
        module, _, word = text.rpartition(".")
        if text in _MAKERS or text in (*_WRAPPERS, _TYPED, *_ODD, *_HARMLESS, _DICT):
            return text
        if module == "torch" and word in _DTYPE_WORDS:
            return text
        if module in ("torch", "torch.storage") and word.removesuffix("Storage") in _STORAGES:
            return text
        raise CheckpointError(
            f"{self._file}: its pickle asks for more than tensors: {text}",
            hint="only load files you trust; save the state dict alone, as safetensors",
        )

    def _reduce(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(arguments, tuple) or not isinstance(function, _Name):
            raise TypeError(f"a call of {type(function).__name__}")
        self._stack.append(_called(function.text, arguments))

    def _build(self) -> None:
        self._stack.pop()
        if isinstance(self._stack[-1], _Name | Storage | Atom):
            raise TypeError("state for what has none")

    def _stored(self) -> None:
        match self._stack.pop():
            case (kind, _Name(text), key, _, int()) if kind in ("storage", b"storage"):
                word = text.rpartition(".")[2].removesuffix("Storage")
                name = key.decode() if isinstance(key, bytes) else key
                if word in _STORAGES and isinstance(name, str):
                    self._stack.append(Storage(name, _STORAGES[word]))
                    return
        raise ValueError("a reference to what is no storage")


def _called(function: str, arguments: tuple[object, ...]) -> object:
    if function == _TYPED:
        match arguments:
            case (_Name(inner), _Name(), tuple(rest), _) if inner != _TYPED:
                return _called(inner, rest)
        raise ValueError(f"{function} of other arguments than tensors have")
    if function in _WRAPPERS:
        if not isinstance(arguments[0], StoredTensor | UnsupportedTensor):
            raise ValueError("a parameter that is no tensor")
        return arguments[0]
    if function == _DICT:
        return {} if not arguments else _OPAQUE
    if function in _ODD:
        return UnsupportedTensor()
    return _tensor(function, arguments) if function in _MAKERS else _OPAQUE


def _tensor(function: str, arguments: tuple[object, ...]) -> StoredTensor | UnsupportedTensor:
    if len(arguments) < _MAKERS[function]:
        raise ValueError(f"{function} of {len(arguments)} arguments")
    storage, offset, shape, strides = arguments[:4]
    if not isinstance(storage, Storage) or type(offset) is not int:
        raise ValueError("a tensor that is no view of a storage")
    dtype, more = storage.dtype, arguments[6:]
    if function.endswith("_v3"):
        named, *more_after = more
        if not isinstance(named, _Name):
            raise ValueError("a tensor without a dtype")
        word = named.text.rpartition(".")[2]
        dtype, more = DTYPES.get(word, word), tuple(more_after)
    if any(metadata for metadata in more):  # conjugate, negated
        return UnsupportedTensor()
    if offset < 0 or not _are_sizes(shape) or not _are_sizes(strides):
        raise ValueError("a tensor of negative sizes or strides")
    if len(shape) != len(strides):
        raise ValueError(f"{len(shape)} sizes and {len(strides)} strides")
    return StoredTensor(storage, dtype, offset, shape, strides)


def _are_sizes(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(
        type(value) is int and 0 <= value < 2**63 for value in values
    )
