"""V-cycles and plain training: tiny GPT-2s learn the text of Python's standard library.

    python -m bench.vcycle [--seeds 3] [--steps 320] [--trainer] [--plot FILE.svg] [--quick]

The large model is trained for some steps, coalesced to half its width and depth, trained small,
decoalesced, blended into the large one (as it was when it was coalesced) and trained on: the cycle
of the paper (ICLR 2024, arXiv:2404.07999). Beside it, the same model is trained from the same start
without. Printed is the loss on text that none saw, as mean and spread over the seeds, and what it
takes to come to the plain run's last loss: floating-point operations, in steps of the large model.

Of V-cycles there are four: the optimizer starts afresh in each stage, or its state goes along; the
copies are equal, or have noise in what reads them. All warm the learning rate up in each stage.
`--trainer` does all training with transformers.Trainer. What streammap does: see `Cycle`.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import streammap
from bench import curves, harness, training
from bench.curves import Curve
from bench.harness import Options
from bench.plot import svg_path
from bench.texts import Text, text
from streammap.api import LazyCheckpoint

CONTEXT, BATCH = 64, 8
N_WARMUP = 20
PLAIN = "plain"
WAYS: Mapping[str, tuple[bool, float | None]] = {
    "V-cycle": (False, None),
    "V-cycle, optimizer": (True, None),
    "V-cycle, noise": (False, 10.0),
    "V-cycle, both": (True, 10.0),
}
"""Name -> whether the optimizer's state goes along, and noise (dB below what reads copies)."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Some steps of one model."""

    name: str
    seed: int
    """Of the batches."""
    n_steps: int
    cost: float
    """Of one step, in steps of the large model."""
    decays: bool
    """Whether the learning rate falls to nothing: the last steps of a model that is kept."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A model with its optimizer."""

    model: GPT2LMHeadModel
    optimizer: torch.optim.Optimizer


Told = Callable[[int], None]
"""Is called with the number of each step that is done."""
Train = Callable[[Trained, Stage, Text, Told, Path], Path]
"""Trains a model for a stage; returns the folder where it and its optimizer's state are saved."""


def rate(stage: Stage, step: int) -> float:
    """The learning rate's factor at a step: warm-up, then constant or falling."""
    rest = (stage.n_steps - step) / max(stage.n_steps - N_WARMUP, 1) if stage.decays else 1.0
    return min((step + 1) / N_WARMUP, rest, 1.0)


