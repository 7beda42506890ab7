"""Derived tensors are read by forms like stored ones, in parts of any size, by any threads."""

import json
import math
import operator
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import final

import pytest
import torch
from torch import Tensor

import streammap
from streammap.analysis import summary
from streammap.api import LazyCheckpoint
from streammap.engine import memory
from streammap.output import fingerprint, layout, run
from streammap.planning import graph, maps
from streammap.planning.derived.elementwise import Elementwise, numbers, totals
from streammap.planning.derived.statistic import BLOCK, N_AHEAD, Statistic
from streammap.planning.graph import FormReader, LinearForm
from streammap.planning.plan import Plan, Step
from tests.support import tiny

ROWS, COLUMNS = 600, 257


@final
@dataclass(frozen=True, eq=False)
class Scaled(Elementwise):
    """a * b / the norm of b: a product, and a number that all of `b` decides."""

    inputs: tuple[LinearForm, ...]
    power: int = 1
    n_passes: int = 2
    norm: Statistic[float, float] = field(init=False)

    def __post_init__(self) -> None:
        n = self.inputs[0].spec.n_elements
        object.__setattr__(self, "norm", Statistic(n, self._block, operator.add, _root))

    @property
    def name(self) -> str:
        return "scaled"

    @property
    def formula(self) -> Mapping[str, object]:
        return {"scaled": self.power}

    def values(self, start: int, parts: Sequence[Tensor], read: FormReader) -> Tensor:
        a, b = parts
        product: Tensor = a * b**self.power / self.norm.get(read)
        return product

    def _block(self, start: int, n: int, read: FormReader) -> float:
        return totals([numbers(self.inputs[1], start, n, read).double() ** 2])[0]


def _root(squares: float, read: FormReader) -> float:
    return math.sqrt(squares)


def expected(a: Tensor, b: Tensor, power: int = 1) -> Tensor:
    made: Tensor = a * b**power / b.double().norm()
    return made


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return tiny.random({"a": (ROWS, COLUMNS), "b": (ROWS, COLUMNS), "c": (COLUMNS,)})


@pytest.fixture(scope="module")
def source(scratch: Path, state: dict[str, Tensor]) -> Path:
    folder = scratch / "source"
    tiny.write(folder, state, {})
    return folder


def planned(source: Path, **targets: LinearForm) -> Plan:
    opened = streammap.open(source).plan
    step = Step("scaled", {}, "approximate", "a test")
    return replace(opened, targets={**opened.targets, **targets}, steps=(step,), request=None)


def form_of(source: Path, key: str) -> LinearForm:
    return streammap.open(source).plan.targets[key]


def test_a_derived_tensor_is_written_read_and_resized_like_any_other(
    tmp_path: Path, source: Path, state: dict[str, Tensor]
) -> None:
    plan = streammap.open(source).plan
    made = graph.derive(Scaled((plan.targets["a"], plan.targets["b"])))
    swap = maps.BlockMap(tuple(((ROWS - 1 - i, 1.0),) for i in range(ROWS)), ROWS, 1)
    targets = {
        "plain": made,
        "turned": graph.map_dims(made, [swap, None]),
        "mixed": graph.combine([(0.5, made), (2.0, plan.targets["a"])]),
        "half": graph.combine([(1.0, made)], dtype="BF16"),
        # Of forms that are computed, one of them derived itself.
        "nested": graph.derive(
            Scaled((graph.map_dims(made, [swap, None]), graph.scale(plan.targets["b"], 3.0)))
        ),
    }
    lazy = LazyCheckpoint(replace(plan, targets={**plan.targets, **targets}, request=None))
    a, b = state["a"], state["b"]
    plain = expected(a, b)
    want = {
        "plain": plain,
        "turned": plain.flip(0),
        "mixed": 0.5 * plain + 2 * a,
        "half": plain.bfloat16(),
        "nested": expected(plain.flip(0), 3 * b),
    }
    lazy.save(tmp_path / "one", memory="64MiB", threads=1, fsync=False)
    lazy.save(tmp_path / "four", threads=4, fsync=False)
    one, four = tiny.written(tmp_path / "one"), tiny.written(tmp_path / "four")
    for key, x in want.items():
        torch.testing.assert_close(
            one[key].float(), x.float(), rtol=1e-2 if key == "half" else 1e-5, atol=1e-6
        )
        assert torch.equal(one[key], four[key]), key
        assert torch.equal(lazy.read(key), one[key]), key
        assert torch.equal(
            lazy.read(key, region=(slice(3, 590), slice(5, 99))), one[key][3:590, 5:99]
        )


