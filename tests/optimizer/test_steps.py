"""A step of the result is the result of a step: AdamW before and after, in strict float64."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

import streammap
from streammap.architectures.schema import TinyModel
from streammap.planning.optimizer.steps import StepFactors
from streammap.tools.spec_proof import tiny_models
from tests.support import optimized, tiny, truth
from tests.support.typed import Options

pytest.importorskip("transformers")

LR, DECAY, EPS = 1e-2, 0.1, 1e-3
CASES = (
    pytest.param("llama", "granite_swa", {"width": 2}, id="llama-gqa"),
    pytest.param("gpt2", "gpt2", {"width": 2}, id="gpt2-tied", marks=pytest.mark.slow),
    pytest.param("qwen_moe", "qwen3_moe", {"width": 2}, id="qwen3_moe", marks=pytest.mark.slow),
    pytest.param("qwen_moe", "qwen3_moe", {"experts": 2}, id="experts", marks=pytest.mark.slow),
    pytest.param("gemma", "gemma3_text", {"width": 3}, id="gemma", marks=pytest.mark.slow),
)


def trained(folder: Path, model: TinyModel, n: int, out: Path) -> None:
    """The model after n further steps of AdamW, with its optimizer's state."""
    with tiny_models.training(folder, model, score=optimized.score) as (net, loss):
        optimizer = torch.optim.AdamW(
            net.named_parameters(), lr=LR, weight_decay=DECAY, eps=EPS, foreach=False
        )
        if (folder / optimized.FILE).exists():
            optimizer.load_state_dict(torch.load(folder / optimized.FILE))
        optimized.train(optimizer, loss, n)
        tiny_models.save(net, out)
        torch.save(optimizer.state_dict(), out / optimized.FILE)


def one_step(folder: Path, model: TinyModel, factors: Mapping[str, StepFactors]) -> tiny.State:
    """The parameters of a result after one step by the stated rule."""
    state = optimized.written(folder)
    with tiny_models.training(folder, model, score=optimized.score) as (net, loss):
        groups = [_group(name, p, factors[name]) for name, p in net.named_parameters()]
        optimizer = torch.optim.AdamW(groups, foreach=False)
        for name, p in net.named_parameters():
            optimizer.state[p] = dict(state[name])
        optimized.train(optimizer, loss, 1)
        return {name: p.detach().clone() for name, p in net.named_parameters()}


def _group(name: str, p: nn.Parameter, by: StepFactors) -> dict[str, object]:
    options = {"lr": LR * by.lr, "eps": EPS * by.eps, "weight_decay": DECAY * by.weight_decay}
    return {"params": [p], **options}


@pytest.mark.parametrize(("arch", "name", "options"), CASES)
def test_a_step_of_the_grown_model_is_the_grown_step(
    arch: str, name: str, options: Options, tmp_path: Path
) -> None:
    model = truth.named(arch, name)
    tiny_models.build(model, tmp_path / "fresh")
    trained(tmp_path / "fresh", model, 4, tmp_path / "small")
    trained(tmp_path / "small", model, 1, tmp_path / "later")
    lazy = streammap.open(tmp_path / "small").decoalesce(**options).carry_optimizer()
    lazy.save(tmp_path / "grown", fsync=False)
    found = one_step(tmp_path / "grown", model, lazy.step_factors)

    streammap.decoalesce(tmp_path / "later", tmp_path / "wanted", fsync=False, **options)
    with tiny_models.training(tmp_path / "wanted", model, score=optimized.score) as (net, _):
        for key, p in net.named_parameters():
            error = float((found[key] - p).abs().max() / p.abs().max())
            assert error < 1e-10, (key, error)
