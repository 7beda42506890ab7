"""Sizes that config.json tells in an unusual way, or not at all: results of them load all the same.

The models have no weights: their classes say the shapes, and files of these shapes have no bytes.
"""

import copy
import json
import random
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import streammap
from streammap import LazyCheckpoint, StreammapError
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.output.loading import class_check, class_trial
from streammap.tools.spec_infer.probe import Workbench

pytest.importorskip("transformers")

Fields = dict[str, object]
N_VARIANTS, N_REQUESTS = 4, 3
"""What the slow test tries of each model."""


def model_of(name: str) -> TinyModel:
    models = [m for arch in registry.names() for m in registry.tiny_models(arch)]
    return next(model for model in models if model.name == name)


def config_of(model: TinyModel) -> Fields:
    """A tiny model's config.json, with all that its class adds."""
    own: Fields = {"model_type": model.model_type, "architectures": [model.class_name]}
    bench = Workbench({**model.config, **own}, name=model.name)
    return {**json.loads(json.dumps(bench.fields)), **own}


def written(folder: Path, config: Mapping[str, object]) -> Path:
    """A checkpoint of this config.json with the tensors that its class would save."""
    shapes = Workbench(config, name="tiny").base().shapes
    header: Fields = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, shape in shapes.items():
        start = end
        size = 4
        for n in shape:
            size *= n
        end += size
        header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def told(lazy: LazyCheckpoint) -> str:
    """What the class has against a plan; empty if it loads it."""
    plan = lazy.plan
    assert plan.config is not None
    verdict = class_trial.compare(
        class_check.source_of(plan), class_check.given(plan.config, plan.specs)
    )
    return "" if verdict is None or verdict.ok else class_check.told(verdict, "transformers")


def test_a_rounded_mlp_of_lfm2_is_written_as_it_is(tmp_path: Path) -> None:
    base = config_of(model_of("lfm2_rounded"))
    for rounding in (
        {},
        {"block_ffn_dim_multiplier": 1},
        {"block_ffn_dim_multiplier": 0.7, "block_multiple_of": 8},
    ):
        config = {**base, **rounding}
        source = streammap.open(written(tmp_path / "source", config))
        assert source.sizes["mlp"] != config["intermediate_size"]
        for request in ({"width": 2}, {"width": 3}, {"axes": {"mlp": {"size": 133}}}):
            result = source.decoalesce(**request)
            assert result.config is not None
            assert told(result) == ""
            assert result.config["intermediate_size"] == result.sizes["mlp"]
            assert result.config["block_auto_adjust_ff_dim"] is False
        wide = source.decoalesce(axes={"embed": 2})  # whose MLP is what it was
        assert told(wide) == ""
        assert wide.config is not None
        assert wide.config["block_auto_adjust_ff_dim"] is True
        small = source.coalesce(axes={"mlp": 2})
        assert told(small) == ""


def test_the_default_of_lfm2_is_to_round(tmp_path: Path) -> None:
    config = config_of(model_of("lfm2_rounded"))
    del config["block_auto_adjust_ff_dim"]
    config["block_ff_dim"] = config["intermediate_size"]  # its older name, which counts first
    source = streammap.open(written(tmp_path, config))
    result = source.decoalesce(width=2)
    assert told(result) == ""
    assert result.config is not None
    assert result.config["block_ff_dim"] == result.sizes["mlp"] == 2 * source.sizes["mlp"]


@pytest.mark.parametrize("absent", [True, False])
def test_an_mlp_of_four_times_the_width_is_written_where_the_class_looks(
    tmp_path: Path, absent: bool
) -> None:
    for name, field in (("gptj", "n_inner"), ("gpt2", "n_inner"), ("codegen", "n_inner")):
        config = config_of(model_of(name))
        del config["n_inner"]
        if not absent:
            config["n_inner"] = None
        source = streammap.open(written(tmp_path / name, config))
        result = source.decoalesce(axes={"embed": 3})
        assert told(result) == ""
        assert result.config is not None
        assert result.config[field] == source.sizes["mlp"]


def test_null_says_which_of_two_names_the_class_reads(tmp_path: Path) -> None:
    config = config_of(model_of("gpt_neo"))
    config["intermediate_size"] = None
    result = streammap.open(written(tmp_path, config)).decoalesce(axes={"embed": 2})
    assert told(result) == ""
    assert result.config is not None
    assert "n_inner" not in result.config


@pytest.mark.parametrize(
    ("name", "grown", "request_"),
    [
        ("electra_gen", True, {"axes": {"emb_in": {"size": 48}}}),
        ("opt_350m", True, {"axes": {"proj": {"size": 48}}}),
        ("deberta-v2_embeddings", True, {"axes": {"emb_in": {"size": 48}}}),
        ("jamba", False, {"axes": {"expert": 7}}),
    ],
)
def test_a_size_at_which_the_class_has_other_tensors_is_refused(
    tmp_path: Path, name: str, grown: bool, request_: dict[str, Any]
) -> None:
    source = streammap.open(written(tmp_path, config_of(model_of(name))))
    call = source.decoalesce if grown else source.coalesce
    with pytest.raises(PlanError, match=r"the result would not fit its config\.json"):
        call(**request_)


