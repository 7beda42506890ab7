"""Another config.json beside the same weights: whole, of the same sizes, and told."""

import json
from pathlib import Path

import pytest

import streammap
from streammap.errors import PlanError
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=2)
CONFIG = tiny.bert_config(SIZES)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), CONFIG)


def configured(big: Path, config: dict[str, object]) -> streammap.LazyCheckpoint:
    opened = {"operator": "open", "path": str(big)}
    return streammap.open_request({"operator": "configure", "config": config, "source": opened})


def test_a_part_of_a_config_is_refused(big: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as error:
        configured(big, {"dtype": "bfloat16"})
    assert "config has dtype and no model_type: it replaces the whole" in str(error.value)
    opened = {"operator": "open", "path": str(big)}
    call = {"operator": "configure", "config": {"dtype": "bfloat16"}, "source": opened}
    request = tiny.file(tmp_path / "r.json", json.dumps(call))
    assert run("apply", request, tmp_path / "out").exit_code == 1
    assert not (tmp_path / "out").exists()


def test_a_config_of_other_sizes_is_refused(big: Path) -> None:
    with pytest.raises(PlanError, match=r"config does not fit the weights: .*layer"):
        configured(big, {**CONFIG, "num_hidden_layers": 3})


def test_what_a_field_changes_is_promised_and_told(big: Path, tmp_path: Path) -> None:
    lazy = configured(big, {**CONFIG, "hidden_act": "relu"})
    assert lazy.promise[0] == "bit-exact"  # what a loader fills in by itself is not known
    config = {**CONFIG, "hidden_act": "gelu"}
    other = tiny.write(tmp_path / "other", tiny.bert(SIZES), config)
    promise, reason = configured(other, {**config, "hidden_act": "relu"}).promise
    assert promise == "approximate"
    assert reason == "configure: config.json says hidden_act relu instead of gelu"
    same = configured(other, {**config, "architectures": ["BertForMaskedLM"]})
    assert (same.promise[0], same.plan.steps) == ("bit-exact", ())


def test_a_dtype_that_the_tensors_do_not_have_is_told(big: Path, tmp_path: Path) -> None:
    lazy = configured(big, {**CONFIG, "dtype": "bfloat16"})
    told = "config.json says bfloat16, the tensors are F32: loaders cast them"
    assert lazy.plan.notes == (told,)
    assert lazy.promise[0] == "bit-exact"
    lazy.save(tmp_path / "out")
    assert streammap.verify(tmp_path / "out", recompute=5).ok


def test_verify_sees_a_config_that_lost_its_model_type(big: Path, tmp_path: Path) -> None:
    ok("coalesce", big, tmp_path / "small", "--width", 2)
    (tmp_path / "small" / "config.json").write_text('{"dtype": "bfloat16"}')
    found = run("verify", tmp_path / "small")
    assert found.exit_code == 1
    assert "error    config.json: config.json has no model_type" in found.stdout
