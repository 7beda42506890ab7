"""What follows what when single axes are resized, and what is refused. Shapes only, no weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

import streammap
from streammap.analysis.summary import formula
from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.errors import CheckpointError, PlanError, SchemeError, StreammapError
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.operators.kinds import RequestLike
from streammap.operators.resize import Direction
from streammap.output import fingerprint
from streammap.planning import graph
from streammap.planning.axis_maps import KvMerge
from streammap.planning.graph import TensorSource
from streammap.planning.plan import Plan
from streammap.tools.spec_proof import tiny_models
from tests.support import tiny
from tests.support.typed import Options, ok, run

Shapes = dict[str, tuple[int, ...]]
Make = Callable[[], LazyCheckpoint]


def keys_of(lazy: LazyCheckpoint) -> frozenset[str]:
    return frozenset(lazy.keys())


def shapes_of(lazy: LazyCheckpoint) -> Shapes:
    return {key: lazy.spec(key).shape for key in lazy.keys()}  # noqa: SIM118 (it is no dict)


class Shown:
    """A source of shapes."""

    name = "shown"
    files = ()
    others = ()
    wrappers = ()
    place = None
    notes = ()

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self._specs = specs

    def spec(self, key: str) -> TensorSpec:
        return self._specs[key]


def shown(shapes: Shapes, config: Mapping[str, object], *, dtype: str = "F32") -> LazyCheckpoint:
    specs = {key: TensorSpec(dtype, shape) for key, shape in shapes.items()}
    source = Shown(specs)
    targets = {key: graph.load(cast("TensorSource", source), key) for key in specs}
    return LazyCheckpoint(Plan(targets, config, (cast("Checkpoint", source),)))


def of_state(state: tiny.State, config: tiny.Config) -> LazyCheckpoint:
    return shown({key: tuple(x.shape) for key, x in state.items()}, config)


def bert() -> LazyCheckpoint:
    sizes = tiny.Sizes()
    return of_state(tiny.bert(sizes), tiny.bert_config(sizes))


def gpt2() -> LazyCheckpoint:
    sizes = tiny.Sizes()
    return of_state(tiny.gpt2(sizes), tiny.gpt2_config(sizes))


def linear(name: str, reads: int, makes: int) -> Shapes:
    return {f"{name}.weight": (makes, reads), f"{name}.bias": (makes,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def bloom() -> LazyCheckpoint:
    shapes: Shapes = {"transformer.word_embeddings.weight": (11, 8)}
    shapes |= norm("transformer.word_embeddings_layernorm", 8) | norm("transformer.ln_f", 8)
    for i in range(2):
        at = f"transformer.h.{i}."
        shapes |= norm(f"{at}input_layernorm", 8) | norm(f"{at}post_attention_layernorm", 8)
        shapes |= linear(f"{at}self_attention.query_key_value", 8, 24)
        shapes |= linear(f"{at}self_attention.dense", 8, 8)
        shapes |= linear(f"{at}mlp.dense_h_to_4h", 8, 32) | linear(f"{at}mlp.dense_4h_to_h", 32, 8)
    config = {"model_type": "bloom", "hidden_size": 8, "n_head": 4, "n_layer": 2, "vocab_size": 11}
    return shown(shapes, config)


def mpt() -> LazyCheckpoint:
    shapes: Shapes = {"transformer.wte.weight": (11, 8), "transformer.norm_f.weight": (8,)}
    for i in range(2):
        at = f"transformer.blocks.{i}."
        shapes |= {
            f"{at}norm_1.weight": (8,),
            f"{at}norm_2.weight": (8,),
            f"{at}attn.Wqkv.weight": (24, 8),
            f"{at}attn.out_proj.weight": (8, 8),
            f"{at}ffn.up_proj.weight": (32, 8),
            f"{at}ffn.down_proj.weight": (8, 32),
        }
    config = {"model_type": "mpt", "d_model": 8, "n_heads": 4, "n_layers": 2, "vocab_size": 11}
    return shown(shapes, config)


def decoder(n_layers: int = 4, *, heads: int = 4, kv: int = 2, dim: int = 6) -> Shapes:
    """A Llama without its MLPs, of hidden size 8."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (11, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    for i in range(n_layers):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (8,),
            f"{at}post_attention_layernorm.weight": (8,),
            f"{at}self_attn.q_proj.weight": (heads * dim, 8),
            f"{at}self_attn.k_proj.weight": (kv * dim, 8),
            f"{at}self_attn.v_proj.weight": (kv * dim, 8),
            f"{at}self_attn.o_proj.weight": (8, heads * dim),
        }
    return shapes


