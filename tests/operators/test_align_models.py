"""Aligned models of transformers compute what they did, and shuffled copies are found again."""

from pathlib import Path

import pytest
import torch

import streammap
from streammap.planning.ordering import units
from streammap.planning.ordering.search import OrderSearch
from tests.support import truth
from tests.support.truth import Bench

pytest.importorskip("transformers")
pytest.importorskip("scipy.optimize")
pytestmark = pytest.mark.slow
MODELS = (
    ("llama", "llama"),
    ("llama", "qwen2_tied"),
    ("gpt2", "gpt2"),
    ("bert", "bert"),
    ("qwen_moe", "qwen3_moe"),
    ("gemma", "gemma_tied"),
    ("deepseek", "deepseek_v3"),
    ("dbrx", "dbrx"),
    ("gpt_oss", "gpt_oss"),
    ("t5", "t5"),
)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("align"))


@pytest.mark.parametrize(("arch", "name"), MODELS)
def test_a_model_aligned_with_another_computes_the_same(bench: Bench, arch: str, name: str) -> None:
    """Two models that have nothing in common, as their weights are random."""
    model = truth.named(arch, name)
    a, b = (bench.source(model, seed=seed) for seed in (0, 1))
    moved = streammap.open(b).align(a).settled()
    assert moved.promise[0] == "exact"
    assert bench.error(moved, b, model, seed=0) < 1e-9


@pytest.mark.parametrize(("arch", "name"), MODELS)
def test_a_shuffled_copy_is_found_again(bench: Bench, tmp_path: Path, arch: str, name: str) -> None:
    source = bench.source(truth.named(arch, name))
    opened = streammap.open(source)
    signed = any(units.takes_signs(opened.plan.model, axis) for axis in opened.sizes)
    opened.permute(each_layer=True, signed=signed, seed=5).save(tmp_path / "b", fsync=False)
    half = streammap.blend(source, tmp_path / "b", weights=[0.5, 0.5], align=True)
    for key, x in half.tensors():
        torch.testing.assert_close(x, opened.read(key), rtol=0, atol=1e-9)


def test_heads_whose_number_counts_keep_their_order(bench: Bench, tmp_path: Path) -> None:
    """ALiBi's slopes belong to places."""
    source = bench.source(truth.named("bloom", "bloom"))
    planned = streammap.open(source).align(source)
    assert "heads keep their order: " in str(planned.summary())
    assert planned.plan.pending is not None
    (search,) = planned.plan.pending.searches
    assert isinstance(search, OrderSearch)
    assert not any("heads" in one.axes for one in search.movables)