def every_model() -> Iterator[object]:
    for arch in registry.names():
        for model in registry.tiny_models(arch):
            if not model.class_name.startswith("timm:"):
                yield pytest.param(model, id=model.name)


@pytest.mark.slow
@pytest.mark.parametrize("model", list(every_model()))
def test_random_requests_over_configs_with_fields_missing_load(
    tmp_path: Path, model: TinyModel
) -> None:
    base = config_of(model)
    generator = random.Random(model.name)
    choices = [copy.deepcopy(base), *variants(base, generator)]
    n_planned, wrong = 0, []
    for config in choices[: 1 + N_VARIANTS]:
        try:
            source = streammap.open(written(tmp_path / "source", config))
            assert source.sizes  # it is read by its spec here
        except StreammapError:
            continue  # The class can't be built of it, or the spec refuses it.
        for how, options in requests(source, generator):
            try:
                result = getattr(source, how)(**options)
            except StreammapError:
                continue
            n_planned += 1
            if message := told(result):
                changed = {k: v for k, v in base.items() if config.get(k) != v}
                wrong.append((changed, how, options, message))
    assert wrong == []
    assert n_planned


def variants(config: Fields, generator: random.Random) -> Iterator[Fields]:
    """The config with one field missing, null, or another flag, at random."""
    names = [name for name in config if name not in ("model_type", "architectures")]
    for name in generator.sample(names, len(names)):
        value = config[name]
        if name.endswith("token_id") or isinstance(value, dict | str | float):
            continue
        changed = copy.deepcopy(config)
        if isinstance(value, bool):
            changed[name] = not value
        elif generator.random() < 0.5:
            del changed[name]
        else:
            changed[name] = None if value is not None else 12
        yield changed


def requests(
    source: LazyCheckpoint, generator: random.Random
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of widths, depths and experts at random."""
    axes = source.plan.model.architecture.axes
    names = [
        n
        for n, size in source.sizes.items()
        if size > 1 and axes[n].kind not in ("group", "frozen")
    ]
    for _ in range(N_REQUESTS):
        name = generator.choice(names)
        size = source.sizes[name]
        match generator.randrange(4):
            case 0:
                yield "decoalesce", {"width": generator.choice([2, 3])}
            case 1:
                yield "decoalesce", {"axes": {name: generator.choice([2, 3])}}
            case 2:
                yield "decoalesce", {"axes": {name: {"size": size + generator.randint(1, size)}}}
            case _:
                # Some classes divide by the number of layers less one.
                least = 2 if axes[name].kind == "depth" else 1
                divisors = [n for n in range(2, size // least + 1) if size % n == 0] or [1]
                yield "coalesce", {"axes": {name: {"factor": generator.choice(divisors)}}}


@pytest.mark.parametrize(
    ("name", "defaults", "request_"),
    [
        ("granitemoe", {"num_experts_per_tok": 2}, {"axes": {"expert": 2}}),
        (
            "deepseek_v3",
            {"n_group": 8, "topk_group": 4, "n_routed_experts": 16},
            {"axes": {"expert": 2}},
        ),
        ("glm4_moe_groups", {"topk_group": 1}, {"axes": {"expert": 2}}),
        ("llama", {"rms_norm_eps": 1e-6}, {"axes": {"embed": {"size": 60}}}),
        ("qwen3", {"rms_norm_eps": 1e-6}, {"head_dim": 20}),
    ],
)
def test_numbers_that_are_left_out_are_those_of_the_class(
    tmp_path: Path, name: str, defaults: Fields, request_: dict[str, Any]
) -> None:
    config = {**config_of(model_of(name)), **defaults}
    told_all = streammap.open(written(tmp_path / "all", config)).decoalesce(**request_)
    fewer = {field: value for field, value in config.items() if field not in defaults}
    fewer |= {field: value for field, value in defaults.items() if field == "n_routed_experts"}
    told_few = streammap.open(written(tmp_path / "few", fewer)).decoalesce(**request_)
    assert told_few.promise == told_all.promise
    assert told_few.plan.specs == told_all.plan.specs
    assert told_all.config is not None
    assert told_few.config is not None
    changed = {f: told_all.config[f] for f in defaults if told_all.config[f] != config[f]}
    assert {field: told_few.config.get(field) for field in changed} == changed


def test_whether_a_part_is_tied_is_as_its_class_has_it(tmp_path: Path) -> None:
    config = config_of(model_of("vision-encoder-decoder"))
    decoder = config["decoder"]
    assert isinstance(decoder, dict)
    assert decoder.pop("tie_word_embeddings") is True
    config["tie_word_embeddings"] = False
    source = streammap.open(written(tmp_path, config))
    assert source.plan.model.tied
