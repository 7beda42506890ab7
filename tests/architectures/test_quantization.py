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
FIELD = "quantization_config"
Extra = Mapping[str, TensorSpec]

METHODS: dict[str, tuple[str, Extra]] = {
    "fp8, one scale": ("fp8 with scales", {f"{AT}.weight_scale": TensorSpec("F32", (1,))}),
    "fp8, blocks": ("fp8 with scales", {f"{AT}.weight_scale_inv": TensorSpec("F32", (1, 1))}),
    "nvfp4": ("fp8 with scales", {f"{AT}.weight_scale_2": TensorSpec("F32", ())}),
    "fp8, activations": ("fp8 with scales", {f"{AT}.input_scale": TensorSpec("F32", ())}),
    "GPTQ": ("GPTQ or AWQ", {f"{AT}.qweight": TensorSpec("I32", (1, 12))}),
    "GPTQ, act order": ("GPTQ or AWQ", {f"{AT}.g_idx": TensorSpec("I32", (8,))}),
    "AWQ": ("GPTQ or AWQ", {f"{AT}.qzeros": TensorSpec("I32", (1, 2))}),
    "MXFP4": ("MXFP4", {"layers.0.mlp.experts.gate_up_proj_blocks": TensorSpec("U8", (2, 4, 16))}),
    "MXFP4 scales": ("MXFP4", {"layers.0.mlp.experts.down_proj_scales": TensorSpec("U8", (2, 4))}),
    "HQQ": ("HQQ", {f"{AT}.W_q": TensorSpec("U8", (12, 4))}),
    "EXL2": ("EXL2", {f"{AT}.q_weight": TensorSpec("I32", (12, 4))}),
    "QuIP#": ("QuIP#", {f"{AT}.Qidxs": TensorSpec("I16", (12, 4))}),
    "quanto": ("quanto", {f"{AT}.weight._data": TensorSpec("I8", (12, 8))}),
    "ModelOpt AWQ": ("AWQ of ModelOpt", {f"{AT}.pre_quant_scale": TensorSpec("F32", (8,))}),
    "bitsandbytes": ("bitsandbytes", {f"{AT}.weight.absmax": TensorSpec("U8", (8,))}),
    "bitsandbytes, state": (
        "bitsandbytes",
        {f"{AT}.weight.quant_state.bitsandbytes__nf4": TensorSpec("U8", (80,))},
    ),
    "compressed": ("compressed-tensors", {f"{AT}.weight_packed": TensorSpec("I32", (12, 1))}),
}
DEQUANTISE = r"\n  hint: (resize it before --keep-quantised, .*; or )?dequantise it first"


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
@pytest.mark.parametrize("dtype", ["I8", "U8", "I32", "F8_E4M3"])
def test_a_packed_weight_under_a_quantization_config_is_refused_with_its_method(
    config: Mapping[str, object], method: str, dtype: str
) -> None:
    specs = {"a.weight": TensorSpec(dtype, (4, 4))}
    expected = rf"a\.weight: dtype {dtype} is quantised \({method}\) and can't be resized"
    for content in ({FIELD: config}, {"text_config": {FIELD: config}}):
        with pytest.raises(CheckpointError, match=expected + DEQUANTISE):
            quantization.check(specs, content)
    with pytest.raises(CheckpointError, match=rf"qweight: quantised \({method}\)"):
        quantization.check({"a.qweight": TensorSpec("I32", (1, 4))}, {FIELD: config})


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


@pytest.mark.parametrize(
    ("name", "beside", "dtype"), [("AQLM", "codebooks", "I8"), ("MLX", "biases", "U32")]
)
def test_codes_are_told_by_what_stands_beside_them(name: str, beside: str, dtype: str) -> None:
    codes = {"AQLM": "codes", "MLX": "weight"}[name]
    specs = {f"{AT}.{codes}": TensorSpec(dtype, (4, 4)), f"{AT}.{beside}": TensorSpec("F16", (4,))}
    with pytest.raises(CheckpointError, match=f"quantised \\({name}\\)"):
        quantization.check(specs, {})
    quantization.check({f"{AT}.{beside}": TensorSpec("F16", (4,))}, {})


def unread(folder: Path) -> Path:
    """A BERT with one matrix of bitsandbytes."""
    state = tiny.bert(SIZES)
    key = f"{AT}.weight"
    state[key] = torch.zeros(48, 1, dtype=torch.uint8)
    state[f"{key}.absmax"] = torch.zeros(2, dtype=torch.uint8)
    return tiny.write(folder, state, tiny.bert_config(SIZES))