def mlp(at: str, width: int) -> Shapes:
    return {
        f"{at}.gate_proj.weight": (width, 8),
        f"{at}.up_proj.weight": (width, 8),
        f"{at}.down_proj.weight": (8, width),
    }


DECODER: Mapping[str, object] = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "intermediate_size": 10,
    "vocab_size": 11,
    "tie_word_embeddings": False,
}


def llama(n_layers: int = 4, **fields: object) -> LazyCheckpoint:
    shapes = decoder(n_layers)
    for i in range(n_layers):
        shapes |= mlp(f"model.layers.{i}.mlp", 10)
    own = {"model_type": "mistral", "num_hidden_layers": n_layers}
    return shown(shapes, {**DECODER, **own, **fields})


def qwen3_moe(dense: tuple[int, ...] = ()) -> LazyCheckpoint:
    """Four layers, of which some are dense."""
    shapes = decoder()
    for i in range(4):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}.weight": (6,) for n in ("q_norm", "k_norm")}
        if i in dense:
            shapes |= mlp(f"{at}mlp", 10)
            continue
        shapes[f"{at}mlp.gate.weight"] = (3, 8)
        for expert in range(3):
            shapes |= mlp(f"{at}mlp.experts.{expert}", 12)
    own = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 4,
        "num_experts": 3,
        "moe_intermediate_size": 12,
        "num_experts_per_tok": 1,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(dense),
    }
    return shown(shapes, {**DECODER, **own})


