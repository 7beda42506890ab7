"""Restacked models of transformers load and run; optipfair drops the same layers."""

from pathlib import Path
from typing import Any

import pytest
import torch

import streammap
from streammap.architectures.schema import TinyModel
from streammap.errors import ArchitectureError
from streammap.tools.spec_proof import tiny_models
from tests.support import tiny

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

WIDTHS = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
LLAMA = TinyModel("llama", "LlamaForCausalLM", {**WIDTHS, "num_hidden_layers": 8})
GEMMA = TinyModel(
    "gemma3_text",
    "Gemma3ForCausalLM",
    {
        **WIDTHS,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
    },
)
DEEPSEEK = TinyModel(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    {
        **{k: v for k, v in WIDTHS.items() if k != "head_dim"},
        "num_key_value_heads": 4,
        "num_hidden_layers": 6,
        "moe_intermediate_size": 8,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 4,
    },
)
T5 = TinyModel(
    "t5",
    "T5ForConditionalGeneration",
    {
        "vocab_size": 31,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 24,
        "num_layers": 4,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
    },
)
ZERO = {"new_layers": "zero"}
EXACT: tuple[tuple[TinyModel, dict[str, Any]], ...] = (
    (LLAMA, {"layers": "llama-pro"}),
    (LLAMA, {"layers": "llama-pro", "expand_every": 3}),
    (LLAMA, {"layers": "solar", **ZERO}),
    (LLAMA, {"layers": "g_stack", "times": 3, **ZERO}),
    (LLAMA, {"layers": "0:2,0:8", **ZERO}),
    (GEMMA, {"layers": "0:4,1:6", **ZERO}),
    (DEEPSEEK, {"layers": "0:2,0:5,3:6", **ZERO}),
    (T5, {"layers": "g_stack", "stack": "encoder", **ZERO}),
    (T5, {"layers": {"encoder": "0:3,1:4", "decoder": "0:3,2:3"}, **ZERO}),
)


def outputs(lazy: streammap.LazyCheckpoint, model: TinyModel, folder: Path) -> Any:
    lazy.save(folder, fsync=False)
    return tiny_models.outputs(folder, model)


@pytest.mark.parametrize(("model", "options"), EXACT, ids=lambda x: str(x)[:50])
def test_zero_initialised_layers_keep_the_function(
    model: TinyModel, options: dict[str, Any], tmp_path: Path
) -> None:
    tiny_models.build(model, tmp_path / "source")
    lazy = streammap.open(tmp_path / "source").restack(**options)
    assert lazy.promise[0] == "bit-exact"
    found = outputs(lazy, model, tmp_path / "result")
    for name, x in tiny_models.outputs(tmp_path / "source", model).items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0)


APPROXIMATE: tuple[tuple[TinyModel, dict[str, Any], dict[str, object]], ...] = (
    (T5, {"stack": "encoder", "drop_layers": "0"}, {"num_layers": 3, "num_decoder_layers": 3}),
    (T5, {"stack": "dec_layer", "drop_layers": [0, 2]}, {"num_layers": 4, "num_decoder_layers": 1}),
    (
        GEMMA,
        {"drop_layers": "1,2"},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "num_hidden_layers": 4},
    ),
    (DEEPSEEK, {"drop_layers": "0,4"}, {"first_k_dense_replace": 1, "num_hidden_layers": 4}),
    (DEEPSEEK, {"layers": "0:5,3:6"}, {"first_k_dense_replace": 2, "num_hidden_layers": 8}),
)


@pytest.mark.parametrize(("model", "options", "fields"), APPROXIMATE, ids=lambda x: str(x)[:50])
def test_models_without_some_layers_load_and_run(
    model: TinyModel, options: dict[str, Any], fields: dict[str, object], tmp_path: Path
) -> None:
    tiny_models.build(model, tmp_path / "source")
    lazy = streammap.open(tmp_path / "source").restack(**options)
    assert lazy.promise[0] == "approximate"
    found = outputs(lazy, model, tmp_path / "result")
    assert all(bool(x.isfinite().all()) for x in found.values())
    assert lazy.config is not None
    assert {name: lazy.config[name] for name in fields} == fields


def test_optipfair_drops_the_same_layers(tmp_path: Path) -> None:
    optipfair = pytest.importorskip("optipfair")
    tiny_models.build(LLAMA, tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    expected = optipfair.prune_model(
        model, pruning_type="DEPTH", layer_indices=[1, 4, 6], show_progress=False
    )
    lazy = streammap.open(tmp_path / "source").restack(drop_layers="1,4,6")
    lazy.save(tmp_path / "result", fsync=False)
    tiny.assert_same(tiny.written(tmp_path / "result"), dict(expected.state_dict()))
    assert expected.config.num_hidden_layers == lazy.sizes["layer"] == 5


def test_layers_that_share_keys_and_values_are_refused(tmp_path: Path) -> None:
    config = transformers.Gemma3nTextConfig(num_hidden_layers=4, num_kv_shared_layers=2)
    state = {"model.layers.0.mlp.down_proj.weight": torch.zeros(4, 4)}
    folder = tiny.write(tmp_path / "gemma3n", state, {**config.to_dict(), "architectures": []})
    with pytest.raises(ArchitectureError):
        streammap.open(folder).restack(drop_layers="1")
