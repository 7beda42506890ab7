"""The commands about architecture specs."""

import json
from importlib import resources
from pathlib import Path

import pytest

from streammap.analysis import architectures_table
from streammap.architectures import registry
from tests.support import typed

SHIPPED = resources.files("streammap") / "architectures" / "specs"


def test_architectures_lists_every_model_type_with_what_is_exact() -> None:
    told = typed.ok("architectures")
    for model_type in registry.model_types():
        assert f"\n{model_type} " in told
    rows = {row.model_type: row for row in architectures_table.listing().rows}
    assert "kv heads" in rows["llama"].exact
    assert rows["llama"].any_size
    assert rows["llama"].silent_layers
    assert rows["llama"].head_size
    assert not rows["bert"].silent_layers
    assert not rows["bert"].any_size
    assert not rows["gpt2"].head_size
    assert "experts" in rows["mixtral"].exact


def test_what_a_caveat_spoils_is_not_listed_as_exact() -> None:
    rows = {row.model_type: row for row in architectures_table.listing().rows}
    assert any("alibi" in caveat for caveat in rows["bloom"].caveats)
    assert rows["bloom"].exact == ()  # Each width needs its heads.


def test_architectures_as_json() -> None:
    found = json.loads(typed.ok("architectures", "--json"))["architectures"]
    assert {row["model_type"] for row in found} == set(registry.model_types())


def test_verify_proves_a_shipped_spec() -> None:
    pytest.importorskip("transformers")
    told = typed.ok("spec", "verify", "gpt2", "--model", "gpt2")
    assert told.startswith("gpt2: passed")
    assert "permutation  ok" in told


def test_verify_tells_what_is_wrong_with_a_spec(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    wrong = tmp_path / "mine.toml"
    text = (SHIPPED / "gpt2.toml").read_text()
    wrong.write_text(text.replace('"conv1d embed -> 2*qk+v"', '"conv1d embed -> heads*3*head_dim"'))
    assert wrong.read_text() != text
    result = typed.run("spec", "verify", wrong, "--model", "gpt2", "--json")
    assert result.exit_code == 1
    (report,) = json.loads(result.stdout)["reports"]
    failed = {check["name"]: check["message"] for check in report["checks"] if not check["passed"]}
    assert "heads" in failed["permutation"]
    assert "1 of 1 models fail: gpt2" in result.stderr


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_verify_fails_where_there_is_nothing_to_verify(
    tmp_path: Path, flags: tuple[str, ...]
) -> None:
    pytest.importorskip("torch")
    spec = tmp_path / "mine.toml"
    spec.write_text('schema = 1\nmodel_types = ["mine"]\nextends = "llama"\n')
    result = typed.run("spec", "verify", spec, *flags)
    assert (result.exit_code, "reports" in result.stdout) == (1, False)
    assert "no model under [proof]" in result.stderr
    result = typed.run("spec", "verify", "gpt2", "--model", "nothing", *flags)
    assert (result.exit_code, "reports" in result.stdout) == (1, False)
    assert "gpt2: no model 'nothing' under [proof]" in result.stderr
    assert typed.run("spec", "verify", *flags).exit_code == 2


def test_infer_writes_a_spec_that_its_own_proof_passes(tmp_path: Path) -> None:
    """From its class alone; shipped specs have no say in it."""
    pytest.importorskip("transformers")
    config = {
        "architectures": ["OpenAIGPTLMHeadModel"],
        "model_type": "openai-gpt",
        "n_embd": 48,
        "n_head": 6,
        "n_layer": 3,
        "n_positions": 32,
        "vocab_size": 97,
    }
    place = tmp_path / "config.json"
    place.write_text(json.dumps(config))
    found = json.loads(typed.ok("spec", "infer", place, "--json"))
    assert all(check["passed"] for report in found["reports"] for check in report["checks"])
    spec = tmp_path / "openai-gpt.toml"
    spec.write_text(found["toml"])
    assert registry.load(str(spec)).model_types == ("openai-gpt",)
    assert registry.load(str(spec), config).caveats == {}
    other = registry.load(str(spec), {**config, "afn": "relu"})
    told = "the spec was tested with afn gelu, config.json has relu"
    assert other.caveats == dict.fromkeys(other.axes, told)


def test_infer_fails_where_its_proof_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from streammap.tools.spec_proof import checks
    from streammap.tools.spec_proof.checks import Check, ProofReport

    place = tmp_path / "config.json"
    sizes = {"n_embd": 48, "n_head": 6, "n_layer": 3, "n_positions": 32, "vocab_size": 97}
    place.write_text(json.dumps({"model_type": "openai-gpt", **sizes}))
    wrong = Check("growth", passed=False, error=0.5, message="heads: 5.0e-01\nmore")
    report = ProofReport("openai-gpt", (wrong,))
    monkeypatch.setattr(checks, "prove", lambda *_, **__: report)
    first = "# FAILED: openai-gpt: growth: heads: 5.0e-01"
    found = typed.run("spec", "infer", place)
    assert found.exit_code == 1
    assert found.stdout.startswith(first)
    assert "schema = 1" in found.stdout
    assert "openai-gpt: FAILED" in found.stderr
    found = typed.run("spec", "infer", place, "--json")
    assert found.exit_code == 1
    assert json.loads(found.stdout)["toml"].startswith(first)
    assert typed.run("spec", "infer", place, "--no-verify").exit_code == 0


def test_infer_runs_no_code_of_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    place = tmp_path / "config.json"
    auto = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    place.write_text(json.dumps({"model_type": "mine", "auto_map": auto}))
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit('this was run')")
    result = typed.run("spec", "infer", place)
    assert result.exit_code == 1
    assert "this was run" not in result.output
    assert "hint" in result.stderr