def deepseek(n_layers: int = 4, *, n_dense: int = 1, n_next: int = 0) -> LazyCheckpoint:
    """Two heads of 4 + 2 and 3 dimensions; layers that predict further tokens behind the stack."""
    shapes: Shapes = {
        "model.embed_tokens.weight": (11, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    for i in range(n_layers + n_next):
        at = f"model.layers.{i}."
        shapes |= {
            f"{at}input_layernorm.weight": (8,),
            f"{at}post_attention_layernorm.weight": (8,),
            f"{at}self_attn.q_proj.weight": (12, 8),
            f"{at}self_attn.kv_a_proj_with_mqa.weight": (7, 8),
            f"{at}self_attn.kv_a_layernorm.weight": (5,),
            f"{at}self_attn.kv_b_proj.weight": (14, 5),
            f"{at}self_attn.o_proj.weight": (8, 6),
        }
        if i < n_dense:
            shapes |= mlp(f"{at}mlp", 10)
        else:
            shapes |= {f"{at}mlp.gate.weight": (4, 8)} | mlp(f"{at}mlp.shared_experts", 24)
            shapes[f"{at}mlp.gate.e_score_correction_bias"] = (4,)
            for expert in range(4):
                shapes |= mlp(f"{at}mlp.experts.{expert}", 12)
        if i >= n_layers:
            shapes |= {f"{at}{n}.weight": (8,) for n in ("enorm", "hnorm", "shared_head.norm")}
            shapes |= {f"{at}eh_proj.weight": (8, 16), f"{at}shared_head.head.weight": (11, 8)}
            shapes[f"{at}embed_tokens.weight"] = (11, 8)
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 2,
        "v_head_dim": 3,
        "q_lora_rank": None,
        "kv_lora_rank": 5,
        "intermediate_size": 10,
        "moe_intermediate_size": 12,
        "n_shared_experts": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": n_dense,
        "num_hidden_layers": n_layers,
        "num_nextn_predict_layers": n_next,
        "vocab_size": 11,
        "tie_word_embeddings": False,
    }
    return shown(shapes, config)


def config_of(lazy: LazyCheckpoint) -> Mapping[str, object]:
    assert lazy.config is not None
    return lazy.config


def resized(
    source: LazyCheckpoint, options: Options, direction: Direction = "decoalesce"
) -> LazyCheckpoint:
    return source.coalesce(**options) if direction == "coalesce" else source.decoalesce(**options)


def changed(source: LazyCheckpoint, result: LazyCheckpoint) -> dict[str, int]:
    """The axes that differ, and their new sizes."""
    return {a: n for a, n in result.sizes.items() if n != source.sizes[a]}


# What follows.


@pytest.mark.parametrize("make", [bert, gpt2])
@pytest.mark.parametrize(
    ("options", "note"),
    [
        ({"heads": 2}, "hidden (embed) follows heads: 8 -> 16"),
        ({"hidden": 2}, "heads follows hidden (embed): 4 -> 8"),
        ({"heads": "=8"}, "hidden (embed) follows heads: 8 -> 16"),
        ({"hidden": "=16"}, "heads follows hidden (embed): 4 -> 8"),
    ],
)
def test_heads_and_hidden_size_follow_each_other(make: Make, options: Options, note: str) -> None:
    source = make()
    result = source.decoalesce(**options)
    assert changed(source, result) == {"embed": 16, "heads": 8}
    assert note in result.plan.notes
    assert result.promise[0] == "exact"
    assert result.coalesce(heads=2).sizes == result.coalesce(hidden=2).sizes == source.sizes


@pytest.mark.parametrize("make", [bert, gpt2])
def test_uneven_sizes_follow_in_proportion(make: Make) -> None:
    source = make()
    for options in ({"heads": "=3"}, {"hidden": "=6"}):
        small = resized(source, options, "coalesce")
        assert changed(source, small) == {"embed": 6, "heads": 3}


@pytest.mark.parametrize("make", [bloom, mpt])
@pytest.mark.parametrize("options", [{"hidden": 2}, {"heads": 2}, {"mlp": 2}, {"width": 2}])
def test_an_mlp_of_fixed_proportion_follows_the_hidden_size(make: Make, options: Options) -> None:
    source = make()
    result = source.decoalesce(**options)
    assert changed(source, result) == {"embed": 16, "heads": 8, "mlp": 64}
    assert result.promise[0] == "approximate"
    assert "alibi" in result.promise[1]
    assert changed(source, source.coalesce(**options)) == {"embed": 4, "heads": 2, "mlp": 16}


def test_heads_that_follow_take_their_kv_heads_along() -> None:
    """Helium's hidden size is heads x head size, and two query heads share a kv head."""
    shapes = decoder(1, dim=2) | mlp("model.layers.0.mlp", 10)
    helium = {"model_type": "helium", "head_dim": 2, "num_hidden_layers": 1}
    source = shown(shapes, {**DECODER, **helium})
    grown = changed(source, source.decoalesce(hidden=2))
    assert grown == {"embed": 16, "heads": 8, "kv_heads": 4}
    small = changed(source, source.coalesce(hidden=2))
    assert small == {"embed": 4, "heads": 2, "kv_heads": 1}


def test_kv_heads_change_only_where_the_heads_could_not_share_them() -> None:
    source = llama()
    assert changed(source, source.coalesce(heads=2)) == {"heads": 2, "q_group": 1}
    assert changed(source, source.coalesce(heads="=1")) == {"heads": 1, "kv_heads": 1, "q_group": 1}


def test_what_has_a_size_of_its_own_stays() -> None:
    source = llama()
    assert changed(source, source.decoalesce(hidden=2)) == {"embed": 16}
    assert changed(source, source.decoalesce(heads=2)) == {"heads": 8, "q_group": 4}
    assert changed(source, source.decoalesce(kv_heads=2)) == {"kv_heads": 4, "q_group": 1}
    assert changed(source, source.decoalesce(mlp="=13")) == {"mlp": 13}
    assert changed(source, source.coalesce(kv_heads=2)) == {"kv_heads": 1, "q_group": 4}
    (note,) = source.decoalesce(hidden=2).plan.notes
    assert note.startswith("copies (hidden units) have equal gradients")


def test_heads_that_a_spec_freezes_stay_whatever_is_asked_for(tmp_path: Path) -> None:
    spec = tmp_path / "still.toml"
    spec.write_text(
        'schema = 1\nextends = "llama"\nmodel_types = ["still"]\n'
        '[axis_kind]\nheads = "frozen"\nkv_heads = "frozen"\n'
    )
    plan = llama().plan
    source = LazyCheckpoint(replace(plan, architecture=str(spec)))
    assert changed(source, source.decoalesce(width=2)) == {"embed": 16, "mlp": 20}
    for axis in ("heads", "kv_heads"):
        with pytest.raises(PlanError, match="can't be resized"):
            source.decoalesce(axes={axis: 2})


@pytest.mark.parametrize(
    ("axes", "sizes"),
    [
        ({"moe_mlp": 2}, {"moe_mlp": 24, "shared_mlp": 48}),
        ({"moe_mlp": "=13"}, {"moe_mlp": 13, "shared_mlp": 26}),
        ({"shared_mlp": 2}, {"moe_mlp": 24, "shared_mlp": 48}),
        ({"shared_mlp": 2, "moe_mlp": 2}, {"moe_mlp": 24, "shared_mlp": 48}),
        ({"mlp": 2}, {"mlp": 20}),
    ],
)
def test_shared_experts_are_as_wide_as_the_others(
    axes: Mapping[str, RequestLike], sizes: Mapping[str, int]
) -> None:
    source = deepseek()
    result = source.decoalesce(axes=axes)
    assert changed(source, result) == sizes
    assert config_of(result)["moe_intermediate_size"] == sizes.get("moe_mlp", 12)
    assert config_of(result)["n_shared_experts"] == 2


def test_mlp_means_all_intermediate_sizes() -> None:
    for source, sizes in (
        (llama(), {"mlp": 20}),
        (qwen3_moe(dense=(0,)), {"mlp": 20, "moe_mlp": 24}),
        (qwen3_moe(), {"mlp": 20, "moe_mlp": 24}),
        (deepseek(), {"mlp": 20, "moe_mlp": 24, "shared_mlp": 48}),
    ):
        assert changed(source, source.decoalesce(mlp=2)) == sizes
    result = qwen3_moe().decoalesce(mlp="=15")
    assert result.spec("model.layers.2.mlp.experts.1.down_proj.weight").shape == (8, 15)


def test_top_k_and_groups_follow_the_experts() -> None:
    source = deepseek()
    result = source.decoalesce(experts=2)
    assert changed(source, result) == {"expert": 8}
    fields = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}
    assert config_of(result).items() >= fields.items()
    assert result.spec("model.layers.1.mlp.gate.weight").shape == (8, 8)
    assert "model.layers.1.mlp.experts.7.up_proj.weight" in keys_of(result)
    assert result.coalesce().config == source.config


