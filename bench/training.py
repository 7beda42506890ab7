"""How bench.vcycle and bench.align train their small models, and what these know then."""

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from bench.texts import Text

LEARNING_RATE = 2e-3
Rate = Callable[[int], float]
"""Step -> the factor of the learning rate."""


def adamw(model: nn.Module) -> AdamW:
    """An optimizer that has no state yet."""
    return AdamW(model.named_parameters(), LEARNING_RATE, weight_decay=0.01)


def scheduled(optimizer: Optimizer, rate: Rate) -> LambdaLR:
    """The learning rates of a stage that begins."""
    for group in optimizer.param_groups:  # a state that went along has its last stage's rate
        group.update(lr=LEARNING_RATE, initial_lr=LEARNING_RATE)
    return LambdaLR(optimizer, rate)


def train(
    model: nn.Module, optimizer: Optimizer, rate: Rate, batches: Iterable[Tensor]
) -> Iterator[int]:
    """Train a model on batches [batch, context]; yields the number of each step that is done."""
    schedule = scheduled(optimizer, rate)
    model.train()
    for step, batch in enumerate(batches, 1):
        torch.autograd.backward(_loss(model, batch))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield step


@torch.no_grad()
def loss_of(model: nn.Module, known: Text) -> float:
    """Mean cross-entropy a byte, in nats, on text that was not trained on."""
    was_training = model.training
    model.train(False)
    losses = [float(_loss(model, batch)) for batch in known.held_out]
    model.train(was_training)
    return statistics.fmean(losses)


def _loss(model: Any, batch: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=batch, labels=batch).loss
    return loss
