"""Operators with several inputs: by place, by name, many at once, and in records."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streammap
from streammap.errors import PlanError
from streammap.operators import calls, registry, request_json
from tests.operators.mean import MeanOf
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=1)
KEY = "pooler.dense.weight"


@pytest.fixture(autouse=True)
def mean() -> Iterator[None]:
    registry.register(MeanOf)
    yield
    registry.unregister(MeanOf)


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    config = tiny.bert_config(SIZES)
    return [tiny.write(tmp_path / f"m{i}", tiny.bert(SIZES, seed=i), config) for i in range(3)]


def tensors() -> list[torch.Tensor]:
    return [tiny.bert(SIZES, seed=i)[KEY].double() for i in range(3)]


def test_many_inputs_by_command_and_by_call(three: list[Path], tmp_path: Path) -> None:
    expected = (sum(tensors()) / 3).float()  # type: ignore[union-attr]
    ok("mean-of", *three, "--output", tmp_path / "out", "--no-fsync")
    torch.testing.assert_close(tiny.written(tmp_path / "out")[KEY], expected)
    first, *others = [streammap.open(path) for path in three]
    torch.testing.assert_close(first.mean_of(others).read(KEY), expected)
    torch.testing.assert_close(first.mean_of(others=[*three[1:]]).read(KEY), expected)
    torch.testing.assert_close(first.mean_of(*others).read(KEY), expected)
    mean = streammap.mean_of  # type: ignore[attr-defined]
    torch.testing.assert_close(mean(first, *others).read(KEY), expected)
    mean(*three, output=tmp_path / "call", fsync=False)
    torch.testing.assert_close(tiny.written(tmp_path / "call")[KEY], expected)


def test_no_input_is_taken_for_the_output(three: list[Path]) -> None:
    before = tiny.tree(three[2])
    assert isinstance(streammap.mean_of(*three), streammap.LazyCheckpoint)  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="options of a result, and no output"):
        streammap.mean_of(*three, fsync=False)  # type: ignore[attr-defined]
    assert run("mean-of", *three).exit_code == 2  # no OUT is given
    plan = json.loads(ok("plan", "mean-of", *three, "--json"))
    assert plan["nbytes_read"] == 3 * sum(t.nbytes for t in tiny.bert(SIZES).values())
    assert tiny.tree(three[2]) == before


def test_an_optional_input_has_a_flag(three: list[Path], tmp_path: Path) -> None:
    one, _, three_ = tensors()
    ok("mean-of", three[0], "--less", three[2], "--output", tmp_path / "out", "--no-fsync")
    torch.testing.assert_close(tiny.written(tmp_path / "out")[KEY], (one - three_).float())


def test_records_hold_all_inputs(three: list[Path], tmp_path: Path) -> None:
    out, again = tmp_path / "out", tmp_path / "again"
    ok("mean-of", *three, "--less", three[0], "--output", out, "--no-fsync")
    request = json.loads((out / "streammap.json").read_text())["request"]
    assert [one["path"] for one in request["others"]] == [str(path) for path in three[1:]]
    assert request["less"]["operator"] == "open"
    ok("apply", out, again, "--no-fsync")
    tiny.assert_same(tiny.written(again), tiny.written(out))
    assert "verdict" in ok("verify", out, "--recompute", 10)


def test_a_source_that_is_used_twice_is_opened_once(three: list[Path]) -> None:
    big = streammap.open(three[0])
    lazy = big.mean_of([big, big])
    request = lazy.plan.request
    assert request is not None
    content = request_json.as_json(request)
    assert content is not None
    parsed = request_json.parse(json.loads(json.dumps(content)))
    assert len(list(parsed.opens())) == 1
    assert len(calls.build(parsed).sources) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"others": {"operator": "open", "path": "x"}}, "others: expected a list"),
        ({"others": [3]}, r"others\[0\]: expected an object"),
        ({"target": {"operator": "open", "path": "x"}}, "mean-of has a target"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    request: dict[str, object] = {
        "operator": "mean-of",
        "source": {"operator": "open", "path": "x"},
        "others": [],
    }
    with pytest.raises(PlanError, match=message):
        streammap.open_request(request | change)


def test_what_is_no_checkpoint_is_refused(three: list[Path]) -> None:
    with pytest.raises(PlanError, match="others is 3, expected a checkpoint"):
        streammap.open(three[0]).mean_of([3])
