"""What spec infer knows of heads and the order of units, of factors and positions."""

import tomllib
from pathlib import Path

import pytest

from streammap.tools.spec_infer import completing, repair
from streammap.tools.spec_infer.amendments import Amendments
from streammap.tools.spec_infer.infer import infer
from streammap.tools.spec_infer.probe import Workbench
from streammap.tools.spec_proof.checks import Check
from tests.support.inferred import named_type

pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


def growth_of(*axes: str) -> Check:
    return Check("growth", False, 0.5, "", axes)


def test_heads_of_two_mixers_share_what_is_theirs() -> None:
    naming = named_type("nemotron_h")
    assert set(naming.solution.groups.values()) == {
        ("num_attention_heads", "num_key_value_heads"),
        ("mamba_num_heads", "n_groups"),
    }
    assert naming.kinds["n_groups"] == "frozen"
    texts = {t.pattern.rpartition("mixer.")[2]: naming.text_of(t, 0) for t in naming.tensors}
    inner = "n_groups*mamba_num_heads_group*mamba_head_dim"
    state = "2*n_groups*ssm_state_size"
    assert texts["conv1d.weight"] == f"{inner}+{state}"
    # Gate and input, B and C, then a time step a head.
    assert texts["in_proj.weight"] == f"2*{inner}+{state}+n_groups*mamba_num_heads_group"
    assert texts["q_proj.weight"] == "q"


def test_an_order_of_units_is_that_of_some_axes() -> None:
    naming = named_type("qwen3_next")

    def texts(known: Amendments) -> dict[str, str]:
        other = naming.amended(known)
        return {t.pattern.rpartition("}.")[2]: other.text_of(t, 0) for t in naming.tensors}

    before, after = (
        texts(known) for known in (Amendments(), Amendments().ordered(["heads"], "interleaved"))
    )
    assert before["self_attn.q_proj.weight"] == "2*q"
    assert after["self_attn.q_proj.weight"] == "q*2"
    assert after["linear_attn.in_proj_ba.weight"] == before["linear_attn.in_proj_ba.weight"]
    # Only one word holds for an axis.
    both = Amendments().ordered(["heads"], "interleaved").ordered(["heads"], "turned")
    assert both.orders == {"heads": "turned"}


def test_orders_that_change_nothing_are_not_tried() -> None:
    naming = named_type("llama")
    tried = list(repair._ordered(naming, Amendments(), growth_of("embed", "heads", "mlp")))
    assert tried == []  # It has no fused or halved dimension.


def test_positions_are_left_out_of_a_proof_where_the_class_has_such() -> None:
    naming = named_type("m2m_100")
    tried = list(repair._without_positions(naming, Amendments(), growth_of("embed", "enc_heads")))
    assert [(t.neutral, *t.caveats) for t in tried] == [("sinusoidal", "embed")]
    bloom = list(
        repair._without_positions(named_type("bloom"), Amendments(), growth_of("embed", "heads"))
    )
    assert [(t.neutral, *t.caveats) for t in bloom] == [("alibi", "heads")]
    assert not list(
        repair._without_positions(named_type("llama"), Amendments(), growth_of("embed"))
    )


def test_a_factor_of_one_table_leaves_that_of_another() -> None:
    naming = named_type("t5gemma")
    encoder = {"model.encoder.embed_tokens.weight": "encoder_embed**0.5"}
    decoder = {"model.decoder.embed_tokens.weight": "decoder_embed**0.5"}
    known = Amendments(scale=encoder)
    tried = repair._rules(naming, known, growth_of("decoder_embed"), "decoder_embed")
    scales = [one.scale for one in tried]
    assert {**encoder, **decoder} in scales
    assert all(encoder.items() <= scale.items() for scale in scales)


@pytest.mark.parametrize(
    ("name", "norm", "embed"),
    [
        ("marian", "{base}decoder.layers.{dec_layer=last}.final_layer_norm", "{base}shared.weight"),
        (
            "bert-generation",
            "{base}encoder.layer.{layer=last}.output.LayerNorm",
            "{base}embeddings.word_embeddings.weight",
        ),
        ("t5gemma", "{base}decoder.norm", "{base}decoder.embed_tokens.weight"),
    ],
)
def test_the_head_has_its_own_table_and_norm(name: str, norm: str, embed: str) -> None:
    head = tomllib.loads(infer({"model_type": name}, name=name).toml)["head"]
    assert (head["norm"], head["embed"]) == (norm, embed)


def test_a_stack_that_no_field_counts_keeps_its_layers(tmp_path: Path) -> None:
    found = infer({"model_type": "nemotron_h"}, name="nemotron_h", scratch=tmp_path)
    assert found.report is not None
    assert found.report.passed
    assert not found.left_out
    assert "depth" not in tomllib.loads(found.toml)["axis_kind"].values()


def test_a_parameter_that_is_a_projection_reads_its_first_dimension() -> None:
    naming = named_type("gemma3")
    (projection,) = (t for t in naming.tensors if t.pattern.endswith("projection_weight"))
    assert projection.roles == ("in", "out")
    assert [naming.text_of(projection, i) for i in (0, 1)] == ["vision_embed", "text_embed"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["m2m_100", "bloom", "marian", "qwen3_next", "mistral3"])
def test_types_whose_orders_factors_and_positions_are_found(name: str, tmp_path: Path) -> None:
    found = infer({"model_type": name}, name=name, scratch=tmp_path)
    assert found.report is not None
    assert found.report.passed
    assert not found.left_out


def test_heads_that_do_not_divide_the_width_are_as_many_as_do() -> None:
    bench = Workbench({"model_type": "aya_vision"}, name="aya_vision")
    assert "divisible" in bench.why()
    completing.complete(bench)
    sizes = {field.name: field.value for field in bench.numbers()}
    assert (sizes["vision_config.hidden_size"], sizes["vision_config.num_attention_heads"]) == (
        1152,
        16,
    )


def test_a_size_of_the_input_is_no_width() -> None:
    assert named_type("wav2vec2-bert").kinds["feature_projection_input_dim"] == "frozen"


def test_a_table_by_layers_that_the_class_makes_is_left_to_it() -> None:
    bench = Workbench({"model_type": "gemma4_text"}, name="gemma4_text")
    assert "per_layer_config" in bench.fields
    made = bench.outline({})
    completing.complete(bench)
    assert bench.fields.get("per_layer_config") is None
    assert bench.outline({}) == made
