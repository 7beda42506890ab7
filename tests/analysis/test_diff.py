"""Differences against those of whole tensors; what has no number; the command and its picture."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streammap
from streammap.analysis import heatmap
from streammap.analysis.difference import TensorDifference
from tests.engine.test_memory import MIB, write_gpt2
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=4, layers=4)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def differences(folder: Path, a: dict[str, Tensor], b: dict[str, Tensor]) -> streammap.Difference:
    save_file(a, folder / "a.safetensors")
    save_file(b, folder / "b.safetensors")
    return streammap.diff(folder / "a.safetensors", folder / "b.safetensors")


def one(folder: Path, a: Tensor, b: Tensor) -> TensorDifference:
    (found,) = differences(folder, {"x": a}, {"x": b}).tensors
    return found


@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_figures_are_those_of_whole_tensors(
    dtype: torch.dtype, other: torch.dtype, tmp_path: Path
) -> None:
    a = torch.randn(1500, 1000).to(dtype)
    b = a.double().clone()
    b[3:700] += 0.01 * torch.randn(697, 1000)
    b = b.to(other)
    found = one(tmp_path, a, b)
    gap = a.double() - b.double()
    assert found.max == gap.abs().max().item()
    assert found.mean == pytest.approx(gap.abs().mean().item(), rel=1e-9)
    assert found.relative == pytest.approx((gap.norm() / a.double().norm()).item(), rel=1e-9)
    assert found.n_different == int(torch.count_nonzero(gap))
    assert not found.is_equal


def test_equal_is_bit_by_bit(tmp_path: Path) -> None:
    x = torch.tensor([1.0, math.nan, math.inf, 0.0])
    assert one(tmp_path, x, x.clone()).is_equal
    assert one(tmp_path, x, x.clone()).relative == 0.0
    minus = x.clone()
    minus[3] = -0.0
    found = one(tmp_path, x, minus)
    assert (found.is_equal, found.n_different, found.relative) == (False, 0, 0.0)
    found = one(tmp_path, x, x.double())
    assert (found.is_equal, found.n_different, found.n_odd) == (False, 0, 0)


def test_what_is_no_number_is_counted_and_left_out(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    a = torch.tensor([nan, nan, 1.0, inf, inf, inf, 3.0, 4.0])
    b = torch.tensor([nan, 2.0, nan, inf, -inf, 5.0, 3.0, 4.5])
    other_nan = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    found = one(tmp_path, torch.cat([a, other_nan]), torch.cat([b, b[:1]]))
    assert found.n_odd == 5
    assert found.n_different == 6
    assert (found.max, found.mean) == (0.5, 0.25)
    assert found.relative == 0.5 / 5.0
    found = one(tmp_path, a[:1], b[1:2])
    assert (found.max, found.mean, found.relative) == (None, None, None)


def test_only_one_shapes_dtypes_and_order(tmp_path: Path) -> None:
    a = {
        "same": torch.ones(3),
        "near": torch.ones(4),
        "far": torch.ones(4),
        "from zero": torch.zeros(2),
        "mine": torch.ones(1),
        "shape": torch.ones(2, 3),
        "words": torch.arange(5),
        "kind": torch.arange(4),
        "nothing": torch.ones(0),
    }
    b = {
        "same": torch.ones(3),
        "near": torch.full((4,), 1.001),
        "far": torch.full((4,), 3.0),
        "from zero": torch.ones(2),
        "yours": torch.ones(1),
        "shape": torch.ones(3, 2),
        "words": torch.tensor([0, 1, 2, 3, 5]),
        "kind": torch.arange(4.0),
        "nothing": torch.ones(0),
    }
    found = differences(tmp_path, a, b)
    assert not found.is_equal
    assert found.only == (("mine",), ("yours",))
    assert found.shapes == {"shape": ((2, 3), (3, 2))}
    assert [t.key for t in found.tensors[:3]] == ["from zero", "far", "near"]
    by_key = {t.key: t for t in found.tensors}
    assert {key for key, t in by_key.items() if t.is_equal} == {"same", "nothing"}
    assert by_key["from zero"].relative == math.inf
    assert (by_key["words"].n_different, by_key["words"].relative) == (1, None)
    assert by_key["kind"].relative is None
    content = json.loads(json.dumps(found.as_json(), allow_nan=False))
    assert content["tensors"][0]["relative"] == "inf"
    assert (content["n_equal"], content["only_b"]) == (2, ["yours"])


def test_plans_are_compared_as_their_results_are(tmp_path: Path) -> None:
    big = tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    lazy = streammap.open(big)
    grown = lazy.coalesce(width=2, depth=2).decoalesce()
    blended = grown.interpolate(lazy, alpha=0.5)
    grown.save(tmp_path / "grown")
    blended.save(tmp_path / "blended")
    pairs = ((grown, blended), (lazy, blended), (blended, lazy), (grown, lazy))
    names = {id(lazy): "big", id(grown): "grown", id(blended): "blended"}
    for a, b in pairs:
        planned = streammap.diff(a, b, threads=2)
        whole = streammap.diff(tmp_path / names[id(a)], tmp_path / names[id(b)])
        expected = {t.key: t for t in whole.tensors}
        assert not planned.is_equal
        for found in planned.tensors:
            other = expected[found.key]
            assert (found.is_equal, found.n_different) == (other.is_equal, other.n_different)
            assert (found.max, found.relative) == pytest.approx((other.max, other.relative))
    assert streammap.diff(blended, tmp_path / "blended").is_equal
    assert streammap.diff(tmp_path / "blended", blended).is_equal


def test_large_tensors_of_plans_are_cut_alike(tmp_path: Path) -> None:
    """Copies of rows are one job with several places; each is compared where it is."""
    sizes = tiny.Sizes(heads=8, layers=1, head_dim=64, vocab=3000)
    big = tiny.write(tmp_path / "big", tiny.gpt2(sizes), tiny.gpt2_config(sizes))
    lazy = streammap.open(big).decoalesce(width=2)
    lazy.save(tmp_path / "out")
    large = tiny.Sizes(heads=16, layers=1, head_dim=64, vocab=3000)
    tiny.write(tmp_path / "other", tiny.gpt2(large, seed=1), tiny.gpt2_config(large))
    blended = lazy.interpolate(tmp_path / "other", alpha=0.5)
    blended.save(tmp_path / "blended")
    expected = streammap.diff(tmp_path / "out", tmp_path / "blended").tensors
    for found, other in zip(streammap.diff(lazy, blended).tensors, expected, strict=True):
        assert (found.key, found.n_different) == (other.key, other.n_different)
        assert (found.max, found.relative) == pytest.approx((other.max, other.relative))
    assert streammap.diff(lazy, tmp_path / "out").is_equal
    assert streammap.diff(tmp_path / "out", lazy, memory="40MiB").is_equal


def test_the_command_exits_as_diff_does(tmp_path: Path) -> None:
    big = tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    state = tiny.bert(SIZES)
    state["pooler.dense.bias"] += 1.0
    other = tiny.write(tmp_path / "other", state, tiny.bert_config(SIZES))
    assert "71 equal, 0 differ" in ok("diff", big, big)
    found = run("diff", big, other)
    assert found.exit_code == 1
    assert found.stdout.splitlines()[1].startswith("pooler.dense.bias")
    assert "70 equal, 1 differ" in found.stdout
    assert json.loads(run("diff", big, other, "--json").stdout)["equal"] is False
    quiet = run("diff", big, other, "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (1, "")
    broken = run("diff", big, tmp_path / "nowhere")
    assert broken.exit_code == 2
    assert broken.stderr.startswith("error: ")
    traced = run("--traceback", "diff", big, tmp_path / "nowhere")
    assert traced.exit_code == 2
    assert "Traceback" in traced.stderr


def test_the_picture(tmp_path: Path) -> None:
    big = tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    state = tiny.bert(SIZES)
    state["encoder.layer.2.output.dense.weight"] *= 1.5
    state["encoder.layer.3.output.dense.weight"][0, 0] = math.nan
    state["pooler.dense.bias"] *= 1.001
    other = tiny.write(tmp_path / "<&>", state, tiny.bert_config(SIZES))
    assert run("diff", big, other, "--plot", tmp_path / "d.svg", "-q").exit_code == 1
    drawn = ET.parse(tmp_path / "d.svg").getroot()
    space = {"": "http://www.w3.org/2000/svg"}
    texts = [text.text for text in drawn.iterfind(".//text", space)]
    assert any(text and text.endswith("<&>") for text in texts)
    assert {"output.dense.weight", "pooler.dense.bias", "layer", "1e0", "equal"} <= set(texts)
    titles = {title.text for title in drawn.iterfind(".//title", space)}
    assert len(titles) == len(state)
    assert "encoder.layer.2.output.dense.weight: 5.0e-1" in titles
    assert "encoder.layer.3.output.dense.weight: NaN" in titles
    assert "encoder.layer.0.output.dense.weight: =" in titles


def test_a_place_for_the_picture_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    taken = tiny.file(tmp_path / "taken.svg", "mine")
    for plot, message in (
        (tmp_path / "no" / "d.svg", "no is no folder"),
        (tmp_path / "d.png", "pictures are SVG, the ending is .png"),
        (tmp_path / "d", "pictures are SVG, the ending is missing"),
        (taken, "already exists"),
    ):
        found = run("diff", tmp_path / "nowhere" / "a", tmp_path / "nowhere" / "b", "--plot", plot)
        assert (found.exit_code, found.stdout) == (2, "")
        assert message in found.stderr
    assert taken.read_text() == "mine"
    one = tiny.write(tmp_path / "one", {"x": torch.ones(2)}, None)
    assert run("diff", one, one, "--plot", taken, "--overwrite").exit_code == 0
    assert taken.read_text().startswith("<svg")


def test_long_names_stay_on_the_page(tmp_path: Path) -> None:
    names = ("/models/" + "a-very-long-name/" * 12 + "first", "short", "x" * 300)
    for pair in ((names[0], names[1]), (names[0], names[2]), (names[1], names[0])):
        found = replace(differences(tmp_path, {"a": torch.ones(1)}, {"a": torch.zeros(1)}))
        drawn = ET.fromstring(heatmap.svg(replace(found, names=pair)))
        (title,) = (t for t in drawn.iter("{http://www.w3.org/2000/svg}text") if t.get("y") == "26")
        assert title.text is not None
        width = float(drawn.get("width", "0"))
        assert 16 + 9 * len(title.text) <= width <= 700
        if names[1] in pair:
            assert "short" in title.text
            assert "name/first" in title.text


def test_layers_are_summed_up(tmp_path: Path) -> None:
    big = tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    state = tiny.bert(SIZES)
    state["encoder.layer.2.output.dense.weight"] *= 1.5
    state["pooler.dense.bias"] *= 2.0
    other = tiny.write(tmp_path / "other", state, tiny.bert_config(SIZES))
    found = run("diff", big, other, "--layers")
    assert found.exit_code == 1
    lines = [" ".join(line.split()) for line in found.stdout.splitlines()]
    assert lines[0] == "layer differ mean relative largest of tensor"
    assert lines[1] == "0 0 of 16 0 0"
    assert lines[3] == "2 1 of 16 3.12e-02 5.00e-01 encoder.layer.2.output.dense.weight"
    assert lines[5] == "- 1 of 7 1.43e-01 1.00e+00 pooler.dense.bias"
    layers = json.loads(run("diff", big, other, "--json").stdout)["layers"]
    assert [layer["layer"] for layer in layers] == [0, 1, 2, 3, None]
    assert layers[2]["worst"] == "encoder.layer.2.output.dense.weight"
    assert layers[2]["n_different"] == 1


def test_what_only_one_has_is_drawn_hatched(tmp_path: Path) -> None:
    a = {f"m.{i}.w": torch.ones(2) for i in range(4)}
    b = {f"m.{i}.w": torch.ones(2) for i in range(6)} | {"m.3.w": torch.ones(3)}
    drawn = ET.fromstring(heatmap.svg(differences(tmp_path, a, b)))
    told = {
        rect[0].text: rect.get("fill")
        for rect in drawn.iter("{http://www.w3.org/2000/svg}rect")
        if len(rect)
    }
    assert len(told) == 6
    hatched = sorted(text for text, fill in told.items() if text and fill == "url(#apart)")
    assert hatched[0] == "m.3.w: shape [2] and [3]"
    assert hatched[1].startswith("m.4.w: only in ")
    assert hatched[1].endswith("b.safetensors")
    assert "not in both" in "".join(drawn.itertext())


def test_pictures_of_few_and_of_many(tmp_path: Path) -> None:
    """Nothing to compare, no layers, 200 layers with experts, one difference of all sizes."""
    none = differences(tmp_path, {"a": torch.ones(1)}, {"b": torch.ones(1)})
    plain = differences(tmp_path, {"a": torch.ones(1)}, {"a": torch.zeros(1)})
    many = {f"m.{i}.experts.{j}.w": torch.full((2,), 1.0) for i in range(200) for j in range(3)}
    changed = {key: x + 10.0 ** -(i % 7) for i, (key, x) in enumerate(many.items())}
    deep = differences(tmp_path, many, changed)
    for found in (none, plain, deep):
        assert ET.fromstring(heatmap.svg(found)).tag.endswith("svg")
    assert heatmap.svg(deep).count("<title>") == 200


_RUN = """
import sys, torch, streammap
from streammap.output.run import peak_nbytes
before = peak_nbytes()
lazy = streammap.open(sys.argv[1])
other = lazy.coalesce(width=2).decoalesce()
found = streammap.diff(lazy, other, memory=sys.argv[2])
assert found.is_equal, found
print(peak_nbytes() - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    size = write_gpt2(tmp_path / "big", vocab=80_000, dtype="BF16")
    assert size > 2 * 40 * MIB
    command = [sys.executable, "-c", _RUN, str(tmp_path / "big"), "40MiB"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(said.stdout) < 40 * MIB