def test_a_head_count_that_config_says_twice_is_written_twice() -> None:
    result = deepseek().decoalesce(heads=2)
    assert config_of(result)["num_key_value_heads"] == config_of(result)["num_attention_heads"] == 4


# Layers.


@pytest.mark.parametrize(
    ("direction", "options", "kinds"),
    [
        ("decoalesce", {"layers": 2}, "abcdabcd"),
        ("decoalesce", {"layers": 2, "grouping": "adjacent"}, "aabbccdd"),
        ("decoalesce", {"layers": [[0], [1], [2, 4], [3, 5]]}, "abcdcd"),
        ("decoalesce", {"depth": 2}, "abcdabcd"),
        ("coalesce", {"layers": [[1], [3]]}, "bd"),
    ],
)
def test_per_layer_lists_follow_the_layers(
    direction: Direction, options: Options, kinds: str
) -> None:
    source = llama(layer_types=list("abcd"), no_rope_layers=[0, 1, 2, 3])
    result = resized(source, options, direction)
    assert config_of(result)["layer_types"] == list(kinds)
    assert config_of(result)["no_rope_layers"] == ["abcd".index(kind) for kind in kinds]
    assert config_of(result)["num_hidden_layers"] == len(kinds)


def test_merging_layers_of_several_kinds_is_noted() -> None:
    source = llama(layer_types=list("aabb"), no_rope_layers=[0, 0, 0, 0])
    (note,) = (n for n in source.coalesce(layers=2).plan.notes if "several kinds" in n)
    assert note.startswith("layer 0, 1: made of layers of several kinds; 0 is layer_types a")
    notes = source.coalesce(layers=2, grouping="adjacent").plan.notes
    assert not any("several kinds" in note for note in notes)


def test_lists_of_layer_numbers_follow_the_layers() -> None:
    source = qwen3_moe(dense=(0,))
    for options, dense in (
        ({"layers": 2}, [0, 4]),
        ({"layers": 2, "grouping": "adjacent"}, [0, 1]),
        ({"layers": [[0, 3], [1], [2], [4]]}, [0, 3]),
    ):
        result = resized(source, options)
        assert config_of(result)["mlp_only_layers"] == dense
        for i in range(config_of(result)["num_hidden_layers"]):  # type: ignore[call-overload]  # int
            assert (f"model.layers.{i}.mlp.up_proj.weight" in keys_of(result)) == (i in dense)


def test_a_count_of_leading_layers_follows_the_layers() -> None:
    source = deepseek()
    assert config_of(source.decoalesce(layers=2, grouping="adjacent"))["first_k_dense_replace"] == 2
    behind: list[object] = [[0], [1, 4], [2, 5], [3, 6]]
    assert config_of(source.decoalesce(layers=behind))["first_k_dense_replace"] == 1
    assert config_of(source.coalesce(layers=[[0], [1, 2, 3]]))["first_k_dense_replace"] == 1
    assert config_of(source.coalesce(layers=[[1], [2, 3]]))["first_k_dense_replace"] == 0
    with pytest.raises(PlanError, match="first_k_dense_replace counts leading layers"):
        source.decoalesce(layers=2)


