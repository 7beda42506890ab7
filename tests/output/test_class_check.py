"""A result that its class in transformers or timm would not load is refused before writing."""

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammap
from streammap import LazyCheckpoint, PlanError
from streammap.analysis import verification
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.output.loading import class_check, class_trial
from streammap.output.save_options import ClassCheck
from streammap.tools.spec_proof import tiny_models

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 31,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
FORGETFUL = """
schema = 1
extends = "llama"
model_types = ["llama"]

# Read from the tensors, so that nothing is written: config.json goes on saying the old size.
[axes]
mlp = "=shape(model.layers.0.mlp.up_proj.weight, 0)"
"""
KEY = "model.layers.0.mlp.down_proj.weight"
TOLD = r"shape \[16, 48\], LlamaForCausalLM of its config\.json has \[16, 24\]"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    model = TinyModel("llama", "LlamaForCausalLM", LLAMA)
    tiny_models.build(model, tmp_path / "llama")
    (tmp_path / "forgetful.toml").write_text(FORGETFUL)
    return tmp_path / "llama"


def forgotten(llama: Path) -> LazyCheckpoint:
    """A plan whose config.json lacks the new size."""
    arch = str(llama.parent / "forgetful.toml")
    return streammap.open(llama, arch=arch).decoalesce(axes={"mlp": 2})


def test_a_result_of_other_shapes_than_its_class_is_refused(llama: Path) -> None:
    with pytest.raises(PlanError, match=rf"{KEY}: {TOLD} \(6 such.*\n.*--class-check never"):
        forgotten(llama).save(llama.parent / "out")
    assert not (llama.parent / "out").exists()
    forgotten(llama).save(llama.parent / "out", class_check="never")
    assert (llama.parent / "out").is_dir()


