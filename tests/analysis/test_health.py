"""Figures of tensors, against those of torch on the whole tensor; and what they may take."""

import itertools
import json
import math
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import streammap
from streammap.analysis import statistics
from streammap.analysis.health import TensorHealth, row_length
from streammap.engine import loop
from streammap.io.dtypes import TensorSpec
from tests.engine.test_memory import MIB, write_gpt2
from tests.support import tiny
from tests.support.typed import ok

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def health(path: Path, state: dict[str, Tensor]) -> dict[str, TensorHealth]:
    save_file(state, path)
    return {found.key: found for found in streammap.open(path).health().tensors}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_figures_are_those_of_the_whole_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    x = torch.randn(700, 1000).to(dtype)
    x[3], x[699] = 0.0, 0.0
    x[5, :999] = 0.0
    found = health(tmp_path / "x.safetensors", {"x": x})["x"]
    wide = x.double()
    assert (found.minimum, found.maximum) == (wide.min().item(), wide.max().item())
    assert found.mean == pytest.approx(wide.mean().item(), rel=1e-9)
    assert found.rms == pytest.approx(wide.square().mean().sqrt().item(), rel=1e-9)
    assert (found.n_rows, found.n_dead_rows) == (700, 2)
    assert found.n_zero == int((x == 0).sum())
    assert found.flags == ("2 of 700 rows dead",)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_counted_and_left_out_of_the_rest(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    x = torch.tensor([[1.0, math.nan, math.inf], [-math.inf, 3.0, math.nan]], dtype=dtype)
    found = health(tmp_path / "x.safetensors", {"x": x, "none": x[0, 1:] * math.nan})
    assert (found["x"].n_nan, found["x"].n_inf, found["x"].n_zero) == (2, 2, 0)
    assert (found["x"].minimum, found["x"].maximum, found["x"].mean) == (1.0, 3.0, 2.0)
    assert found["x"].flags == ("2 NaN", "2 Inf")
    assert (found["none"].minimum, found["none"].mean) == (None, None)


def test_ranges_and_constants(tmp_path: Path) -> None:
    state = {
        "large": torch.tensor([1e5, -7e4, 65504.0]),
        "small": torch.tensor([1e-40, 0.0, 1.0]),
        "half": torch.tensor([1e-6, 1.0], dtype=torch.float16),
        "zeros": torch.zeros(4, 4),
        "ones": torch.ones(4),
        "scalar": torch.tensor(2.0),
        "nothing": torch.zeros(0, 4),
        "f8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
        "words": torch.arange(4),
    }
    found = health(tmp_path / "x.safetensors", state)
    flags = {key: value.flags for key, value in found.items()}
    assert flags == {
        "large": ("2 beyond float16",),
        "small": ("1 subnormal",),
        "half": ("1 subnormal",),
        "zeros": ("all 0",),
        "ones": ("all 1",),
        "scalar": (),
        "nothing": (),
        "f8": (),
    }
    assert found["f8"].maximum == 2.0
    assert found["zeros"].n_dead_rows == 4
    whole = streammap.open(tmp_path / "x.safetensors").health()
    assert whole.n_unlooked == 1
    assert [t.key for t in whole.tensors[:2]] == ["large", "zeros"]


@pytest.mark.parametrize(
    ("shape", "length"), [((4,), 0), ((4, 3), 3), ((2, 4, 3), 3), ((8, 3, 2, 2), 12), ((), 0)]
)
def test_what_a_row_is(shape: tuple[int, ...], length: int) -> None:
    assert row_length(TensorSpec("F32", shape)) == length


@given(
    length=st.integers(1, 9),
    n_rows=st.integers(1, 9),
    dead=st.sets(st.integers(0, 8)),
    zeros=st.sets(st.integers(0, 80)),
    cuts=st.sets(st.integers(1, 80)),
)
def test_dead_rows_are_counted_however_the_tensor_is_cut(
    length: int, n_rows: int, dead: set[int], zeros: set[int], cuts: set[int]
) -> None:
    x = torch.ones(n_rows, length)
    x[sorted(d for d in dead if d < n_rows)] = 0.0
    flat = x.view(-1)
    flat[sorted(z for z in zeros if z < len(flat))] = 0.0
    places = [0, *sorted(c for c in cuts if c < len(flat)), len(flat)]
    total, scratch = statistics.TensorStats(), statistics.Scratch()
    for start, end in itertools.pairwise(places):
        total.add(statistics.counted(flat[start:end], start, length, scratch))
    assert total.dead_rows(length) == int((x == 0).all(dim=1).sum())
    assert total.n_zero == int((x == 0).sum())


@given(st.lists(st.floats(-1e100, 1e100)), st.randoms())
def test_sums_are_exact_in_any_order(numbers: list[float], random: Random) -> None:
    found = statistics.ExactSum()
    for number in numbers:
        found.add(number)
    random.shuffle(numbers)
    other, rest = statistics.ExactSum(), statistics.ExactSum()
    for i, number in enumerate(numbers):
        (other if i % 2 else rest).add(number)
    other.add_all(rest)
    assert found.value == other.value == math.fsum(numbers)


def test_a_row_larger_than_a_tile_is_one_row(tmp_path: Path) -> None:
    x = torch.zeros(3, 2_000_000, dtype=torch.bfloat16)
    x[1, 1_999_999] = 1.0
    found = health(tmp_path / "x.safetensors", {"x": x})["x"]
    assert (found.n_rows, found.n_dead_rows) == (3, 2)


def test_a_plan_is_as_healthy_as_its_result(tmp_path: Path) -> None:
    sizes = tiny.Sizes(heads=4, layers=4)
    state = tiny.bert(sizes)
    state["encoder.layer.1.output.dense.weight"][0, 0] = math.inf
    state["pooler.dense.weight"][:] = 0.0
    tiny.write(tmp_path / "big", state, tiny.bert_config(sizes))
    lazy = streammap.open(tmp_path / "big").coalesce(width=2, depth=2).decoalesce()
    planned = lazy.health(threads=3)
    lazy.save(tmp_path / "out")
    for found, expected in zip(
        planned.tensors, streammap.open(tmp_path / "out").health().tensors, strict=True
    ):
        assert found.mean == pytest.approx(expected.mean)
        assert found.rms == pytest.approx(expected.rms)
        assert replace(found, mean=0.0, rms=0.0) == replace(expected, mean=0.0, rms=0.0)
    assert planned.totals["n_inf"] > 0


def test_the_command(tmp_path: Path) -> None:
    save_file(
        {f"h.{i}.w": torch.full((2, 2), float(i)) for i in range(30)}
        | {"bad": torch.tensor([math.nan])},
        tmp_path / "x.safetensors",
    )
    said = ok("inspect", tmp_path / "x.safetensors", "--health", "--limit", 3).splitlines()
    assert said[1].split() == ["bad", "F32", "-", "-", "-", "-", "1", "NaN"]
    assert "h.29.w" in said[2]
    assert said[4] == "... and 28 more, --limit 0 shows all"
    assert "finite   1 NaN, 0 Inf" in said
    content = json.loads(ok("inspect", tmp_path / "x.safetensors", "--health", "--json"))
    assert len(content["tensors"]) == 31
    assert content["totals"]["n_nan"] == 1


_RUN = """
import sys, torch, streammap
from streammap.output.run import peak_nbytes
before = peak_nbytes()
found = streammap.open(sys.argv[1]).health(memory=sys.argv[2])
print(peak_nbytes() - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """The file is zeros: all rows are looked at as if they were dead."""
    size = write_gpt2(tmp_path / "big", vocab=80_000, dtype="BF16")
    assert size > 3 * 32 * MIB
    command = [sys.executable, "-c", _RUN, str(tmp_path / "big"), "32MiB"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(said.stdout) < 32 * MIB


def test_passes_at_once_leave_the_threads_of_torch_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to begin ends first, and is not the one to put back what it found."""
    sizes = tiny.Sizes(layers=1)
    tiny.write(tmp_path / "bert", tiny.bert(sizes), tiny.bert_config(sizes))
    n_threads, both, begun, run = torch.get_num_threads(), threading.Barrier(2), [0], loop.run

    def slow(*given: Any, **more: Any) -> int:
        number, begun[0] = begun[0], begun[0] + 1
        both.wait(10)
        time.sleep(0.3 * number)
        return run(*given, **more)

    monkeypatch.setattr(loop, "run", slow)
    torch.set_num_threads(3)
    try:
        lazy = streammap.open(tmp_path / "bert")
        with ThreadPoolExecutor(2) as pool:
            passes = [pool.submit(lazy.health) for _ in range(2)]
            one, other = (found.result() for found in passes)
            assert one.tensors == other.tensors
        with ThreadPoolExecutor(1) as fresh:
            assert fresh.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(n_threads)