def test_all_that_determines_it_is_in_the_fingerprint(source: Path) -> None:
    plan = streammap.open(source).plan
    inputs = plan.targets["a"], plan.targets["b"]

    def digest(made: Scaled) -> str:
        changed = planned(source, x=graph.derive(made))
        shards = layout.arrange(changed.specs, max_shard_nbytes=10**9)
        return fingerprint.of_result(changed, shards, max_shard_nbytes=10**9, version="0").formulas

    assert digest(Scaled(inputs)) == digest(Scaled(inputs))
    assert digest(Scaled(inputs)) != digest(Scaled(inputs, power=2))
    assert digest(Scaled(inputs)) != digest(Scaled(inputs[::-1]))
    assert digest(Scaled(inputs)) != digest(Scaled((graph.scale(inputs[0], 2.0), inputs[1])))


def test_a_plan_names_it_and_counts_what_it_reads(source: Path, state: dict[str, Tensor]) -> None:
    plan = streammap.open(source).plan
    made = graph.derive(Scaled((plan.targets["a"], plan.targets["b"])))
    changed = replace(plan, targets={"x": made})
    nbytes = state["a"].nbytes
    assert run.read_nbytes(changed) == 2 * 2 * nbytes
    assert summary.formula(made, {}) == "scaled"
    assert made.copied is None
    assert {load.key for load in made.loads()} == {"a", "b"}


_PEAK = """
import json, sys, torch
from dataclasses import replace
import streammap
from streammap.api import LazyCheckpoint
from streammap.output.run import peak_nbytes
from streammap.planning import graph
from tests.engine.test_derived import Scaled
before = peak_nbytes()
plan = streammap.open(sys.argv[1]).plan
wte = plan.targets["wte.weight"]
made = Scaled((wte, graph.scale(wte, 0.3)))
lazy = LazyCheckpoint(replace(plan, targets={"x": graph.derive(made, dtype="BF16")}, request=None))
report = lazy.save(sys.argv[2], memory="40MiB", fsync=False)
print(json.dumps([report.peak_nbytes - before, report.planned_nbytes]))
"""


def test_each_thread_has_scratch_of_its_own(source: Path) -> None:
    plan = streammap.open(source).plan
    made = Scaled((plan.targets["a"], plan.targets["b"]))

    def fixed(form: LinearForm, n_workers: int) -> int:
        return memory.fit([form], budget=None, n_workers=n_workers).fixed_nbytes

    for n in (1, 3):
        more = fixed(graph.derive(made), n) - fixed(plan.targets["a"], n)
        assert more >= n * made.scratch_nbytes


def test_memory_is_counted(tmp_path: Path) -> None:
    from tests.engine.test_memory import MIB, write_gpt2

    size = write_gpt2(tmp_path / "big", vocab=60_000, layers=1, dtype="BF16")
    assert size > 40 * MIB
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "big"), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        text=True,
    )
    added, allowed = json.loads(done.stdout)
    assert added <= allowed <= 40 * MIB


def test_a_block_that_fails_is_tried_again_and_nobody_waits_for_ever() -> None:
    calls: list[int] = []

    def of_block(start: int, n: int, read: FormReader) -> int:
        calls.append(start)
        if len(calls) == 2:
            raise OSError("once")
        return n

    def finish(total: int, read: FormReader) -> int:
        calls.append(-1)
        if calls.count(-1) == 1:
            raise OSError("at the end")
        return total

    statistic = Statistic(2 * BLOCK + 5, of_block, operator.add, finish)
    read: FormReader = None  # type: ignore[assignment]
    for match in ("once", "at the end"):
        with pytest.raises(OSError, match=match):
            statistic.get(read)
    assert statistic.get(read) == 2 * BLOCK + 5
    assert statistic.get(read) == 2 * BLOCK + 5
    assert len(calls) == 4 + 2


@pytest.mark.parametrize("in_order", [True, False])
def test_blocks_are_added_in_order_whoever_computes_them(in_order: bool) -> None:
    n_blocks, waiting, most = 60, set[int](), [0]

    def of_block(start: int, n: int, read: FormReader) -> list[int]:
        waiting.add(start)
        most[0] = max(most[0], len(waiting))
        time.sleep(0.002 if start % (4 * BLOCK) == 0 else 0)
        return [start // BLOCK]

    def add(total: list[int], block: list[int]) -> list[int]:
        waiting.discard(block[0] * BLOCK)
        return total + block

    statistic = Statistic(
        n_blocks * BLOCK, of_block, add, lambda total, read: total, in_order=in_order
    )
    with ThreadPoolExecutor(12) as pool:
        read: FormReader = None  # type: ignore[assignment]
        found = list(pool.map(lambda _: statistic.get(read), range(12)))
    assert all(each is found[0] for each in found)
    assert sorted(found[0]) == list(range(n_blocks))
    if in_order:
        assert found[0] == list(range(n_blocks))
        assert most[0] <= N_AHEAD + 1
