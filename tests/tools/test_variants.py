"""Switches of config.json that tiny models don't have: resized, they compute the same too."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from streammap.architectures import registry
from streammap.tools.spec_proof import checks

pytest.importorskip("transformers")

VARIANTS = """
afmoe attention_bias=true mup_enabled=true
aria_text moe_num_shared_experts=1 mlp_bias=true
axk2 attention_bias=true
blip-2 vision_config.qkv_bias=false qformer_config.use_qformer_text_input=true
cohere2_moe num_key_value_heads=6 head_dim=absent layer_types=absent
dbrx num_key_value_heads=1
deepseek_v2 q_lora_rank=null n_group=2 attention_bias=true
deepseek_v2 first_k_dense_replace=2 mlp_bias=true
deepseek_v3 first_k_dense_replace=0
dinov3_vit query_bias=false value_bias=false proj_bias=false
dots1 sliding_window=null norm_topk_prob=true
ernie4_5_moe moe_layer_start_index=2
exaone_moe num_shared_experts=1
falcon_h1 projectors_bias=true mamba_rms_norm=true
falcon_h1_norm head_dim=absent key_multiplier=1.7
flint decoder_sparse_step=2 num_key_value_heads=1
gemma4 vision_config.num_key_value_heads=1 vision_config.attention_bias=true
gemma4_text num_hidden_layers=12 num_kv_shared_layers=4
glm4_moe n_shared_experts=1 use_qk_norm=false first_k_dense_replace=2
glm4v_moe text_config.n_shared_experts=1 text_config.routed_scaling_factor=1.7
got_ocr2 vision_config.qkv_bias=false
granitemoehybrid_dense attention_bias=false embedding_multiplier=1.7
hunyuan_vl text_config.num_key_value_heads=1 text_config.attention_bias=true
internvl vision_feature_layer=-2
kimi_linear head_dim=absent q_lora_rank=12
kolibri1 head_dim=absent layer_types=absent norm_topk_prob=true
kosmos-2 tie_word_embeddings=false
kosmos-2 text_config.tie_word_embeddings=false
laguna gating=false head_dim=absent
lfm2 block_ffn_dim_multiplier=1.7
lfm2_moe conv_bias=true num_dense_layers=2 num_key_value_heads=1
lfm2_vl text_config.block_auto_adjust_ff_dim=true
lfm3 use_attention_gate=false head_dim=absent layer_types=absent
llama4_text use_qk_norm=false num_key_value_heads=6
llava vision_feature_layer=[-2,-1] multimodal_projector_bias=false
mimo_v2_flash head_dim=absent hidden_act="relu"
minicpm3 q_lora_rank=null
minimax layer_types=absent sliding_window=4
nemotron_h n_shared_experts=2 num_key_value_heads=1
nemotron_h_latent attention_bias=false norm_topk_prob=true use_bias=false
nllb-moe_untied router_bias=false
olmoe clip_qkv=0.5 attention_bias=true
olmo_hybrid num_key_value_heads=6
ovis2 vision_config.mlp_bias=true text_config.layer_types=absent
paligemma text_config.use_bidirectional_attention=false vision_config.vision_use_head=true
paligemma2 text_config.attn_logit_softcapping=null text_config.final_logit_softcapping=null
parakeet_encoder attention_bias=true convolution_bias=true
phimoe num_key_value_heads=1 sliding_window=4
pixtral head_dim=absent
qwen2_5_omni_thinker text_config.use_sliding_window=true
qwen3_next head_dim=absent mlp_only_layers=[1] num_key_value_heads=1
qwen3_vl_moe text_config.decoder_sparse_step=2
recurrent_gemma_untied attention_bias=false num_key_value_heads=1
wav2vec2-bert_adapter output_hidden_size=36
"""
"""Of each line a model, and fields of its config.json; "absent" removes one."""


@pytest.mark.slow
@pytest.mark.parametrize("line", VARIANTS.strip().splitlines())
def test_a_variant_is_proved_as_its_model_is(tmp_path: Path, line: str) -> None:
    name, *changes = line.split()
    archs = [arch for arch in registry.names() if registry.tiny_models(arch)]
    ((arch, model),) = checks.chosen(archs, name=name)
    config: dict[str, Any] = copy.deepcopy(dict(model.config))
    for field, value in (change.split("=", 1) for change in changes):
        *parts, last = field.split(".")
        table = config
        for part in parts:
            table = table[part]
        table.pop(last, None)
        if value != "absent":
            table[last] = json.loads(value)
    report = checks.prove(replace(model, config=config), arch, tmp_path)
    assert [check for check in report.checks if not check.passed] == []
