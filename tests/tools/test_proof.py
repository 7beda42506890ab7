"""The specs, proved on tiny models of transformers and timm: resized, they compute the same."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.errors import ArchitectureError, PlanError
from streammap.tools.spec_proof import checks, comparison, tiny_models, unseen

pytest.importorskip("transformers")

QUICK = (
    "bert",
    "gpt2",
    "llama",
    "qwen3",
    "gemma2",
    "t5",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "falcon",
    "phi3",
    "vit",
    "opt_350m",
    "mamba",
)
"""One of each kind; the others are slow only because there are many of them."""
SEEING = ("llava", "llava_next", "mistral3", "idefics3", "qwen3_5", "glm4v", "siglip2")
"""One of each form that images are taken in."""
CANNOT_RUN = "llama4"
"""Its class in transformers 5.24 asks its text model for outputs of images, which that has not."""
TINY = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
BERT = TinyModel("bert", "BertForMaskedLM", TINY)


def cases() -> Iterator[object]:
    for arch in registry.names():
        for model in registry.tiny_models(arch):
            marks = () if model.name in QUICK else (pytest.mark.slow,)
            yield pytest.param(arch, model, id=model.name, marks=marks)


def test_marks_of_tokens_that_are_never_given_hide_no_error() -> None:
    lowest = torch.finfo(torch.float64).min
    logits = torch.tensor([[1.0, -2.0, lowest, 0.5]], dtype=torch.float64)
    moved, unmarked = logits.clone(), logits.clone()
    moved[0, 0], unmarked[0, 2] = 1.5, 0.0
    assert comparison.difference(logits, logits, in_order=True) == 0.0
    assert comparison.difference(moved, logits, in_order=True) == 0.25
    assert comparison.difference(unmarked, logits, in_order=True) == float("inf")


@pytest.mark.parametrize(("arch", "model"), list(cases()))
def test_a_resized_model_computes_what_its_source_does(
    tmp_path: Path, arch: str, model: TinyModel
) -> None:
    if model.class_name.startswith("timm:"):
        pytest.importorskip("timm", exc_type=ImportError)
    report = checks.prove(model, arch, tmp_path)
    assert [check for check in report.checks if not check.passed] == []
    assert [check.name for check in report.checks] == list(checks.CHECKS)
    errors = {check.name: check.error for check in report.checks}
    for name in ("growth", "permutation"):
        error = errors[name]
        assert (error is None) == model.shapes_only
        assert error is None or error < comparison.TOLERANCE


def test_each_quick_model_is_there() -> None:
    found = {model.name for arch in registry.names() for model in registry.tiny_models(arch)}
    assert set(QUICK) <= found


def with_images() -> Iterator[object]:
    for arch in registry.names():
        for model in registry.tiny_models(arch):
            seeing = "vision_config" in model.config and "text_config" in model.config
            if seeing and model.name != CANNOT_RUN:
                marks = () if model.name in SEEING else (pytest.mark.slow,)
                yield pytest.param(model, id=model.name, marks=marks)


@pytest.mark.parametrize("model", list(with_images()))
def test_vision_language_models_are_run_with_images(tmp_path: Path, model: TinyModel) -> None:
    assert not model.shapes_only
    tiny_models.build(model, tmp_path)
    before = tiny_models.outputs(tmp_path, model)
    weights = load_file(tmp_path / "model.safetensors")
    patches = {f"patch_{name}" for name in ("embedding", "embeddings", "embed", "embedder")}
    patches |= {"patch_conv", "patch_projection"}
    (first, *_) = (
        k for k in weights if k.endswith(".weight") and set(k.split(".")).intersection(patches)
    )
    save_file({**weights, first: 2 * weights[first]}, tmp_path / "model.safetensors")
    after = tiny_models.outputs(tmp_path, model)
    for name, x in before.items():
        assert "image_embeds" in before or not torch.equal(after[name], x), name


@pytest.mark.parametrize("quick", [False, True])
def test_a_whole_proof_asks_the_class_and_names_what_it_would_not_load(
    tmp_path: Path, quick: bool
) -> None:
    spec = tmp_path / "wrong.toml"
    spec.write_text(
        'schema = 1\nextends = "bert"\nmodel_types = ["bert"]\n'
        '[modules]\n"{L}intermediate.dense" = "linear embed -> _"\n'
    )
    report = checks.prove(BERT, str(spec), tmp_path / "models", quick=quick)
    failed = [check for check in report.checks if not check.passed]
    assert failed[0].name == "growth"
    assert ("intermediate.dense" in failed[0].message) != quick
    assert (len(failed) == 1) == quick


def test_lists_that_are_derived_otherwise_are_found(tmp_path: Path) -> None:
    """A spec that derives other lists than transformers does would promise what doesn't hold."""
    model = TinyModel(
        "qwen3",
        "Qwen3ForCausalLM",
        {
            **TINY,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "sliding_window": 4,
        },
    )
    found = {}
    for name, before in (("right", "max_window_layers"), ("wrong", "num_hidden_layers")):
        spec = tmp_path / f"{name}.toml"
        spec.write_text(
            'schema = 1\nextends = "llama"\nmodel_types = ["qwen3"]\n'
            '[[depth.layer.derived]]\nlist = "layer_types"\n'
            f'before = "{before}"\nyes = "full_attention"\nno = "sliding_attention"\n'
        )
        (found[name],) = (
            check
            for check in checks.prove(model, str(spec), tmp_path / name).checks
            if check.name == "missing"
        )
    assert (found["right"].passed, found["right"].error) == (True, 0.0)
    # The lists of the file are not those that this spec derives: nothing to compare.
    assert found["wrong"].error is None


