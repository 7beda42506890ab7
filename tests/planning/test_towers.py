"""Models of several towers, and one tower alone: what is asked of which, and what they compute."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import streammap
from tests.support.typed import ok, run

transformers: Any = pytest.importorskip("transformers")

TEXT = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 40,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}


def _filled(model: Any) -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


def _llava(folder: Path, **fields: object) -> Path:
    config = transformers.LlavaConfig(
        text_config=TEXT, vision_config=VISION, image_token_index=5, image_seq_length=9, **fields
    )
    _filled(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def _logits(folder: Path) -> torch.Tensor:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32")
    torch.manual_seed(1)
    ids = torch.tensor([[7, *[5] * 9, 8, 9]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(
            input_ids=ids, pixel_values=torch.randn(1, 3, 12, 12)
        ).logits
    return found


def _config(folder: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
    return content


@pytest.mark.parametrize(
    ("given", "grouping", "expected"),
    [
        (-1, "stacked", -1),
        (-2, "stacked", -6),
        (-2, "adjacent", -3),
        (2, "adjacent", 4),
        ([-2, 1, -1], "adjacent", [-3, 2, -1]),
        ([0, -5], "adjacent", [0, -9]),
    ],
    ids=str,
)
def test_features_come_from_the_same_hidden_states_when_layers_are_added(
    tmp_path: Path, given: object, grouping: str, expected: object
) -> None:
    source, out = _llava(tmp_path / "src", vision_feature_layer=given), tmp_path / "out"
    said = ok(
        *("decoalesce", source, out, "--axis", "vision.layer=2"),
        *("--new-layers", "zero", "--grouping", grouping),
    )
    assert "guarantee  bit-exact" in said
    assert _config(out)["vision_feature_layer"] == expected
    assert torch.equal(_logits(out), _logits(source))


def test_features_of_several_layers_are_read_by_one_projection(tmp_path: Path) -> None:
    source, out = _llava(tmp_path / "src", vision_feature_layer=[-2, 1]), tmp_path / "out"
    assert streammap.open(source).sizes["features"] == 2
    ok("decoalesce", source, out, "--width", 2)
    torch.testing.assert_close(_logits(out), _logits(source), rtol=1e-4, atol=1e-4)


def test_a_missing_feature_layer_is_written_where_it_changes(tmp_path: Path) -> None:
    source, out = _llava(tmp_path / "src"), tmp_path / "out"
    content = {k: v for k, v in _config(source).items() if k != "vision_feature_layer"}
    (source / "config.json").write_text(json.dumps(content))
    adjacent = ("--new-layers", "zero", "--grouping", "adjacent")
    ok("decoalesce", source, out, "--axis", "vision.layer=2", *adjacent)
    assert _config(out)["vision_feature_layer"] == -3
    assert torch.equal(_logits(out), _logits(source))


@pytest.mark.parametrize("flag", ["mlp", "heads", "hidden"])
@pytest.mark.parametrize("direction", ["decoalesce", "coalesce"])
def test_one_size_for_towers_of_several_sizes_is_refused_with_a_hint_that_works(
    tmp_path: Path, flag: str, direction: str
) -> None:
    source = _llava(tmp_path / "src")
    sizes = streammap.open(source).sizes
    axis = {"mlp": "mlp", "heads": "heads", "hidden": "embed"}[flag]
    own = sizes[f"text.{axis}"]
    size = own * 2 if direction == "decoalesce" else own // 2
    refused = run("plan", direction, source, f"--{flag}", f"={size}")
    assert refused.exit_code == 1
    each = f"text.{axis} is {own}, vision.{axis} is {sizes[f'vision.{axis}']}"
    assert f"--{flag} ={size}: the model's towers differ in it: {each}" in refused.stderr
    hint = f"--axis text.{axis}=={size}"
    assert f"say which one: {hint}," in refused.stderr
    said = ok("plan", direction, source, *hint.split())
    assert f"text.{axis} {own} -> {size}" in said
    assert "vision." not in next(line for line in said.splitlines() if line.startswith("sizes"))
    assert "text.mlp" in ok("plan", direction, source, f"--{flag}", "2") or flag != "mlp"


def test_groups_for_towers_of_several_sizes_are_refused(tmp_path: Path) -> None:
    source = _llava(tmp_path / "src")
    groups = json.dumps([[i, i + 40] for i in range(40)])
    refused = run("plan", "coalesce", source, "--mlp", groups)
    assert "--mlp groups: the model's towers differ in it: " in refused.stderr
    said = ok("plan", "coalesce", source, "--axis", f"vision.mlp={groups}")
    assert "vision.mlp 80 -> 40" in said


def _whisper() -> Any:
    return transformers.WhisperConfig(
        vocab_size=97,
        d_model=48,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=6,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=80,
        num_mel_bins=13,
        max_source_positions=15,
        max_target_positions=21,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        begin_suppress_tokens=[2],
        suppress_tokens=[3],
        classifier_proj_size=7,
    )


@pytest.mark.parametrize("request_", [("--mlp", "2"), ("--axis", "enc_layer=2")], ids=str)
@pytest.mark.parametrize("alone", [False, True])
def test_an_encoder_of_whisper_needs_no_decoder(
    tmp_path: Path, request_: tuple[str, str], *, alone: bool
) -> None:
    from transformers.models.whisper import modeling_whisper as whisper

    cls: Any = whisper.WhisperEncoder if alone else whisper.WhisperForAudioClassification
    source, out = tmp_path / "src", tmp_path / "out"
    _filled(cls(_whisper())).save_pretrained(source)
    zero = ("--new-layers", "zero") if "enc_layer" in request_[1] else ()
    ok("decoalesce", source, out, *request_, *zero)
    features = torch.randn(1, 13, 30)
    with torch.no_grad():
        before, after = (
            cls.from_pretrained(folder, dtype="float32").eval()(features)[0]
            for folder in (source, out)
        )
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_whisper_without_its_decoder_is_incomplete_by_its_class(tmp_path: Path) -> None:
    source = tmp_path / "src"
    from transformers.models.whisper import modeling_whisper as whisper

    encoder: Any = whisper.WhisperForAudioClassification(_whisper())
    encoder.save_pretrained(source)
    content = {**_config(source), "architectures": ["WhisperForConditionalGeneration"]}
    (source / "config.json").write_text(json.dumps(content))
    refused = run("plan", "decoalesce", source, "--mlp", "2")
    assert "decoder.layers.0.self_attn.q_proj.weight: missing" in refused.stderr


def test_what_no_spec_can_say_is_refused_with_the_cause_and_what_works(tmp_path: Path) -> None:
    config = transformers.ConvBertConfig(
        vocab_size=97,
        embedding_size=24,
        hidden_size=48,
        intermediate_size=92,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_groups=2,
    )
    source = tmp_path / "src"
    _filled(transformers.ConvBertModel(config)).save_pretrained(source)
    refused = run("plan", "decoalesce", source, "--mlp", "2")
    assert refused.exit_code == 1
    assert "config.json: num_groups: linears in groups of channels" in refused.stderr
    assert "interpolate, diff and inspect --health need no spec" in refused.stderr
    ok("plan", "interpolate", source, source, "--alpha", "0.5")
    ok("inspect", source, "--health")
    ok("diff", source, source)
