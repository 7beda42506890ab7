"""Tiny models with gradients and optimizers, in strict float64."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from streammap.architectures.schema import TinyModel
from streammap.tools.spec_proof import tiny_models

FILE = "optimizer.pt"
StateDict = dict[str, dict[str, Tensor]]
"""Parameter -> what its optimizer keeps."""


def score(x: Tensor) -> Tensor:
    """A loss that sees all logits, each in its own way."""
    weights = torch.linspace(-1.0, 1.0, x.numel(), dtype=x.dtype).reshape(x.shape).sin()
    return (weights * x).sum() + (x * x).mean()


def gradients(folder: Path, model: TinyModel) -> dict[str, Tensor]:
    """Parameter -> gradient of the loss; 0 where the logits do not depend on it."""
    with tiny_models.training(folder, model, score=score) as (net, loss):
        torch.autograd.backward(loss())
        return {
            name: torch.zeros_like(x) if x.grad is None else x.grad
            for name, x in net.named_parameters()
        }


def keep_gradients(folder: Path, found: Mapping[str, Tensor]) -> None:
    """Write gradients as if they were an optimizer's means."""
    state = {
        name: {"step": torch.tensor(3.0), "exp_avg": g.contiguous().clone(), "exp_avg_sq": g**2}
        for name, g in found.items()
    }
    write(folder / FILE, state)


def write(path: Path, state: Mapping[str, object], **options: object) -> None:
    """Write a state as torch.save(optimizer.state_dict()) does, with names."""
    names = list(state)
    group = {"lr": 1e-3, **options, "params": list(range(len(names))), "param_names": names}
    torch.save({"state": dict(enumerate(state.values())), "param_groups": [group]}, path)


def named(content: Mapping[str, object]) -> StateDict:
    """A state dict by the names of its parameters."""
    groups, state = content["param_groups"], content["state"]
    assert isinstance(groups, list)
    assert isinstance(state, dict)
    return {
        name: state[number]
        for group in groups
        for number, name in zip(group["params"], group["param_names"], strict=True)
    }


def written(folder: Path) -> StateDict:
    """The state beside a result's weights, read by torch."""
    return named(torch.load(folder / FILE, weights_only=True))


def train(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], n: int) -> None:
    """Some steps."""
    for _ in range(n):
        optimizer.zero_grad()
        torch.autograd.backward(loss())
        optimizer.step()
