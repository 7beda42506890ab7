"""Products of thin matrices are what dense float64 gives, in any parts, for any threads."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.io.dtypes import TensorSpec
from streammap.planning import graph
from streammap.planning.derived import low_rank
from streammap.planning.derived.low_rank import Factor, LowRank, Product
from streammap.planning.derived.row_norms import RowsOfLength
from streammap.planning.graph import LinearForm
from tests.support import tiny

ROWS, COLUMNS, RANK = 300, 1030, 5


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    shapes = {"w": (ROWS, COLUMNS), "a": (RANK, COLUMNS), "b": (ROWS, RANK), "m": (ROWS,)}
    stacks = {"stack": (3, 40, 70), "up": (3 * RANK, 70), "down": (40, RANK * 3)}
    return tiny.random(shapes | stacks)


@pytest.fixture(scope="module")
def source(scratch: Path, state: dict[str, Tensor]) -> Path:
    return tiny.write(scratch / "source", state, {})


def forms(source: Path) -> dict[str, LinearForm]:
    return dict(streammap.open(source).plan.targets)


def outer(form: LinearForm, n: int, rank: int, stack: int = 1, i: int = 0) -> Factor:
    return Factor(form, n, rank, i, rank * stack, stack)


def inner(form: LinearForm, n: int, rank: int, i: int = 0) -> Factor:
    return Factor(form, n, rank, i * rank * n, 1, n)


def of(spec: TensorSpec, *products: Product, precise: bool = False) -> LowRank:
    *_, n_rows, n_columns = spec.shape
    return LowRank(spec, n_rows, n_columns, products, precise)


def lazy(source: Path, **targets: LinearForm) -> LazyCheckpoint:
    plan = streammap.open(source).plan
    return LazyCheckpoint(replace(plan, targets=targets, request=None))


def test_a_product_is_the_dense_one(source: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    f = forms(source)
    b, a = outer(f["b"], ROWS, RANK), inner(f["a"], COLUMNS, RANK)
    wide, tall = TensorSpec("F32", (ROWS, COLUMNS)), TensorSpec("F32", (COLUMNS, ROWS))
    two = TensorSpec("F32", (2 * ROWS, COLUMNS))
    made = lazy(
        source,
        plain=graph.derive(of(wide, Product(b, a, 0.3), precise=True)),
        turned=graph.derive(of(tall, Product(a, b, 0.3))),
        twice=graph.derive(of(wide, Product(b, a, 0.3), Product(b, a, -2.0))),
        placed=graph.derive(of(two, Product(b, a, 1.0, row=7))),
    )
    made.save(tmp_path / "one", threads=1, memory="64MiB", fsync=False)
    made.save(tmp_path / "four", threads=4, fsync=False)
    one, four = tiny.written(tmp_path / "one"), tiny.written(tmp_path / "four")
    product = state["b"].double() @ state["a"].double()
    placed = torch.zeros(2 * ROWS, COLUMNS, dtype=torch.float64)
    placed[7 : 7 + ROWS] = product
    assert torch.equal(one["plain"], (0.3 * product).float())
    for key, want in {"turned": 0.3 * product.T, "twice": -1.7 * product, "placed": placed}.items():
        torch.testing.assert_close(one[key].double(), want, rtol=1e-5, atol=1e-5)
    for key in one:
        assert torch.equal(one[key], four[key])
        assert torch.equal(one[key], made.read(key))
        region = made.read(key, region=(slice(3, 200), slice(17, 290)))
        assert torch.equal(region, one[key][3:200, 17:290])


def test_a_stack_has_a_product_for_each_expert(source: Path, state: dict[str, Tensor]) -> None:
    f, spec = forms(source), TensorSpec("F32", (3, 40, 70))
    made = of(
        spec,
        *(
            Product(outer(f["down"], 40, RANK, 3, e), inner(f["up"], 70, RANK, e), 2.0, e)
            for e in (0, 2)
        ),
    )
    found = lazy(source, x=graph.combine([(1.0, f["stack"]), (1.0, graph.derive(made))])).read("x")
    a = state["up"].double().reshape(3, RANK, 70)
    b = state["down"].double().reshape(40, RANK, 3)
    delta = 2.0 * torch.einsum("ore,eri->eoi", b, a)
    delta[1] = 0.0
    torch.testing.assert_close(found.double(), state["stack"] + delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rank", "columns"), [(1, 7), (33, 300_000), (700, 300), (9000, 20)])
def test_bands_and_panels_of_any_size(tmp_path: Path, rank: int, columns: int) -> None:
    """Very wide rows, large ranks: panels are cut, and right factors not kept."""
    state = tiny.random({"a": (rank, columns), "b": (6, rank)}, seed=rank)
    source = tiny.write(tmp_path / "source", state, {})
    f, spec = forms(source), TensorSpec("F32", (6, columns))
    product = Product(outer(f["b"], 6, rank), inner(f["a"], columns, rank), 1.0)
    found = lazy(source, x=graph.derive(of(spec, product))).read("x")
    want = state["b"].double() @ state["a"].double()
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-4 * rank**0.5)


def test_rows_get_their_lengths(source: Path, state: dict[str, Tensor]) -> None:
    f = forms(source)
    made = graph.derive(RowsOfLength(f["w"], f["m"]))
    found = lazy(source, x=made).read("x")
    w = state["w"].double()
    want = w * (state["m"].double() / w.norm(dim=1))[:, None]
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(lazy(source, x=made).read("x", region=slice(77, 80)), found[77:80])


def test_a_band_is_read_once_for_neighbours(monkeypatch: pytest.MonkeyPatch, source: Path) -> None:
    """Parts that are asked for one after the other do not compute their band again."""
    calls: list[int] = []
    compute = low_rank.LowRank._add

    def count(self: LowRank, *args: object) -> None:
        calls.append(1)
        compute(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(low_rank.LowRank, "_add", count)
    f, spec = forms(source), TensorSpec("F32", (ROWS, COLUMNS))
    product = Product(outer(f["b"], ROWS, RANK), inner(f["a"], COLUMNS, RANK), 1.0)
    lazy(source, x=graph.derive(of(spec, product))).read("x")
    assert len(calls) == -(-ROWS // (2**17 // COLUMNS))


_PEAK = """
import json, sys
import torch
import streammap
from streammap.output.run import peak_nbytes
before = peak_nbytes()
lazy = streammap.open(sys.argv[1] + "/model+" + sys.argv[1] + "/adapter")
report = lazy.save(sys.argv[1] + "/out", memory=sys.argv[2], fsync=False)
print(json.dumps([report.peak_nbytes - before, report.planned_nbytes]))
"""


@pytest.mark.parametrize(
    ("rank", "dtype"), [(16, "BF16"), pytest.param(300, "F32", marks=pytest.mark.slow)]
)
def test_memory_is_counted(tmp_path: Path, rank: int, dtype: str) -> None:
    """A wide weight, and one of a large rank; neither the weight nor the product is ever whole."""
    from tests.engine.test_memory import MIB

    torch_dtype = {"BF16": torch.bfloat16, "F32": torch.float32}[dtype]
    shape = (6000, 11_000) if dtype == "BF16" else (9000, 2500)
    state = {"up.weight": torch.ones(shape, dtype=torch_dtype)}
    tiny.write(tmp_path / "model", state, None)
    names = itertools.product(("lora_A", "lora_B"))
    sizes = {"lora_A": (rank, shape[1]), "lora_B": (shape[0], rank)}
    adapter = {f"base_model.model.up.{n}.weight": torch.ones(sizes[n]) for (n,) in names}
    tiny.adapter(tmp_path / "adapter", adapter, r=rank, lora_alpha=1)
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path), "64MiB"],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    added, planned = json.loads(done.stdout)
    assert added <= planned <= 64 * MIB
    found = streammap.open(tmp_path / "out").read("up.weight", region=slice(70, 71))
    assert bool((found == 2.0).all())
