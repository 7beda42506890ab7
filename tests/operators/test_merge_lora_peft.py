"""What peft makes of the same adapters: its merged weights, and its models' outputs."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import streammap
from streammap.common import optional

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # peft warns of much
_COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
_EXPERTS: dict[str, Any] = {
    "moe_intermediate_size": 20,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "head_dim": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": False}),
    "tied": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": True}),
    "gpt2": ("GPT2Config", {"vocab_size": 97, "n_embd": 48, "n_layer": 2, "n_head": 6}),
    "phi3": ("Phi3Config", {**_COMMON, "pad_token_id": 0}),
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_COMMON, **_EXPERTS}),
    "gpt_oss": ("GptOssConfig", {**_COMMON, "head_dim": 8, "num_local_experts": 4}),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "patterns": (
        "llama",
        {
            "lora_alpha": 7,
            "target_modules": LINEARS,
            "rank_pattern": {"layers.0.mlp.down_proj": 2, ".*k_proj": 8},
            "alpha_pattern": {r"layers\.(0|1)\.self_attn.v_proj": 3},
        },
    ),
    "rslora": ("llama", {"use_rslora": True, "target_modules": [*LINEARS, "lm_head"]}),
    "dora": ("llama", {"use_dora": True, "target_modules": LINEARS}),
    "embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3]}),
    "tied tokens": ("tied", {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3]}),
    "tied head": ("tied", {"target_modules": ["q_proj", "lm_head"]}),
    "tied embedding": ("tied", {"target_modules": ["q_proj", "embed_tokens"]}),
    "conv1d": (
        "gpt2",
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "bias": "all"},
    ),
    "biases": ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}),
    "lora bias": ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}),
    "fused qkv": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "mixtral": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "alpha_pattern": {"experts.down_proj": 32},
        },
    ),
    "one of two": ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}),
    "gpt_oss": ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


def _made(transformers: Any, kind: str) -> Any:
    name, options = MODELS[kind]
    torch.manual_seed(5)
    config = getattr(transformers, name)(**options)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    return model.eval()


def _adapted(peft: Any, model: Any, options: dict[str, Any], folder: Path) -> Any:
    """The model with a random adapter, which is saved."""
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.parametrize("published", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_as_peft_merges(tmp_path: Path, case: str, *, published: bool) -> None:
    """Weights within a unit in the last place, outputs within rounding, in both layouts."""
    peft = pytest.importorskip("peft")
    transformers = optional.library("transformers")
    kind, options = CASES[case]
    if not published and kind not in ("mixtral", "qwen3_moe"):
        pytest.skip("one layout only")
    with optional.quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = _made(transformers, kind)
        model.save_pretrained(tmp_path / "model", save_original_format=published)
        adapted = _adapted(peft, model, options, tmp_path / "adapter")
        both = f"{tmp_path}/model+{tmp_path}/adapter"
        streammap.open(both).save(tmp_path / "out", fsync=False, class_check="never")
        ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(18).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, adapted(tokens).logits, rtol=0, atol=5e-7)
    if kind == "tied":
        return  # peft merges into both of two tensors that are tied, against its own outputs
    merged = adapted.merge_and_unload().state_dict()
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, merged[key], rtol=2**-23, atol=2e-7)


def test_two_adapters_as_peft_merges_them(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = optional.library("transformers")
    with optional.quiet(), contextlib.redirect_stderr(io.StringIO()):
        _made(transformers, "llama").save_pretrained(tmp_path / "model")
        for name, modules in {"one": LINEARS, "two": ["q_proj", "up_proj"]}.items():
            model = _made(transformers, "llama")
            _adapted(peft, model, {"target_modules": modules}, tmp_path / name)
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "one", adapter_name="one")
        adapted.load_adapter(tmp_path / "two", adapter_name="two")
        merged = adapted.merge_and_unload(adapter_names=["one", "two"]).state_dict()
    lazy = streammap.open(f"{tmp_path}/model+{tmp_path}/one+{tmp_path}/two")
    for key, tensor in dict(lazy.tensors()).items():
        torch.testing.assert_close(tensor, merged[key], rtol=2**-22, atol=2e-7)


def test_in_bfloat16_the_rounding_is_the_better_one(tmp_path: Path) -> None:
    """peft rounds B A, scales it, and rounds the sum again; here the sum is rounded once."""
    peft = pytest.importorskip("peft")
    transformers = optional.library("transformers")
    with optional.quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = _made(transformers, "llama").to(torch.bfloat16)
        model.save_pretrained(tmp_path / "model")
        before = {key: x.double() for key, x in model.state_dict().items()}
        adapted = _adapted(peft, model, {"target_modules": ["up_proj"]}, tmp_path / "adapter")
        theirs = adapted.merge_and_unload().state_dict()
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    lazy = streammap.open(f"{tmp_path}/model+{tmp_path}/adapter")
    for i in range(2):
        module = f"model.layers.{i}.mlp.up_proj"
        a, b = (stored[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
        want = before[f"{module}.weight"] + 2.0 * (b @ a)
        ours = (lazy.read(f"{module}.weight").double() - want).abs()
        other = (theirs[f"{module}.weight"].double() - want).abs()
        assert ours.mean() <= other.mean()
        torch.testing.assert_close(want + ours, want, rtol=2**-8, atol=0)
