"""Quantised tensors: each format against its formula, and against the library that writes it."""

import random
from collections.abc import Mapping

import pytest
import torch

from streammap.errors import CheckpointError
from streammap.io.codecs import encodings, formats
from streammap.io.codecs.quantization_config import QuantizationConfig
from streammap.io.codecs.reader import DecodedTensors
from streammap.io.dtypes import FROM_TORCH, TensorSpec
from streammap.io.tensor_readers import TensorReader
from tests.support import quantised

E4M3 = torch.float8_e4m3fn
NAMES = {**FROM_TORCH, "float8_e4m3fn": "F8_E4M3", "float8_e8m0fnu": "F8_E8M0"}
Tensors = Mapping[str, torch.Tensor]


class Memory(TensorReader):
    """A reader of tensors in memory."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = {key: tensor.reshape(-1).clone() for key, tensor in tensors.items()}

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        stored = self.tensors[key].view(torch.uint8)[start : start + len(view)]
        assert len(stored) == len(view)
        torch.frombuffer(view, dtype=torch.uint8).copy_(stored)

    def tensor(self, key: str) -> torch.Tensor:
        return self.tensors[key]


def specs(tensors: Tensors) -> dict[str, TensorSpec]:
    return {
        key: TensorSpec(NAMES[str(t.dtype).removeprefix("torch.")], tuple(t.shape))
        for key, t in tensors.items()
    }


def ints(bits: int) -> dict[str, object]:
    return {"config_groups": {"group_0": {"weights": {"num_bits": bits}}}}


def check(
    tensors: Tensors, expected: torch.Tensor, config: Mapping[str, object] | None = None
) -> None:
    """The one quantised tensor, whole and in parts."""
    found = formats.find(specs(tensors), QuantizationConfig(config or {}))
    ((key, coded),) = found.coded.items()
    assert found.absorbed == tensors.keys() - {key}
    assert coded.spec == TensorSpec("BF16", tuple(expected.shape))
    reader = DecodedTensors(Memory(tensors), found.coded)
    whole = reader.tensor(key)
    bits = expected.to(torch.bfloat16).contiguous().view(torch.int16)
    assert torch.equal(whole.view(torch.int16), bits)
    draw = random.Random(0)
    for _ in range(40):
        start = draw.randrange(whole.numel())
        end = min(whole.numel(), start + draw.choice([1, 3, 17, 200, 5000, whole.numel()]))
        part = bytearray(2 * (end - start))
        reader.read_into(key, 2 * start, memoryview(part))
        assert torch.equal(torch.frombuffer(part, dtype=torch.int16), bits.flatten()[start:end])


def blocks(scales: torch.Tensor, shape: torch.Size, size: int = 128) -> torch.Tensor:
    spread = scales.repeat_interleave(size, -2).repeat_interleave(size, -1)
    return spread[..., : shape[-2], : shape[-1]]


def codes(*shape: int) -> torch.Tensor:
    return torch.randn(shape).mul(50).to(E4M3)


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_each_code_of_a_float_of_8_bits_means_what_torch_says(dtype: torch.dtype) -> None:
    every = torch.arange(256, dtype=torch.uint8)
    decode = encodings.e4m3 if dtype == E4M3 else encodings.e5m2
    value, expected = decode(every), every.view(dtype).to(torch.float32)
    assert torch.equal(value.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(value[finite].view(torch.int32), expected[finite].view(torch.int32))


@pytest.mark.parametrize("scale", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_in_blocks_of_which_the_last_are_partial(scale: torch.dtype) -> None:
    weight, scales = codes(300, 260), torch.rand(3, 3).add(0.1).to(scale)
    expected = weight.float() * blocks(scales.float(), weight.shape)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scales}
    check(tensors, expected, {"weight_block_size": [128, 128]})
    check(tensors, expected)  # the size of a block follows from the shapes


def test_fp8_with_a_scale_for_each_row_and_with_one_for_all() -> None:
    weight = codes(70, 33)
    for scales in (torch.rand(70, 1), torch.rand(70), torch.rand(1), torch.rand(())):
        rows = scales.reshape(-1, 1)
        ranges = {"a.input_scale": torch.rand(1)}
        check({"a.weight": weight, "a.weight_scale": scales, **ranges}, weight.float() * rows)


def test_fp8_without_a_scale_is_a_cast() -> None:
    weight = codes(5, 7)
    check({"a.weight": weight}, weight.float())


def test_fp8_of_a_stack_of_experts() -> None:
    weight, scales = codes(3, 150, 260), torch.rand(3, 2, 3)
    tensors = {"e.gate_up_proj": weight, "e.gate_up_proj_scale_inv": scales}
    check(tensors, weight.float() * blocks(scales, weight.shape))


@pytest.mark.slow
def test_mxfp4_of_gpt_oss_is_read_transposed() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    packed = torch.randint(0, 256, (3, 70, 5, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 70, 5), dtype=torch.uint8)
    expected = mxfp4._convert_moe_packed_tensors(packed, scales, dtype=torch.bfloat16)
    assert expected.shape == (3, 160, 70)
    check({"m.down_proj_blocks": packed, "m.down_proj_scales": scales}, expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 256])
def test_packed_integers(bits: int, group: int) -> None:
    high = 1 << (bits - 1)
    numbers = torch.randint(-high, high, (96, 256))
    words = (numbers + high).view(96, -1, 32 // bits) << torch.arange(0, 32, bits)
    scales = torch.rand(96, 256 // group).to(torch.bfloat16)
    tensors = {
        "a.weight_packed": words.sum(-1).to(torch.int64).to(torch.int32),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([96, 256]),
    }
    expected = numbers * scales.float().repeat_interleave(group, 1)
    check(tensors, expected, ints(bits))


def test_bytes_with_scales_are_integers_and_bytes_without_are_left_alone() -> None:
    weight, scales = torch.randint(-128, 127, (9, 16), dtype=torch.int8), torch.rand(9, 1)
    check({"a.weight": weight, "a.weight_scale": scales}, weight * scales)
    assert not formats.find(specs({"mask": weight}), QuantizationConfig({})).coded


def test_scales_that_do_not_fit_are_refused() -> None:
    tensors = {"a.weight": codes(300, 260), "a.weight_scale_inv": torch.rand(4, 3)}
    with pytest.raises(CheckpointError, match=r"a.weight_scale_inv.*\[4, 3\].*\[300, 260\]"):
        formats.find(specs(tensors), QuantizationConfig({}))
    packed = {"a_blocks": torch.zeros(2, 3, 2, 16, dtype=torch.uint8)}
    with pytest.raises(CheckpointError, match="a_scales is missing"):
        formats.find(specs(packed), QuantizationConfig({}))


def _int8(zeros: torch.Tensor) -> Tensors:
    weight = torch.zeros(20, 32, dtype=torch.int8)
    return {"a.weight": weight, "a.weight_scale": torch.ones(20, 1), "a.weight_zero_point": zeros}


def _int4(zeros: torch.Tensor) -> Tensors:
    return {
        "a.weight_packed": torch.zeros(16, 8, dtype=torch.int32),
        "a.weight_scale": torch.ones(16, 2),
        "a.weight_zero_point": zeros,
    }


def _nvfp4(**more: torch.Tensor) -> Tensors:
    return {
        "a.weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "a.weight_scale": torch.ones(4, 2),
        **{f"a.weight_{name}": x for name, x in more.items()},
    }


def _gptq(**more: torch.Tensor) -> Tensors:
    words = torch.zeros(8, 16, dtype=torch.int32)
    zeros, scales = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 16).half()
    return {"a.qweight": words, "a.qzeros": zeros, "a.scales": scales} | {
        f"a.{name}": x for name, x in more.items()
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_int8(torch.zeros(20, 0, dtype=torch.int8)), r"zero points \[20, 0\].*scales \[20, 1\]"),
        (_int8(torch.zeros(20, 2, dtype=torch.int8)), r"zero points \[20, 2\]"),
        (_int8(torch.zeros(10, 1, dtype=torch.int8)), r"zero points \[10, 1\]"),
        (_int4(torch.zeros(16, 2, dtype=torch.int8)), "zero_point: dtype I8, expected I32"),
        (_int4(torch.zeros(3, 2, dtype=torch.int32)), r"zero points \[3, 2\]"),
        (_nvfp4(global_scale=torch.ones(3)), r"global_scale: shape \[3\], expected one number"),
        (_nvfp4(scale_2=torch.ones(0)), r"scale_2: shape \[0\], expected one number"),
        (_gptq(g_idx=torch.zeros(64, dtype=torch.int64)), "g_idx: dtype I64, expected I32"),
        (_gptq(qzeros=torch.zeros(2, 2)), "qzeros: dtype F32, expected I32"),
        (
            {"a_blocks": torch.zeros(2, 3, 16, dtype=torch.uint8), "a_scales": torch.ones(2, 3)},
            "a_scales: dtype F32, expected U8",
        ),
    ],
)
def test_parts_that_are_not_one_for_each_block_are_refused(tensors: Tensors, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        formats.find(specs(tensors), QuantizationConfig({}))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, None), (8, 32), (2, None)])
def test_compressed_tensors_packs_integers_alike(
    bits: int, group: int | None, *, symmetric: bool
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="group" if group else "channel",
        group_size=group,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    n_groups = 256 // group if group else 1
    state = {
        "weight": torch.randn(96, 256).to(torch.bfloat16),
        "weight_scale": torch.rand(96, n_groups).mul(0.1).add(0.05).to(torch.bfloat16),
    }
    if not symmetric:
        high = 1 << (bits - 1)
        zeros = torch.randint(-high, high, (96, n_groups), dtype=torch.int8)
        state["weight_zero_point"] = zeros
    packed = PackedQuantizationCompressor.compress(state, scheme)
    expected = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    tensors = {f"a.{key}": value for key, value in packed.items() if value is not None}
    check(tensors, expected, ints(bits))


@pytest.mark.slow
@pytest.mark.parametrize("group", [16, 32])
def test_compressed_tensors_decodes_floats_of_4_bits_alike(group: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "tensor_group" if group == 16 else "group"
    args = QuantizationArgs(num_bits=4, type="float", strategy=strategy, group_size=group)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {"weight_packed": torch.randint(0, 256, (96, 128), dtype=torch.uint8)}
    if group == 16:
        state["weight_scale"] = torch.rand(96, 16).mul(400).to(E4M3)
        state["weight_global_scale"] = torch.tensor([300.0])
        expected = NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    else:
        state["weight_scale"] = torch.randint(100, 140, (96, 8), dtype=torch.uint8)
        expected = MXFP4PackedCompressor.decompress(state, scheme)["weight"]
    check({f"a.{key}": value for key, value in state.items()}, expected)


# GPTQ and AWQ, whose tensors are stored transposed.


def check_made(made: quantised.Quantised, config: Mapping[str, object]) -> None:
    """Against the formula in float64: of the float16 scales, whole and in parts."""
    ((key, expected),) = made.meant.items()
    found = formats.find(specs(made.stored), QuantizationConfig(config))
    assert found.absorbed == made.stored.keys()
    reader = DecodedTensors(Memory(made.stored), found.coded)
    whole = reader.tensor(key)
    assert whole.dtype == torch.float16
    assert torch.equal(whole, expected)
    draw = random.Random(0)
    for _ in range(20):
        start = draw.randrange(whole.numel())
        end = min(whole.numel(), start + draw.choice([1, 3, 17, 200, whole.numel()]))
        part = bytearray(2 * (end - start))
        reader.read_into(key, 2 * start, memoryview(part))
        assert torch.equal(
            torch.frombuffer(part, dtype=torch.float16), expected.flatten()[start:end]
        )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("is_v2", [False, True])
@pytest.mark.parametrize("shuffled", [False, True])
def test_gptq(bits: int, *, is_v2: bool, shuffled: bool) -> None:
    made = quantised.gptq("a.weight", 48, 96, 32, is_v2=is_v2, shuffled=shuffled, bits=bits)
    version = {"checkpoint_format": "gptq_v2"} if is_v2 else {}
    check_made(made, {"quant_method": "gptq", **version})
    if not shuffled:
        del made.stored["a.g_idx"]
        check_made(made, {"quant_method": "gptq", **version})


def test_awq() -> None:
    check_made(quantised.awq("a.weight", 48, 96, 32), {"quant_method": "awq", "version": "GEMM"})


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"quant_method": "awq", "version": "gemv"}, "AWQ of 4 bits, version gemv"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "layout of marlin"),
    ],
)
def test_other_layouts_are_refused_by_name(table: Mapping[str, object], told: str) -> None:
    made = quantised.awq("a.weight", 48, 96, 32)
    if table["quant_method"] == "gptq":
        made = quantised.gptq("a.weight", 48, 96, 32, is_v2=False, shuffled=False)
    with pytest.raises(CheckpointError, match=told) as error:
        formats.find(specs(made.stored), QuantizationConfig(table))
    assert error.value.hint


def test_a_group_that_is_none_is_refused() -> None:
    made = quantised.gptq("a.weight", 48, 96, 32, is_v2=False, shuffled=False)
    made.stored["a.g_idx"][5] = 3
    found = formats.find(specs(made.stored), QuantizationConfig({}))
    with pytest.raises(CheckpointError, match=r"a\.g_idx: group 3, expected 0 to 2"):
        DecodedTensors(Memory(made.stored), found.coded).tensor("a.weight")


# Less usual shapes.


def test_fp4_of_deepseek_v4_in_signed_bytes() -> None:
    packed = torch.randint(-128, 128, (3, 40, 64), dtype=torch.int8)
    scales = torch.randint(100, 140, (3, 40, 4), dtype=torch.uint8).view(torch.float8_e8m0fnu)
    values = torch.cat([quantised.VALUES, -quantised.VALUES])
    byte = packed.view(torch.uint8).to(torch.int64)
    exact = torch.stack([values[byte & 15], values[byte >> 4]], -1).flatten(-2)
    exact = exact * scales.double().repeat_interleave(32, -1)
    tensors = {"e.gate_up_proj": packed, "e.gate_up_proj_scale_inv": scales}
    check(tensors, exact.float(), {"weight_block_size": [128, 128]})


@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 1, 1), (3, 1, 20)])
def test_fp8_of_a_stack_with_few_scales(shape: tuple[int, ...]) -> None:
    weight, scales = codes(3, 10, 20), torch.rand(shape).add(0.1)
    whole = scales.view(3, 1, 1) if shape == (3,) else scales
    check({"e.w": weight, "e.w_scale": scales}, weight.float() * whole)


def test_rows_longer_than_a_strip() -> None:
    weight, scales = codes(2, 300_000), torch.rand(1, 2344)
    expected = weight.float() * blocks(scales, weight.shape)
    check({"a.weight": weight, "a.weight_scale_inv": scales}, expected)
    packed = torch.randint(0, 256, (1, 2, 10_000, 16), dtype=torch.uint8)
    exponents = torch.full((1, 2, 10_000), 127, dtype=torch.uint8)
    found = formats.find(specs({"m_blocks": packed, "m_scales": exponents}), QuantizationConfig({}))
    reader = DecodedTensors(Memory({"m_blocks": packed, "m_scales": exponents}), found.coded)
    byte = packed.to(torch.int64)
    values = torch.cat([quantised.VALUES, -quantised.VALUES])
    exact = torch.stack([values[byte & 15], values[byte >> 4]], -1).flatten(-3)
    assert torch.equal(reader.tensor("m").double(), exact.transpose(-1, -2))


def test_a_read_knows_where_its_bytes_are() -> None:
    weight, scales = codes(300, 260), torch.rand(3, 3)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scales}
    found = formats.find(specs(tensors), QuantizationConfig({}))
    ((_, coded),) = found.coded.items()
    assert list(coded.stretches(260 * 130 + 5, 260 * 140)) == [
        ("a.weight", 260 * 130, 260 * 140),
        ("a.weight_scale_inv", 12, 24),
    ]
    assert coded.stored == ("a.weight", "a.weight_scale_inv")


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    tensors = {
        "a.weight": torch.zeros(4, 8),
        "a.weight_packed": torch.zeros(4, 1, dtype=torch.int32),
        "a.weight_scale": torch.ones(4, 1),
    }
    with pytest.raises(CheckpointError, match="there as it is, and quantised too"):
        formats.find(specs(tensors), QuantizationConfig({}))


@pytest.mark.slow
def test_compressed_tensors_converts_awq_alike() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    made = quantised.awq("a.weight", 64, 128, 32)
    converter = AutoAWQConverter(bits=4, group_size=32, zero_point=True, targets=["Linear"])
    packed = converter.process(dict(made.stored))
    args = QuantizationArgs(
        num_bits=4, type="int", symmetric=False, strategy="group", group_size=32
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {key.removeprefix("a."): x for key, x in packed.items()}
    expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    assert torch.equal(expected, made.meant["a.weight"])