def run(*arguments: object, code: int) -> str:
    command = [sys.executable, "-m", "streammap", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_a_spec_of_ones_own_is_held_against_the_class_by_another_process(llama: Path) -> None:
    out = llama.parent / "out"
    arch = ("--arch", llama.parent / "forgetful.toml")
    told = run("decoalesce", llama, out, "--axis", "mlp=2", *arch, code=1)
    assert f"error: {KEY}: shape [16, 48], LlamaForCausalLM of its config.json has" in told
    assert not out.exists()


def test_a_small_result_of_a_shipped_spec_does_not_wait_for_transformers(llama: Path) -> None:
    code = (
        "import sys, streammap; from streammap.output.loading import class_check\n"
        "class_check._ask_apart = None  # nobody may call it\n"
        f"streammap.open({str(llama)!r}).decoalesce(width=2).save({str(llama.parent / 'o')!r})\n"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_other_threads_ask_the_class_by_another_process(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers replaces functions of its own meanwhile: of two threads one may put back
    what the other has put there.
    """
    asked: list[str] = []
    compare = class_trial.compare

    def listed(source: class_trial.Given | None, result: class_trial.Given) -> object:
        asked.append(threading.current_thread().name)
        return compare(source, result)

    monkeypatch.setattr(class_trial, "compare", listed)
    tie = transformers.PreTrainedModel.tie_weights

    def save(i: int) -> None:
        streammap.open(llama).decoalesce(width=2).save(llama.parent / f"out{i}", fsync=False)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(8)))
        told = pool.submit(forgotten(llama).save, llama.parent / "wrong")
        with pytest.raises(PlanError, match=TOLD):
            told.result()
    assert asked == []
    save(8)
    assert asked == [threading.main_thread().name]
    assert transformers.PreTrainedModel.tie_weights is tie


GOOD = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


def test_a_config_that_its_class_refuses_is_refused(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {**LLAMA, "model_type": "llama", "hidden_size": 66}  # no multiple of 4 heads
    source, refused = (
        (config, {key: slot.shape for key, slot in streammap.open(llama).plan.specs.items()})
        for config in ({**LLAMA, "model_type": "llama"}, bad)
    )
    verdict = class_check.ask(source, refused)
    assert verdict is not None
    assert "hidden size" in verdict.refusal
    assert "transformers would refuse the result" in class_check.told(verdict, "transformers")
    assert class_check.ask(refused, refused) is None  # the source is refused as well


def test_what_the_source_has_wrong_is_no_fault_of_the_result(llama: Path) -> None:
    state = load_file(llama / "model.safetensors")
    del state["lm_head.weight"]
    config = json.loads((llama / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]  # its head is missing
    (llama / "config.json").write_text(json.dumps(config))
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, llama / "model.safetensors", metadata={"format": "pt"})
    streammap.open(llama).decoalesce(width=2, depth=2).save(llama.parent / "out")
    report = verification.verify(llama.parent / "out")
    assert report.ok
    assert "class" in report.checks


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"model_type": "nothing_known"}, "transformers has none for 'nothing_known'"),
        ({"auto_map": {"AutoModel": "code.Model"}}, "it brings its own code"),
    ],
)
def test_without_a_class_to_ask_nothing_is_refused(
    llama: Path, change: dict[str, object], why: str
) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, **change}))
    forgotten(llama).save(llama.parent / "out")
    with pytest.raises(PlanError, match=f"no class to ask: {why}.*\n.*--class-check auto"):
        forgotten(llama).save(llama.parent / "again", class_check="always")
    report = verification.verify(llama.parent / "out")
    assert "class" not in report.checks
    assert any(why in skipped for skipped in report.skipped)


def test_a_library_that_is_not_installed_is_told(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(class_trial, "is_installed", lambda library: False)
    forgotten(llama).save(llama.parent / "out")
    report = verification.verify(llama.parent / "out")
    assert "class: transformers is not installed" in report.skipped
    assert report.ok


def test_verify_asks_the_class_too(llama: Path) -> None:
    out = llama.parent / "out"
    forgotten(llama).save(out, class_check="never")
    report = verification.verify(out)
    found = {finding.key: finding for finding in report.findings if finding.check == "class"}
    assert len(found) == 6
    assert (found[KEY].found, found[KEY].expected) == ((16, 48), (16, 24))
    assert found[KEY].file == "model.safetensors"
    assert "class" in report.checks
    assert "class" not in verification.verify(out, class_check=False).checks


def test_verify_needs_no_source_to_ask_the_class(llama: Path) -> None:
    out = llama.parent / "out"
    streammap.open(llama).decoalesce(width=2).save(out)
    (out / "streammap.json").unlink()
    assert verification.verify(out).ok
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert verification.verify(out).ok
    state = load_file(out / "model.safetensors")
    save_file({**state, "more": torch.ones(1)}, out / "model.safetensors", {"format": "pt"})


def test_a_blend_may_hold_what_its_class_leaves_out(llama: Path) -> None:
    other = llama.parent / "other"
    other.mkdir()
    (other / "config.json").write_bytes((llama / "config.json").read_bytes())
    state = load_file(llama / "model.safetensors")
    state.pop("lm_head.weight")
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((llama / "config.json").read_text())
    (other / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaModel"], "tie_word_embeddings": False})
    )
    out = llama.parent / "out"
    streammap.open(llama).interpolate(other, alpha=0.5).save(out)
    assert verification.verify(out).ok


@pytest.mark.parametrize("when", ["auto", "always"])
def test_an_unchanged_checkpoint_is_asked_about_only_on_request(
    llama: Path, when: ClassCheck
) -> None:
    (llama / "config.json").write_text(json.dumps({**LLAMA, "model_type": "llama", "x": 1}))
    state = load_file(llama / "model.safetensors")
    lazy = streammap.open(llama)
    lazy.save(llama.parent / "same", class_check=when)
    assert load_file(llama.parent / "same" / "model.safetensors").keys() == state.keys()


def models() -> Iterator[object]:
    from tests.tools.test_proof import QUICK

    for arch in registry.names():
        for model in registry.tiny_models(arch):
            marks = () if model.name in QUICK else (pytest.mark.slow,)
            if not model.class_name.startswith("timm:"):
                yield pytest.param(arch, model, id=model.name, marks=marks)


@pytest.mark.parametrize(("arch", "model"), list(models()))
def test_the_class_is_content_with_good_results_and_with_no_others(
    tmp_path: Path, arch: str, model: TinyModel
) -> None:
    tiny_models.build(model, tmp_path)
    plan = streammap.open(tmp_path, arch=arch).decoalesce(width=2).plan
    assert plan.config is not None
    source = class_check.source_of(plan)
    config, shapes = class_check.given(plan.config, plan.specs)
    verdict = class_check.ask(source, (config, shapes))
    assert verdict is not None
    assert verdict.ok, class_check.told(verdict, "transformers")
    wrong = next(key for key in shapes if key.endswith("weight") and len(shapes[key]) == 2)
    for change in ({wrong: (shapes[wrong][0] + 1, *shapes[wrong][1:])}, {wrong: None}):
        others = {k: shape for k, shape in {**shapes, **change}.items() if shape is not None}
        verdict = class_check.ask(source, (config, others))
        assert verdict is not None
        assert not verdict.ok, (wrong, change)
