"""One module is an operator: command, plan, call, record, apply and verify come from its fields."""

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streammap
from streammap.cli.main import main
from streammap.errors import PlanError
from streammap.operators import registry
from tests.operators.scale import Scale
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=2)
BIAS = "encoder.layer.0.output.dense.bias"


@pytest.fixture(autouse=True)
def scale() -> Iterator[None]:
    registry.register(Scale)
    yield
    registry.unregister(Scale)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "bert", tiny.bert(SIZES), tiny.bert_config(SIZES))


def written(folder: Path) -> dict[str, torch.Tensor]:
    return dict(tiny.written(folder))


def weights(folder: Path) -> dict[str, bytes]:
    """The bytes of all files but the record, which says when it was made."""
    return {name: data for name, data in tiny.tree(folder).items() if name != "streammap.json"}


def test_it_is_a_command(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "guarantee  approximate: scale: scaled" in ok(
        "scale", source, out, "--key", "*.bias", "--by", 0.5
    )
    before, after = tiny.bert(SIZES), written(out)
    torch.testing.assert_close(after[BIAS], 0.5 * before[BIAS], rtol=0, atol=0)
    assert torch.equal(after["pooler.dense.weight"], before["pooler.dense.weight"])
    report = json.loads(ok("scale", source, tmp_path / "b", "--key", "*", "--by", 2, "--json"))
    assert report["promise"] == "approximate"


def test_help_has_its_options_and_examples() -> None:
    text = ok("scale", "--help")
    assert "Multiply some tensors by a number." in text
    assert "--key GLOB" in text
    assert "The factor.  [required]" in text
    assert "streammap scale llama/ scaled/ --key '*.bias' --by 0.5" in text
    assert re.search("scale +Multiply some tensors by a number.", ok("--help"))


def test_it_can_be_planned(source: Path) -> None:
    text = ok("plan", "scale", source, "--key", "*.bias", "--by", 0.5)
    assert "approximate: scale: scaled" in text
    plan = json.loads(ok("plan", "scale", source, "--key", "*", "--by", 2, "--json"))
    assert plan["n_tensors"] == len(tiny.bert(SIZES))
    assert "plan scale llama/" in ok("plan", "scale", "--help")


def test_it_is_a_python_call(source: Path, tmp_path: Path) -> None:
    lazy = streammap.open(source)
    by_name = lazy.scale(key="*.bias", by=0.5)
    by_object = lazy.apply(Scale(key="*.bias", by=0.5))
    expected = 0.5 * tiny.bert(SIZES)[BIAS]
    for scaled in (by_name, by_object):
        assert torch.equal(scaled.read(BIAS), expected)
    streammap.scale(source, tmp_path / "out", key="*.bias", by=0.5, fsync=False)  # type: ignore[attr-defined]
    assert torch.equal(written(tmp_path / "out")[BIAS], expected)
    parameters = inspect.signature(streammap.scale).parameters  # type: ignore[attr-defined]
    assert {"source", "output", "key", "by", "max_shard_size", "memory"} <= set(parameters)


def test_it_is_recorded_applied_and_verified(source: Path, tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    ok("scale", source, out, "--key", "*.bias", "--by", 0.5)
    request = json.loads((out / "streammap.json").read_text())["request"]
    assert request["operator"] == "scale"
    assert (request["key"], request["by"]) == ("*.bias", 0.5)
    assert request["source"]["operator"] == "open"
    ok("apply", out, again)
    assert weights(out) == weights(again)
    assert "verdict" in ok("verify", out, "--recompute", 20)


def test_a_changed_tensor_is_found_by_recomputing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ok("scale", source, out, "--key", "*", "--by", 0.5, "--no-fsync")
    other = streammap.open_request(out).plan
    assert other.steps[-1].options == {"key": "*", "by": 0.5}
    record = json.loads((out / "streammap.json").read_text())
    record["request"]["by"] = 0.25
    (out / "streammap.json").write_text(json.dumps(record))
    assert run("verify", out, "--recompute", 20).exit_code == 1


def test_it_chains_with_others(source: Path, tmp_path: Path) -> None:
    lazy = streammap.open(source).coalesce(width=2).scale(key="*.bias", by=0.5)
    lazy.save(tmp_path / "chain", fsync=False)
    ok("apply", tmp_path / "chain", tmp_path / "again", "--no-fsync")
    assert weights(tmp_path / "chain") == weights(tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "*"}, "scale: by is missing"),
        ({"key": "*", "by": "2"}, "by is '2', expected a number"),
        ({"key": "*", "by": True}, "by is True, expected a number"),
        ({"key": 3, "by": 1.0}, "key is 3, expected text"),
        ({"key": "*", "by": 1.0, "bye": 1}, "unknown option 'bye'"),
        ({"key": "nothing", "by": 1.0}, "no key matches 'nothing'"),
    ],
)
def test_bad_options_are_refused(source: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        streammap.open(source).scale(**options)
    request = {"operator": "scale", "source": {"operator": "open", "path": str(source)}, **options}
    with pytest.raises(PlanError, match=message):
        streammap.open_request(request)


def test_wrong_usage_exits_with_2(source: Path, tmp_path: Path) -> None:
    assert run("scale", source, tmp_path / "out", "--key", "*").exit_code == 2
    assert run("scale", source, tmp_path / "out", "--key", "*", "--by", "x").exit_code == 2


def test_an_unknown_operator_is_no_command_and_no_call(source: Path) -> None:
    registry.unregister(Scale)
    assert run("scale", source, "out").exit_code == 2
    with pytest.raises(AttributeError, match="no attribute 'scale'"):
        _ = streammap.open(source).scale
    with pytest.raises(PlanError, match="operator 'scale'"):
        streammap.open_request(
            {"operator": "scale", "source": {"operator": "open", "path": str(source)}}
        )


def test_a_name_is_taken_once() -> None:
    class Coalesce(Scale):
        """Not the one that is known."""

    with pytest.raises(ValueError, match="'coalesce' is known already"):
        registry.register(Coalesce)


def test_each_operator_has_its_line_and_its_name() -> None:
    for name, line in registry.commands().items():
        cls = registry.load(name)
        assert cls.name == name
        assert cls.examples, name
        assert all(example.startswith(f"{name} ") for example in cls.examples)
        assert 20 <= len(line) <= 60, line
    assert main.name == "main"