def by_hand(trained: Trained, stage: Stage, known: Text, told: Told, folder: Path) -> Path:
    """Training in plain PyTorch."""
    model, optimizer = trained.model, trained.optimizer
    batches = itertools.islice(known.batches(stage.seed), stage.n_steps)
    for step in training.train(model, optimizer, partial(rate, stage), batches):
        told(step)
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def by_trainer(trained: Trained, stage: Stage, known: Text, told: Told, folder: Path) -> Path:
    """Training with transformers.Trainer: a callback saves and ends the stage."""
    from streammap.trainer import Switch

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            told(state.global_step)

    class Rows(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in known.batches(stage.seed):
                for row in batch:
                    yield {"input_ids": row, "labels": row}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2 * stage.n_steps,
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    saved: list[Path] = []
    transformers.Trainer(
        model=trained.model,
        args=arguments,
        train_dataset=Rows(),
        callbacks=[Steps(), Switch(at=stage.n_steps, then=saved.append)],
        optimizers=(
            trained.optimizer,
            training.scheduled(trained.optimizer, partial(rate, stage)),
        ),
    ).train()
    return saved[0]


def with_optimizer(model: GPT2LMHeadModel) -> Trained:
    """A model with an optimizer that has no state yet."""
    return Trained(model, training.adamw(model))


def cost(model: GPT2LMHeadModel, large: GPT2LMHeadModel) -> float:
    """Of a step, in steps of the large model: multiplications with weights, and in attention."""
    return _multiplied(model) / _multiplied(large)


def _multiplied(model: GPT2LMHeadModel) -> int:
    config = model.config
    attention = 2 * config.n_layer * CONTEXT * config.n_embd
    weights = sum(
        p.numel() for name, p in model.named_parameters() if p.dim() > 1 and ".h." in name
    )
    return weights + attention + config.vocab_size * config.n_embd


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs of a seed have in common."""

    known: Text
    train: Train
    fresh: Callable[[], GPT2LMHeadModel]
    seed: int
    folder: Path
    every: int
    """Steps between two points of a curve."""


def plain(given: Setting, n_steps: int) -> Curve:
    """The large model, trained from the start to the end."""
    record = Record(PLAIN, given)
    record.train(with_optimizer(given.fresh()), Stage("large", given.seed, n_steps, 1.0, True))
    return record.curve


@dataclass(frozen=True, slots=True)
class Cycle:
    """A V-cycle: the large model, the small one made of it, and the large one of both."""

    name: str
    optimizer: bool
    """Whether the optimizer's state goes along."""
    noise: float | None
    alpha: float

    def run(self, given: Setting, stages: tuple[Stage, Stage, Stage]) -> Curve:
        """Train through the three stages."""
        record = Record(self.name, given)
        large = record.train(with_optimizer(given.fresh()), stages[0])
        small = large.parent / "coalesced"
        streammap.coalesce(large, small, width=2, depth=2, optimizer=self.optimizer)
        model = GPT2LMHeadModel.from_pretrained(small)
        trained = record.train(self._loaded(model, streammap.open(small)), stages[1])
        seed = None if self.noise is None else given.seed
        grown = streammap.open(trained).decoalesce(map=small, noise=self.noise, seed=seed)
        both = grown.interpolate(large, alpha=self.alpha)
        record.train(self._loaded(given.fresh(), both), stages[2])
        return record.curve

    def _loaded(self, model: GPT2LMHeadModel, weights: LazyCheckpoint) -> Trained:
        begun = with_optimizer(model)
        if self.optimizer:
            weights = weights.carry_optimizer()
            streammap.load_optimizer_into(begun.optimizer, model, weights)
        streammap.load_into(model, weights)
        return begun


class Record:
    """A run as it goes on: its curve so far."""

    def __init__(self, name: str, given: Setting) -> None:
        self._name, self._given, self._spent = name, given, 0.0
        self._points: list[tuple[float, float]] = []
        self._started = time.perf_counter()

    def train(self, trained: Trained, stage: Stage) -> Path:
        """Train a model for a stage; returns the folder in which it is saved."""
        self._measure(trained.model, stage, 0)

        def told(step: int) -> None:
            self._spent += stage.cost
            if step % self._given.every == 0 or step == stage.n_steps:
                self._measure(trained.model, stage, step)

        given = self._given
        folder = given.folder / f"{self._name} {given.seed}" / stage.name
        return given.train(trained, stage, given.known, told, folder)

    def _measure(self, model: GPT2LMHeadModel, stage: Stage, step: int) -> None:
        self._points.append((self._spent, training.loss_of(model, self._given.known)))
        seconds = time.perf_counter() - self._started
        print(
            f"{self._given.seed} {self._name:18s} {stage.name:6s} step {step:4d} "
            f"cost {self._spent:6.1f} loss {self._points[-1][1]:.3f} {seconds:6.1f} s",
            file=sys.stderr,
            flush=True,
        )

    @property
    def curve(self) -> Curve:
        """What was measured."""
        seconds = time.perf_counter() - self._started
        return Curve(self._name, tuple(self._points), seconds)


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--seeds", type=int, default=3, help="first weights, batches and noise")
    parser.add_argument("--steps", type=int, default=320, help="steps of the large model alone")
    parser.add_argument("--alpha", type=float, default=0.5, help="part of the small model")
    parser.add_argument("--trainer", action="store_true", help="train with transformers.Trainer")
    parser.add_argument("--plot", type=svg_path, help="draw the first seed's curves (SVG)")


def model_of(width: int, layers: int, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 over bytes, the same at each call."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        n_embd=width,
        n_layer=layers,
        n_head=width // 16,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def runs_of(setting: Setting, n: int, part: float, alpha: float) -> tuple[Curve, ...]:
    """Plain training and each V-cycle, from one start.

    The paper's proportions: a short first stage, a small model trained for half the steps, and the
    large one for what is left.
    """
    seed = 100 * setting.seed
    stages = (
        Stage("large", setting.seed, n // 8, 1.0, decays=False),
        Stage("small", seed + 1, n // 2, part, decays=False),
        Stage("again", seed + 2, n - n // 8, 1.0, decays=True),
    )
    cycles = (Cycle(name, *how, alpha) for name, how in WAYS.items())
    return (plain(setting, n), *(cycle.run(setting, stages) for cycle in cycles))


def main(options: Options) -> None:
    """Train, print, draw."""
    given = options.given
    n, n_seeds = (20, 2) if options.quick else (given.steps, given.seeds)
    width, layers = 64, 4
    large = model_of(width, layers, 0)
    part = cost(model_of(width // 2, layers // 2, 0), large)
    known, train = text(CONTEXT, BATCH), by_trainer if given.trainer else by_hand
    # Products as small as these take longer on several threads than on one.
    torch.set_num_threads(1)
    found = [
        runs_of(
            Setting(
                known,
                train,
                lambda seed=seed: model_of(width, layers, seed),  # type: ignore[misc]
                seed,
                options.folder,
                max(1, n // 8),
            ),
            n,
            part,
            given.alpha,
        )
        for seed in range(1, n_seeds + 1)
    ]
    by = "transformers.Trainer" if given.trainer else "plain PyTorch"
    harness.print_head(
        f"V-cycle: a GPT-2 of {n} steps, alpha {given.alpha:g}, {n_seeds} seeds, {by}",
        None,
        f"{large.num_parameters() / 1e6:.2f} million parameters",
        f"a step of the small model costs {part:.2f}",
    )
    print_result(found)
    print(curves.as_text(found[0]))
    if given.plot is not None:
        given.plot.write_text(curves.svg("Loss over cost (steps of the large model)", found[0]))
        print(f"drawn in {given.plot}")


def print_result(found: Sequence[tuple[Curve, ...]]) -> None:
    """Losses at the end as mean and spread over seeds, and compared with plain training."""
    rows = []
    for way in zip(*found, strict=True):
        ends = [curve.points[-1][1] for curve in way]
        aims = [runs[0].points[-1][1] for runs in found]
        less = [end - aim for end, aim in zip(ends, aims, strict=True)]
        reached = [curves.cost_to_reach(c, aim) for c, aim in zip(way, aims, strict=True)]
        costs = [cost for cost in reached if cost is not None]
        at = f"{statistics.fmean(costs):.0f} ({len(costs)} of {len(way)})" if costs else "nowhere"
        rows.append(
            (way[0].name, f"{way[0].points[-1][0]:.0f}", *_spread(ends), *_spread(less), at)
        )
    harness.print_table(
        ("", "cost", "loss", "+-", "less plain", "+-", "plain's loss at a cost of"), rows
    )


def _spread(numbers: Sequence[float]) -> tuple[str, str]:
    return f"{statistics.fmean(numbers):.3f}", f"{statistics.pstdev(numbers):.3f}"


if __name__ == "__main__":
    with harness.options(__doc__, add) as asked:
        main(asked)
