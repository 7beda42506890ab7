"""Depth promises, held against models: what is called bit-exact is, and what is not isn't."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammap import api
from streammap.api import LazyCheckpoint
from streammap.architectures import config_fields
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.tools.spec_proof import tiny_models

transformers = pytest.importorskip("transformers")

GPT2 = TinyModel(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "vocab_size": 31,
        "n_positions": 32,
        "n_embd": 16,
        "n_head": 4,
        "n_layer": 3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "scale_attn_by_inverse_layer_idx": True,
    },
)
TINY = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
ESM = TinyModel(
    "esm",
    "EsmForMaskedLM",
    {
        **TINY,
        "num_hidden_layers": 3,
        "mask_token_id": 5,
        "position_embedding_type": "rotary",
    },
)
ALBERT: Mapping[str, object] = {**TINY, "embedding_size": 8, "num_hidden_layers": 6}
QWEN3_VL = TinyModel(
    "qwen3_vl",
    "Qwen3VLForConditionalGeneration",
    {
        "image_token_id": 5,
        "video_token_id": 6,
        "vision_start_token_id": 3,
        "vision_end_token_id": 4,
        "text_config": {
            **TINY,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [2, 2, 2],
                "rope_theta": 10000.0,
            },
        },
        "vision_config": {
            "depth": 4,
            "hidden_size": 16,
            "out_hidden_size": 16,
            "num_heads": 2,
            "intermediate_size": 20,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "deepstack_visual_indexes": [0, 2],
            "num_position_embeddings": 16,
        },
    },
)


def made(model: TinyModel, folder: Path) -> LazyCheckpoint:
    tiny_models.build(model, folder / "source")
    return api.open(folder / "source")


def error(model: TinyModel, folder: Path, result: LazyCheckpoint) -> float:
    """How far the outputs of a result are from the source's."""
    result.save(folder / "result", overwrite=True, fsync=False)
    expected = tiny_models.outputs(folder / "source", model)
    found = tiny_models.outputs(folder / "result", model)
    return max(float((found[k] - x).abs().max() / x.abs().max()) for k, x in expected.items())


def test_layers_scaled_by_their_number_keep_it_with_zero_layers_behind_them(tmp_path: Path) -> None:
    source = made(GPT2, tmp_path)
    behind = source.decoalesce(layers=[[0], [1], [2, 3, 4]], new_layers="zero")
    assert behind.promise[0] == "bit-exact"
    assert error(GPT2, tmp_path, behind) == 0.0
    between = source.decoalesce(layers=[[0], [1, 2], [3]], new_layers="zero")
    assert between.promise == (
        "approximate",
        "decoalesce: layer 2 becomes 3: a layer's scores are divided by its number",
    )
    assert error(GPT2, tmp_path, between) > 1e-3


def test_a_contact_head_reads_nothing_of_zero_layers(tmp_path: Path) -> None:
    source = made(ESM, tmp_path)
    grown = source.decoalesce(layers=[[0, 1], [2], [3, 4]], new_layers="zero")
    assert grown.promise[0] == "bit-exact"
    assert error(ESM, tmp_path, grown) == 0.0
    assert contacts(tmp_path / "result").equal(contacts(tmp_path / "source"))


def contacts(folder: Path) -> torch.Tensor:
    net = transformers.EsmForMaskedLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager"
    ).eval()
    ids = torch.tensor([[7, 8, 9, 10, 11, 12, 13, 14]])
    with torch.no_grad():
        found: torch.Tensor = net.predict_contacts(ids, torch.ones_like(ids))
    return found


@pytest.mark.parametrize("n_groups", [1, 2])
def test_new_groups_of_albert_are_run_as_often_as_the_others(tmp_path: Path, n_groups: int) -> None:
    model = TinyModel("albert", "AlbertForMaskedLM", {**ALBERT, "num_hidden_groups": n_groups})
    source = made(model, tmp_path)
    deep = source.decoalesce(layers=2)
    assert deep.config is not None
    assert deep.config["num_hidden_groups"] == 2 * n_groups
    assert deep.config["num_hidden_layers"] == 12
    assert deep.promise[0] == "approximate"
    assert error(model, tmp_path, deep) > 1e-3
    assert deep.coalesce().config == source.config
    assert len(deep.coalesce().keys()) == len(source.keys())


def test_groups_of_albert_that_are_run_unequally_often_stay(tmp_path: Path) -> None:
    for n_layers, n_groups in ((5, 2), (1, 2)):
        config = {**ALBERT, "num_hidden_layers": n_layers, "num_hidden_groups": n_groups}
        source = made(TinyModel("albert", "AlbertForMaskedLM", config), tmp_path / str(n_layers))
        with pytest.raises(PlanError, match=r"num_hidden_layers is \d, no multiple of the 2"):
            source.decoalesce(layers=2)


def deeper(source: LazyCheckpoint, **groups: Any) -> LazyCheckpoint:
    axes = {axis.replace("_", ".", 1): {"groups": g} for axis, g in groups.items()}
    return source.decoalesce(axes=axes, new_layers="zero")


def test_deepstack_reads_the_same_outputs_of_a_deeper_image_encoder(tmp_path: Path) -> None:
    source = made(QWEN3_VL, tmp_path)
    grown = deeper(source, vision_layer=[[0, 1], [2], [3, 4], [5]])
    assert grown.config is not None
    marks = config_fields.field_value(grown.config, "vision_config.deepstack_visual_indexes")
    assert marks == [1, 4]
    assert grown.promise[0] == "bit-exact"
    assert error(QWEN3_VL, tmp_path, grown) == 0.0


def test_text_layers_that_take_image_features_keep_their_numbers(tmp_path: Path) -> None:
    source = made(QWEN3_VL, tmp_path)
    behind = deeper(source, text_layer=[[0], [1, 2], [3], [4, 5]])
    assert behind.promise[0] == "bit-exact"
    assert error(QWEN3_VL, tmp_path, behind) == 0.0
    before = deeper(source, text_layer=[[0, 1], [2], [3], [4]])
    assert before.promise[0] == "approximate"
    assert "text.layer 1 becomes 2: image features are added" in before.promise[1]
    assert error(QWEN3_VL, tmp_path, before) > 1e-3
