"""Which stored tensors make up a quantised one: the formats that are read, by their keys.

    format                key of the codes          beside it
    fp8                   X (F8_E4M3, F8_E5M2)      X_scale_inv | X_scale: one, rows, blocks
    int8                  X.weight (I8)             X.weight_scale
    compressed-tensors    X.weight_packed (I32)     X.weight_scale, _shape, _zero_point
    NVFP4, MXFP4          X.weight_packed (U8)      X.weight_scale, .weight_global_scale
    MXFP4 of gpt-oss      X_blocks (U8)             X_scales; the tensor is the transpose

Sources: the files of DeepSeek-V3, gpt-oss and compressed-tensors 0.20; each is compared with the
library that wrote it (tests/io/test_codecs.py).
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from streammap.errors import CheckpointError
from streammap.io.codecs import encodings
from streammap.io.codecs.coded import Coded, Numbers, PackedZeros
from streammap.io.dtypes import TensorSpec

Specs = Mapping[str, TensorSpec]
_FP8 = {"F8_E4M3": encodings.e4m3, "F8_E5M2": encodings.e5m2}
_ACTIVATIONS = re.compile(r".*[._](input_(global_)?scale|[qkv]_scale|(k|v)_cache_scale)")
_SIZES = (128, 64, 32, 256)
"""Block sizes to be tried where config.json names none."""


@dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says of how a checkpoint is quantised."""

    table: Mapping[str, object]
    dtype: str = "BF16"
    """The dtype that its tensors are read in."""

    @cached_property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block."""
        for place in (self.table, *self._weights):
            size = place.get("weight_block_size") or place.get("block_structure")
            match size:
                case [int(rows), int(columns)] if rows > 0 and columns > 0:
                    return rows, columns
        return None

    @cached_property
    def bits(self) -> int | None:
        """Bits of an integer code."""
        for weights in self._weights:
            if isinstance(bits := weights.get("num_bits"), int) and 1 <= bits <= 8:
                return bits
        return None

    @property
    def _weights(self) -> Iterator[Mapping[str, object]]:
        groups = self.table.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                yield weights


@dataclass(frozen=True)
class Decoded:
    """The tensors that a checkpoint is read as."""

    coded: Mapping[str, Coded]
    """Key -> how it is decoded."""
    absorbed: frozenset[str]
    """Stored keys that are read no more: codes under another key, scales, ranges of activations."""


def find(specs: Specs, config: QuantizationConfig) -> Decoded:
    """The quantised tensors among stored ones.

    Raises:
        CheckpointError: codes without their scales, or of shapes that don't fit.
    """
    coded: dict[str, Coded] = {}
    for key, spec in specs.items():
        for rule in _RULES:
            name = rule(key, spec, specs, config)
            if name is not None:
                coded[name[0]] = name[1]
                break
    if not coded:
        return Decoded({}, frozenset())
    used = {stored for each in coded.values() for stored in each.stored[1:]}
    coded = {key: each for key, each in coded.items() if key not in used}  # scales in fp8 are none
    used |= {each.key for each in coded.values()}
    companions = {key for key in specs if _ACTIVATIONS.fullmatch(key)}
    companions |= {f"{key.removesuffix('_packed')}_shape" for key in used}
    absorbed = (used | (companions & specs.keys())) - coded.keys()
    return Decoded(coded, frozenset(absorbed))


_Found = tuple[str, Coded] | None
_Rule = Callable[[str, TensorSpec, Specs, QuantizationConfig], _Found]


def _bytes(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """One code a byte, under the tensor's own key."""
    decode = _FP8.get(spec.dtype)
    scale = next((key + end for end in ("_scale_inv", "_scale") if key + end in specs), None)
    if decode is None and spec.dtype == "I8" and scale is not None:
        decode = encodings.int8
    if decode is None or not spec.shape:
        return None
    read_as = TensorSpec(config.dtype, spec.shape)
    rows = spec.shape[-2] if len(spec.shape) > 1 else 1
    coded = Coded(read_as, key, decode, 8, rows, spec.shape[-1])
    if scale is None:
        return key, coded
    zero = f"{key}_zero_point"
    block = _block(key, spec.shape, scale, specs[scale].shape, config)
    return key, Coded(
        read_as,
        key,
        decode,
        8,
        rows,
        spec.shape[-1],
        _numbers(scale, specs[scale]),
        block,
        _numbers(zero, specs[zero]) if zero in specs else None,
    )


