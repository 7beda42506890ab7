"""Where states are stored, and of which optimizers: each comes out as it went in."""

import shutil
import warnings
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

import streammap
from streammap.analysis.verification import verify
from streammap.testing import faults
from tests.support import optimized, tiny

SIZES = tiny.Sizes(layers=2)
OPTIMIZERS = {
    "amsgrad": (("exp_avg", 1), ("exp_avg_sq", 2), ("max_exp_avg_sq", 2)),
    "lion": (("exp_avg", 1),),
    "sgd": (("momentum_buffer", 1),),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A GPT-2 of random numbers."""
    return tiny.write(tmp_path / "source", tiny.gpt2(SIZES), tiny.gpt2_config(SIZES))


def states(folder: Path, whats: tuple[str, ...]) -> optimized.StateDict:
    """A state of random numbers for all parameters."""
    draw = torch.Generator().manual_seed(1)
    return {
        name: {what: torch.rand(spec.shape, generator=draw) for what in whats}
        for name, spec in streammap.open(folder).plan.specs.items()
    }


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_of_each_optimizer_all_means_are_grown(kind: str, source: Path) -> None:
    powers = OPTIMIZERS[kind]
    state = states(source, tuple(what for what, _ in powers))
    optimized.write(source / optimized.FILE, state)
    lazy = streammap.open(source).decoalesce(mlp=2).carry_optimizer()
    name = "h.1.mlp.c_fc.weight"  # [in, out]
    for what, power in powers:
        found = lazy.read(f"optim.state.{name}.{what}")
        assert torch.equal(found, state[name][what].repeat(1, 2) / 2**power)
    assert not any(key.endswith(".step") for key in lazy.keys())  # noqa: SIM118 (no dict)


def test_a_file_may_hold_both(source: Path, tmp_path: Path) -> None:
    state = states(source, ("exp_avg", "exp_avg_sq"))
    optimized.write(tmp_path / "optimizer.pt", {n: {**x, "step": 7} for n, x in state.items()})
    content = torch.load(tmp_path / "optimizer.pt")
    weights = dict(streammap.open(source).tensors())
    torch.save({"model": weights, "optimizer": content, "epoch": 3}, tmp_path / "both.pt")
    lazy = streammap.open(tmp_path / "both.pt", config=source / "config.json")
    lazy.coalesce(mlp=2).carry_optimizer().save(tmp_path / "out")
    name = "h.0.mlp.c_proj.bias"
    found = optimized.written(tmp_path / "out")[name]
    assert torch.equal(found["exp_avg"], state[name]["exp_avg"])
    assert found["step"] == 7
    assert verify(tmp_path / "out", recompute=5).ok


@pytest.mark.parametrize("nested", [pytest.param(False, marks=pytest.mark.slow), True])
def test_dcp_folders_keep_their_form(nested: bool, source: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict_saver import save

    state = states(source, ("exp_avg", "exp_avg_sq"))
    options: dict[str, object] = {"lr": 0.25, "betas": (0.5, 0.75), "foreach": None}
    optim: dict[str, object] = {
        "state": state,
        "param_groups": [{**options, "params": list(state)}],
    }
    if not nested:
        optim = {f"state.{n}.{what}": x for n, kept in state.items() for what, x in kept.items()}
        optim |= {f"param_groups.{n}.{o}": value for n in state for o, value in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = dict(streammap.open(source).tensors())
        save({"model": model, "optim": optim}, checkpoint_id=tmp_path / "dcp")
    shutil.copy(source / "config.json", tmp_path / "dcp")
    lazy = streammap.open(tmp_path / "dcp").decoalesce(mlp=2).carry_optimizer()
    lazy.save(tmp_path / "out", format="dcp")
    assert verify(tmp_path / "out", recompute=5).ok
    dcp_to_torch_save(tmp_path / "out", tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt")["optim"]
    assert found.keys() == optim.keys()
    name = "h.0.mlp.c_proj.weight"
    mean: Tensor = found["state"][name]["exp_avg"] if nested else found[f"state.{name}.exp_avg"]
    assert torch.equal(mean, state[name]["exp_avg"].repeat(2, 1))
    if nested:
        assert found["param_groups"] == [{**options, "params": list(state)}]
    else:
        assert found[f"param_groups.{name}.betas"] == (0.5, 0.75)


def test_a_bucket_takes_it_too(source: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    optimized.write(source / optimized.FILE, states(source, ("exp_avg", "exp_avg_sq")))
    lazy = streammap.open(source).decoalesce(mlp=2).carry_optimizer()
    lazy.save("memory://optimizer-test/out", max_shard_size=4000)
    names = {
        path.rpartition("/")[2]
        for path in fsspec.filesystem("memory").ls("/optimizer-test/out", detail=False)
    }
    assert {"optimizer.pt", "model.safetensors.index.json"} <= names
    with fsspec.open("memory://optimizer-test/out/optimizer.pt", "rb") as file:
        assert len(optimized.named(torch.load(file))) == len(lazy.plan.weights)
    back = streammap.open("memory://optimizer-test/out").coalesce(mlp=2).carry_optimizer()
    for key, x in back.tensors():
        if key.endswith(".exp_avg"):
            assert torch.equal(x, streammap.open(source).carry_optimizer().read(key))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["safetensors", "dcp"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    form: Literal["safetensors", "dcp"], source: Path, tmp_path: Path
) -> None:
    optimized.write(source / optimized.FILE, states(source, ("exp_avg", "exp_avg_sq")))
    lazy = streammap.open(source).decoalesce(width=2).carry_optimizer()

    def save(out: Path) -> streammap.Report:
        return lazy.save(out, format=form, max_shard_size=4000)

    with faults.counted() as count:
        save(tmp_path / "whole")
    n_resumed = 0
    for n in (count.count // 3, count.count // 2, count.count - 3):
        assert faults.killed(lambda: save(tmp_path / "out"), n)
        n_resumed += save(tmp_path / "out").n_resumed
        assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "whole")
        shutil.rmtree(tmp_path / "out")
    assert n_resumed
