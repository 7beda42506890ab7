"""The maps of gradients, against gradients that autograd finds before and after a change."""

from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.tools.spec_proof import tiny_models
from tests.support import optimized, tiny, truth
from tests.support.typed import Options

pytest.importorskip("transformers")

FAST = (
    ("llama", "granite_swa", {"width": 2}),
    ("gpt2", "gpt2", {"width": 2}),
    ("gemma", "gemma_tied", {"width": 2}),
)
OTHERS = (
    {"head_dim": 24},
    {"mlp": "to:130"},
    {"kv_heads": 4, "heads": 4, "mlp": 4, "split": "0.4,0.3,0.2,0.1"},
    {"heads": 2, "mlp": 2, "split": 0.7},
)
EXACT = 1e-9
Operation = Callable[[LazyCheckpoint], LazyCheckpoint]


def grown(folder: Path, model: TinyModel, options: Options) -> float:
    """How far carried gradients are from those of the grown model."""
    return carried(folder, model, lambda lazy: lazy.decoalesce(**options))


def both(
    folder: Path, model: TinyModel, operation: Operation
) -> tuple[optimized.StateDict, dict[str, Tensor]]:
    """The carried state of a result whose source keeps its gradients, and the result's own."""
    tiny_models.build(model, folder / "source")
    found = optimized.gradients(folder / "source", model)
    optimized.keep_gradients(folder / "source", found)
    lazy = operation(streammap.open(folder / "source"))
    promise, reason = lazy.promise
    if promise != "exact" or "takes one of them" in reason:
        pytest.skip(f"the gradients are not those of the copies alone: {reason}")
    lazy.carry_optimizer().save(folder / "grown", fsync=False)
    state = optimized.written(folder / "grown")
    wanted = optimized.gradients(folder / "grown", model)
    assert list(state) == list(wanted), "the order of the class's own parameters"
    return state, wanted


def carried(folder: Path, model: TinyModel, operation: Operation) -> float:
    """The largest relative difference of carried gradients from those of the result."""
    state, wanted = both(folder, model, operation)
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
@pytest.mark.parametrize("options", OTHERS, ids=str)
def test_gradients_of_other_growth(options: Options, tmp_path: Path) -> None:
    assert grown(tmp_path, truth.named("llama", "llama"), options) < EXACT


@pytest.mark.parametrize("signed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_gradients_change_places_and_signs(signed: bool, tmp_path: Path) -> None:
    model = truth.named("llama", "llama_tied")
    assert carried(tmp_path, model, lambda lazy: lazy.permute(seed=3, signed=signed)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"noise": 10.0}, {"split": 0.7}], ids=str)
def test_gradients_of_copies_that_differ_add_up_to_those_without(
    options: Options, tmp_path: Path
) -> None:
    """Noise, and shares behind a norm, give copies other parts of a gradient: their sum stays."""
    model = truth.named("llama", "llama")
    state, wanted = both(
        tmp_path, model, lambda lazy: lazy.decoalesce(width=2, grouping="stacked", **options)
    )
    apart = 0.0
    for name, gradient in wanted.items():
        mean = state[name]["exp_avg"]
        apart = max(apart, float((gradient - mean).abs().max() / gradient.abs().max()))
        # lm_head makes no units, columns of readers stand at equal copies.
        dim, n = int("embed" in name), 1 if "lm_head" in name else 2
        found, summed = (tiny.cut(x, dim, n).sum(dim) for x in (mean, gradient))
        assert float((found - summed).abs().max()) < EXACT * float(summed.abs().max()), name
    assert apart > 0.01
