"""A V-cycle and plain training: a tiny GPT-2 learns the text of Python's standard library.

    python -m bench.vcycle [--steps 160] [--alpha 0.5] [--trainer] [--plot FILE.svg] [--quick]

The large model is trained for some steps, coalesced to half its width and depth, trained small,
decoalesced, blended into the large one (as it was when it was coalesced) and trained on: the cycle
of the paper (ICLR 2024, arXiv:2404.07999). Beside it, the same model is trained from the same start
without. Prints the loss on text that neither saw over the cost of training: floating-point
operations, in steps of the large model. `--trainer` does all training with transformers.Trainer.

What streammap does in it are three lines: see `shrink` and `grow`.
"""

import argparse
import itertools
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import streammap
from bench import curves, harness
from bench.curves import Curve
from bench.harness import Options
from bench.plot import svg_path

CONTEXT, BATCH, N_HELD_OUT = 128, 16, 24
LEARNING_RATE, N_WARMUP = 2e-3, 20
_MAX_NBYTES = 6_000_000


@dataclass(frozen=True, slots=True)
class Stage:
    """Some steps of one model."""

    name: str
    n_steps: int
    cost: float
    """Of one step, in steps of the large model."""
    decays: bool
    """Whether the learning rate falls to nothing: the last steps of a model that is kept."""


Told = Callable[[int], None]
"""Is called with the number of each step that is done."""
Then = Callable[[Path], object]
"""Makes the next model of the one that was saved in a folder."""
Train = Callable[[GPT2LMHeadModel, Stage, "Text", Told, Then, Path], None]
"""Trains a model for a stage, saves it below the folder, and goes on to the next."""


@dataclass(frozen=True, slots=True)
class Text:
    """Bytes as tokens."""

    seen: Tensor
    held_out: Tensor
    """[batches, BATCH, CONTEXT]"""

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Pieces of the text that is trained on, without end. Shapes: [BATCH, CONTEXT]."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.seen) - CONTEXT, (BATCH,), generator=draw)
            yield torch.stack([self.seen[at : at + CONTEXT] for at in starts.tolist()])


def text() -> Text:
    """The standard library's modules, one after the other; the last part is held out."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    content = b"\n".join(file.read_bytes() for file in files)[:_MAX_NBYTES]
    tokens = torch.frombuffer(bytearray(content), dtype=torch.uint8).long()
    n = N_HELD_OUT * BATCH * CONTEXT
    return Text(tokens[:-n], tokens[-n:].view(N_HELD_OUT, BATCH, CONTEXT))


@torch.no_grad()
def loss_of(model: GPT2LMHeadModel, known: Text) -> float:
    """Mean cross-entropy a byte, in nats, on text that was not trained on."""
    was_training = model.training
    model.train(False)
    losses = [float(model(input_ids=batch, labels=batch).loss) for batch in known.held_out]
    model.train(was_training)
    return sum(losses) / len(losses)


def rate(stage: Stage, step: int) -> float:
    """The learning rate's factor at a step: warm-up, then constant or falling."""
    rest = (stage.n_steps - step) / max(stage.n_steps - N_WARMUP, 1) if stage.decays else 1.0
    return min((step + 1) / N_WARMUP, rest, 1.0)


def by_hand(
    model: GPT2LMHeadModel, stage: Stage, known: Text, told: Told, then: Then, folder: Path
) -> None:
    """Training in plain PyTorch."""
    optimizer, schedule = _optimizer(model, stage)
    model.train()
    batches = itertools.islice(known.batches(len(stage.name)), stage.n_steps)
    for step, batch in enumerate(batches, 1):
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        told(step)
    model.save_pretrained(folder / stage.name)
    then(folder / stage.name)


