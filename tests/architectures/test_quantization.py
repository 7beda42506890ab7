"""Quantised checkpoints are told, and refused with the reason; inspect still works."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

import streammap
from streammap.architectures import quantization
from streammap.errors import CheckpointError
from streammap.io.dtypes import TensorSpec
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes()
AT = "encoder.layer.0.intermediate.dense"
Extra = Mapping[str, TensorSpec]

METHODS: dict[str, tuple[str, Extra]] = {
    "fp8, one scale": ("fp8 with scales", {f"{AT}.weight_scale": TensorSpec("F32", (1,))}),
    "fp8, blocks": ("fp8 with scales", {f"{AT}.weight_scale_inv": TensorSpec("F32", (1, 1))}),
    "nvfp4": ("fp8 with scales", {f"{AT}.weight_scale_2": TensorSpec("F32", ())}),
    "fp8 cache": ("fp8 with scales", {"encoder.layer.0.attn.k_scale": TensorSpec("F32", ())}),
    "GPTQ": ("GPTQ or AWQ", {f"{AT}.qweight": TensorSpec("I32", (1, 12))}),
    "GPTQ, act order": ("GPTQ or AWQ", {f"{AT}.g_idx": TensorSpec("I32", (8,))}),
    "AWQ": ("GPTQ or AWQ", {f"{AT}.qzeros": TensorSpec("I32", (1, 2))}),
    "MXFP4": ("MXFP4", {"layers.0.mlp.experts.gate_up_proj_blocks": TensorSpec("U8", (2, 4, 16))}),
    "MXFP4 scales": ("MXFP4", {"layers.0.mlp.experts.down_proj_scales": TensorSpec("U8", (2, 4))}),
    "bitsandbytes": ("bitsandbytes", {f"{AT}.weight.absmax": TensorSpec("U8", (8,))}),
    "bitsandbytes, state": (
        "bitsandbytes",
        {f"{AT}.weight.quant_state.bitsandbytes__nf4": TensorSpec("U8", (80,))},
    ),
    "compressed": ("compressed-tensors", {f"{AT}.weight_packed": TensorSpec("I32", (12, 1))}),
}
DEQUANTISE = r"\n  hint: dequantise it first"


@pytest.mark.parametrize("name", METHODS)
def test_a_quantised_tensor_is_refused_by_its_method(name: str) -> None:
    method, extra = METHODS[name]
    (key,) = extra
    plain = {f"{AT}.weight": TensorSpec("BF16", (12, 8))}
    quantization.check(plain, {})
    with pytest.raises(CheckpointError, match=f"quantised \\({method}\\).*{DEQUANTISE}") as told:
        quantization.check({**plain, **extra}, {})
    assert told.value.message.startswith(f"{key}: ")


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_a_dtype_that_needs_scales_is_refused(dtype: str) -> None:
    specs = {f"{AT}.weight": TensorSpec(dtype, (12, 8))}
    with pytest.raises(CheckpointError, match=f"weight: dtype {dtype} is quantised.*{DEQUANTISE}"):
        quantization.check(specs, {})


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"load_in_8bit": True}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_a_quantization_config_is_refused_with_its_method(
    config: Mapping[str, object], method: str
) -> None:
    expected = rf"config\.json: quantization_config \({method}\).*can't be resized{DEQUANTISE}"
    with pytest.raises(CheckpointError, match=expected):
        quantization.check({}, {"quantization_config": config})


@pytest.mark.parametrize(
    "key",
    [
        "scales",
        "x.weight",
        "x.scale",
        "logit_scale",
        "layers.0.layer_scale1.lambda1",
        "x.weight_g",
        "proj_blocks.weight",
        "x.scales.weight",
        "blocks.0.attn.k_scale_bias",
        "weight_scale",
    ],
)
def test_plain_tensors_with_such_names_pass(key: str) -> None:
    quantization.check({key: TensorSpec("F32", (4,))}, {"quantization_config": None})


@pytest.mark.parametrize("dtype", ["BOOL", "I64", "U8", "F16", "BF16", "F64"])
def test_plain_dtypes_pass(dtype: str) -> None:
    quantization.check({"x": TensorSpec(dtype, (4,))}, {})


def fp8(folder: Path) -> Path:
    """A BERT with one matrix in fp8, and its scale."""
    state = tiny.bert(SIZES)
    key = f"{AT}.weight"
    state[key] = state[key].to(torch.float8_e4m3fn)
    state[f"{key}_scale_inv"] = torch.ones(1, 1)
    return tiny.write(folder, state, tiny.bert_config(SIZES))


def test_commands_refuse_a_quantised_checkpoint(tmp_path: Path) -> None:
    source = fp8(tmp_path / "in")
    for command in ("coalesce", "decoalesce"):
        result = run(command, source, tmp_path / "out", "--width", 2)
        assert result.exit_code == 1
        assert "quantised" in result.stderr
        assert "hint: dequantise it first" in result.stderr
        assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="quantised"):
        streammap.open(source).coalesce(width=2)


def test_inspect_still_works(tmp_path: Path) -> None:
    source = fp8(tmp_path / "in")
    said = ok("inspect", source)
    assert "quantised" in said
    assert f"{AT}.weight" in said or "layer" in said
    assert json.loads(ok("inspect", source, "--json"))


def test_inspect_of_a_quantization_config_still_works(tmp_path: Path) -> None:
    config = {**tiny.bert_config(SIZES), "quantization_config": {"quant_method": "awq"}}
    source = tiny.write(tmp_path / "in", tiny.bert(SIZES), config)
    assert "quantization_config (awq)" in ok("inspect", source)
