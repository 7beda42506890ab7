"""The maps of gradients, against gradients that autograd finds before and after a change."""

from pathlib import Path

import pytest

import streammap
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.tools.spec_proof import tiny_models
from tests.support import optimized, truth
from tests.support.typed import Options

pytest.importorskip("transformers")

FAST = (
    ("llama", "granite_swa", {"width": 2}),
    ("gpt2", "gpt2", {"width": 2}),
    ("gemma", "gemma_tied", {"width": 2}),
)
EXACT = 1e-9


def grown(folder: Path, model: TinyModel, options: Options) -> float:
    """How far carried gradients are from those of the grown model: largest relative difference."""
    tiny_models.build(model, folder / "source")
    found = optimized.gradients(folder / "source", model)
    optimized.keep_gradients(folder / "source", found)
    lazy = streammap.open(folder / "source").decoalesce(**options)
    promise, reason = lazy.promise
    if promise != "exact" or "takes one of them" in reason:
        pytest.skip(f"the gradients are not those of the copies alone: {reason}")
    lazy.carry_optimizer().save(folder / "grown", fsync=False)
    state = optimized.written(folder / "grown")
    wanted = optimized.gradients(folder / "grown", model)
    assert list(state) == list(wanted), "the order of the class's own parameters"
    worst = 0.0
    # Of biases of keys the gradient is 0 but for rounding, as a softmax does not see them.
    noise = 1e-3 * max(float(gradient.abs().max()) for gradient in wanted.values())
    for name in state:
        gradient = wanted[name]
        largest = max(float(gradient.abs().max()), noise)
        mean, square = state[name]["exp_avg"], state[name]["exp_avg_sq"]
        worst = max(worst, float((mean - gradient).abs().max()) / largest)
        worst = max(worst, float((square - gradient**2).abs().max()) / largest**2)
        assert state[name]["step"] == 3
    return worst


@pytest.mark.parametrize(("arch", "name", "options"), FAST)
def test_gradients_of_a_grown_model_are_the_mapped_ones(
    arch: str, name: str, options: Options, tmp_path: Path
) -> None:
    assert grown(tmp_path, truth.named(arch, name), options) < EXACT


def cases() -> list[object]:
    """A model of each spec, widened, and its experts copied where it has some."""
    found: list[object] = []
    for arch in registry.names():
        for model in registry.tiny_models(arch)[:1]:
            if model.shapes_only or model.class_name.startswith("timm") or arch == "rwkv":
                continue  # rwkv changes tensors in place, so that autograd fails
            growths: list[Options] = [{"width": 2}]
            growths += [{"experts": 2}] if registry.load(arch, model.config).experts else []
            found += (pytest.param(model, one, id=f"{arch}-{next(iter(one))}") for one in growths)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("model", "options"), cases())
def test_gradients_of_every_spec_s_model(
    model: TinyModel, options: Options, tmp_path: Path
) -> None:
    try:
        assert grown(tmp_path, model, options) < EXACT
    except PlanError as error:
        if "gives no logits" not in error.message and "has no experts" not in error.message:
            raise
        pytest.skip(error.message)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"head_dim": 24}, {"mlp": "to:130"}])
def test_gradients_of_other_growth(options: Options, tmp_path: Path) -> None:
    assert grown(tmp_path, truth.named("llama", "llama"), options) < EXACT
