"""Methods that read tensors more than once: by command and call, in 32 MiB, and after kills."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import streammap
from streammap.cli.main import main
from streammap.errors import StreammapError
from streammap.planning.merging.methods import registry
from tests.engine.test_memory import MIB, write_gpt2
from tests.planning.merging import dense
from tests.support import tiny

SIZES = tiny.Sizes()


@pytest.fixture(scope="module")
def models(scratch: Path) -> Path:
    """A base, and a, b and c that grew from it."""
    base = tiny.bert(SIZES)
    for i, name in enumerate(("base", "a", "b", "c")):
        noise = tiny.bert(SIZES, seed=i)
        grown = {key: x + 0.3 * noise[key] * (i > 0) for key, x in base.items()}
        tiny.write(scratch / name, grown, tiny.bert_config(SIZES))
    return scratch


def test_slerp_by_command_recipe_and_call_is_one(models: Path, tmp_path: Path) -> None:
    a, b = models / "a", models / "b"
    t = [{"filter": "attention", "value": [0, 0.5]}, 0.3]
    (tmp_path / "t.json").write_text(json.dumps(t))
    recipe = {
        "merge_method": "slerp",
        "base_model": str(a),
        "slices": [
            {"sources": [{"model": str(m), "layer_range": [0, SIZES.layers]} for m in (b, a)]}
        ],
        "parameters": {"t": t},
    }
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    command = ["blend", str(a), str(b), "-o", str(tmp_path / "one"), "--method", "slerp"]
    main([*command, "--t", str(tmp_path / "t.json")], standalone_mode=False)
    streammap.blend(str(tmp_path / "r.yml"), output=tmp_path / "two", fsync=False)
    streammap.blend(str(a), str(b), method="slerp", t=t, output=tmp_path / "three", fsync=False)
    one, x, y = (tiny.written(path) for path in (tmp_path / "one", a, b))
    for other in ("two", "three"):
        made = tiny.written(tmp_path / other)
        assert all(torch.equal(made[key], value) for key, value in one.items())
    for key, value in one.items():
        place = key.split("layer.")
        depth = int(place[1].split(".")[0]) / (SIZES.layers - 1) if len(place) > 1 else 0.0
        at = 0.5 * depth if "attention" in key else 0.3
        want = dense.slerp(torch.stack([x[key], y[key]]).double(), at).float()
        torch.testing.assert_close(value, want, rtol=1e-6, atol=1e-7)


def test_ties_by_command_and_call_is_one(models: Path, tmp_path: Path) -> None:
    sources = [str(models / name) for name in ("a", "b", "c")]
    base = str(models / "base")
    options = ["--base", base, "--method", "ties", "--density", "0.5", "--lambda", "0.8"]
    weights = ["--weights", "1,0.5,0.25"]
    command = ["blend", *sources, "-o", str(tmp_path / "one"), *options, *weights]
    main(command, standalone_mode=False)
    lazy = streammap.open(sources[0]).blend(
        *sources[1:], base=base, method="ties", density=0.5, lambda_=0.8, weights=[1, 0.5, 0.25]
    )
    states = [tiny.written(models / name) for name in ("base", "a", "b", "c")]
    weights_of = torch.tensor([1, 0.5, 0.25], dtype=torch.float64)
    for key, value in tiny.written(tmp_path / "one").items():
        assert torch.equal(value, lazy.read(key))
        x = torch.stack([state[key] for state in states])
        low, made = x[1:] - x[0], x[1:].double() - x[0].double()
        kept = torch.stack([dense.kept(each, int(each.numel() * 0.5)) for each in low])
        mixed = dense.agreed(made * kept, weights_of, normalize=True)
        torch.testing.assert_close(value, (x[0] + 0.8 * mixed).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", registry.names())
def test_every_method_can_be_named(models: Path, method: str) -> None:
    about = registry.load(method)
    parameters = {"t": 0.5} if "t" in about.parameters else {}
    if "density" in about.parameters:
        parameters["density"] = 0.5
    others = [str(models / "b")] if about.max_sources != 1 else []
    base = str(models / "base") if about.takes_base else None
    lazy = streammap.open(str(models / "a")).blend(
        *others, base=base, method=method, parameters=parameters
    )
    assert lazy.read("pooler.dense.weight").isfinite().all()


def test_too_few_sources_and_numbers_without_sense_are_refused(models: Path) -> None:
    a, b = (streammap.open(str(models / name)) for name in ("a", "b"))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("slerp takes 2 sources", {"method": "slerp", "t": 0.5}),
        ("karcher: max_iter 1.5", {"method": "karcher", "parameters": {"max_iter": 1.5}}),
        ("ties needs a base", {"method": "ties"}),
        ("no t for all", {"method": "slerp", "others": [b]}),
        ("slerp takes 2 sources, and there are 3", {"method": "slerp", "others": [b, b], "t": 0.5}),
        ("density -0.5, expected", {"method": "ties", "base": b, "density": -0.5}),
        ("density 50, expected", {"method": "dare_linear", "base": b, "density": 50}),
        ("gamma 2, expected", {"method": "breadcrumbs", "base": b, "parameters": {"gamma": 2}}),
        ("slerp has no parameter density", {"method": "slerp", "t": 0.5, "density": 0.5}),
    ]
    for match, options in cases:
        with pytest.raises(StreammapError, match=match):
            a.blend(*options.pop("others", []), **options)


_PEAK = """
import json, sys, torch
import streammap
from streammap.output.run import peak_nbytes
folder, method, memory, threads = sys.argv[1:]
before = peak_nbytes()
options = {"slerp": {"t": 0.5}, "ties": {"density": 0.5, "base": folder}}[method]
lazy = streammap.open(folder).blend(folder, method=method, **options)
report = lazy.save(
    f"{folder}-{method}-{threads}", memory=memory, threads=int(threads), fsync=False
)
print(json.dumps([report.peak_nbytes - before, report.planned_nbytes]))
"""


def peak(folder: Path, method: str, threads: int) -> None:
    """A run in a process of its own stays within 32 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(folder), method, "32MiB", str(threads)],
        check=True,
        capture_output=True,
        text=True,
    )
    added, planned = json.loads(done.stdout)
    assert added <= planned <= 32 * MIB


