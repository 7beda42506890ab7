"""Which stored tensors make up a quantised one: the formats that are read, by their keys.

    format                key of the codes          beside it
    fp8                   X (F8_E4M3, F8_E5M2)      X_scale_inv | X_scale: one, rows, blocks
    int8                  X.weight (I8)             X.weight_scale
    compressed-tensors    X.weight_packed (I32)     X.weight_scale, _shape, _zero_point
    NVFP4, MXFP4          X.weight_packed (U8)      X.weight_scale, .weight_global_scale
    NVFP4 of ModelOpt     X.weight (U8)             X.weight_scale, .weight_scale_2
    fp4 of DeepSeek V4    X (I8)                    X_scale_inv (F8_E8M0): 32 of a row
    MXFP4 of gpt-oss      X_blocks (U8)             X_scales; the tensor is the transpose
    GPTQ                  X.qweight (I32)           X.scales, .qzeros, .g_idx; the transpose
    AWQ (gemm)            X.qweight (I32)           X.scales, .qzeros; the transpose

A tensor is read as bfloat16, or as float16 where its scales are. Sources: the files of DeepSeek-V3,
gpt-oss, AutoGPTQ, AutoAWQ and compressed-tensors 0.20; each is compared with the library that wrote
it, or with its formula (tests/io/test_codecs.py).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from streammap.errors import CheckpointError
from streammap.io.codecs import encodings, packed_shape
from streammap.io.codecs.coded import Coded
from streammap.io.codecs.matrices import Codes, Groups, Numbers, RowWords
from streammap.io.codecs.parts import check_parts
from streammap.io.codecs.quantization_config import QuantizationConfig
from streammap.io.dtypes import TensorSpec

Specs = Mapping[str, TensorSpec]
_FP8 = {"F8_E4M3": encodings.e4m3, "F8_E5M2": encodings.e5m2}
_ACTIVATIONS = re.compile(
    r".*[._](input_(global_)?scale|input_scale_ub|input_zero_point|output_(scale|zero_point)"
    r"|activation_scale)"
)
"""Ranges of activations, which a server measured; a weight is the same without them."""
_SIZES = (128, 64, 32, 256)
"""Block sizes to be tried where config.json names none."""
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place in its word of each of 8 columns."""
_AGAIN = "download the checkpoint again: a shard may be incomplete"


@dataclass(frozen=True)
class Decoded:
    """The tensors that a checkpoint is read as."""

    coded: Mapping[str, Coded]
    """Key -> how it is decoded."""
    absorbed: frozenset[str]
    """Stored keys that are read no more: codes under another key, scales, ranges of activations."""


def find(
    specs: Specs,
    config: QuantizationConfig,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    *,
    casts: bool = True,
) -> Decoded:
    """The quantised tensors among stored ones; those of other formats are left as they are.

    Args:
        shapes: Of packed integers, by the name that they are read as (packed_shape.py).
        casts: Whether floats of 8 bits without scales are decoded too.

    Raises:
        CheckpointError: codes without their scales, or of shapes that don't fit.
    """
    coded: dict[str, Coded] = {}
    for key, spec in specs.items():
        for rule in _RULES.get(spec.dtype, ()):
            found = rule(key, spec, specs, config)
            if found is not None:
                check_parts(found[1], specs)
                name, each = found
                shape = (shapes or {}).get(name)
                coded[name] = each if shape is None else packed_shape.cut(each, shape)
                break
    if not casts:
        coded = {key: each for key, each in coded.items() if each.scales is not None}
    if not coded:
        return Decoded({}, frozenset())
    used = {stored for each in coded.values() for stored in each.stored[1:]}
    coded = {key: each for key, each in coded.items() if key not in used}  # scales in fp8 are none
    used |= {each.codes.key for each in coded.values()}
    companions = {key for key in specs if _ACTIVATIONS.fullmatch(key)}
    companions |= {f"{key.removesuffix('_packed')}_shape" for key in used}
    absorbed = (used | (companions & specs.keys())) - coded.keys()
    for key in coded:
        if key in specs and key not in used:
            raise CheckpointError(
                f"{key}: there as it is, and quantised too",
                hint="remove one of the two: which of them is meant can't be told",
            )
    return Decoded(coded, frozenset(absorbed))


_Found = tuple[str, Coded] | None
_Rule = Callable[[str, TensorSpec, Specs, QuantizationConfig], _Found]