@pytest.mark.parametrize("make", [deepseek, lambda: qwen3_moe(dense=(0,))])
@pytest.mark.parametrize("layers", [2, [[0, 1], [2, 3]], "=3"])
def test_layers_with_other_tensors_are_not_mixed(make: Make, layers: RequestLike) -> None:
    source = make()
    if layers == "=3":
        assert source.coalesce(layers=layers).sizes["layer"] == 3
        return
    with pytest.raises(PlanError, match="layers of different kinds can't be mixed") as refusal:
        source.coalesce(layers=layers)
    assert "mlp.gate_proj.weight would mix 2 layers, of which 1 have it" in refusal.value.message
    assert refusal.value.hint is not None


def test_layers_behind_the_stack_are_dropped_with_a_note_when_it_changes() -> None:
    source = deepseek(n_next=1)
    assert any(key.startswith("model.layers.4.") for key in keys_of(source))
    for direction, layers in (("decoalesce", "=5"), ("coalesce", "=3")):
        result = (
            source.coalesce(layers=layers)
            if direction == "coalesce"
            else source.decoalesce(layers=layers)
        )
        assert not any("eh_proj" in key or "shared_head" in key for key in keys_of(result))
        assert config_of(result)["num_nextn_predict_layers"] == 0
        assert sum("layers after the stack" in note for note in result.plan.notes) == 1
    wide = source.decoalesce(hidden=2)
    assert wide.spec("model.layers.4.eh_proj.weight").shape == (16, 32)
    assert config_of(wide)["num_nextn_predict_layers"] == 1


# What is refused.

REFUSED: tuple[tuple[Make, Direction, Options, str], ...] = (
    (
        bert,
        "decoalesce",
        {"hidden": "=9"},
        r"bert: embed == .* would not hold \(hidden \(embed\) 9",
    ),
    (bert, "coalesce", {"hidden": "=3"}, r"embed == heads\*head_dim would not hold"),
    (
        bert,
        "decoalesce",
        {"heads": 3, "hidden": 2},
        r"\(embed\) 16, heads 12, head_dim 2\)",
    ),
    (gpt2, "decoalesce", {"hidden": "=13"}, r"embed == heads\*head_dim would not hold"),
    (bloom, "decoalesce", {"hidden": 2, "mlp": "=40"}, r"mlp == 4\*embed would not hold \(mlp 40"),
    (bert, "coalesce", {"hidden": "=16"}, "8 hidden units can't become 16 this way"),
    (bert, "decoalesce", {"layers": "=2"}, "4 layers can't become 2 this way"),
    (bert, "decoalesce", {"kv_heads": 2}, "bert has no kv heads"),
    (bert, "decoalesce", {"experts": 2}, "bert has no experts"),
    (bert, "decoalesce", {"axes": {"depth": 2}}, "bert has no axis 'depth'"),
    (llama, "coalesce", {"experts": 2}, "mistral has no experts"),
    (
        bert,
        "decoalesce",
        {"axes": {"vocab": 2}},
        "vocab of bert can't be resized: token ids",
    ),
    (
        llama,
        "decoalesce",
        {"axes": {"head_dim": 2}},
        "head_dim of mistral can't be resized: a h",
    ),
    (
        llama,
        "decoalesce",
        {"axes": {"q_group": 2}},
        "q_group of mistral can't .*: it follows",
    ),
    (llama, "decoalesce", {"kv_heads": "=3"}, "4 heads can't share 3 kv heads evenly"),
    (llama, "decoalesce", {"kv_heads": 3}, "4 heads can't share 6 kv heads evenly"),
    (llama, "decoalesce", {"heads": "=5"}, "5 heads can't share 2 kv heads evenly"),
    (llama, "decoalesce", {"heads": "=6", "kv_heads": "=4"}, "6 heads can't share 4 kv heads"),
    (llama, "coalesce", {"heads": "=1", "kv_heads": "=2"}, "1 heads can't share 2 kv heads"),
    (
        llama,
        "decoalesce",
        {"heads": [[0, 4], [1, 5], [2, 6], [3, 7]]},
        "heads 2 would come from heads that read kv heads 1, but its own, 0, comes from 0",
    ),
    (deepseek, "decoalesce", {"experts": "=5"}, r"5 experts do not divide into 2 groups \(n_group"),
    (llama, "coalesce", {"mlp": 3}, "10 MLP neurons do not divide into groups of 3"),
    (llama, "decoalesce", {"hidden": [[0], [1]]}, "2 groups, the small model has 8"),
    (llama, "coalesce", {"mlp": [[0, 10]]}, "10 is out of range, the large model has 10"),
    (llama, "coalesce", {"head_dim": 4}, "coalesce: unknown option 'head_dim'"),
    (bert, "decoalesce", {"layers": 2, "new_layers": "zero"}, "after the residual addition"),
    (llama, "decoalesce", {"mlp": 2, "new_layers": "zero"}, "no layers are added"),
    (llama, "coalesce", {"layers": 2, "new_layers": "zero"}, "unknown option 'new_layers'"),
    (llama, "decoalesce", {}, "no target size given, and no map to grow by"),
    (
        llama,
        "decoalesce",
        {"layers": [[4, 1], [0], [2], [3]], "new_layers": "zero"},
        "not in their old order",
    ),
)