def _words(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """Integers packed into int32 words along the columns."""
    if not key.endswith(".weight_packed") or spec.dtype != "I32" or len(spec.shape) < 2:
        return None
    name = key.removesuffix("_packed")
    scale = _companion(key, f"{name}_scale", specs)
    bits = config.bits or 4
    if 32 % bits:
        raise CheckpointError(f"{key}: codes of {bits} bits, which don't fill a word of 32 bits")
    shape = (*spec.shape[:-1], spec.shape[-1] * 32 // bits)
    block = _block(name, shape, scale, specs[scale].shape, config)
    zero, order = f"{name}_zero_point", f"{name}_g_idx"
    if order in specs:
        raise CheckpointError(f"{order}: columns quantised in an order of their own")
    numbers = _numbers(scale, specs[scale])
    return name, Coded(
        TensorSpec(config.dtype, shape),
        key,
        encodings.packed(bits),
        bits,
        shape[-2],
        shape[-1],
        numbers,
        block,
        PackedZeros(zero, numbers.n_columns, bits) if zero in specs else None,
    )


def _halves(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """Two 4-bit floats a byte along the columns."""
    name = key.removesuffix("_packed")
    scale, second = f"{name}_scale", f"{name}_scale_2"
    packed = key.endswith(".weight_packed") or second in specs
    if spec.dtype != "U8" or not packed or len(spec.shape) < 2:
        return None
    _companion(key, scale, specs)
    shape = (*spec.shape[:-1], spec.shape[-1] * 2)
    block = _block(name, shape, scale, specs[scale].shape, config)
    divisor = f"{name}_global_scale"
    return name, Coded(
        TensorSpec(config.dtype, shape),
        key,
        encodings.fp4,
        4,
        shape[-2],
        shape[-1],
        _numbers(scale, specs[scale]),
        block,
        factor=_numbers(second, specs[second]) if second in specs else None,
        divisor=_numbers(divisor, specs[divisor]) if divisor in specs else None,
    )


def _blocks(key: str, spec: TensorSpec, specs: Specs, config: QuantizationConfig) -> _Found:
    """Of gpt-oss: [experts, rows, groups, 16] bytes, read as [experts, columns, rows]."""
    if not key.endswith("_blocks") or spec.dtype != "U8" or len(spec.shape) < 3:
        return None
    name = key.removesuffix("_blocks")
    scale = _companion(key, f"{name}_scales", specs)
    *stack, rows, groups, nbytes = spec.shape
    _expect(scale, specs[scale].shape, (*stack, rows, groups))
    columns = groups * nbytes * 2
    return name, Coded(
        TensorSpec(config.dtype, (*stack, columns, rows)),
        key,
        encodings.fp4,
        4,
        rows,
        columns,
        Numbers(scale, groups, "U8", encodings.exponents),
        (1, nbytes * 2),
        is_transposed=True,
    )


_RULES: Sequence[_Rule] = (_words, _halves, _blocks, _bytes)


def _companion(key: str, name: str, specs: Specs) -> str:
    if name not in specs:
        raise CheckpointError(
            f"{key}: quantised, and its {name} is missing",
            hint="download the checkpoint again: a shard may be incomplete",
        )
    return name


def _numbers(key: str, spec: TensorSpec) -> Numbers:
    decode = {**_FP8, "F8_E8M0": encodings.e8m0, "U8": encodings.exponents, "I8": encodings.int8}
    columns = spec.shape[-1] if len(spec.shape) > 1 else 1
    return Numbers(key, columns, spec.dtype, decode.get(spec.dtype))


def _block(
    name: str,
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
    if scale_shape in ((), (1,)):
        # One for all: as if all rows of a stack were one block.
        if len(shape) > 2:
            raise CheckpointError(f"{scale}: one scale for a stack of matrices {list(shape)}")
        return rows, columns
    if len(scale_shape) == 1 and scale_shape[0] == rows:
        return 1, columns
    if len(scale_shape) == len(shape) and scale_shape[:-2] == shape[:-2]:
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


def _size(n: int, n_blocks: int, given: int) -> int:
    """Codes that share a scale along one dimension; 0 where no size gives `n_blocks`."""
    sizes = (given, 1 if n == n_blocks else 0, n if n_blocks == 1 else 0, *_SIZES)
    return next((size for size in sizes if size and -(-n // size) == n_blocks), 0)


def _expect(key: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(f"{key}: shape {list(shape)}, expected {list(expected)}")