def _bytes(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """One code a byte, under the tensor's own key."""
    decode = _FP8.get(spec.dtype)
    scale = _scale_of(key, specs)
    if decode is None and spec.dtype == "I8" and scale is not None:
        decode = encodings.int8
    if decode is None or not spec.shape:
        return None
    word = "int8" if spec.dtype == "I8" else "fp8"
    rows, columns = math.prod(spec.shape[:-1]), spec.shape[-1]
    codes = Codes(key, columns, 8, decode)
    if scale is None:
        read_as = TensorSpec("BF16", spec.shape)
        return key, Coded(read_as, f"{word} without scales", codes, rows, columns)
    block = _block(spec.shape, scale, specs[scale].shape, config)
    rows = _n_rows(spec.shape, specs[scale])
    return key, Coded(
        TensorSpec(_dtype(specs[scale]), spec.shape),
        f"{word} {_words_for(block, rows, columns)}",
        codes,
        rows,
        columns,
        _numbers(scale, specs[scale]),
        block,
        _optional(f"{key}_zero_point", specs),
    )


def _halves_in_bytes(
    key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig
) -> _Found:
    """Two 4-bit floats a signed byte, a scale for 32 of a row: experts of DeepSeek V4."""
    scale = _scale_of(key, specs)
    if scale is None or len(spec.shape) < 2 or specs[scale].dtype not in ("F8_E8M0", "F32"):
        return None
    shape, groups = (*spec.shape[:-1], spec.shape[-1] * 2), specs[scale].shape
    if groups != (*shape[:-1], -(-shape[-1] // 32)) or shape[-1] < 64:
        return None  # one scale a row, say: they are integers
    return key, Coded(
        TensorSpec("BF16", shape),
        "fp4 in groups of 32",
        Codes(key, shape[-1], 4, encodings.fp4),
        shape[-2],
        shape[-1],
        _numbers(scale, specs[scale]),
        (1, 32),
    )


def _words(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """Integers packed into int32 words along the columns."""
    if not key.endswith(".weight_packed") or len(spec.shape) < 2:
        return None
    name = key.removesuffix("_packed")
    scale = _companion(key, f"{name}_scale", specs)
    bits = config.bits or 4
    _check_bits(key, bits)
    shape = (*spec.shape[:-1], spec.shape[-1] * 32 // bits)
    block = _block(shape, scale, specs[scale].shape, config)
    zero, order = f"{name}_zero_point", f"{name}_g_idx"
    if order in specs:
        raise CheckpointError(
            f"{order}: columns quantised in an order of their own, which is not read",
            hint="load it with transformers and save it in bfloat16",
        )
    numbers = _numbers(scale, specs[scale])
    middle = 1 << (bits - 1)
    zeros = RowWords(zero, numbers.n_columns, bits, middle) if zero in specs else None
    return name, Coded(
        TensorSpec(_dtype(specs[scale]), shape),
        f"int{bits} {_words_for(block, shape[-2], shape[-1])}",
        Codes(key, shape[-1], bits, encodings.packed(bits=bits, less=middle), 32),
        _n_rows(shape, specs[scale]),
        shape[-1],
        numbers,
        block,
        zeros,
    )


def _halves(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """Two 4-bit floats a byte along the columns."""
    name = key.removesuffix("_packed")
    scale, second = f"{name}_scale", f"{name}_scale_2"
    is_packed = key.endswith(".weight_packed") or second in specs
    if not is_packed or len(spec.shape) < 2:
        return None
    _companion(key, scale, specs)
    shape = (*spec.shape[:-1], spec.shape[-1] * 2)
    block = _block(shape, scale, specs[scale].shape, config)
    divisor = f"{name}_global_scale"
    is_nv = second in specs or divisor in specs
    return name, Coded(
        TensorSpec("BF16", shape),
        "NVFP4" if is_nv else "MXFP4",
        Codes(key, shape[-1], 4, encodings.fp4),
        _n_rows(shape, specs[scale]),
        shape[-1],
        _numbers(scale, specs[scale]),
        block,
        factor=_optional(second, specs),
        divisor=_optional(divisor, specs),
    )


def _blocks(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """Of gpt-oss: [experts, rows, groups, 16] bytes, read as [experts, columns, rows]."""
    if not key.endswith("_blocks") or len(spec.shape) < 3:
        return None
    name = key.removesuffix("_blocks")
    scale = _companion(key, f"{name}_scales", specs)
    *stack, rows, groups, nbytes = spec.shape
    _expect(scale, specs[scale].shape, (*stack, rows, groups))
    columns = groups * nbytes * 2
    return name, Coded(
        TensorSpec("BF16", (*stack, columns, rows)),
        "MXFP4",
        Codes(key, columns, 4, encodings.fp4),
        rows,
        columns,
        Numbers(scale, groups, _byte_dtype(specs[scale]), encodings.exponents),
        (1, nbytes * 2),
        is_transposed=True,
    )


def _transposed(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """GPTQ, whose words run along the input, and AWQ, whose words run along the output."""
    if not key.endswith(".qweight") or len(spec.shape) != 2:
        return None
    name = key.removesuffix("qweight")
    scale = _companion(key, f"{name}scales", specs)
    zero = _companion(key, f"{name}qzeros", specs)
    if len(specs[scale].shape) != 2 or len(specs[zero].shape) != 2:
        return None
    n_groups, n_out = specs[scale].shape
    bits = 32 * specs[zero].shape[1] // max(1, n_out)
    _check_bits(key, bits)
    _expect(zero, specs[zero].shape, (n_groups, n_out * bits // 32))
    if spec.shape[1] == n_out:
        return f"{name}weight", _gptq(key, spec, (scale, zero), specs, config, bits)
    _expect(key, spec.shape, (spec.shape[0], n_out * bits // 32))
    return f"{name}weight", _awq(key, spec, (scale, zero), specs, config, bits)


def _gptq(
    key: str,
    spec: TensorSpec,
    parts: tuple[str, str],
    specs: Specs,
    config: QuantizationConfig,
    bits: int,
) -> Coded:
    """W[o, i] = (q[i, o] - z[g, o]) * s[g, o], g = g_idx[i]; z is stored less 1 but in gptq_v2."""
    scale, zero = parts
    format_ = config.text("checkpoint_format")
    if format_ not in ("", "gptq", "gptq_v2"):
        raise _unread(key, f"GPTQ in the layout of {format_}")
    n_in, (n_groups, n_out) = spec.shape[0] * 32 // bits, specs[scale].shape
    order = key.removesuffix("qweight") + "g_idx"
    groups, size = None, -(-n_in // max(1, n_groups))
    if order in specs:
        _expect(order, specs[order].shape, (n_in,))
        groups = Groups(order, n_groups)
    more = 0 if format_ == "gptq_v2" else 1
    decode = encodings.packed(bits=bits, more=more)
    return Coded(
        TensorSpec(_dtype(specs[scale]), (n_out, n_in)),
        f"GPTQ of {bits} bits",
        RowWords(key, n_out, bits),
        n_in,
        n_out,
        _numbers(scale, specs[scale]),
        (1 if groups else size, 1),
        Codes(zero, n_out, bits, decode, 32),
        groups=groups,
        is_transposed=True,
    )


def _awq(
    key: str,
    spec: TensorSpec,
    parts: tuple[str, str],
    specs: Specs,
    config: QuantizationConfig,
    bits: int,
) -> Coded:
    """W[o, i] = (q[i, o] - z[g, o]) * s[g, o], g = i // group size; columns out of order."""
    scale, zero = parts
    version = config.text("version")
    if version not in ("", "gemm") or bits != 4:
        raise _unread(key, f"AWQ of {bits} bits, version {version or 'gemm'}")
    n_in, (n_groups, n_out) = spec.shape[0], specs[scale].shape
    size = n_in // max(1, n_groups)
    if size * n_groups != n_in:
        raise CheckpointError(f"{scale}: {n_groups} groups for {n_in} inputs, which they don't cut")
    decode = encodings.packed(bits=bits, order=_AWQ_ORDER)
    return Coded(
        TensorSpec(_dtype(specs[scale]), (n_out, n_in)),
        f"AWQ of {bits} bits",
        Codes(key, n_out, bits, decode, 32),
        n_in,
        n_out,
        _numbers(scale, specs[scale]),
        (size, 1),
        Codes(zero, n_out, bits, decode, 32),
        is_transposed=True,
    )


_RULES: Mapping[str, Sequence[_Rule]] = {
    "I32": (_words, _transposed),
    "U8": (_halves, _blocks),
    "I8": (_halves_in_bytes, _bytes),
    "F8_E4M3": (_bytes,),
    "F8_E5M2": (_bytes,),
}
"""Dtype of the codes -> what they may be."""


def _scale_of(key: str, specs: Specs) -> str | None:
    names = [f"{key}_scale_inv", f"{key}_scale"]
    if key.endswith(".weight"):
        names.append(f"{key.removesuffix('.weight')}.scale")
    return next((name for name in names if name in specs), None)


def _dtype(scale: TensorSpec) -> str:
    """The dtype that a tensor with such scales is read in."""
    return "F16" if scale.dtype == "F16" else "BF16"


def _byte_dtype(exponents: TensorSpec) -> str:
    """What exponents are stored as: bytes, by one name or the other."""
    return "F8_E8M0" if exponents.dtype == "F8_E8M0" else "U8"


def _companion(key: str, name: str, specs: Specs) -> str:
    if name not in specs:
        raise CheckpointError(f"{key}: quantised, and its {name} is missing", hint=_AGAIN)
    return name


def _numbers(key: str, spec: TensorSpec) -> Numbers:
    decode = {**_FP8, "F8_E8M0": encodings.e8m0, "U8": encodings.exponents, "I8": encodings.int8}
    if spec.dtype not in decode and not spec.is_float:
        raise CheckpointError(
            f"{key}: scales of dtype {spec.dtype}, expected floats or exponents", hint=_AGAIN
        )
    columns = spec.shape[-1] if len(spec.shape) > 1 else 1
    return Numbers(key, columns, spec.dtype, decode.get(spec.dtype))


def _optional(key: str, specs: Specs) -> Numbers | None:
    return _numbers(key, specs[key]) if key in specs else None


def _block(
    shape: tuple[int, ...],
    scale: str,
    scale_shape: tuple[int, ...],
    config: QuantizationConfig,
) -> tuple[int, int]:
    """Rows and columns that share a scale.

    Raises:
        CheckpointError: the scales' shape doesn't fit the codes'.
    """
    rows, columns = (shape[-2] if len(shape) > 1 else 1), shape[-1]
    if math.prod(scale_shape) == 1:
        return max(1, math.prod(shape[:-1])), columns  # one for all
    if len(scale_shape) == 1:
        if len(shape) == 2 and scale_shape[0] == rows:
            return 1, columns
        if len(shape) == 3 and scale_shape[0] == shape[0]:
            return rows, columns  # one for each expert
    if len(scale_shape) == len(shape) > 1 and scale_shape[:-2] == shape[:-2]:
        given = config.block or (0, 0)
        high = _size(rows, scale_shape[-2], given[0])
        wide = _size(columns, scale_shape[-1], given[1]) or columns // max(1, scale_shape[-1])
        wide = wide if wide * scale_shape[-1] >= columns else 0
        if high and wide:
            return high, wide
    raise CheckpointError(
        f"{scale}: scales {list(scale_shape)} for codes {list(shape)}"
        + (f" in blocks of {list(config.block)}" if config.block else ""),
        hint="is config.json's quantization_config the checkpoint's own?",
    )


def _n_rows(shape: tuple[int, ...], scale: TensorSpec) -> int:
    """Rows of one matrix; a stack with one scale for all is a single one."""
    return max(1, math.prod(shape[:-1])) if scale.n_elements == 1 else shape[-2]


def _size(n: int, n_blocks: int, given: int) -> int:
    """Codes that share a scale along one dimension; 0 where no size gives `n_blocks`."""
    sizes = (given, 1 if n == n_blocks else 0, n if n_blocks == 1 else 0, *_SIZES)
    return next((size for size in sizes if size and -(-n // size) == n_blocks), 0)


def _words_for(block: tuple[int, int], rows: int, columns: int) -> str:
    """How scales are spread, for people."""
    high, wide = block
    if wide >= columns:
        return "with one scale" if high >= rows > 1 else "with a scale for each row"
    if high >= rows > 1 and wide == 1:
        return "with a scale for each column"
    return f"in groups of {wide}" if high == 1 else f"blocks of {high} x {wide}"


def _check_bits(key: str, bits: int) -> None:
    if bits not in (1, 2, 4, 8):
        raise CheckpointError(
            f"{key}: codes of {bits} bits, expected 1, 2, 4 or 8, which fill a word of 32",
            hint="load it with transformers and save it in bfloat16",
        )


def _unread(key: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{key}: {what}, which is not read",
        hint="load it with transformers and the library that wrote it, and save it in float16",
    )


def _expect(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(f"{key}: shape {list(shape)}, expected {list(expected)}", hint=_AGAIN)
