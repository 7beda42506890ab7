"""Means on the sphere and their like equal those of whole tensors in float64, in any tiles."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.engine import memory
from streammap.errors import StreammapError
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.merging import dots
from streammap.planning.merging.directions import (
    Karcher,
    ModelStock,
    MultiSlerp,
    NuSlerp,
    Rule,
    Slerp,
)
from tests.planning.merging import dense
from tests.support import tiny

WEIGHTS = (0.7, 0.5, 0.1)
SHAPES = {"wide": (300, 401), "long": (3, 70_000), "deep": (3, 40, 50), "bias": (500,)}
ROWS = [key for key in SHAPES if key != "bias"]


def near(key: str) -> Tensor:
    """A base and three tensors that are neither parallel nor orthogonal [4, ...]."""
    source = torch.Generator().manual_seed(len(key))
    base = torch.randn(SHAPES[key], generator=source)
    noise = [torch.randn(SHAPES[key], generator=source) for _ in range(4)]
    common = noise[3]
    return torch.stack([base, *(base + 0.5 * (n + common) for n in noise[:3])])


@pytest.fixture(scope="module")
def states() -> dict[str, Tensor]:
    return {key: near(key) for key in SHAPES}


@pytest.fixture(scope="module")
def source(scratch: Path, states: dict[str, Tensor]) -> Path:
    folder = scratch / "models"
    state = {f"{key}.{i}": x for key, each in states.items() for i, x in enumerate(each)}
    tiny.write(folder, state, {})
    return folder


def forms_of(source: Path, key: str) -> list[LinearForm]:
    """The base first."""
    targets = streammap.open(source).plan.targets
    return [targets[f"{key}.{i}"] for i in range(4)]


def lazy_of(source: Path, targets: Mapping[str, LinearForm]) -> LazyCheckpoint:
    plan = streammap.open(source).plan
    return LazyCheckpoint(replace(plan, targets=dict(targets), request=None))


CASES: dict[str, tuple[Rule, bool, int, dots.By, Callable[[Tensor], Tensor]]] = {
    "slerp": (Slerp(0.3), False, 2, "whole", lambda x: dense.slerp(x, 0.3)),
    "slerp beyond": (Slerp(1.4), False, 2, "whole", lambda x: dense.slerp(x, 1.4)),
    "nuslerp": (NuSlerp((1.0, 3.0)), False, 2, "whole", lambda x: dense.nuslerp(x, 0.75)),
    "nuslerp base": (NuSlerp((1.0, 3.0)), True, 2, "whole", lambda x: dense.nuslerp(x, 0.75)),
    "nuslerp rows": (NuSlerp((1.0, 3.0)), True, 2, "rows", lambda x: dense.nuslerp(x, 0.75, -1)),
    "nuslerp columns": (
        NuSlerp((1.0, 3.0)),
        False,
        2,
        "columns",
        lambda x: dense.nuslerp(x, 0.75, 0),
    ),
    "multislerp": (
        MultiSlerp(WEIGHTS),
        False,
        3,
        "whole",
        lambda x: dense.multislerp(x, torch.tensor(WEIGHTS, dtype=torch.float64)),
    ),
    "multislerp base": (
        MultiSlerp(WEIGHTS),
        True,
        3,
        "whole",
        lambda x: dense.multislerp(x, torch.tensor(WEIGHTS, dtype=torch.float64)),
    ),
    "karcher": (Karcher(100, 1e-13), False, 3, "whole", dense.karcher),
    "model stock": (ModelStock(), True, 3, "whole", dense.model_stock),
    "model stock rows": (
        ModelStock(),
        True,
        3,
        "rows",
        lambda x: dense.model_stock(x, rows=True),
    ),
}


@pytest.fixture(scope="module")
def merged(source: Path) -> LazyCheckpoint:
    """All cases of all tensors."""
    targets = {}
    for case, (rule, has_base, n, by, _) in CASES.items():
        for key in SHAPES:
            base, *models = forms_of(source, key)
            if not (by == "columns" and key == "long"):
                made = dots.derive(key, rule, models[:n], base if has_base else None, by=by)
                targets[f"{key} {case}"] = made
    return lazy_of(source, targets)


def test_each_equals_the_same_on_whole_tensors(
    merged: LazyCheckpoint, states: dict[str, Tensor], tmp_path: Path
) -> None:
    merged.save(tmp_path / "one", threads=1, memory="48MiB", fsync=False)
    merged.save(tmp_path / "four", threads=4, fsync=False)
    one, four = tiny.written(tmp_path / "one"), tiny.written(tmp_path / "four")
    for name, found in one.items():
        key, case = name.split(maxsplit=1)
        _, has_base, n, _, oracle = CASES[case]
        x = states[key].double()
        origin = x[0] if has_base else torch.zeros_like(x[0])
        expected = origin + oracle(x[1 : n + 1] - origin)
        # Rounded once from float64, but for the last bits of that.
        torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=1e-9, msg=name)
        assert (found == expected.float()).double().mean() > 0.999, name
        assert torch.equal(found, four[name]), name


def test_any_part_has_the_bits_of_the_whole(merged: LazyCheckpoint) -> None:
    for case in ("slerp", "nuslerp rows", "nuslerp columns"):
        key = f"wide {case}"
        whole = merged.read(key)
        part = merged.read(key, region=(slice(7, 250), slice(11, 390)))
        assert torch.equal(part, whole[7:250, 11:390])


def test_parallel_opposite_and_zero_tensors_have_a_mean_or_none_is_told(tmp_path: Path) -> None:
    x = torch.randn(50, 60, generator=torch.Generator().manual_seed(0))
    tiny.write(tmp_path, {"x": x, "y": 2 * x, "z": -x, "0": torch.zeros_like(x)}, {})
    plan = streammap.open(tmp_path).plan

    def made(rule: Rule, *keys: str) -> Tensor:
        form = dots.derive("it", rule, [plan.targets[key] for key in keys])
        return lazy_of(tmp_path, {"it": form}).read("it")

    close = torch.testing.assert_close
    for rule in (Slerp(0.25), NuSlerp((3, 1)), MultiSlerp((3, 1)), Karcher()):
        assert torch.equal(made(rule, "x", "x"), x) or rule.name in ("multislerp", "karcher")
        close(made(rule, "x", "x"), x)
    for straight in (Slerp(0.25), NuSlerp((3, 1))):
        close(made(straight, "x", "y"), 1.25 * x)
        close(made(straight, "x", "z"), 0.5 * x)
    close(made(Slerp(0.5), "x", "0"), 0.5**0.5 * x)
    close(made(MultiSlerp((1, 1)), "x", "z"), torch.zeros_like(x))
    close(made(Karcher(), "x", "0"), 0.5 * x)
    close(made(Karcher(), "0", "0"), torch.zeros_like(x))
    assert made(Karcher(), "x", "z").isfinite().all()
    with pytest.raises(StreammapError, match="it: multislerp: its directions cancel out"):
        made(MultiSlerp((1, 1, 1, 1)), "x", "x", "z", "z")


def test_numbers_that_are_not_finite_are_told_by_name(tmp_path: Path) -> None:
    x = torch.randn(50, 60)
    x[7, 3] = torch.nan
    tiny.write(tmp_path, {"a": x, "b": torch.ones(50, 60)}, {})
    targets = streammap.open(tmp_path).plan.targets
    form = dots.derive("it", Slerp(0.5), [targets["a"], targets["b"]])
    with pytest.raises(StreammapError, match="it: slerp asks for norms"):
        lazy_of(tmp_path, {"it": form}).read("it")


def test_too_many_columns_are_refused_before_anything_is_read(source: Path) -> None:
    _, *models = forms_of(source, "long")
    with pytest.raises(StreammapError, match="by columns, of which it has 70000"):
        dots.derive("long", NuSlerp((1, 1)), models[:2], by="columns")


@pytest.mark.parametrize("scale", [1.0, 2.0**124])
def test_half_precision_is_the_nearest_but_next_to_ties(tmp_path: Path, scale: float) -> None:
    """In float32, or in float64 where float32 has no room for squares."""
    a, b = (near("wide")[i].mul(scale).bfloat16() for i in (1, 2))
    tiny.write(tmp_path, {"a": a, "b": b}, {})
    targets = streammap.open(tmp_path).plan.targets
    forms = [targets["a"], targets["b"]]
    form = dots.derive("a", Slerp(0.3), forms)
    assert form.spec.dtype == "BF16"
    exact = dense.slerp(torch.stack([a, b]).double(), 0.3)
    half = torch.exp2(torch.frexp(exact).exponent - 9)
    error = (lazy_of(tmp_path, {"a": form}).read("a").double() - exact).abs()
    assert bool((error <= half + 2.0**-22 * (a.double().abs() + b.double().abs())).all())
    for wide in (dots.derive("a", Slerp(0.3), forms, dtype="F32"), graph.cast(form, "F32")):
        found = lazy_of(tmp_path, {"a": wide}).read("a")
        torch.testing.assert_close(found, exact.float(), rtol=1e-7, atol=0)


def test_terms_that_float32_has_no_room_for_add_up_in_float64(tmp_path: Path) -> None:
    """Of tensors that are nearly opposite, each counts twice and more."""
    torch.manual_seed(0)
    a = torch.randn(300, 100).clamp(-3, 3)
    b = 0.1 * torch.randn(300, 100).clamp(-3, 3) - a
    x = torch.stack([a, b]).mul(2.0**126 / 3).bfloat16()
    tiny.write(tmp_path, {"a": x[0], "b": x[1]}, {})
    targets = streammap.open(tmp_path).plan.targets
    form = dots.derive("a", Slerp(0.5), [targets["a"], targets["b"]])
    exact = dense.slerp(x.double(), 0.5)
    found = lazy_of(tmp_path, {"a": form}).read("a").double()
    assert bool(((found - exact).abs() <= 2.0**-8 * exact.abs()).all())


def test_small_calls_take_one_thread_where_most_is_computed_by_them(source: Path) -> None:
    _, a, b, c = forms_of(source, "wide")
    blended = dots.derive("a", Slerp(0.3), [a, b])
    assert memory.fit([blended], budget=None, n_workers=None).n_workers == 1
    assert memory.fit([blended, a, b, c], budget=None, n_workers=None).n_workers > 1
    assert memory.fit([blended], budget=None, n_workers=4).n_workers == 4