def test_slerp_takes_32_mib_with_four_threads(tmp_path: Path) -> None:
    assert write_gpt2(tmp_path / "big", vocab=150_000, layers=1) > 300 * 10**6
    peak(tmp_path / "big", "slerp", 4)


def test_ties_takes_32_mib_with_four_threads(tmp_path: Path) -> None:
    assert write_gpt2(tmp_path / "big", vocab=25_000, layers=1) > 50 * 10**6
    peak(tmp_path / "big", "ties", 4)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["slerp", "ties"])
def test_a_tensor_of_a_gigabyte_takes_32_mib(tmp_path: Path, method: str) -> None:
    assert write_gpt2(tmp_path / "big", vocab=500_000, layers=1) > 1024 * 10**6
    peak(tmp_path / "big", method, 4)


_KILLED = """
import os, sys
import streammap
from streammap.planning.derived import elementwise
from streammap.planning.merging import dots, task_vectors
folder, out, method, last = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
left, numbers = [last], elementwise.numbers
def counted(*args):
    left[0] -= 1
    if left[0] == 0:
        os._exit(9)
    return numbers(*args)
elementwise.numbers = dots.numbers = task_vectors.numbers = counted
options = {"slerp": {"t": 0.3}, "ties": {"density": 0.5, "base": folder + "/base"}}[method]
streammap.open(folder + "/a").blend(folder + "/b", method=method, **options).save(out, threads=2)
"""


@pytest.mark.parametrize(
    ("method", "places"),
    [("slerp", (3, 13)), pytest.param("ties", (5, 44, 60), marks=pytest.mark.slow)],
)
def test_a_run_that_is_killed_in_either_pass_ends_with_the_same_bytes(
    tmp_path: Path, method: str, places: tuple[int, ...]
) -> None:
    for i, name in enumerate(("base", "a", "b")):
        shapes = {"x": (400, 600), "y": (199, 301)}
        tiny.write(tmp_path / name, tiny.random(shapes, seed=i), {})
    folder = str(tmp_path)
    for last in (*places, 0):
        done = subprocess.run(
            [sys.executable, "-c", _KILLED, folder, f"{folder}/out", method, str(last)], check=False
        )
        assert done.returncode == (9 if last else 0), last
    options = {"slerp": {"t": 0.3}, "ties": {"density": 0.5, "base": f"{folder}/base"}}[method]
    lazy = streammap.open(f"{folder}/a").blend(f"{folder}/b", method=method, **options)  # type: ignore[arg-type]
    lazy.save(tmp_path / "whole", threads=1, fsync=False)
    name = "model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