GPT2 = """[[proof.models]]
name = "gpt2"
class = "GPT2LMHeadModel"
[proof.models.config]
vocab_size = 31
n_positions = 32
n_embd = 16
n_head = 4
n_layer = 2
n_inner = 20
"""

# Each is a spec with a fault, the check that finds it, and what is told of it.
FAULTS = {
    "no head to compensate": ('[head]\nclasses = ["NoSuchModel"]', "growth", "embed: "),
    "a scale that the model lacks": (
        '[forward_scale]\n"{base}wte.weight" = "embed**0.5"',
        "growth",
        "embed: ",
    ),
    "another layout of q, k, v": (
        '[modules]\n"{L}attn.c_attn" = "conv1d embed -> heads*3*head_dim"',
        "permutation",
        "heads: ",
    ),
    "a role the wrong way round": (
        '[tensors]\n"{L}mlp.c_fc.weight" = "embed:in, mlp:in"',
        "growth",
        "mlp: ",
    ),
    "a rule that is missing": ('[modules]\n"{L}mlp.c_fc" = "linear mlp -> mlp"', "growth", "c_fc"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_spec_fails_and_the_axis_is_named(tmp_path: Path, name: str) -> None:
    tables, check, told = FAULTS[name]
    spec = tmp_path / "faulty.toml"
    spec.write_text(f'schema = 1\nextends = "gpt2"\nmodel_types = ["gpt2"]\n{tables}\n{GPT2}')
    (report,) = checks.verify(str(spec), scratch=tmp_path)
    assert not report.passed
    (found,) = (found for found in report.checks if found.name == check)
    assert not found.passed
    assert told in found.message


def test_an_axis_that_cannot_change_alone_is_not_called_wrong(tmp_path: Path) -> None:
    # 6 heads can't share 4 kv heads, 12 can; the fault is another one.
    spec = tmp_path / "scaled.toml"
    spec.write_text(
        'schema = 1\nextends = "llama"\nmodel_types = ["llama"]\n'
        '[forward_scale]\n"{base}embed_tokens.weight" = "embed**0.5"\n'
        '[[proof.models]]\nname = "llama"\nclass = "LlamaForCausalLM"\n'
        "config = {vocab_size = 31, hidden_size = 12, intermediate_size = 10, head_dim = 4, "
        "num_hidden_layers = 1, num_attention_heads = 6, num_key_value_heads = 2}\n"
    )
    (model,) = registry.tiny_models(str(spec))
    _, growth = checks.prove(model, str(spec), tmp_path, only=("growth",)).checks
    assert growth.axes == ("embed",)
    assert "kv_heads with heads: " in growth.message


def test_verify_takes_one_model_by_name(tmp_path: Path) -> None:
    (report,) = checks.verify("gpt2", name="gpt2", scratch=tmp_path)
    assert report.model == "gpt2"
    with pytest.raises(ArchitectureError, match=r"no model 'nothing' under .*\n.*there are gpt2,"):
        checks.verify("gpt2", name="nothing", scratch=tmp_path)


def test_a_spec_without_models_is_not_called_tested(tmp_path: Path) -> None:
    spec = tmp_path / "mine.toml"
    spec.write_text('schema = 1\nmodel_types = ["mine"]\nextends = "llama"\n')
    with pytest.raises(ArchitectureError, match=r"mine\.toml: no model under \[proof\]"):
        checks.chosen(["gpt2", str(spec)], name="gpt2")


def test_a_model_may_be_of_any_of_the_specs() -> None:
    ((arch, model),) = checks.chosen(["bert", "gpt2"], name="gpt2")
    assert (arch, model.name) == ("gpt2", "gpt2")


def test_a_model_that_cannot_be_made_is_a_failed_source(tmp_path: Path) -> None:
    report = checks.prove(replace(BERT, class_name="NoSuchModel"), "bert", tmp_path)
    assert not report.passed
    assert [(check.name, check.error) for check in report.checks] == [("source", None)]
    assert "NoSuchModel" in report.checks[0].message


def test_weights_gains_and_biases_are_all_random_float64(tmp_path: Path) -> None:
    tiny_models.build(BERT, tmp_path)
    for key, x in load_file(tmp_path / "model.safetensors").items():
        assert x.dtype == torch.float64, key
        assert len(set(x.flatten().tolist())) == x.numel(), key
        if "LayerNorm.weight" in key:
            assert 0.5 <= float(x.min()) <= float(x.max()) <= 1.5


def test_outputs_are_the_same_each_time(tmp_path: Path) -> None:
    tiny_models.build(BERT, tmp_path)
    first, again = (tiny_models.outputs(tmp_path, BERT) for _ in range(2))
    assert first.keys() == {"logits"}
    assert first["logits"].dtype == torch.float64
    assert torch.equal(first["logits"], again["logits"])
    assert not torch.equal(first["logits"], tiny_models.outputs(tmp_path, BERT, seed=1)["logits"])


def test_each_key_must_be_there_and_wanted(tmp_path: Path) -> None:
    tiny_models.build(BERT, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    key = "bert.encoder.layer.0.output.dense.bias"
    changes = ({key: None}, {"more": torch.zeros(1)}, {key: torch.zeros(3)})
    for change in changes:
        changed = {k: x for k, x in (state | change).items() if x is not None}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises((PlanError, RuntimeError), match=r"missing|unexpected|mismatch"):
            tiny_models.outputs(tmp_path, BERT)


def test_shapes_only_loads_and_does_not_run(tmp_path: Path) -> None:
    tiny_models.build(BERT, tmp_path)
    assert tiny_models.outputs(tmp_path, replace(BERT, shapes_only=True)) == {}


def test_float32_is_float64_inside_only(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    with pytest.raises(PlanError, match="NoSuchModel"):
        tiny_models.build(replace(BERT, class_name="NoSuchModel"), tmp_path)
    tiny_models.build(BERT, tmp_path)
    tiny_models.outputs(tmp_path, BERT)
    assert torch.get_default_dtype() == torch.float32
    assert torch.zeros(1, dtype=torch.float32).double().float().dtype == torch.float32
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("feature", "model"),
    [
        ("alibi", TinyModel("bloom", "BloomForCausalLM", TINY | {"n_head": 2, "n_layer": 2})),
        (
            "alibi",
            TinyModel(
                "mpt",
                "MptForCausalLM",
                {
                    "vocab_size": 31,
                    "d_model": 16,
                    "n_heads": 2,
                    "n_layers": 2,
                    "max_seq_len": 32,
                },
            ),
        ),
        (
            "sinusoidal",
            TinyModel(
                "xglm",
                "XGLMForCausalLM",
                {
                    "vocab_size": 31,
                    "d_model": 16,
                    "ffn_dim": 24,
                    "num_layers": 2,
                    "attention_heads": 2,
                },
            ),
        ),
    ],
)
def test_a_feature_is_switched_off_inside_only(
    tmp_path: Path, feature: Literal["alibi", "sinusoidal"], model: TinyModel
) -> None:
    tiny_models.build(model, tmp_path)
    neutral = replace(model, neutral=(feature,))
    with_it, without, after = (
        tiny_models.outputs(tmp_path, m)["logits"] for m in (model, neutral, model)
    )
    assert float((with_it - without).abs().max()) > 1e-3
    assert torch.equal(with_it, after)


def test_timm_models_are_read_by_their_arguments(tmp_path: Path) -> None:
    try:
        importlib.import_module("timm")
    except ImportError as error:
        pytest.skip(str(error))
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    model = TinyModel("timm", "timm:VisionTransformer", arguments)
    tiny_models.build(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_args"] == arguments
    assert tiny_models.outputs(tmp_path, model)["logits"].shape == (2, 1000)


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ('class = "BertModel"', r"name: no entry"),
        ('name = "x"\nconfig = {a = 1}', r"class: no entry"),
        ('name = "x"\nclass = 3', r"class: expected a string, found 3"),
        (
            'name = "x"\nclass = "BertModel"\nneutral = ["gravity"]',
            r"neutral: 'gravity' is not one of alibi, sinusoidal",
        ),
        (
            'name = "x"\nclass = "BertModel"\nnamed = 1',
            "unknown entry 'named'\n  hint: known: name",
        ),
    ],
)
def test_an_entry_of_another_form_is_refused(tmp_path: Path, entry: str, expected: str) -> None:
    spec = tmp_path / "mine.toml"
    spec.write_text(f'schema = 1\nmodel_types = ["mine"]\n[[proof.models]]\n{entry}\n')
    with pytest.raises(ArchitectureError, match=rf"mine\.toml: proof\.models.*{expected}"):
        registry.tiny_models(str(spec))


def test_hidden_states_are_compared_whatever_their_order() -> None:
    x = torch.randn(2, 3, 4)
    grown = x[..., [3, 1, 0, 2, 0, 1, 2, 3]]
    assert comparison.difference(grown, x, in_order=False) == 0.0
    negated = torch.tensor([1.0, -1.0] * 4)  # A permutation may negate hidden units.
    assert comparison.difference(grown * negated, x, in_order=False, signed=True) == 0.0
    assert comparison.difference(grown * negated, x, in_order=False) > 0.1
    assert comparison.difference(grown + 1, x, in_order=False) > 0.1
    assert comparison.difference(x[..., [3, 1, 0, 2]], x, in_order=True) > 0.1
    for found in (grown, x[..., :3], x[:1]):
        with pytest.raises(PlanError, match="shape"):
            comparison.difference(found, x, in_order=found is grown)


CROSS = """
schema = 1
extends = "gpt2"
model_types = ["gpt2"]
[axes]
cross = "=embed"
[modules]
"{L}crossattention.c_attn" = "conv1d embed -> 2*cross"
"{L}crossattention.q_attn" = "conv1d embed -> cross"
"{L}crossattention.c_proj" = "conv1d cross -> embed"
[proof]
[[proof.models]]
name = "gpt2"
class = "GPT2LMHeadModel"
config = {vocab_size = 97, n_embd = 48, n_head = 6, n_layer = 2, add_cross_attention = true}
"""


def test_axes_that_a_tiny_model_does_not_compute_with_are_told(tmp_path: Path) -> None:
    file = tmp_path / "cross.toml"
    file.write_text(CROSS)
    (model,) = registry.tiny_models(str(file))
    tiny_models.build(model, tmp_path / "source")
    # Nothing is there to attend to.
    assert unseen.axes(model, str(file), tmp_path / "source") == ("cross",)


def test_a_model_whose_widths_all_stay_is_merged_by_nothing(tmp_path: Path) -> None:
    text = CROSS[: CROSS.index("[axes]")] + CROSS[CROSS.index("[proof]") :]
    frozen = "".join(f'{axis} = "frozen"\n' for axis in ("embed", "heads", "mlp"))
    file = tmp_path / "fixed.toml"
    file.write_text(f"{text}\n[axis_kind]\n{frozen}")
    (model,) = registry.tiny_models(str(file))
    report = checks.prove(model, str(file), tmp_path, only=("round trip",))
    assert report.passed, report