@pytest.mark.parametrize(
    ("make", "direction", "options", "match"),
    [pytest.param(*case, id=f"{case[0].__name__}-{case[1]}-{case[2]}"[:70]) for case in REFUSED],
)
def test_what_is_refused_says_why_and_what_to_do(
    make: Make, direction: Direction, options: Options, match: str
) -> None:
    source = make()
    with pytest.raises((PlanError, SchemeError), match=match) as refusal:
        resized(source, options, direction)
    if "new_layers" not in options or direction == "decoalesce":
        assert refusal.value.hint


@pytest.mark.parametrize("how", [{"quant_method": "gptq"}, {}])
def test_quantised_models_are_refused(how: Mapping[str, object]) -> None:
    config = {**config_of(llama()), "quantization_config": how}
    with pytest.raises(CheckpointError, match=r"is quantised .* can't be resized") as refusal:
        shown(shapes_of(llama()), config, dtype="I8").decoalesce(mlp=2)
    assert refusal.value.hint is not None
    assert "dequantise" in refusal.value.hint


def test_dtypes_and_keys_tell_quantised_weights_too() -> None:
    source = llama()
    shapes = shapes_of(source)
    scales: Shapes = {"model.layers.0.mlp.up_proj.weight_scale_inv": (1, 1)}
    for lazy in (
        shown(shapes, config_of(source), dtype="F8_E4M3"),
        shown(shapes | scales, config_of(source)),
    ):
        with pytest.raises(StreammapError, match=r"quantised.* can't be resized"):
            lazy.decoalesce(mlp=2)


# What a plan says of a change.


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"kv_heads": "=1"}, "kv heads are merged (mean of 2)"),
        ({"kv_heads": "=1", "kv_merge": "first"}, "1 of 2 kv heads are dropped"),
        ({"mlp": 2}, "MLP neurons are merged (mean of 2)"),
        ({"mlp": [[1], [0], [4]]}, "7 of 10 MLP neurons are dropped"),
        ({"hidden": 2}, "hidden units are merged (mean of 2)"),
        ({"layers": 2}, "layers are merged (mean of 2)"),
        ({"layers": [[0], [2], [3]]}, "1 of 4 layers are dropped"),
        ({"layers": [[1], [0], [2], [3]]}, "layers change places"),
    ],
)
def test_a_shrink_merges_drops_or_moves(options: Options, expected: str) -> None:
    assert llama().coalesce(**options).promise == ("approximate", f"coalesce: {expected}")


def test_dropped_kv_heads_are_dropped_everywhere() -> None:
    """In the guarantee, in the table's formulas and in the record."""
    small = llama().coalesce(kv_heads="=1", kv_merge="first")
    options = small.plan.steps[-1].options["maps"]
    assert options == {"kv_heads": [2, 1, "selection"]}
    keys = [key for key in small.plan.targets if "k_proj" in key]
    assert {formula(small.plan.targets[key], {}) for key in keys} == {"rows: selection"}


def test_the_hidden_size_has_one_name_for_users() -> None:
    assert shapes_of(llama().coalesce(axes={"hidden": 2})) == shapes_of(llama().coalesce(hidden=2))
    assert shapes_of(llama().coalesce(axes={"embed": 2})) == shapes_of(llama().coalesce(hidden=2))


# One request, however it is written.

GROUPS = [[0, 1], [2, 3]]
FORMS: tuple[tuple[tuple[str, ...], Options, Mapping[str, object]], ...] = (
    (("--hidden", "2"), {"hidden": 2}, {"hidden": 2}),
    (("--hidden", "=4"), {"hidden": "=4"}, {"hidden": {"size": 4}}),
    (("--heads", "[[0,1],[2,3]]"), {"heads": [*GROUPS]}, {"heads": GROUPS}),
    (("--layers", "2", "--mlp", "3"), {"layers": 2, "mlp": 3}, {"layers": "2", "mlp": 3}),
    (("--axis", "mlp=2"), {"axes": {"mlp": 2}}, {"axes": {"mlp": {"factor": 2}}}),
    (("--axis", "mlp==6"), {"axes": {"mlp": "=6"}}, {"axes": {"mlp": "=6"}}),
    (("--axis", "mlp=to:6"), {"axes": {"mlp": "to:6"}}, {"axes": {"mlp": {"size": 6}}}),
    (("--hidden", "to:4"), {"hidden": "to:4"}, {"hidden": "to:4"}),
    (("--mlp", "x3"), {"mlp": "x3"}, {"mlp": "x3"}),
    (("--width", "2"), {"width": 2}, {"width": 2}),
    (("--width", "x2"), {"width": "x2"}, {"width": {"factor": 2}}),
    (
        ("--heads", '{"factor": 2, "grouping": "adjacent"}'),
        {"heads": {"factor": 2, "grouping": "adjacent"}},
        {"heads": {"factor": 2, "grouping": "adjacent"}},
    ),
)


