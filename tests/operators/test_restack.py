"""Restack, and slices in coalesce and decoalesce, against stacks of tensors made by hand."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import streammap
from streammap.errors import PlanError, SchemeError
from tests.support import tiny
from tests.support.tiny import State
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=8, vocab=5)
WRITERS = re.compile(r"h\.\d+\.(attn|mlp)\.c_proj\.")
QUICK = ("--no-fsync", "--class-check", "never")
PRO = [0, 1, 2, 3, 3, 4, 5, 6, 7, 7]
SOLAR = [*range(6), *range(2, 8)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "gpt2", tiny.gpt2(SIZES), tiny.gpt2_config(SIZES))


def stacked(state: State, layers: Sequence[int], *, zero: Sequence[int] = ()) -> State:
    """The layers by hand, of those in `zero` the writers to the residual stream 0."""
    made = {key: x for key, x in state.items() if not key.startswith("h.")}
    for i, j in enumerate(layers):
        for key, x in state.items():
            if key.startswith(f"h.{j}."):
                here = f"h.{i}.{key.split('.', 2)[2]}"
                silent = i in zero and WRITERS.match(here) is not None
                made[here] = torch.zeros_like(x) if silent else x
    return made


WAYS: Mapping[str, tuple[tuple[str, ...], dict[str, Any], list[int], Sequence[int], str]] = {
    "slices": (("--layers", "0:6,2:8"), {"layers": "0:6,2:8"}, SOLAR, (), "copied layers are run"),
    "solar": (("--layers", "solar"), {"layers": "solar"}, SOLAR, (), "copied layers are run"),
    "solar zero": (
        ("--layers", "solar", "--trim", "2", "--new-layers", "zero"),
        {"layers": "solar", "trim": 2, "new_layers": "zero"},
        SOLAR,
        range(6, 10),
        "new layers are zero-initialised (identity)",
    ),
    "llama-pro": (
        ("--layers", "llama-pro"),
        {"layers": "llama-pro", "expand_every": 4},
        PRO,
        (4, 9),
        "new layers are zero-initialised (identity)",
    ),
    "llama-pro copied": (
        ("--layers", "llama-pro", "--new-layers", "copy"),
        {"layers": {"recipe": "llama-pro"}, "new_layers": "copy"},
        PRO,
        (),
        "copied layers are run twice",
    ),
    "drop": (
        ("--drop-layers", "5,1,-1"),
        {"drop_layers": [1, 5, 7]},
        [0, 2, 3, 4, 6],
        (),
        "3 of 8 layers are dropped",
    ),
    "keep": (("--keep-layers", "::3"), {"keep_layers": "0,3,6"}, [0, 3, 6], (), "5 of 8 layers"),
    "both": (
        ("--layers", "4:,0:2,4:"),
        {"layers": [slice(4, None), 0, 1, slice(4, 8)]},
        [4, 5, 6, 7, 0, 1, 4, 5, 6, 7],
        (),
        "2 of 8 layers are dropped; copied layers are run twice",
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_layers_are_those_of_a_stack_made_by_hand(way: str, source: Path, tmp_path: Path) -> None:
    typed, options, layers, zero, reason = WAYS[way]
    expected = stacked(tiny.gpt2(SIZES), layers, zero=zero)
    lazy = streammap.open(source).restack(**options)
    assert reason in lazy.promise[1]
    assert lazy.promise[0] == ("bit-exact" if zero else "approximate")
    lazy.save(tmp_path / "python", fsync=False, class_check="never")
    assert "merged" not in ok("plan", "restack", source, *typed)
    ok("restack", source, tmp_path / "cli", *typed, *QUICK)
    for folder in ("python", "cli"):
        tiny.assert_same(tiny.written(tmp_path / folder), expected)
        assert json.loads((tmp_path / folder / "config.json").read_text())["n_layer"] == len(layers)
    ok("verify", tmp_path / "cli", "--recompute", "10", "--no-class-check")
    ok("apply", tmp_path / "python", tmp_path / "again", *QUICK)
    assert tiny.tree(tmp_path / "again") == tiny.tree(tmp_path / "python")


@pytest.mark.parametrize("zero", [False, True])
def test_coalesce_leads_back_by_the_saved_map(zero: bool, source: Path) -> None:
    grown = streammap.open(source).restack(layers="solar", new_layers="zero" if zero else "copy")
    back = grown.coalesce()
    assert "the map saved with the source is used" in back.plan.notes
    for key, x in tiny.gpt2(SIZES).items():
        torch.testing.assert_close(back.read(key), x)


def test_decoalesce_and_coalesce_take_the_same_requests(source: Path, tmp_path: Path) -> None:
    state, lazy = tiny.gpt2(SIZES), streammap.open(source)
    scheme = tiny.file(tmp_path / "pro.json", '{"layers": {"recipe": "llama-pro"}}')
    pro = stacked(state, PRO, zero=(4, 9))
    for made in (
        lazy.decoalesce(layers="llama-pro"),
        lazy.decoalesce(scheme=scheme),
        lazy.decoalesce(axes={"layer": "llama-pro"}),
    ):
        assert made.promise[0] == "bit-exact"
        tiny.assert_same({key: made.read(key) for key in made.plan.targets}, pro)
    ok("decoalesce", source, tmp_path / "solar", "--layers", "0:6,2:8", *QUICK)
    tiny.assert_same(tiny.written(tmp_path / "solar"), stacked(state, SOLAR))
    ok("apply", tmp_path / "solar", tmp_path / "again", *QUICK)
    assert tiny.tree(tmp_path / "again") == tiny.tree(tmp_path / "solar")
    before = lazy.restack(layers="4:8,0:8", new_layers="zero")
    assert before.promise[0] == "bit-exact"
    assert "layers 0 to 3 (of 4 to 7) of 12: zero-initialised copies" in before.plan.notes
    kept = lazy.coalesce(layers={"drop": "1:8:2"}, heads="1:2")
    by_hand = lazy.coalesce(layers=[[0], [2], [4], [6]], heads=[[1]])
    tiny.assert_same(
        {key: kept.read(key) for key in kept.plan.targets},
        {key: by_hand.read(key) for key in by_hand.plan.targets},
    )


def test_a_plan_says_what_becomes_of_layers(source: Path) -> None:
    deep = ok("plan", "restack", source, "--layers", "solar")
    assert "layers 6 to 9 (of 2 to 5) of 12: copies" in deep
    assert "--new-layers zero makes added layers zero-initialised" in deep
    pro = ok("plan", "restack", source, "--layers", "llama-pro")
    assert "layers 4 (of 3), 9 (of 7) of 10: zero-initialised copies" in pro
    assert "copied; 2 of 10 zero-initialised" in pro
    pruned = ok("plan", "restack", source, "--drop-layers", "5,1,-1")
    assert "layers 1, 5, 7 of 8: dropped" in pruned
    assert "--new-layers" not in pruned
    assert "--new-layers zero makes" in ok("plan", "decoalesce", source, "--layers", "2")


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "nothing says which layers there are"),
    ({"layers": "solar", "drop_layers": "1"}, "--layers and --drop-layers"),
    ({"layers": ":"}, "all layers stay where they are"),
    ({"drop_layers": "8"}, "layer 8: the source has 8 layers"),
    ({"layers": "0:4", "trim": 2}, "is no recipe, and trim is a parameter of one"),
    ({"layers": "midas", "trim": 2}, "midas has no parameter 'trim'"),
    ({"drop_layers": "1", "new_layers": "zero"}, "no layers are added"),
    ({"layers": "4:8,0:4,0:2", "new_layers": "zero"}, "not in their old order"),
    ({"layers": "solar", "stack": "encoder"}, "has no stack 'encoder'"),
    ({"layers": {"decoder": "solar"}, "stack": "layer"}, "names stacks itself"),
    ({"layers": 'solar"'}, "is neither a layer nor a slice"),
    ({"layers": "[0, 1"}, "not JSON"),
)


@pytest.mark.parametrize(("options", "match"), REFUSED, ids=lambda x: str(x)[:50])
def test_what_is_refused_says_why_and_what_to_do(
    options: dict[str, Any], match: str, source: Path
) -> None:
    with pytest.raises((PlanError, SchemeError), match=match) as refusal:
        streammap.open(source).restack(**options)
    assert refusal.value.hint


def test_coalesce_repeats_nothing_and_decoalesce_drops_nothing(source: Path) -> None:
    lazy = streammap.open(source)
    with pytest.raises(SchemeError, match="layers 2, 3 of 8 would be repeated, but coalesce"):
        lazy.coalesce(layers="0:4,2:4")
    with pytest.raises(SchemeError, match="layers 4 of 8 would be left out, but decoalesce"):
        lazy.decoalesce(layers="0:4,0:4,5:8")
    with pytest.raises(SchemeError, match="solar is a recipe for layers, not for MLP neurons"):
        lazy.decoalesce(mlp="solar")
    with pytest.raises(SchemeError, match="no slices of all widths"):
        lazy.coalesce(scheme={"width": "0:1"})


def test_what_is_wrong_usage_is_told_before_anything_is_opened(tmp_path: Path) -> None:
    result = run("restack", tmp_path / "nowhere", tmp_path / "out", "--layers", "0:x")
    assert result.exit_code == 2
    assert "neither a layer nor a slice" in result.output
    assert not (tmp_path / "out").exists()
