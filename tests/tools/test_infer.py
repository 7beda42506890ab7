"""A spec found by probing a model class: its rules, its axes, and what it refuses.

The expected rules are written out by hand, from the classes' own code.
"""

import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import cast

import pytest

from streammap.architectures import config_fields, registry
from streammap.errors import ArchitectureError, CheckpointError
from streammap.tools.spec_infer import (
    completing,
    module_roles,
    repair,
    shrink,
    solve,
    tiny_sizes,
    words,
)
from streammap.tools.spec_infer.amendments import Amendments
from streammap.tools.spec_infer.depth_rules import DepthRules
from streammap.tools.spec_infer.disk_names import DiskNames, on_disk, saved
from streammap.tools.spec_infer.infer import Inferred, infer
from streammap.tools.spec_infer.naming import AxisNaming
from streammap.tools.spec_infer.probe import Workbench
from streammap.tools.spec_infer.write_rules import SpecRules
from streammap.tools.spec_proof import unseen
from streammap.tools.spec_proof.checks import Check
from tests.support.inferred import named_type

transformers = pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

Table = Mapping[str, object]

CONFIGS: dict[str, dict[str, object]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "vocab_size": 50257,
    },
    "bert": {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "hidden_size": 768,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "intermediate_size": 3072,
        "vocab_size": 30522,
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "vocab_size": 32000,
    },
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "d_model": 512,
        "d_ff": 2048,
        "d_kv": 64,
        "num_heads": 8,
        "num_layers": 6,
        "num_decoder_layers": 6,
        "vocab_size": 32128,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 32064,
        "pad_token_id": 32000,
    },
}

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
T5_BIAS = "embedding relative_attention_num_buckets -> heads"
MODULES: dict[str, dict[str, str]] = {
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
        **{f"{{LAYER}}layer.{i}.layer_norm": "norm embed" for i in range(2)},
        **{f"{{DEC}}layer.{i}.layer_norm": "norm embed" for i in range(3)},
        **{f"{{LAYER}}layer.0.SelfAttention.{p}": "linear embed -> q" for p in "qkv"},
        **{f"{{DEC}}layer.0.SelfAttention.{p}": "linear embed -> q" for p in "qkv"},
        **{f"{{DEC}}layer.1.EncDecAttention.{p}": "linear embed -> q" for p in "qkv"},
        "{LAYER}layer.0.SelfAttention.o": "linear q -> embed",
        "{DEC}layer.0.SelfAttention.o": "linear q -> embed",
        "{DEC}layer.1.EncDecAttention.o": "linear q -> embed",
        "{LAYER}layer.0.SelfAttention.relative_attention_bias": T5_BIAS,
        "{DEC}layer.0.SelfAttention.relative_attention_bias": T5_BIAS,
        "{LAYER}layer.1.DenseReluDense.wi": "linear embed -> mlp",
        "{LAYER}layer.1.DenseReluDense.wo": "linear mlp -> embed",
        "{DEC}layer.2.DenseReluDense.wi": "linear embed -> mlp",
        "{DEC}layer.2.DenseReluDense.wo": "linear mlp -> embed",
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


AXES: dict[str, dict[str, object]] = {
    "llama": {
        "embed": "hidden_size",
        "heads": "num_attention_heads",
        "q_group": "=heads/kv_heads",
        "kv_heads": ["num_key_value_heads", "=heads"],
        "head_dim": ["head_dim", "=embed/heads"],
    },
    "gpt2": {"mlp": ["n_inner", "=4*embed"], "head_dim": "=embed/heads", "layer": "n_layer"},
    "bert": {"heads": "num_attention_heads", "head_dim": "=embed/heads"},
    "mixtral": {"expert": "num_local_experts", "mlp": "intermediate_size"},
    "t5": {"head_dim": ["d_kv", "=64"], "layer": "num_layers", "dec_layer": "num_decoder_layers"},
    "phi3": {"head_dim": "=embed/heads", "q_group": "=heads/kv_heads"},
}
KINDS = {
    "llama": {"layer": "depth", "head_dim": "frozen", "q_group": "group", "vocab": "frozen"},
    "gpt2": {"layer": "depth", "head_dim": "frozen", "vocab": "frozen", "pos": "frozen"},
    "mixtral": {
        "layer": "depth",
        "head_dim": "frozen",
        "q_group": "group",
        "vocab": "frozen",
        "expert": "expert",
    },
}
HEADS: dict[str, dict[str, object]] = {
    "llama": {"norm": "{base}norm", "embed": "{base}embed_tokens.weight", "tied": False},
    "gpt2": {"norm": "{base}ln_f", "embed": "{base}wte.weight"},
    "bert": {
        "norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions.decoder.weight",
    },
    "t5": {"norm": "decoder.final_layer_norm", "embed": "shared.weight"},
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_the_rules_are_those_of_the_class(name: str) -> None:
    assert table(name, "modules") == MODULES[name]
    assert inferred(name).unresolved == ()


@pytest.mark.parametrize("name", sorted(AXES))
def test_axes_are_config_fields_and_what_their_absence_means(name: str) -> None:
    assert AXES[name].items() <= table(name, "axes").items()


@pytest.mark.parametrize("name", sorted(KINDS))
def test_only_widths_that_are_made_and_read_can_be_resized(name: str) -> None:
    assert table(name, "axis_kind") == KINDS[name]


@pytest.mark.parametrize("name", sorted(HEADS))
def test_the_head_and_the_norm_before_it(name: str) -> None:
    assert HEADS[name].items() <= table(name, "head").items()


def test_a_norm_of_the_embeddings_is_not_the_one_before_the_head() -> None:
    found = tomllib.loads(infer({"model_type": "flaubert", "n_layers": 2}, name="flaubert").toml)
    assert found["head"]["norm"] == "{base}layer_norm2.{layer=last}"
    assert found["norm"]["post"] is True


def test_norms_are_known_by_what_they_do() -> None:
    gemma = infer({"model_type": "gemma", "num_hidden_layers": 2}, name="gemma")
    assert tomllib.loads(gemma.toml)["norm"] == {
        "kind": "rms",
        "offset": 1.0,
        "eps": ["rms_norm_eps"],
    }
    assert table("bert", "norm") == {"kind": "layer", "eps": ["layer_norm_eps"], "post": True}
    assert table("gpt2", "norm") == {"kind": "layer", "eps": ["layer_norm_epsilon"]}


def test_modules_of_a_class_s_own_are_known_by_what_they_give() -> None:
    # I-BERT's norms give a scale beside the numbers, and its embeddings are not torch's.
    config: Table = {"model_type": "ibert", "num_hidden_layers": 2}
    found = tomllib.loads(infer(config, name="ibert").toml)
    assert found["norm"]["kind"] == "layer"
    assert found["norm"]["post"] is True
    embeddings = found["modules"]["{base}embeddings.word_embeddings"]
    assert embeddings == "embedding vocab -> embed"


def test_experts_kept_apart_in_files_are_an_index() -> None:
    assert table("mixtral", "experts") == {"top_k": ["num_experts_per_tok"]}


def test_what_picks_more_than_there_are_experts_does_not_grow_with_them() -> None:
    config: Table = {"model_type": "deepseek_v32", "num_hidden_layers": 4, "index_topk": 2048}
    bench = Workbench(config, name="deepseek_v32")
    shrink.shorten(bench)
    few = ("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
    assert [bench.fields[name] for name in few] == [8, 2, 4, 2]
    found = tomllib.loads(infer(config, name="deepseek_v32").toml)
    assert found["experts"]["top_k"] == ["num_experts_per_tok"]


def test_groups_of_experts_go_by_more_than_one_name() -> None:
    config: Table = {"model_type": "bailing_hybrid", "num_experts": 32}
    found = tomllib.loads(infer(config, name="bailing_hybrid").toml)
    assert found["experts"]["groups"] == "num_expert_group"
    assert sorted(found["experts"]["multiply"]) == ["num_expert_group", "topk_group"]


@pytest.mark.parametrize("name", ["mixtral", "phi3"])
def test_names_in_files_are_remembered_from_model_to_model(name: str) -> None:
    known = DiskNames()
    for changes in ({"num_hidden_layers": 2}, {"num_hidden_layers": 3, "hidden_size": 512}):
        net = Workbench(CONFIGS[name], name=name).with_changes(changes).net()
        shapes = {key: tuple(x.shape) for key, x in on_disk(net, saved(net)).items()}
        assert known.shapes(net) == shapes


def test_layers_of_two_kinds() -> None:
    config: dict[str, object] = {"model_type": "gpt_oss", "num_hidden_layers": 4}
    found = tomllib.loads(infer(config, name="gpt_oss").toml)
    derived = {"list": "layer_types", "when": ["model_type == gpt_oss"], "every": 2, "offset": -1}
    kinds = {"yes": "full_attention", "no": "sliding_attention"}
    assert found["depth"] == {"layer": {"lists": ["layer_types"], "derived": [derived | kinds]}}
    assert found["tensors"]["{L}mlp.experts.down_proj"] == "expert, mlp:in, embed:out"
    assert found["tensors"]["{L}mlp.experts.down_proj_bias"] == "expert, embed:out"


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_text_is_a_spec_with_a_tiny_model(name: str) -> None:
    spec = registry.parse(inferred(name).toml, name=name)
    assert spec.model_types == (name,)
    (model,) = cast("dict[str, list[Table]]", table(name, "proof"))["models"]
    config = cast("Table", model["config"])
    made = transformers.AutoConfig.for_model(name, **config)
    sizes = [getattr(made, field, 0) or 0 for field in ("hidden_size", "vocab_size")]
    assert max(sizes) <= 100
    assert model["class"] == cast("list[str]", CONFIGS[name]["architectures"])[0]


def test_probing_is_quick() -> None:
    # 20 models or so: one field after the other, not all their combinations.
    assert all(inferred(name).n_probes < 60 for name in CONFIGS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no model_type in its config.json"),
        ({"model_type": "grown"}, "has no model type 'grown'"),
        (
            {"model_type": "grown", "auto_map": {"AutoModel": "modeling.Grown"}},
            "'grown' brings its own code, which is never run",
        ),
        ({"model_type": "bert", "hidden_size": "wide"}, "transformers can't read its config"),
        (
            {"model_type": "bert", "hidden_size": 10, "num_attention_heads": 3},
            "can't be built: The hidden size",
        ),
    ],
)
def test_what_is_refused(config: Table, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message) as caught:
        infer(config, name="x")
    assert caught.value.hint


def test_code_that_comes_with_a_known_model_type_is_passed_by() -> None:
    config = {**CONFIGS["bert"], "auto_map": {"AutoModel": "modeling_other.OtherBert"}}
    assert infer(config, name="bert").toml == inferred("bert").toml


SMALL: dict[str, object] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 92,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
}


def test_a_factor_of_the_forward_pass_is_found_by_the_proof(tmp_path: Path) -> None:
    config: Table = {"model_type": "gemma2", **SMALL}
    draft = tomllib.loads(infer(config, name="gemma2").toml)
    assert "forward_scale" not in draft
    found = infer(config, name="gemma2", scratch=tmp_path)
    assert found.report is not None
    assert found.report.passed
    assert not found.left_out
    amended = tomllib.loads(found.toml)
    assert amended.pop("forward_scale") == {"model.embed_tokens.weight": "embed**0.5"}
    assert amended == draft


def test_lists_that_only_the_built_model_has_and_the_rule_of_those_that_are_derived() -> None:
    # Longformer makes one window a layer of a number; ModernBERT's first layer lacks a norm.
    longformer = tomllib.loads(infer({"model_type": "longformer"}, name="longformer").toml)
    assert longformer["depth"]["layer"]["lists"] == ["attention_window"]
    modernbert = tomllib.loads(infer({"model_type": "modernbert"}, name="modernbert").toml)
    depth = modernbert["depth"]["layer"]
    assert depth["first"] is True
    assert depth["lists"] == ["layer_types"]
    assert depth["derived"][0]["every"] == 3
    assert depth["derived"][0]["yes"] == "full_attention"


def test_every_n_th_layer_by_a_field() -> None:
    config: Table = {
        "model_type": "nllb-moe",
        "encoder_layers": 4,
        "decoder_layers": 4,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": 4,
    }
    depth = tomllib.loads(infer(config, name="nllb-moe").toml)["depth"]
    assert depth["enc_layer"] == {"periods": [[["encoder_sparse_step", 2], -1]]}
    assert depth["dec_layer"] == {"periods": [[["decoder_sparse_step", 2], -1]]}


def test_linear_attention_makes_queries_and_keys_before_values() -> None:
    config: Table = {"model_type": "qwen3_5_text", "num_hidden_layers": 4}
    modules = tomllib.loads(infer(config, name="qwen3_5_text").toml)["modules"]
    keys, of_one = "linear_num_key_heads", "linear_num_value_heads_group"
    values = f"{keys}*{of_one}*linear_value_head_dim"
    made = f"2*{keys}*linear_key_head_dim+{values}"
    assert modules["{L}linear_attn.in_proj_qkv"] == f"linear embed -> {made}"
    assert modules["{L}linear_attn.out_proj"] == f"linear {values} -> embed"
    # The attention beside it has groups of its own, by the usual name.
    assert modules["{L}self_attn.o_proj"] == "linear q -> embed"


def test_every_n_th_layer_where_only_the_class_says_so() -> None:
    # Two recurrent layers and one of attention take turns, whatever the number of layers.
    found = tomllib.loads(infer({"model_type": "recurrent_gemma"}, name="recurrent_gemma").toml)
    assert found["depth"]["layer"]["periods"] == [[3, 2]]


def test_sizes_that_a_configuration_lacks_are_filled() -> None:
    bench = Workbench({"model_type": "ministral"}, name="ministral")
    assert bench.snapshot({}) is None
    completing.complete(bench)
    assert bench.fields["head_dim"] == 4096 // 32


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_each_tiny_model_is_tiny_and_keeps_what_is_equal(name: str) -> None:
    bench = Workbench(CONFIGS[name], name=name)
    shrink.shorten(bench)
    structure = module_roles.describe_model(bench.net())
    naming = AxisNaming(bench, structure, solve.solve(bench, structure))
    proposed = tuple(tiny_sizes.proposals(naming))
    assert len(proposed) >= 3
    for sizes in proposed:
        model = bench.with_changes(sizes).snapshot({})
        assert model is not None
        assert model.n_elements < 2_000_000
        assert model.templates == bench.base().templates
    heads = [proposed[1].get(f, 0) for f in ("num_attention_heads", "num_key_value_heads")]
    assert name == "t5" or heads == [8, 2]


def test_images_of_tiny_models_are_small_where_that_runs() -> None:
    sides = [sizes.get("image_size") for sizes in tiny_sizes.proposals(named_type("vit"))]
    assert sides == [4 * 16] * 3 + [None] * 3


def test_each_size_of_a_list_is_made_smaller() -> None:
    sizes = next(tiny_sizes.proposals(named_type("hubert")))
    assert all(int(str(sizes[f"conv_dim.{i}"])) < 512 for i in range(5))


def test_a_part_of_a_tiny_config_says_what_its_own_class_has_otherwise() -> None:
    # PaliGemma's image encoder has 16 heads where nothing is said, SigLIP's own class 12.
    bench = Workbench({"model_type": "paligemma"}, name="paligemma")
    given = tiny_sizes.proof_config(bench.with_changes({"vision_config.hidden_size": 64}))
    made = bench.made_of(given)["vision_config"]
    assert isinstance(made, dict)
    assert (made["hidden_size"], made["num_attention_heads"]) == (64, 16)


def test_a_model_of_several_parts_has_one_size_of_each_kind_in_each_part() -> None:
    spec = registry.parse(infer({"model_type": "siglip2"}, name="siglip2").toml, name="siglip2")
    assert spec.spaces["hidden"] == ("vision_embed",)
    assert spec.spaces["heads"] == ("vision_heads",)
    assert spec.spaces["mlp"] == ("vision_mlp",)


def test_norms_of_a_model_in_parts_are_each_of_their_own_kind() -> None:
    text = infer({"model_type": "paligemma"}, name="paligemma").toml
    rules = registry.parse(text, name="paligemma").rules
    norms = {rule.pattern.text: rule.norm for rule in rules if rule.norm is not None}
    found = {(("TEXT" in k or "language" in k), n.kind, n.offset) for k, n in norms.items()}
    assert found == {(True, "rms", 1.0), (False, "layer", 0.0)}


def test_the_head_reads_the_norm_of_its_own_text_model_and_neighbours_lie_one_by_one() -> None:
    name = "moss_transcribe_diarize"
    spec = tomllib.loads(infer({"model_type": name}, name=name).toml)
    assert spec["head"]["norm"] == "{base}language_model.norm"
    projector = spec["modules"]["{base}multi_modal_projector.linear_1"]
    assert projector == "linear audio_merge_size*audio_embed -> text_embed"


def test_a_model_without_a_width_of_its_own_is_refused(tmp_path: Path) -> None:
    naming = named_type("vit")
    fixed = naming.amended(Amendments(frozen=dict.fromkeys(naming.kinds, "")))
    with pytest.raises(ArchitectureError, match="one size a stage"):
        repair.prove(fixed, lambda *_: "", tmp_path)


def test_a_head_size_that_no_tensor_has_is_that_of_the_tiny_model() -> None:
    # Pixtral's rotary positions read head_dim, its linears hidden_size / num_attention_heads.
    bench = Workbench({"model_type": "pixtral", "num_hidden_layers": 1}, name="pixtral")
    structure = module_roles.describe_model(bench.net())
    naming = AxisNaming(bench, structure, solve.solve(bench, structure))
    sizes = next(iter(tiny_sizes.proposals(naming)))
    parts = [int(str(sizes[f])) for f in ("hidden_size", "num_attention_heads", "head_dim")]
    assert parts[0] == parts[1] * parts[2]


def test_a_head_size_that_equals_another_one_stays_so_in_the_tiny_model() -> None:
    # Rotary positions are as many as head_dim says, and turn the qk_rope_head_dim of each head.
    config = {"model_type": "longcat_flash", "num_layers": 2, "n_routed_experts": 8}
    bench = Workbench(config, name="longcat_flash")
    structure = module_roles.describe_model(bench.net())
    naming = AxisNaming(bench, structure, solve.solve(bench, structure))
    sizes = tiny_sizes._all_different(naming)
    assert sizes["head_dim"] == sizes["qk_rope_head_dim"] != 64


def test_hidden_sizes_that_heads_do_not_divide_get_a_head_size() -> None:
    bench = Workbench({"model_type": "glm4_moe"}, name="glm4_moe")
    assert "head_dim" not in bench.fields
    completing.complete(bench)
    assert bench.fields["head_dim"] == 42
    # Where the class reads none, or they divide, nothing is added.
    for name in ("bert", "llama"):
        other = Workbench({"model_type": name, "hidden_size": 768}, name=name)
        before = dict(other.fields)
        completing.complete(other)
        assert other.fields == before


def test_a_field_that_the_class_asks_for_by_name_is_given() -> None:
    bench = Workbench({"model_type": "dbrx"}, name="dbrx")
    assert "rope_theta" in bench.why()
    completing.complete(bench)
    assert bench.snapshot({}) is not None
    inside = bench.fields["attn_config"]
    assert isinstance(inside, dict)
    assert inside["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("name", "field", "kinds"),
    [
        ("lfm2_moe", "layer_types", {"full_attention", "conv"}),
        ("deepseek_ocr2", "text_config.mlp_layer_types", {"dense", "sparse"}),
    ],
)
def test_a_list_of_kinds_that_is_null_has_all_that_the_class_knows(
    name: str, field: str, kinds: set[str]
) -> None:
    bench = Workbench({"model_type": name}, name=name)
    assert bench.outline({}) is None
    completing.complete(bench)
    entries = config_fields.field_value(bench.fields, field)
    assert isinstance(entries, list)
    assert set(entries) == kinds
    assert bench.outline({}) is not None


def test_rotary_positions_are_those_of_each_kind_of_layer_where_a_class_asks_for_them() -> None:
    bench = Workbench({"model_type": "cohere_compass_text"}, name="cohere_compass_text")
    completing.complete(bench)
    rope = bench.fields["rope_parameters"]
    assert isinstance(rope, dict)
    assert rope.keys() == {"full_attention"}
    assert bench.outline({}) is not None


def test_layers_whose_outputs_are_read_one_by_one_are_marks_and_two_of_them_are_left() -> None:
    bench = Workbench({"model_type": "qwen3_vl"}, name="qwen3_vl")
    marks = "vision_config.deepstack_visual_indexes"
    assert config_fields.field_value(bench.fields, marks) == [8, 16, 24]
    assert bench.is_counted(marks)
    shrink.shorten(bench)
    assert config_fields.field_value(bench.fields, marks) == [0, 1]
    windows = Workbench({"model_type": "qwen2_5_vl"}, name="qwen2_5_vl")
    assert not windows.is_counted("vision_config.fullatt_block_indexes")


def test_the_hidden_state_that_a_projector_reads_moves_with_its_layers() -> None:
    spec = tomllib.loads(infer({"model_type": "video_llava"}, name="video_llava").toml)
    assert spec["depth"]["vision_layer"]["states"] == [["vision_feature_layer", -2]]
    assert "states" not in spec["depth"].get("text_layer", {})


def test_factors_of_the_residual_stream_may_be_1_in_new_layers() -> None:
    naming = named_type("doge")
    failed = Check("promises", False, 1.0, "new_layers doubled: 1.0", ("layer",))
    known = next(iter(repair._promises(naming, Amendments(), failed)))
    names = ("input_residual", "post_attention_residual")
    assert set(known.ones) == {f"model.layers.{{layer}}.{name}" for name in names}
    other = naming.amended(known)
    (text,) = DepthRules(other, SpecRules(other)).tables()
    assert tomllib.loads(text)["depth"]["layer"]["ones"] == [f"{{L}}{name}" for name in names]


def test_layers_may_compute_by_their_number() -> None:
    naming = named_type("llama")
    failed = Check("promises", False, 1.0, "new_layers doubled: 1.0", ("layer",))
    known = next(iter(repair._promises(naming, Amendments(), failed)))
    assert known.numbered.keys() == {"layer"}
    other = naming.amended(known)
    (text,) = DepthRules(other, SpecRules(other)).tables()
    assert tomllib.loads(text)["numbered"]["layer"]["first"] > 1000


def test_the_number_of_the_last_layer_follows_and_a_period_is_no_count() -> None:
    naming = named_type("ernie4_5_moe")
    fields = naming.bench.fields
    assert fields["moe_layer_end_index"] == int(str(fields["num_hidden_layers"])) - 1
    (text,) = DepthRules(naming, SpecRules(naming)).tables()
    depth = tomllib.loads(text)["depth"]["layer"]
    assert depth["prefix_counts"] == ["moe_layer_start_index"]
    assert depth["last_index"] == ["moe_layer_end_index"]


def test_trailing_layers_without_some_tensors_are_counted_from_the_end() -> None:
    naming = named_type("gemma3n_text")
    (text,) = DepthRules(naming, SpecRules(naming)).tables()
    depth = tomllib.loads(text)["depth"]["layer"]
    assert depth["suffix_counts"] == ["num_kv_shared_layers"]
    assert "prefix_counts" not in depth


def test_a_head_is_tied_to_its_own_embeddings_by_the_part_of_config_json_that_says_so() -> None:
    found = infer({"model_type": "encoder-decoder"}, name="encoder-decoder")
    head = tomllib.loads(found.toml)["head"]
    assert head["tied_by"] == "decoder"
    assert head["embed"] == "decoder.bert.embeddings.word_embeddings.weight"
    assert head["copies"] == {
        "decoder.cls.predictions.decoder.bias": "decoder.cls.predictions.bias"
    }
    (parsed,) = registry.parse(found.toml, name="encoder-decoder").heads
    assert parsed.path == "decoder."
    # Where the whole model's flag unties it, nothing is said.
    whole = infer(CONFIGS["bert"], name="bert").toml
    assert "tied_by" not in tomllib.loads(whole)["head"]


def test_norms_of_embeddings_do_not_feed_the_head() -> None:
    name = "vision-encoder-decoder"
    head = tomllib.loads(infer({"model_type": name}, name=name).toml)["head"]
    assert head["norm"] == "decoder.cls.predictions.transform.LayerNorm"


def test_a_long_list_is_written_in_lines() -> None:
    keys = [f"a.{i}.b" for i in range(150)]
    text = f"keys = {words.toml_value(keys)}"
    assert tomllib.loads(text) == {"keys": keys}
    assert max(line.count(".") for line in text.split("\n")) == 2
    assert words.toml_value(keys[:2]) == '["a.0.b", "a.1.b"]'


def test_a_draft_whose_shapes_are_wrong_is_a_failed_proof_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> tuple[str, ...]:
        raise CheckpointError("its shapes are not those of the spec")

    monkeypatch.setattr(unseen, "axes", refused)
    monkeypatch.setattr(registry, "tiny_models", lambda _: (None,))
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a.toml").touch()
    naming = named_type("vit")
    proof = repair._Proof(naming, naming.bench, lambda *_: "", tmp_path)
    proof.n_proofs = 1
    assert proof.unseen() == ()


def test_a_token_takes_some_experts_where_config_json_has_null() -> None:
    bench = Workbench({"model_type": "dots1", "num_hidden_layers": 2}, name="dots1")
    assert bench.fields["num_experts_per_tok"] is None
    completing.complete(bench)
    assert bench.fields["num_experts_per_tok"] == 2


def test_rows_and_columns_are_no_list_of_layers() -> None:
    sizes = {"num_hidden_layers": 2, "image_size": [56, 56], "patch_size": [14, 14]}
    text = infer({"model_type": "internvl_vision", **sizes}, name="internvl_vision").toml
    assert "image_size" not in str(tomllib.loads(text).get("depth", {}))


def test_parts_of_rotary_positions_add_up_to_half_a_tiny_head() -> None:
    # config.json does not say them, and the class's own are those of heads of 128.
    naming = named_type("qwen2_5_vl")
    sizes = tiny_sizes._all_different(naming)
    sections = sizes["text_config.rope_parameters.mrope_section"]
    assert isinstance(sections, list)
    hidden, heads = (sizes[f"text_config.{f}"] for f in ("hidden_size", "num_attention_heads"))
    assert 2 * sum(sections) == int(str(hidden)) // int(str(heads))
    assert not any("mrope" in name for name in tiny_sizes._all_different(named_type("llama")))


def test_places_of_merged_patches_may_lie_behind_their_channels() -> None:
    naming = named_type("lighton_ocr")
    (merged,) = (t.dims[1] for t in naming.tensors if t.pattern.endswith("merging_layer.weight"))
    merge, width = "spatial_merge_size", "vision_embed"
    assert naming.expression(merged) == f"{merge}*{merge}*{width}"
    other = naming.amended(Amendments().ordered([width], "interleaved"))
    assert other.expression(merged) == f"{width}*{merge}*{merge}"


def test_parts_of_a_sum_may_lie_the_other_way_round() -> None:
    naming = named_type("mamba")
    (x_proj,) = (t.dims[0] for t in naming.tensors if t.pattern.endswith("x_proj.weight"))
    assert naming.expression(x_proj) == "time_step_rank+2*state_size"
    turned = naming.amended(Amendments().ordered(["time_step_rank"], "turned"))
    assert turned.expression(x_proj) == "2*state_size+time_step_rank"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "ministral",
        "modernbert",
        "electra",
        "lfm3",
        "longformer",
        "instructblip",
        "paligemma",
        "mamba",
    ],
)
def test_default_configurations_that_pass_their_proof(name: str, tmp_path: Path) -> None:
    found = infer({"model_type": name}, name=name, scratch=tmp_path)
    assert found.report is not None
    assert found.report.passed
    assert not found.left_out


@pytest.mark.slow
def test_what_no_rule_explains_is_not_resized(tmp_path: Path) -> None:
    # FNet has a Fourier transform over the width in place of attention.
    config: Table = {
        "model_type": "fnet",
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "intermediate_size": 92,
        "max_position_embeddings": 61,
    }
    found = infer(config, name="fnet", scratch=tmp_path)
    assert found.report is not None
    assert found.report.passed
    assert found.left_out
    spec = registry.parse(found.toml, name="fnet")
    kinds = {name: axis.kind for name, axis in spec.axes.items()}
    assert kinds["embed"] == "frozen"
    assert kinds["mlp"] == "width"
    assert spec.caveats["embed"] == found.left_out["embed"]