def test_commands_refuse_what_is_not_read(tmp_path: Path) -> None:
    source = unread(tmp_path / "in")
    for command in ("coalesce", "decoalesce"):
        result = run(command, source, tmp_path / "out", "--width", 2)
        assert result.exit_code == 1
        assert "quantised (bitsandbytes)" in result.stderr
        assert "hint: dequantise it first" in result.stderr
        assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="quantised"):
        streammap.open(source).coalesce(width=2)


def test_inspect_still_works(tmp_path: Path) -> None:
    source = unread(tmp_path / "in")
    said = ok("inspect", source)
    assert "quantised" in said
    assert f"{AT}.weight" in said or "layer" in said
    assert json.loads(ok("inspect", source, "--json"))


# What is left over beside plain weights.


def _with_cache_scales(state: tiny.State) -> tiny.State:
    layers = range(SIZES.layers)
    scales = {f"encoder.layer.{i}.attn.{x}_scale": torch.ones(()) for i in layers for x in "kv"}
    return {**state, **scales}


@pytest.mark.parametrize("nested", [False, True])
def test_a_quantization_config_beside_plain_weights_is_left_out(
    tmp_path: Path, *, nested: bool
) -> None:
    how = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    extra: dict[str, object] = {"text_config": {FIELD: how, "x": 1}} if nested else {FIELD: how}
    config = {**tiny.bert_config(SIZES), **extra}
    state = {key: tensor.bfloat16() for key, tensor in tiny.bert(SIZES).items()}
    source = tiny.write(tmp_path / "in", state, config)
    note = "config.json: quantization_config (bitsandbytes) is left out: no weight is quantised"
    assert note in ok("inspect", source)
    assert f"in: {note}" in ok("plan", "coalesce", source, "--width", 2)
    big = streammap.open(source)
    for n, result in enumerate((big.coalesce(width=2), big.interpolate(big, alpha=0.5), big)):
        out = tmp_path / str(n)
        assert f"in: {note}" in result.save(out).notes
        written = (out / "config.json").read_text()
        assert FIELD not in written
        assert ('"x": 1' in written) is nested
        ok("verify", out, "--recompute", 5)


@pytest.mark.parametrize("configured", [False, True])
def test_scales_of_a_quantised_cache_are_left_out_with_one_note(
    tmp_path: Path, *, configured: bool
) -> None:
    config = tiny.bert_config(SIZES)
    if configured:
        config[FIELD] = {"quant_method": "fp8", "kv_cache_scheme": {"num_bits": 8}}
    source = tiny.write(tmp_path / "in", _with_cache_scales(tiny.bert(SIZES)), config)
    report = streammap.open(source).coalesce(width=2, depth=2).save(tmp_path / "out")
    told = [note for note in report.notes if "_scale" in note]
    assert len(told) == 1
    assert "k_scale" in told[0]
    assert "and 5 more: scales of a quantised KV cache, left out" in told[0]
    assert not [key for key in tiny.written(tmp_path / "out") if key.endswith("_scale")]
    assert FIELD not in (tmp_path / "out" / "config.json").read_text()
    ok("verify", tmp_path / "out", "--recompute", 5)
    ok("verify", source)


def test_what_is_not_read_keeps_its_config_and_its_scales(tmp_path: Path) -> None:
    state = _with_cache_scales(tiny.bert(SIZES))
    state[f"{AT}.weight.absmax"] = torch.zeros(2, dtype=torch.uint8)
    config = {**tiny.bert_config(SIZES), FIELD: {"quant_method": "bitsandbytes"}}
    lazy = streammap.open(tiny.write(tmp_path / "in", state, config))
    assert lazy.config == config
    assert lazy.plan.specs.keys() == state.keys()
    assert lazy.plan.notes == ()
    with pytest.raises(CheckpointError, match=r"quantised \(bitsandbytes\)"):
        lazy.coalesce(width=2)


def test_tensors_that_are_dropped_in_each_layer_are_one_note(tmp_path: Path) -> None:
    at = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 11,
        "tie_word_embeddings": True,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (11, 8)}
    shapes["model.norm.weight"] = (8,)
    for i in range(4):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{n}_layernorm.weight": (8,) for n in ("input", "post_attention")}
        shapes |= {f"{layer}self_attn.{n}_proj.weight": (8, 8) for n in "qkvo"}
        shapes |= {f"{layer}mlp.{n}_proj.weight": (12, 8) for n in ("gate", "up")}
        shapes |= {f"{layer}mlp.down_proj.weight": (8, 12), at.format(i): (2,)}
    source = tiny.write(tmp_path / "in", tiny.random(shapes), config)
    notes = streammap.open(source).coalesce(mlp=2).plan.notes
    told = [note for note in notes if "inv_freq" in note]
    assert told == [f"{at.format('*')} (4): dropped, loaders don't use it"]
