"""A spec found by probing a model class: its rules, its axes, and what it refuses.

The expected rules are written out by hand, from the classes' own code.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from typing import cast

import pytest

from streammap import catalogue
from streammap.errors import ArchitectureError
from streammap.infer import Inferred, infer

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

Table = Mapping[str, object]

CONFIGS: dict[str, dict[str, object]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 768, "n_head": 12,
        "n_layer": 12, "n_positions": 1024, "vocab_size": 50257,
    },
    "bert": {
        "architectures": ["BertForMaskedLM"], "model_type": "bert", "hidden_size": 768,
        "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072,
        "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096,
        "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "num_local_experts": 8, "vocab_size": 32000,
    },
    "t5": {
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 512,
        "d_ff": 2048, "d_kv": 64, "num_heads": 8, "num_layers": 6, "num_decoder_layers": 6,
        "vocab_size": 32128,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "hidden_size": 3072,
        "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 32, "vocab_size": 32064, "pad_token_id": 32000,
    },
}  # fmt: skip

LLAMA_ATTENTION = {
    "{base}embed_tokens": "embedding vocab -> embed",
    "{L}self_attn.q_proj": "linear embed -> q",
    "{L}self_attn.k_proj": "linear embed -> kv",
    "{L}self_attn.v_proj": "linear embed -> kv",
    "{L}self_attn.o_proj": "linear q -> embed",
    "{L}input_layernorm": "norm embed",
    "{L}post_attention_layernorm": "norm embed",
    "{base}norm": "norm embed",
    "lm_head": "linear embed -> vocab",
}
MODULES = {
    "llama": {
        **LLAMA_ATTENTION,
        "{L}mlp.gate_proj": "linear embed -> mlp",
        "{L}mlp.up_proj": "linear embed -> mlp",
        "{L}mlp.down_proj": "linear mlp -> embed",
    },
    "gpt2": {
        "{base}wte": "embedding vocab -> embed",
        "{base}wpe": "embedding pos -> embed",
        "{L}ln_1": "norm embed",
        "{L}attn.c_attn": "conv1d embed -> 3*q",
        "{L}attn.c_proj": "conv1d q -> embed",
        "{L}ln_2": "norm embed",
        "{L}mlp.c_fc": "conv1d embed -> mlp",
        "{L}mlp.c_proj": "conv1d mlp -> embed",
        "{base}ln_f": "norm embed",
        "lm_head": "linear embed -> vocab",
    },
    "bert": {
        "{base}embeddings.word_embeddings": "embedding vocab -> embed",
        "{base}embeddings.position_embeddings": "embedding pos -> embed",
        "{base}embeddings.token_type_embeddings": "embedding types -> embed",
        "{base}embeddings.LayerNorm": "norm embed",
        "{L}attention.self.query": "linear embed -> q",
        "{L}attention.self.key": "linear embed -> q",
        "{L}attention.self.value": "linear embed -> q",
        "{L}attention.output.dense": "linear q -> embed",
        "{L}attention.output.LayerNorm": "norm embed",
        "{L}intermediate.dense": "linear embed -> mlp",
        "{L}output.dense": "linear mlp -> embed",
        "{L}output.LayerNorm": "norm embed",
        "cls.predictions.transform.dense": "linear embed -> embed",
        "cls.predictions.transform.LayerNorm": "norm embed",
        "cls.predictions.decoder": "linear embed -> vocab",
    },
    "mixtral": {
        **LLAMA_ATTENTION,
        "{L}block_sparse_moe.gate": "linear embed -> expert",
        "{L}block_sparse_moe.experts.{expert}.w1": "linear embed -> mlp",
        "{L}block_sparse_moe.experts.{expert}.w2": "linear mlp -> embed",
        "{L}block_sparse_moe.experts.{expert}.w3": "linear embed -> mlp",
    },
    "t5": {
        "shared": "embedding vocab -> embed",
        "encoder.embed_tokens": "embedding vocab -> embed",
        "decoder.embed_tokens": "embedding vocab -> embed",
        "lm_head": "linear embed -> vocab",
        "encoder.final_layer_norm": "norm embed",
        "decoder.final_layer_norm": "norm embed",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "embedding",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias": "embedding",
        **{f"{{L}}layer.0.SelfAttention.{p}": "linear embed -> q" for p in "qkv"},
        **{f"{{DEC}}layer.0.SelfAttention.{p}": "linear embed -> q" for p in "qkv"},
        **{f"{{DEC}}layer.1.EncDecAttention.{p}": "linear embed -> q" for p in "qkv"},
    },
    "phi3": {
        **{k: v for k, v in LLAMA_ATTENTION.items() if k[-6:-4] not in ("q_", "k_", "v_")},
        "{L}self_attn.qkv_proj": "linear embed -> q+2*kv",
        "{L}mlp.gate_up_proj": "linear embed -> 2*mlp",
        "{L}mlp.down_proj": "linear mlp -> embed",
    },
}


@cache
def inferred(name: str) -> Inferred:
    return infer(CONFIGS[name], name=name)


def table(name: str, entry: str) -> Table:
    return cast("Table", tomllib.loads(inferred(name).toml).get(entry, {}))


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"t5"}))
def test_the_rules_are_those_of_the_class(name: str) -> None:
    assert table(name, "modules") == MODULES[name]
    assert inferred(name).unresolved == ()


def test_show_t5() -> None:
    print(inferred("t5").toml)
    assert table("t5", "modules") == MODULES["t5"]
