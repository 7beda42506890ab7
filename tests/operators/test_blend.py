"""Blends of any number of checkpoints, beside dense float64."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import swa_utils

import streammap
from streammap.operators import blend
from streammap.output.run import Report
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=4)
CONFIG = tiny.bert_config(SIZES)
STATES = [tiny.bert(SIZES, seed=i) for i in range(4)]
MLP = "encoder.layer.{}.intermediate.dense.weight"
QUERY = "encoder.layer.{}.attention.self.query.weight"


@pytest.fixture
def four(tmp_path: Path) -> list[Path]:
    return [tiny.write(tmp_path / f"m{i}", state, CONFIG) for i, state in enumerate(STATES)]


def refused(*words: object) -> str:
    said = run(*words)
    assert said.exit_code == 1, said.output
    return said.output


def summed(weights: Sequence[float], key: str) -> Tensor:
    xs = [state[key].double() for state in STATES]
    return sum((w * x for w, x in zip(weights, xs, strict=False)), torch.zeros(()).double())


def assert_sum(found: Mapping[str, Tensor], weights: Sequence[float]) -> None:
    """Each tensor is the sum in float64, rounded once."""
    for key, x in found.items():
        assert torch.equal(x, summed(weights, key).to(x.dtype)), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("n", range(2, 8))
def test_a_mean_is_the_float64_mean_rounded_once(
    tmp_path: Path, n: int, dtype: torch.dtype
) -> None:
    numpy = pytest.importorskip("numpy")
    torch.manual_seed(n)
    largest = torch.finfo(dtype).max
    sources = []
    for i in range(n):
        spread = 8 if dtype == torch.float16 else 20
        x = torch.randn(100, 33).mul(torch.randint(-spread, spread, (100, 33)).exp2())
        x[0], x[1, 0] = largest * (0.9 if i else 1.0), (-1) ** i * largest
        x = x.to(dtype)
        x[2] = torch.arange(33).mul(n * 2 + 1).add(i).to(dtype)  # ties
        sources.append(x)
    paths = [tiny.write(tmp_path / str(i), {"x": x}, None) for i, x in enumerate(sources)]
    mean = torch.stack([x.double() for x in sources]).sum(0) / n
    if dtype == torch.float16:
        expected = torch.from_numpy(mean.numpy().astype(numpy.float16))
    elif dtype == torch.float32:
        expected = mean.float()
    else:
        # By way of the 16 digits behind bfloat16's, which no float64 of these needs more of.
        high = mean.float()
        low = (mean - high.double()).float()
        bits = high.view(torch.int32)
        tie = (bits & 0xFFFF) == 0x8000
        nudge = torch.where(tie & (low != 0), torch.sign(low * torch.sign(high)).int(), 0)
        expected = (bits + nudge).view(torch.float32).bfloat16()
    found = streammap.blend(*paths)
    assert torch.equal(found.read("x"), expected)
    report = streammap.blend(*paths, output=tmp_path / "out", fsync=False, threads=2)
    assert isinstance(report, Report)
    assert torch.equal(tiny.written(tmp_path / "out")["x"], expected)


def test_weights_are_taken_as_they_are(four: list[Path], tmp_path: Path) -> None:
    said = ok("blend", *four[:3], "-o", tmp_path / "out", "--weights", "0.5,0.3,0.1", "--no-fsync")
    assert "weights 0.5 (m0) + 0.3 (m1) + 0.1 (m2) = 0.9" in said
    assert_sum(tiny.written(tmp_path / "out"), [0.5, 0.3, 0.1])
    first, *others = (streammap.open(path) for path in four[:3])
    assert_sum(dict(first.blend(*others, weights=[2, -0.75, 0]).tensors()), [2, -0.75])
    normal = first.blend(*others, weights=[1, 2, 5], normalize=True)
    assert_sum(dict(normal.tensors()), [1 / 8, 2 / 8, 5 / 8])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_average_of_16_bit_tensors_is_the_nearest_but_next_to_ties(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    """Unequal weights are added up in float32; others, and for a wider result, in float64."""
    torch.manual_seed(0)
    sources = [torch.randn(300, 100).to(dtype) for _ in range(3)]
    first, *others = (
        streammap.open(tiny.write(tmp_path / str(i), {"x": x}, None)) for i, x in enumerate(sources)
    )
    stacked = torch.stack(sources).double()

    def exact(weights: Sequence[float]) -> Tensor:
        made: Tensor = torch.tensordot(torch.tensor(weights, dtype=torch.float64), stacked, 1)
        return made

    for weights, bits in (([0.2, 0.3, 0.5], 22), ([1.2, 0.3, -0.5], 50)):
        blended = first.blend(*others, weights=weights)
        error = (blended.read("x").double() - exact(weights)).abs()
        half = torch.exp2(torch.frexp(exact(weights)).exponent - 1.0) * torch.finfo(dtype).eps / 2
        assert bool((error <= half + 2.0**-bits * stacked.abs().sum(0)).all())
        assert torch.equal(blended.convert(dtype="float32").read("x"), exact(weights).float())


def test_what_rounding_loses_is_counted_once(tmp_path: Path) -> None:
    """Not again in a small tensor, whose buffers still hold the numbers of the large one."""
    states = {"x": torch.full((300_000,), 6e4).half(), "z": torch.ones(7).half()}
    paths = [tiny.write(tmp_path / name, states, None) for name in ("a", "b")]
    report = streammap.blend(*paths, weights=[1, 1], output=tmp_path / "out", threads=1)
    assert isinstance(report, Report)
    assert report.n_overflowed == 300_000


def test_one_weight_alone_copies_bytes(four: list[Path]) -> None:
    one = streammap.blend(*four[:2], weights=[1, 0])
    assert one.promise[0] == "bit-exact"
    assert all(form.copied is not None for form in one.plan.targets.values())


@pytest.mark.parametrize("n", [1, 2, 5])
def test_an_average_over_time_is_that_of_a_run(n: int) -> None:
    source = torch.Generator().manual_seed(n)
    steps = torch.randn(n, 3, generator=source, dtype=torch.float64)
    average = steps[0]
    for x in steps[1:]:
        average = 0.9 * average + 0.1 * x
    weights = torch.tensor(blend.ema_weights(0.9, n), dtype=torch.float64)
    torch.testing.assert_close(weights @ steps, average)
    assert math.isclose(sum(blend.ema_weights(0.9, n)), 1.0)


@pytest.mark.parametrize(
    ("ema", "tolerance"),
    [(None, 1e-6), (0.9, 1e-14)],
)
def test_averages_are_those_of_torch_over_a_run(
    tmp_path: Path, ema: float | None, tolerance: float
) -> None:
    """torch divides by the number of steps in float32."""
    average: Any = swa_utils
    average = average.get_ema_multi_avg_fn(ema) if ema else average.get_swa_multi_avg_fn()
    model = torch.nn.Linear(7, 5).double()
    averaged = swa_utils.AveragedModel(model, multi_avg_fn=average)
    paths = []
    for step in range(5):
        for x in model.parameters():
            x.data.add_(torch.randn_like(x))
        averaged.update_parameters(model)
        paths.append(tiny.write(tmp_path / str(step), model.state_dict(), None))
    found = dict(streammap.blend(paths[0], *paths[1:], ema=ema).tensors())
    for key, x in averaged.module.state_dict().items():
        torch.testing.assert_close(found[key], x, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "factor"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("1-sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_decay_is_that_of_a_run_with_decayed_updates(
    tmp_path: Path, shape: str, factor: Callable[[float], float]
) -> None:
    """SGD with a fixed rate, whose updates are then applied again, decayed."""
    n, w = 6, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    checkpoints, updates = [w], []
    for step in range(1, n):
        gradient = torch.sin(w * step) + w
        updates.append(-0.1 * gradient)
        w = w + updates[-1]
        checkpoints.append(w)
    decayed = checkpoints[0]
    for j, update in enumerate(updates, 1):
        decayed = decayed + factor(j / n) * update
    paths = [tiny.write(tmp_path / str(i), {"w": x}, None) for i, x in enumerate(checkpoints)]
    ok("blend", *paths, "-o", tmp_path / "out", "--decay", shape, "--no-fsync")
    torch.testing.assert_close(tiny.written(tmp_path / "out")["w"], decayed, rtol=0, atol=1e-14)


def test_task_arithmetic_adds_differences_to_a_base(four: list[Path], tmp_path: Path) -> None:
    a, b, c, base = four
    ok("blend", a, b, c, "-o", tmp_path / "out", "--base", base, "--lambda", 0.5, "--no-fsync")
    assert_sum(tiny.written(tmp_path / "out"), [0.5, 0.5, 0.5, -0.5])
    lazy = streammap.blend(a, b, base=base, weights=[1, -1])
    assert_sum(dict(lazy.tensors()), [1, -1, 0, 1])
    assert lazy.plan.side is lazy.plan.sources[-1]


def test_numbers_depend_on_the_place(four: list[Path], tmp_path: Path) -> None:
    rules = [{"kind": "attention", "value": [0, 1]}, {"filter": "dense", "value": 0.25}, 0.5]
    weights = tmp_path / "weights.json"
    weights.write_text(json.dumps([rules, 1]))
    ok("blend", *four[:2], "-o", tmp_path / "out", "--weights", weights, "--no-fsync")
    found = tiny.written(tmp_path / "out")
    for layer in range(4):
        for key, weight in ((QUERY, layer / 3), (MLP, 0.25)):
            name = key.format(layer)
            assert torch.equal(found[name], summed([weight, 1], name).float()), name
    name = "embeddings.LayerNorm.weight"
    assert torch.equal(found[name], summed([0.5, 1], name).float())
    ok("apply", tmp_path / "out", tmp_path / "again", "--no-fsync")
    tiny.assert_same(tiny.written(tmp_path / "again"), found)
    text = json.dumps([{"filter": "layer.0.", "value": 0}, [0.5, 1]])
    ok("interpolate", *four[:2], tmp_path / "lerp", "--alpha", text, "--no-fsync")
    found = tiny.written(tmp_path / "lerp")
    for layer, alpha in enumerate((0, 0.5 + 1 / 6, 0.5 + 2 / 6, 1)):
        expected = summed([alpha, 1 - alpha], MLP.format(layer)).float()
        torch.testing.assert_close(found[MLP.format(layer)], expected)


def test_layers_are_stacked(four: list[Path], tmp_path: Path) -> None:
    other = tiny.Sizes(heads=2, layers=6)
    state = tiny.bert(other, seed=9)
    deeper = tiny.write(tmp_path / "deeper", state, tiny.bert_config(other))
    slices = "[[0, 0, 3], [1, 2, 6], [0, 3, 4]]"
    scale = json.dumps([{"filter": "output.dense", "value": 0}, 1])
    ok("blend", four[0], deeper, "-o", tmp_path / "out", "--slices", slices, "--no-fsync")
    made = streammap.open(tmp_path / "out")
    assert (made.config or {})["num_hidden_layers"] == 8
    origin = [(STATES[0], i) for i in (0, 1, 2)] + [(state, i) for i in (2, 3, 4, 5)]
    for layer, (source, i) in enumerate([*origin, (STATES[0], 3)]):
        assert torch.equal(made.read(MLP.format(layer)), source[MLP.format(i)])
    lazy = streammap.blend(four[0], deeper, slices=json.loads(slices), scale=json.loads(scale))
    assert not lazy.read("encoder.layer.4.output.dense.weight").any()
    assert torch.equal(lazy.read(MLP.format(4)), state[MLP.format(3)])
    assert all(f.copied is not None for k, f in lazy.plan.targets.items() if "output" not in k)
    mixed = streammap.blend(
        four[0],
        deeper,
        slices=[
            [0, 0, 2],
            {
                "sources": [
                    {"source": 0, "layers": [2, 4], "parameters": {"weight": [0, 1]}},
                    {"source": 1, "layers": [0, 2], "parameters": {"weight": 0.5}},
                ],
                "parameters": {"normalize": True},
            },
        ],
        parameters={"weight": 1},
        method="linear",
    )
    name = MLP.format(3)
    expected = (STATES[0][name].double() + 0.5 * state[MLP.format(1)].double()) / 1.5
    torch.testing.assert_close(mixed.read(name).double(), expected, rtol=1e-7, atol=0)
    assert torch.equal(mixed.read(MLP.format(2)), state[MLP.format(0)])


def test_a_blend_is_one_step_of_a_chain(four: list[Path], tmp_path: Path) -> None:
    big = [streammap.open(path) for path in four[:3]]
    chain = big[0].coalesce(width=2).blend(*(one.coalesce(width=2) for one in big[1:]))
    later = streammap.blend(*four[:3]).coalesce(width=2)
    for key in chain.plan.targets:
        torch.testing.assert_close(chain.read(key), later.read(key))
    chain.save(tmp_path / "out", fsync=False)
    assert streammap.verify(tmp_path / "out", recompute=20, class_check=False).ok
    request = json.loads((tmp_path / "out" / "streammap.json").read_text())["request"]
    again = streammap.open_request(request)
    assert again.plan.request is not None
    tiny.assert_same(dict(again.tensors()), dict(chain.tensors()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "1,2,3"], "weights: 3 given, there are 2 sources"),
        (["--weights", "1,2", "--ema", "0.9"], "--weights and --ema: each says all weights"),
        (["--lambda", "2"], "--lambda needs --base"),
        (["--weights", "1,-1", "--normalize"], "add up to 0"),
        (["--weights", "1e999,1"], "a number beyond"),
        (["--method", "sce"], "no method 'sce'"),
        (["--scale", "2"], "linear has no parameter scale"),
        (["--slices", "[[0, 0, 9]]"], "layers 0 to 9 of m0, which has 4"),
        (["--slices", "[[2, 0, 1]]"], "source 2 in a slice"),
        (["--slices", "[[0, 3, 1]]"], r"slices\[0\]: source 0 and layers \[3, 1\]"),
        (["--weights", '[{"filter": "mlp", "value": 1}, 1]'], "no weight for m0"),
        (["--method", "linear", "--base", "BASE"], "linear has no base"),
    ],
)
def test_what_makes_no_sense_is_refused(
    four: list[Path], tmp_path: Path, options: list[str], message: str
) -> None:
    options = [str(four[3]) if word == "BASE" else word for word in options]
    said = refused("blend", *four[:2], "-o", tmp_path / "out", *options)
    assert re.search(message, said)
    assert not (tmp_path / "out").exists()


def test_nothing_to_do_is_refused(four: list[Path], tmp_path: Path) -> None:
    assert "one checkpoint and nothing to do" in refused("blend", four[0], "-o", tmp_path / "out")
    assert run("blend", *four, "--weights", "much", "-o", tmp_path / "out").exit_code == 2


def test_other_models_are_refused_by_their_names(four: list[Path], tmp_path: Path) -> None:
    sizes = tiny.Sizes(heads=2, layers=2)
    other = tiny.write(tmp_path / "other", tiny.bert(sizes), tiny.bert_config(sizes))
    said = refused("blend", four[0], other, "-o", tmp_path / "out")
    assert "layer: other 2, m0 4" in said