@pytest.mark.parametrize(("typed", "options", "scheme"), FORMS, ids=[str(f[0]) for f in FORMS])
def test_each_way_to_write_a_request_gives_the_same_plan(
    tmp_path: Path, typed: tuple[str, ...], options: Options, scheme: Mapping[str, object]
) -> None:
    sizes = tiny.Sizes()
    folder = tiny.write(tmp_path / "big", tiny.bert(sizes), tiny.bert_config(sizes))
    source = streammap.open(folder)
    file = tiny.file(tmp_path / "scheme.json", json.dumps(scheme))
    plans = [
        source.coalesce(**options),
        source.coalesce(scheme=scheme),
        source.coalesce(scheme=file),
    ]
    assert len({fingerprint.of_plan(lazy.plan) for lazy in plans}) == 1
    for lazy in plans[1:]:
        assert lazy.plan.targets == plans[0].plan.targets
        assert lazy.config == plans[0].config
    said = json.loads(ok("plan", "coalesce", folder, *typed, "--json"))
    assert said == json.loads(json.dumps(plans[0].summary().as_json()))
    out = tmp_path / "small"
    ok("coalesce", folder, out, *typed, "--quiet")
    tiny.assert_same(tiny.written(out), dict(plans[0].tensors()))


AMBIGUOUS: tuple[tuple[tuple[str, ...], Options, str], ...] = (
    (
        ("--layers", "48"),
        {"layers": 48},
        (
            "--layers 48 can be read in two ways: 48 layers, or 48 times the 4 layers, which is 192"
            "\n  hint: give to:48 for 48 layers, x48 for 192"
        ),
    ),
    (
        ("--hidden", "80"),
        {"hidden": "80"},
        (
            "--hidden 80 can be read in two ways: 80 hidden units, or 80 times the 8 hidden units, "
            "which is 640\n  hint: give to:80 for 80 hidden units, x80 for 640"
        ),
    ),
    (("--axis", "mlp=24"), {"axes": {"mlp": 24}}, "mlp 24 can be read in two ways: 24 MLP neurons"),
    (("--depth", "9"), {"depth": 9}, "hint: give --layers to:9 for 9 layers, x9 for 36"),
    (("--width", "32"), {"width": 32}, "hint: give --hidden to:32 for 32 hidden units, x32 for"),
)


@pytest.mark.parametrize(
    ("typed", "options", "told"), AMBIGUOUS, ids=[a[2][:12] for a in AMBIGUOUS]
)
def test_a_number_that_may_be_a_size_is_refused_wherever_it_stands(
    tmp_path: Path, typed: tuple[str, ...], options: Options, told: str
) -> None:
    sizes = tiny.Sizes()
    folder = tiny.write(tmp_path / "small", tiny.bert(sizes), tiny.bert_config(sizes))
    source = streammap.open(folder)
    with pytest.raises(SchemeError) as error:
        source.decoalesce(**options)
    assert told in str(error.value)
    found = run("plan", "decoalesce", folder, *typed)
    assert found.exit_code == 1
    assert told in found.stderr
    call = {
        "operator": "decoalesce",
        **options,
        "source": {"operator": "open", "path": str(folder)},
    }
    with pytest.raises(SchemeError) as error:
        streammap.open_request(call)
    assert told in str(error.value)


def test_a_factor_where_only_factors_go_refuses_a_size() -> None:
    expected = (
        r"--depth is 'to:8', expected a factor such as 2 or x2\n  hint: a size is asked for by "
    )
    with pytest.raises(SchemeError, match=expected + "--layers to:N"):
        llama().decoalesce(depth="to:8")
    with pytest.raises(PlanError, match="both --depth and --layers"):
        llama().decoalesce(depth=2, layers=3)


