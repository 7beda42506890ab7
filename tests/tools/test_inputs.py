"""What tiny models are run on: forms of images and sounds that no shipped spec's models ask for."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.tools.spec_proof import tiny_models

pytest.importorskip("transformers", minversion="5.0")
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

LLAMA = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 92, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
SIGLIP = {"hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 2, "patch_size": 4}
SIGLIP |= {"num_attention_heads": 4, "image_size": 32}
WHISPER = {"num_mel_bins": 20, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
WHISPER |= {"intermediate_size": 44, "max_source_positions": 20}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}

CONFIGS: Mapping[str, tuple[str, Mapping[str, object], str]] = {
    "rows and columns of patches in a strip": (
        "MiniCPMV4_6ForConditionalGeneration",
        {
            "text_config": {**LLAMA, "model_type": "qwen3"},
            "vision_config": {**SIGLIP, "image_size": 64, "num_hidden_layers": 4},
            "image_token_id": 3,
            "video_token_id": 4,
            "insert_layer_id": 1,
        },
        "patch_embedding",
    ),
    "tiles": (
        "MllamaForConditionalGeneration",
        {
            "text_config": {
                **LLAMA,
                "num_hidden_layers": 4,
                "cross_attention_layers": [1],
                "rope_parameters": ROPE,
                "pad_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 44,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 16,
                "patch_size": 4,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [1],
                "supported_aspect_ratios": [[1, 1], [1, 2]],
                "max_num_tiles": 2,
            },
            "image_token_index": 3,
        },
        "patch_embedding",
    ),
    "patches that tokens pool": (
        "Molmo2ForConditionalGeneration",
        {
            "text_config": {**LLAMA, "additional_vocab_size": 4},
            "vision_config": {
                **SIGLIP,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "num_position_embeddings": 16,
                "image_size": [16, 16],
            },
            "adapter_config": {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "intermediate_size": 44,
                "text_hidden_size": 48,
                "vision_feature_layer": [-1],
            },
            "image_patch_id": 1,
        },
        "patch_embedding",
    ),
    "a mask of the sound": (
        "MossTranscribeDiarizeForConditionalGeneration",
        {
            "text_config": {**LLAMA, "model_type": "qwen3"},
            "audio_config": WHISPER,
            "audio_token_id": 1,
        },
        "conv1",
    ),
    "whole windows of a sound": (
        "Qwen3ASRForConditionalGeneration",
        {
            "text_config": {**LLAMA, "model_type": "qwen3"},
            "audio_config": {
                "num_mel_bins": 20,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 44,
                "d_model": 32,
                "downsample_hidden_size": 12,
                "output_dim": 48,
            },
            "audio_token_id": 1,
        },
        "conv2d1",
    ),
    "a sound whose features are looked for among the tokens": (
        "MusicFlamingoForConditionalGeneration",
        {
            "text_config": {**LLAMA, "model_type": "qwen2"},
            "audio_config": {**WHISPER, "model_type": "audioflamingo3_encoder"},
            "audio_token_id": 1,
            "audio_bos_token_id": 2,
            "audio_eos_token_id": 3,
        },
        "conv1",
    ),
    "a wave with channels": (
        "OmniASRForCTC",
        {
            "vocab_size": 31,
            "audio_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 44,
                "conv_dim": [12, 16],
                "conv_kernel": [10, 3],
                "conv_stride": [5, 2],
                "num_conv_pos_embeddings": 4,
                "num_conv_pos_embedding_groups": 2,
            },
        },
        "conv",
    ),
    "an image that each stage shrinks": (
        "SegformerForImageClassification",
        {
            "hidden_sizes": [8, 16, 16, 24],
            "num_attention_heads": [1, 2, 2, 4],
            "depths": [1, 1, 1, 1],
        },
        "proj",
    ),
    "a mask of features that the encoder does not take": (
        "GraniteSpeechForConditionalGeneration",
        {
            "text_config": {**LLAMA, "model_type": "granite"},
            "encoder_config": {
                "model_type": "granite_speech_encoder",
                "input_dim": 20,
                "num_layers": 2,
                "hidden_dim": 32,
                "num_heads": 4,
                "dim_head": 8,
                "output_dim": 12,
            },
            "projector_config": {
                "model_type": "blip_2_qformer",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 44,
                "encoder_hidden_size": 32,
            },
            "audio_token_index": 1,
            "has_lora_adapter": False,
        },
        "input_linear",
    ),
    "many queries at fixed places": (
        "Kosmos2_5ForConditionalGeneration",
        {
            "latent_query_num": 20,
            "text_config": {
                "vocab_size": 97,
                "embed_dim": 48,
                "ffn_dim": 44,
                "layers": 2,
                "attention_heads": 4,
                "max_position_embeddings": 64,
            },
            "vision_config": {
                "hidden_size": 32,
                "patch_embed_hidden_size": 48,
                "intermediate_size": 44,
                "head_dim": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
            },
        },
        "patch_projection",
    ),
}


@pytest.mark.parametrize("form", list(CONFIGS))
def test_images_and_sounds_are_given_in_the_form_that_a_class_asks_for(
    form: str, tmp_path: Path
) -> None:
    kind, config, first = CONFIGS[form]
    model = TinyModel("tiny", kind, config)
    tiny_models.build(model, tmp_path)
    before = tiny_models.outputs(tmp_path, model)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    seen = next(key for key in weights if first in key.split(".") and key.endswith("weight"))
    save_file({**weights, seen: 2 * weights[seen]}, file, metadata={"format": "pt"})
    after = tiny_models.outputs(tmp_path, model)
    for name, x in before.items():
        assert x.isfinite().all()
        assert not torch.equal(after[name], x)


def test_features_of_another_width_are_not_put_in_the_places_of_tokens() -> None:
    mask = torch.tensor([[True], [False]]).expand(2, 3)
    with tiny_models._InFloat64():
        torch.zeros(2, 3).masked_scatter(mask, torch.ones(1, 3))
        torch.zeros(2, 3).masked_scatter(mask, source=torch.ones(3))
        with pytest.raises(PlanError, match="as wide as 4 can't take the places of tokens"):
            torch.zeros(2, 3).masked_scatter(mask, torch.ones(1, 4))
