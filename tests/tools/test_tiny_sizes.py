"""Sizes of tiny models whose parts depend on one another by no shape."""

import pytest

from streammap.tools.spec_infer import repair, tiny_sizes
from streammap.tools.spec_infer.probe import Workbench
from tests.support.inferred import named_type

pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")


def test_parts_of_rotary_positions_are_those_of_the_part_of_a_head_that_they_turn() -> None:
    sizes = tiny_sizes._all_different(named_type("glm4v_moe"))
    sections = sizes["text_config.rope_parameters.mrope_section"]
    assert isinstance(sections, list)
    assert min(sections) >= 0
    assert 4 * sum(sections) == sizes["text_config.head_dim"]  # Half of it is turned.


def test_what_the_module_of_a_part_reads_is_mentioned() -> None:
    # The class stands in another module than its text model.
    assert Workbench({"model_type": "glmga"}, name="glmga").mentions("mrope_section")
    assert not Workbench({"model_type": "llama"}, name="llama").mentions("mrope_section")


def test_a_head_size_that_only_the_forward_pass_reads_is_that_of_the_tiny_model() -> None:
    sizes = tiny_sizes._all_different(named_type("pix2struct"))
    leaves = ("hidden_size", "num_heads", "d_kv")
    hidden, heads, head = (int(str(sizes[f"text_config.{leaf}"])) for leaf in leaves)
    assert hidden == heads * head
    # What must be as wide says nothing where it is so by chance.
    assert hidden != sizes["vision_config.hidden_size"]


def test_small_images_have_the_patches_that_are_pooled() -> None:
    naming = named_type("gemma3")
    small = tiny_sizes._small_images(naming.bench, {})
    assert small["mm_tokens_per_image"] == 4
    assert small["vision_config.image_size"] == 64


def test_outputs_of_all_encoders_are_as_wide_as_the_text_model_together() -> None:
    _, together, *_ = repair._joined(named_type("qwen2_5_omni_thinker"))
    text = "text_config.hidden_size"
    outputs = ("audio_config.output_dim", "vision_config.out_hidden_size")
    assert {together.solution.same.get(field) for field in outputs} == {text}


def test_an_encoder_is_as_wide_as_what_reads_it_expects() -> None:
    field, own = "projector_config.encoder_hidden_size", "encoder_config.hidden_dim"
    naming = named_type("granite_speech")
    assert naming.fields[field].value == naming.fields[own].value  # By default they differ.
    assert any(other.solution.same.get(field) == own for other in repair._joined(naming))


def test_a_constant_dimension_has_no_heads() -> None:
    assert named_type("vit")._per_head({(): 24}, by_head=False) is None
