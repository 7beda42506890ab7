"""What a plan says of each tensor: which sources it is made of, and what stays as it was."""

import json
from pathlib import Path

import pytest
import torch

import streammap
from streammap.analysis.summary import PlanRow
from tests.support import tiny
from tests.support.typed import ok

SIZES = tiny.Sizes(heads=2, layers=1)
WEIGHT = "pooler.dense.weight"
BUFFER = "embeddings.position_ids"


def write(folder: Path, seed: int) -> Path:
    state = tiny.bert(SIZES, seed=seed) | {BUFFER: torch.arange(8).reshape(1, 8)}
    return tiny.write(folder, state, tiny.bert_config(SIZES))


def rows(lazy: streammap.LazyCheckpoint) -> dict[str, PlanRow]:
    return {row.pattern: row for row in lazy.summary().rows}


@pytest.mark.parametrize(
    ("one", "other", "formula"),
    [
        ("a", "b", "0.75 * b + 0.25 * a"),
        ("x/ck", "y/ck", "0.75 * y/ck + 0.25 * x/ck"),
        ("x/1/ck", "y/1/ck", "0.75 * y/1/ck + 0.25 * x/1/ck"),
    ],
)
def test_two_sources_are_named_apart(tmp_path: Path, one: str, other: str, formula: str) -> None:
    source, target = write(tmp_path / one, 0), write(tmp_path / other, 1)
    blend = streammap.open(source).interpolate(target, alpha=0.25)
    assert rows(blend)[WEIGHT].formula == formula
    plan = json.loads(ok("plan", "interpolate", source, target, "--alpha", 0.25, "--json"))
    assert formula in {row["formula"] for row in plan["rows"]}


def test_one_folder_opened_twice_is_told_apart_by_number(tmp_path: Path) -> None:
    folder = write(tmp_path / "ck", 0)
    blend = streammap.open(folder).interpolate(folder, alpha=0.25)
    assert rows(blend)[WEIGHT].formula == "0.75 * ck (2) + 0.25 * ck (1)"


def test_what_a_blend_copies_is_bit_exact(tmp_path: Path) -> None:
    blend = streammap.open(write(tmp_path / "a", 0)).interpolate(
        write(tmp_path / "b", 1), alpha=0.5
    )
    by_pattern = rows(blend)
    assert (by_pattern[BUFFER].promise, by_pattern[BUFFER].formula) == ("bit-exact", "copied")
    assert by_pattern[WEIGHT].promise == "approximate"
    assert blend.promise[0] == "approximate"


def test_a_copied_layer_is_still_as_approximate_as_its_axis(tmp_path: Path) -> None:
    deep = streammap.open(write(tmp_path / "a", 0)).decoalesce(depth=2)
    assert rows(deep)["encoder.layer.*.output.dense.weight"].promise == "approximate"
    assert rows(deep)[WEIGHT].promise == "bit-exact"
