"""Trimmed and elected differences equal those of whole tensors, bit for bit in any tiles."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.errors import StreammapError
from streammap.output.run import read_nbytes
from streammap.planning.derived import random_numbers
from streammap.planning.derived.statistic import BLOCK
from streammap.planning.graph import FormReader, LinearForm
from streammap.planning.merging import selection, task_vectors
from streammap.planning.merging.selection import Cut, Selection, chosen, patterns
from streammap.planning.merging.task_vectors import TaskRule
from streammap.planning.merging.trimming import Trim
from tests.planning.merging import dense
from tests.support import tiny

WEIGHTS = (0.7, 0.5, -0.1)
TENSOR = torch.tensor(WEIGHTS, dtype=torch.float64)
ROWS, COLUMNS = 391, 401


def models(dtype: torch.dtype) -> Tensor:
    """A base and three models; in half precision many differences are equal [4, ...]."""
    source = torch.Generator().manual_seed(1)
    base = torch.randn(ROWS, COLUMNS, generator=source)
    x = torch.stack([base] * 4)
    x[1:] += 0.1 * torch.randn(3, ROWS, COLUMNS, generator=source)
    return x.to(dtype)


def opened(folder: Path, x: Tensor) -> tuple[LinearForm, Sequence[LinearForm]]:
    tiny.write(folder, {str(i): each for i, each in enumerate(x)}, {})
    targets = streammap.open(folder).plan.targets
    return targets["0"], [targets[str(i)] for i in range(1, len(x))]


def lazy_of(folder: Path, **targets: LinearForm) -> LazyCheckpoint:
    plan = streammap.open(folder).plan
    return LazyCheckpoint(replace(plan, targets=targets, request=None))


def rules() -> dict[str, TaskRule]:
    def trims(kind: str, **options: float) -> tuple[Trim, ...]:
        densities = (0.5, 0.2, 1.0)
        return tuple(Trim(kind, d, **options) for d in densities)  # type: ignore[arg-type]

    largest, outliers = trims("magnitude"), trims("outliers", gamma=0.02)
    return {
        "ties": TaskRule("ties", WEIGHTS, largest, "sum", normalize=True),
        "ties_count": TaskRule("ties", WEIGHTS, largest, "count", scale=0.5),
        "ties_rescale": TaskRule("ties", WEIGHTS, largest, "sum", normalize=True, rescale=True),
        "breadcrumbs": TaskRule("breadcrumbs", WEIGHTS, outliers),
        "breadcrumbs_ties": TaskRule("breadcrumbs_ties", WEIGHTS, outliers, "sum"),
        "dare_ties": TaskRule("dare_ties", WEIGHTS, trims("random"), "sum", rescale=True, seed=3),
        "dare_linear": TaskRule("dare_linear", WEIGHTS, trims("random"), normalize=True, seed=3),
        "della": TaskRule(
            "della", WEIGHTS, trims("ranks", epsilon=0.1), "sum", normalize=True, rescale=True
        ),
        "task_arithmetic": TaskRule("task_arithmetic", WEIGHTS, normalize=True),
    }


def expected(rule: TaskRule, key: str, x: Tensor) -> Tensor:
    low = x[1:].float() - x[0].float()
    made = x[1:].double() - x[0].double()
    n = ROWS * COLUMNS
    for i, trim in enumerate(rule.trims):
        if trim.density == 1:
            continue
        factor: float | Tensor = 1.0
        if trim.kind in ("random", "ranks"):
            p = torch.full((ROWS, COLUMNS), trim.density, dtype=torch.float64)
            if trim.kind == "ranks":
                ranks = low[i].abs().argsort(dim=1, stable=True).argsort(1).double()
                spread = 2 * trim.epsilon * ranks / (COLUMNS - 1)
                p = trim.density - trim.epsilon + spread
            left = random_numbers.words(rule.seed, f"{key} {i}", 0, n).view(p.shape) < p * 2**32
            factor = 1 / p if rule.rescale else 1.0
        elif trim.kind == "magnitude":
            left = dense.kept(low[i], int(trim.density * n))
        else:
            n_left, n_top = int(trim.density * n), int(trim.gamma * n)
            lowest = n - max(0, n - n_left - n_top)
            left = dense.kept(low[i], lowest) & ~dense.kept(low[i], lowest - n_left)
        if rule.rescale and trim.is_sorted:
            factor = float(low[i].double().abs().sum() / (low[i] * left).double().abs().sum())
        made[i] *= left.double() * factor
    if rule.elect is not None:
        by_count = rule.elect == "count"
        mixed = dense.agreed(made, TENSOR, normalize=rule.normalize, by_count=by_count)
    else:
        mixed = (made * TENSOR[:, None, None]).sum(0) / (TENSOR.sum() if rule.normalize else 1)
    return x[0].double() + rule.scale * mixed


@pytest.mark.parametrize(
    ("dtype", "names"),
    [(torch.float32, list(rules())), (torch.bfloat16, ["ties", "breadcrumbs", "della"])],
)
def test_each_equals_the_same_on_whole_tensors(
    tmp_path: Path, dtype: torch.dtype, names: Sequence[str]
) -> None:
    x, chosen_rules = models(dtype), {name: rules()[name] for name in names}
    base, forms = opened(tmp_path / "models", x)
    targets = {
        name: task_vectors.derive("w", rule, forms, base, dtype="F32")
        for name, rule in chosen_rules.items()
    }
    lazy = lazy_of(tmp_path / "models", **targets)
    lazy.save(tmp_path / "one", threads=1, memory="48MiB", fsync=False)
    lazy.save(tmp_path / "four", threads=4, fsync=False)
    one, four = tiny.written(tmp_path / "one"), tiny.written(tmp_path / "four")
    for name, rule in chosen_rules.items():
        want = expected(rule, "w", x)
        torch.testing.assert_close(one[name], want.float(), rtol=2e-7, atol=1e-9, msg=name)
        assert torch.equal(one[name], four[name]), name
    for name in ("ties", "della"):
        part = lazy.read(name, region=(slice(7, 300), slice(11, 399)))
        assert torch.equal(part, one[name][7:300, 11:399])


def test_float64_is_compared_in_all_its_digits(tmp_path: Path) -> None:
    x = torch.zeros(3, 4, 100, dtype=torch.float64)
    x[1] = (
        1 + torch.arange(400, dtype=torch.float64).view(4, 100) * 2.0**-50
    )  # one number in float32
    x[2, 0, :3] = 1.0
    base, forms = opened(tmp_path, x)
    rule = TaskRule("ties", (1.0, 2.0), (Trim("magnitude", 0.25), Trim("magnitude", 0.5)))
    made = lazy_of(tmp_path, x=task_vectors.derive("x", rule, forms, base)).read("x")
    want = x[1].clone()
    want[:3] = 0
    want[0, :3] += 2
    assert torch.equal(made, want)


@pytest.mark.parametrize("most", [0, 99, 4096])
@pytest.mark.parametrize(
    ("density", "n_left"), [(0.0, 0), (1e-9, 1), (0.3, 30), (0.999, 99), (1.0, 100), (1.5, 100)]
)
def test_as_many_as_asked_are_left_and_equal_ones_by_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, density: float, n_left: int, most: int
) -> None:
    """Whether they are collected and sorted, or cut at a place."""
    monkeypatch.setattr(selection, "_MAX_COLLECTED", most)
    x = torch.stack([torch.zeros(100), torch.ones(100)])
    base, forms = opened(tmp_path, x)
    rule = TaskRule("ties", (1.0,), (Trim("magnitude", density),))
    made = lazy_of(tmp_path, x=task_vectors.derive("x", rule, forms, base)).read("x")
    assert made.tolist() == [1.0] * n_left + [0.0] * (100 - n_left)


class _NoReader:
    """Of what is given without forms."""

    def __init__(self) -> None:
        self.kept: dict[object, object] = {}

    def __call__(self, form: LinearForm, start: int, view: memoryview) -> None:
        raise AssertionError(form)


@pytest.mark.parametrize("most", [0, 50, 4096])
def test_the_largest_are_those_of_a_sorted_tensor(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Blocks of 2**14 numbers, many of them equal."""
    monkeypatch.setattr(selection, "_MAX_COLLECTED", most)
    n, source = 2**15 + 77, torch.Generator().manual_seed(3)
    x = torch.stack([torch.randn(n, generator=source), torch.randn(n, generator=source).bfloat16()])
    counts = [[1, n // 3, n], [n // 2, 5000]]

    def given(start: int, size: int, read: FormReader) -> list[Tensor]:
        return [patterns(each[start : start + size]) for each in x]

    found = Selection(n, given, counts, n_bits=31, block=BLOCK).cuts(_NoReader())
    for each, ends, wanted in zip(x, found, counts, strict=True):
        order = each.abs().argsort(descending=True, stable=True)
        for cut, count in zip(ends, wanted, strict=True):
            left = chosen(patterns(each), cut, 0)
            assert left.nonzero().view(-1).tolist() == order[:count].sort().values.tolist()


def test_a_cut_takes_equal_numbers_up_to_its_place() -> None:
    x = torch.tensor([2.0, -3.0, 3.0, 1.0, -3.0])
    cut = Cut(int(patterns(torch.tensor([3.0]))[0]), 12)
    for start in range(8, 16):
        found = chosen(patterns(x), cut, start)
        assert found.tolist() == [x[i].abs() == 3 and start + i < 12 for i in range(5)]


def test_random_numbers_are_of_the_seed_the_key_and_the_model(tmp_path: Path) -> None:
    x = models(torch.float32)
    base, forms = opened(tmp_path, x)
    rule = TaskRule("dare_linear", (1.0,), (Trim("random", 0.3),), rescale=True, seed=1)
    targets = {
        "a": task_vectors.derive("a", rule, forms[:1], base),
        "same": task_vectors.derive("a", rule, forms[:1], base),
        "key": task_vectors.derive("b", rule, forms[:1], base),
        "seed": task_vectors.derive("a", replace(rule, seed=2), forms[:1], base),
    }
    lazy = lazy_of(tmp_path, **targets)
    made = {key: lazy.read(key) for key in targets}
    assert torch.equal(made["a"], made["same"])
    for key in ("key", "seed"):
        both = (made[key] != x[0]) & (made["a"] != x[0])
        assert abs(float(both.double().mean()) - 0.09) < 0.01  # independent
    left = made["a"] != x[0]
    assert abs(float(left.double().mean()) - 0.3) < 0.01
    want = x[0].double() + (x[1].double() - x[0].double()) / 0.3
    torch.testing.assert_close(made["a"][left], want.float()[left], rtol=1e-6, atol=1e-7)


def test_what_is_read_again_is_counted(tmp_path: Path) -> None:
    x = models(torch.bfloat16)
    base, forms = opened(tmp_path, x)
    once = x.nbytes
    for name, n_passes in [("ties", 5), ("ties_rescale", 6), ("dare_ties", 1), ("della", 2)]:
        form = task_vectors.derive("w", rules()[name], forms, base)
        plan = lazy_of(tmp_path, w=form).plan
        assert read_nbytes(plan) == n_passes * once


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StreammapError, match="probabilities from"):
        Trim("ranks", 0.1, epsilon=0.15)
    base, forms = opened(tmp_path, torch.zeros(2, 2**20 + 1))
    rule = TaskRule("della", (1.0,), (Trim("ranks", 0.5),))
    with pytest.raises(StreammapError, match="bias: della sorts rows, of 1048577 numbers here"):
        task_vectors.derive("bias", rule, forms, base)
