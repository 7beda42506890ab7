"""Growth by empty units under a LayerNorm: new units hold the mean, and no map is dense."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.planning.maps import DenseMap
from tests.support import tiny

SIZES = tiny.Sizes(heads=2, layers=2, head_dim=4)
N_NEW = 12
F64 = torch.float64


def grown(x: Tensor, dim: int) -> Tensor:
    """The old units, and the mean of them in each new one."""
    n = x.shape[dim]
    matrix = torch.cat([torch.eye(n, dtype=F64), torch.full((N_NEW - n, n), 1 / n, dtype=F64)])
    mapped: Tensor = torch.tensordot(x, matrix, dims=([dim], [1])).movedim(-1, dim)
    return mapped


MADE = {
    "wte.weight": 1,
    "wpe.weight": 1,
    "h.0.mlp.c_proj.weight": 1,
    "h.0.mlp.c_proj.bias": 0,
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    state = {key: x.to(F64) for key, x in tiny.gpt2(SIZES).items()}
    return tiny.write(tmp_path / "gpt2", state, tiny.gpt2_config(SIZES))


def test_new_units_hold_the_mean_of_the_others(source: Path, tmp_path: Path) -> None:
    lazy = streammap.open(source).decoalesce(hidden=f"={N_NEW}", untie=True)
    assert lazy.promise[0] in ("exact", "exact up to eps")
    forms = lazy.plan.targets.values()
    assert not any(isinstance(m, DenseMap) for f in forms for t in f.terms for m in t.maps)
    lazy.save(tmp_path / "out", fsync=False, class_check="never")
    found, state = tiny.written(tmp_path / "out"), tiny.gpt2(SIZES)
    for key, dim in MADE.items():
        expected = grown(state[key].to(F64), dim)
        torch.testing.assert_close(found[key], expected, rtol=1e-14, atol=1e-14)


def test_the_bytes_do_not_depend_on_threads_and_memory(source: Path, tmp_path: Path) -> None:
    lazy = streammap.open(source).decoalesce(hidden=f"={N_NEW}", untie=True)
    for name, threads, memory in (("one", 1, "24MiB"), ("four", 4, "256MiB")):
        out = tmp_path / name
        lazy.save(out, threads=threads, memory=memory, fsync=False, class_check="never")
    tiny.assert_same(tiny.written(tmp_path / "one"), tiny.written(tmp_path / "four"))
