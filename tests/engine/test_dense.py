"""Dense maps of any size: in the memory that was given, and with the same bits each time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streammap
from streammap.engine import memory, tile_reads
from streammap.planning import graph
from streammap.planning.dense import matrix as matrices
from streammap.planning.dense import stored
from streammap.planning.dense.stored import Stored
from streammap.planning.maps import DenseMap
from tests.engine.test_evaluate import Held
from tests.support import tiny

MIB = 2**20
_RUN = """
import json, sys
import torch
import streammap
from streammap.output.run import peak_nbytes
before = peak_nbytes()
source, maps, out, options = *sys.argv[1:4], json.loads(sys.argv[4])
lazy = streammap.open(source).remap(maps=maps)
report = lazy.save(out, fsync=False, class_check="never", **options)
print(json.dumps([report.peak_nbytes - before, report.planned_nbytes]))
"""


def write_gpt2(folder: Path, *, embed: int, inner: int, dtype: torch.dtype) -> Path:
    """A GPT-2 of two layers, of random numbers."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (32, embed), "wpe.weight": (16, embed)}
    shapes |= {f"ln_f.{part}": (embed,) for part in ("weight", "bias")}
    for i in range(2):
        sides = {"attn.c_attn": (embed, 3 * embed), "attn.c_proj": (embed, embed)}
        sides |= {"mlp.c_fc": (embed, inner), "mlp.c_proj": (inner, embed)}
        for name, (n_in, n_out) in sides.items():
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.{part}": (embed,) for part in ("weight", "bias")}
    config = {"model_type": "gpt2", "n_embd": embed, "n_inner": inner, "n_head": 2, "n_layer": 2}
    state = {key: x.to(dtype) for key, x in tiny.random(shapes, seed=1).items()}
    return tiny.write(folder, state, {**config, "n_positions": 16, "vocab_size": 32})


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_matrix_of_any_size_takes_the_room_of_a_block() -> None:
    class NotRead:
        def read_into(self, offset: int, view: memoryview) -> None:
            raise AssertionError

    n = 200_000
    matrix = Stored(NotRead(), 0, (n, n), "F32")
    assert matrix.nbytes > 100_000 * MIB
    for kept in (matrix, matrix.transposed()):
        form = graph.map_dims(Held().load(torch.ones(n, 1)), [DenseMap(kept), None])
        fitted = memory.fit([form], budget=48 * MIB, n_workers=None)
        assert fitted.peak_nbytes <= 48 * MIB
        assert memory.fit([form], budget=None, n_workers=2).peak_nbytes < 80 * MIB
    whole = DenseMap(matrices.Held(torch.ones(2048, 2048)))
    form = graph.map_dims(Held().load(torch.ones(2048, 1)), [whole, None])
    assert memory.fit([form], budget=None, n_workers=1).matrices_nbytes == 16 * MIB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bits_depend_on_neither_budget_nor_threads(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small tiles and blocks: several of both, of rows and of columns.
    monkeypatch.setattr(memory, "DENSE_TILE_NBYTES", 2**12)
    monkeypatch.setattr(memory, "DENSE_WORK_NBYTES", 2**14)
    monkeypatch.setattr(matrices, "BLOCK", 2**10)
    monkeypatch.setattr(tile_reads, "STRIP", 8)
    source = write_gpt2(tmp_path / "small", embed=24, inner=96, dtype=dtype)
    given = {"hidden.matrix": random(36, 24), "hidden.reader": random(24, 36, seed=1)}
    file = tmp_path / "maps.safetensors"
    given |= {"mlp.matrix": random(80, 96, seed=2), "heads.matrix": random(3, 2, seed=3)}
    save_file(given, file)
    lazy = streammap.open(source).remap(maps=file)
    found = []
    for name, options in {
        "one": {"memory": "40MiB", "threads": 1},
        "four": {"memory": "1GiB", "threads": 4},
    }.items():
        lazy.save(tmp_path / name, fsync=False, class_check="never", **options)
        found.append((tmp_path / name / "model.safetensors").read_bytes())
    assert found[0] == found[1]
    # A part of a tensor, and one that is asked for alone.
    whole = tiny.written(tmp_path / "one")
    for key in ("h.1.mlp.c_proj.weight", "h.0.attn.c_attn.weight"):
        assert tiny.bits(lazy.read(key)) == tiny.bits(whole[key])
        part = lazy.read(key, region=(slice(5, 31), slice(3, 20)))
        assert tiny.bits(part) == tiny.bits(whole[key][5:31, 3:20].contiguous())


def test_dense_maps_of_dense_maps_are_products_of_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "_HELD", 16)  # what is made of others goes into a file
    source = write_gpt2(tmp_path / "small", embed=8, inner=24, dtype=torch.float64)
    p, q = random(20, 24).double(), random(16, 20, seed=1).double()
    lazy = streammap.open(source)
    for at, matrix in enumerate((p, q)):
        save_file({"mlp.matrix": matrix}, tmp_path / f"{at}.safetensors")
        lazy = lazy.remap(maps=tmp_path / f"{at}.safetensors")
    weight = tiny.written(source)["h.0.mlp.c_proj.weight"]
    wanted = torch.einsum("ij,jk,kl->il", q, p, weight)
    found = lazy.read("h.0.mlp.c_proj.weight")
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_map_larger_than_the_memory_stays_in_it(kind: torch.dtype, tmp_path: Path) -> None:
    source = write_gpt2(tmp_path / "big", embed=64, inner=8192, dtype=torch.float32)
    file = tmp_path / "maps.safetensors"
    save_file({"mlp.matrix": random(4096, 8192).to(kind)}, file)
    assert file.stat().st_size > 128 * MIB
    found = []
    for limit, threads in (("64MiB", 1), ("200MiB", 4)):
        out, options = tmp_path / limit, json.dumps({"memory": limit, "threads": threads})
        said = subprocess.run(
            [sys.executable, "-c", _RUN, str(source), str(file), str(out), options],
            check=True,
            capture_output=True,
            text=True,
        )
        added, planned = json.loads(said.stdout)
        assert added <= planned <= int(limit.removesuffix("MiB")) * MIB
        found.append((out / "model.safetensors").read_bytes())
    assert found[0] == found[1]
