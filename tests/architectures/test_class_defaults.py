"""A size that config.json leaves out is the one that the model's class has for it."""

import copy
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

import pytest

from streammap.architectures import axis_sizes, config_fields, registry
from streammap.architectures.classes import defaults
from streammap.tools import class_defaults

transformers = pytest.importorskip("transformers")

QUICK = (
    "llama",
    "bert",
    "gemma3",
    "siglip",
    "llava",
    "electra",
    "wav2vec2",
    "falcon_h1",
    "voxtral",
)
PUBLISHED: Mapping[str, tuple[dict[str, Any], dict[str, int]]] = {
    "parts of nothing but a type": (
        {
            "model_type": "siglip",
            "text_config": {"model_type": "siglip_text_model"},
            "vision_config": {"model_type": "siglip_vision_model"},
        },
        {"t_embed": 768, "t_heads": 12, "t_layer": 12, "v_embed": 768, "v_mlp": 3072},
    ),
    "what differs from the class": (
        {
            "model_type": "gemma3",
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560},
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
        },
        {"text.embed": 2560, "text.heads": 8, "text.kv_heads": 4, "text.head_dim": 256},
    ),
    "a part without a type": (
        {"model_type": "gemma3", "text_config": {}, "vision_config": {}},
        {"text.embed": 2304, "vision.embed": 768},
    ),
    "a decoder of another type": (
        {
            "model_type": "llava",
            "text_config": {"model_type": "mistral"},
            "vision_config": {"hidden_size": 1024},
        },
        {"text.embed": 4096, "text.kv_heads": 8, "vision.embed": 1024, "vision.heads": 12},
    ),
    "a part with sizes of its own in its whole": (
        {"model_type": "voxtral", "text_config": {"model_type": "llama"}, "audio_config": {}},
        {"text.embed": 3072, "text.head_dim": 128},
    ),
    "null: worked out": (
        {"model_type": "qwen3", "hidden_size": 48, "num_attention_heads": 4, "head_dim": None},
        {"head_dim": 12},
    ),
    "under another name": (
        {"model_type": "gpt2", "n_embd": 48, "num_attention_heads": 4},
        {"embed": 48, "vocab": 50257},
    ),
}
"""config.json as it is saved with what differs from the class's defaults, and sizes."""


def sizes(config: Mapping[str, Any]) -> dict[str, int]:
    name = registry.model_types()[str(config["model_type"])]
    return axis_sizes.of_config(registry.load(name, config), config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_left_out_is_as_the_class_has_it(name: str) -> None:
    config, expected = PUBLISHED[name]
    found = sizes(config)
    assert {axis: found.get(axis) for axis in expected} == expected


def test_a_size_that_a_class_takes_under_another_name_is_not_guessed() -> None:
    config: dict[str, object] = {"model_type": "gpt2", "num_attention_heads": 4}
    assert defaults.size(config, "n_layer") == 12
    assert defaults.size(config, "n_head") is None


def test_conditions_see_the_sizes_of_the_class() -> None:
    config: dict[str, object] = {"model_type": "electra", "hidden_size": 128}
    assert config_fields.holds("embedding_size == hidden_size", config)
    assert config_fields.holds("embedding_size", config)
    assert config_fields.holds("embedding_size == absent", config)
    assert not config_fields.holds("embedding_size", {**config, "embedding_size": None})


@pytest.mark.slow
def test_the_file_is_what_transformers_has() -> None:
    text = (resources.files(defaults.__package__) / "defaults.json").read_text(encoding="utf-8")
    assert text == class_defaults.text(class_defaults.collected())


def every_type() -> Iterator[object]:
    for model_type in sorted(registry.model_types()):
        if model_type in transformers.CONFIG_MAPPING:
            marks = () if model_type in QUICK else (pytest.mark.slow,)
            yield pytest.param(model_type, id=model_type, marks=marks)


def without(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    copied = copy.deepcopy(config)
    table = copied
    for part in path[:-1]:
        table = table[part]
    del table[path[-1]]
    return copied


def numbers(config: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for field, value in config.items():
        if isinstance(value, dict):
            yield from numbers(value, (*above, field))
        elif type(value) is int and not field.endswith("token_id"):
            yield (*above, field)


# Two names of which the other counts, where both are there; lists that are worked out.
OTHERWISE = {"embed_dim", "out_hidden_size", "projector_output_dim"}


@pytest.mark.parametrize("model_type", list(every_type()))
def test_each_size_is_the_same_where_it_is_left_out(model_type: str) -> None:
    kind = transformers.CONFIG_MAPPING[model_type]
    try:
        full = json.loads(json.dumps(kind().to_dict(), default=str))
    except Exception:  # Some classes can't do without their parts.
        pytest.skip("it has no default")
    for path in numbers(full):
        if OTHERWISE & {*path}:
            continue
        fewer = without(full, path)
        try:
            meant = {**kind.from_dict(copy.deepcopy(fewer)).to_dict(), "model_type": model_type}
        except Exception:  # It can't do without this field.
            continue
        found, expected = sizes(fewer), sizes(json.loads(json.dumps(meant, default=str)))
        assert found == {axis: expected.get(axis) for axis in found}, path