def test_an_axis_of_a_mixture_can_be_typed() -> None:
    assert qwen3_moe().decoalesce(axes={"moe_mlp": "2"}).sizes["moe_mlp"] == 24
    assert qwen3_moe().decoalesce(axes={"moe_mlp": "=18"}).sizes["moe_mlp"] == 18


def test_a_scheme_and_an_option_are_not_both_taken() -> None:
    with pytest.raises(PlanError, match="both a scheme and --mlp"):
        llama().coalesce(scheme={"mlp": 2}, mlp=2)
    with pytest.raises(SchemeError, match="unknown key 'moe_mlp'"):
        qwen3_moe().coalesce(scheme={"moe_mlp": 2})


# Weights, and the way back.


def test_members_may_have_weights(tmp_path: Path) -> None:
    sizes = tiny.Sizes()
    state = tiny.bert(sizes)
    folder = tiny.write(tmp_path / "big", state, tiny.bert_config(sizes))
    groups: list[object] = [
        {"members": [0, 1], "weights": [3, 1]},
        [2, 3],
        {"members": [5, 4], "weights": [0, 2]},
    ]
    lazy = streammap.open(folder).coalesce(mlp=groups)
    at = "encoder.layer.1."
    rows, columns = (state[f"{at}{n}.weight"] for n in ("intermediate.dense", "output.dense"))
    up, down = (lazy.read(f"{at}{n}.weight") for n in ("intermediate.dense", "output.dense"))
    tiny.assert_close(
        {"0": up[0], "1": up[1], "2": up[2]},
        {"0": 0.75 * rows[0] + 0.25 * rows[1], "1": (rows[2] + rows[3]) / 2, "2": rows[4]},
    )
    assert lazy.sizes["mlp"] == 3
    assert lazy.promise[0] == "approximate"
    assert any("in no group, dropped" in note for note in lazy.plan.notes)
    tiny.assert_close({"0": down[:, 1]}, {"0": columns[:, 2] + columns[:, 3]})


@pytest.mark.parametrize("kv_merge", ["mean", "first"])
def test_the_saved_map_takes_merged_kv_heads_back_as_copies(
    tmp_path: Path, kv_merge: KvMerge
) -> None:
    config = {**config_of(llama())}
    state = tiny.random(shapes_of(llama()))
    big = streammap.open(tiny.write(tmp_path / "big", state, config))
    small = big.coalesce(kv_heads="=1", kv_merge=kv_merge)
    small.save(tmp_path / "small", fsync=False)
    key = "model.layers.0.self_attn.k_proj.weight"
    heads = state[key].view(2, 6, 8)
    expected = heads[0] if kv_merge == "first" else heads.mean(0)
    tiny.assert_close({key: small.read(key)}, {key: expected})
    grown = streammap.open(tmp_path / "small").decoalesce()
    assert grown.plan.notes[0] == "the map saved with the source is used"
    assert grown.sizes == big.sizes
    assert grown.config == big.config
    tiny.assert_same({key: grown.read(key)}, {key: small.read(key).repeat(2, 1)})
    unchanged = {k for k in state if "k_proj" not in k and "v_proj" not in k}
    tiny.assert_same({k: grown.read(k) for k in unchanged}, {k: state[k] for k in unchanged})
    assert grown.promise[0] == "exact"


@pytest.mark.parametrize(
    "options",
    [
        {"hidden": "=12"},
        {"mlp": "=13"},
        {"heads": 2, "kv_heads": 2},
        {"experts": 2},
        {"layers": 2},
        {"layers": 2, "new_layers": "zero"},
        {"axes": {"moe_mlp": 3}},
        {"width": 2},
    ],
    ids=str,
)
def test_the_saved_map_takes_a_growth_back(tmp_path: Path, options: Options) -> None:
    state = tiny.random(shapes_of(qwen3_moe()))
    source = streammap.open(tiny.write(tmp_path / "small", state, {**config_of(qwen3_moe())}))
    source.decoalesce(**options).save(tmp_path / "large", fsync=False)
    back = streammap.open(tmp_path / "large").coalesce()
    assert back.sizes == source.sizes
    if options.get("new_layers") != "zero":
        tiny.assert_close(dict(back.tensors()), state)


@pytest.mark.slow
@pytest.mark.parametrize("arch", registry.names())
def test_no_frozen_axis_changes_where_all_widths_do(arch: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    for model in registry.tiny_models(arch):
        if not model.class_name.startswith("timm:"):
            tiny_models.build(model, tmp_path / model.name)
            source = streammap.open(tmp_path / model.name)
            axes = source.plan.model.architecture.axes
            grown = changed(source, source.decoalesce(width=2))
            assert not [axis for axis in grown if axes[axis].kind == "frozen"]