def by_trainer(
    model: GPT2LMHeadModel, stage: Stage, known: Text, told: Told, then: Then, folder: Path
) -> None:
    """Training with transformers.Trainer: a callback saves and goes on to the next model."""
    from streammap.trainer import Switch

    class Steps(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            told(state.global_step)

    class Rows(torch.utils.data.IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            for batch in known.batches(len(stage.name)):
                for row in batch:
                    yield {"input_ids": row, "labels": row}

    arguments = transformers.TrainingArguments(
        output_dir=str(folder / stage.name),
        max_steps=2 * stage.n_steps,
        use_cpu=True,
        per_device_train_batch_size=BATCH,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Rows(),
        callbacks=[Steps(), Switch(at=stage.n_steps, then=then)],
        optimizers=_optimizer(model, stage),
    ).train()


def _optimizer(
    model: GPT2LMHeadModel, stage: Stage
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.01)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(stage, step))


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
    """What both runs have in common."""

    known: Text
    train: Train
    fresh: Callable[[], GPT2LMHeadModel]
    folder: Path
    every: int
    """Steps between two points of a curve."""


def plain(given: Setting, n_steps: int) -> Curve:
    """The large model, trained from the start to the end."""
    record = Record("plain", given)
    record.train(given.fresh(), Stage("large", n_steps, 1.0, decays=True), lambda saved: None)
    return record.curve


def v_cycle(given: Setting, stages: tuple[Stage, Stage, Stage], alpha: float) -> Curve:
    """The large model, the small one made of it, and the large one that both are blended to."""
    record, model = Record("V-cycle", given), given.fresh()
    small = given.folder / "coalesced"
    before: list[Path] = []

    def shrink(saved: Path) -> None:
        before.append(saved)
        streammap.coalesce(saved, small, width=2, depth=2)

    def grow(saved: Path) -> None:
        grown = streammap.open(saved).decoalesce(map=small)
        streammap.load_into(model, grown.interpolate(before[0], alpha=alpha))

    record.train(model, stages[0], shrink)
    record.train(GPT2LMHeadModel.from_pretrained(small), stages[1], grow)
    record.train(model, stages[2], lambda saved: None)
    return record.curve


class Record:
    """A run as it goes on: its curve so far."""

    def __init__(self, name: str, given: Setting) -> None:
        self._name, self._given, self._spent = name, given, 0.0
        self._points: list[tuple[float, float]] = []
        self._started = time.perf_counter()

    def train(self, model: GPT2LMHeadModel, stage: Stage, then: Then) -> None:
        """Train a model for a stage, and go on to the next."""
        self._measure(model, stage, 0)

        def told(step: int) -> None:
            self._spent += stage.cost
            if step % self._given.every == 0 or step == stage.n_steps:
                self._measure(model, stage, step)

        given = self._given
        given.train(model, stage, given.known, told, then, given.folder / self._name)

    def _measure(self, model: GPT2LMHeadModel, stage: Stage, step: int) -> None:
        self._points.append((self._spent, loss_of(model, self._given.known)))
        seconds = time.perf_counter() - self._started
        print(
            f"{self._name:8s} {stage.name:6s} step {step:4d} cost {self._spent:6.1f} "
            f"loss {self._points[-1][1]:.3f} {seconds:6.1f} s",
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
    parser.add_argument("--steps", type=int, default=160, help="steps of the large model alone")
    parser.add_argument("--alpha", type=float, default=0.5, help="part of the small model")
    parser.add_argument("--trainer", action="store_true", help="train with transformers.Trainer")
    parser.add_argument("--plot", type=svg_path, help="draw the curves (SVG)")


def model_of(width: int, layers: int) -> GPT2LMHeadModel:
    """A GPT-2 over bytes, the same at each call."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        bos_token_id=0,
        eos_token_id=0,
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        n_positions=CONTEXT,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def main(options: Options) -> None:
    """Train twice, print, draw."""
    given = options.given
    n = 20 if options.quick else given.steps
    width, layers = (64, 2) if options.quick else (192, 4)
    part = cost(model_of(width // 2, layers // 2), model_of(width, layers))
    # The paper's proportions: a short first stage, a small model trained for half the steps, and
    # the large one for what is left.
    stages = (
        Stage("large", n // 8, 1.0, decays=False),
        Stage("small", n // 2, part, decays=False),
        Stage("again", n - n // 8, 1.0, decays=True),
    )
    setting = Setting(
        text(),
        by_trainer if given.trainer else by_hand,
        lambda: model_of(width, layers),
        options.folder,
        max(1, n // 16),
    )
    found = plain(setting, n), v_cycle(setting, stages, given.alpha)
    print_result(found, part, n, model_of(width, layers).num_parameters(), given)


def print_result(
    found: tuple[Curve, Curve], part: float, n: int, n_parameters: int, given: argparse.Namespace
) -> None:
    """The curves as a table, and as a picture."""
    alone, vcycle = found
    by = "transformers.Trainer" if given.trainer else "plain PyTorch"
    harness.print_head(
        f"V-cycle: a GPT-2 of {n} steps, alpha {given.alpha:g}, {by}",
        None,
        f"{n_parameters / 1e6:.2f} million parameters",
        f"a step of the small model costs {part:.2f}",
    )
    columns = ("", "cost", "loss", "seconds")
    harness.print_table(
        columns,
        [
            (c.name, f"{c.points[-1][0]:.0f}", f"{c.points[-1][1]:.3f}", f"{c.seconds:.0f}")
            for c in found
        ],
    )
    reached = curves.cost_to_reach(vcycle, alone.points[-1][1])
    print(
        "the V-cycle reaches the plain run's last loss "
        + (f"at a cost of {reached:.0f}" if reached is not None else "nowhere")
        + f", the plain run at {alone.points[-1][0]:.0f}"
    )
    print(curves.as_text(found))
    if given.plot is not None:
        given.plot.write_text(curves.svg("Loss over cost (steps of the large model)", found))
        print(f"drawn in {given.plot}")


if __name__ == "__main__":
    with harness.options(__doc__, add) as asked:
        main(asked)
