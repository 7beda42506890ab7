"""The loss half way between two models that were trained apart, with and without `--align`.

    python -m bench.align [--seeds 3] [--steps 300] [--quick]

Small Llamas learn the text of Python's standard library byte by byte, two for each row of seeds:
other first weights, other batches. Their mean is blended as it is, with neurons aligned, with all
units aligned, and with hidden units negated too. Printed is the loss on text that none saw, as mean
and spread over the pairs. The barrier is the loss half way less the mean of both ends'.
"""

import argparse
import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import streammap
from bench import harness, training
from bench.harness import Options
from bench.texts import CONTEXT, Text, text

WAYS: Mapping[str, dict[str, Any] | None] = {
    "as they are": None,
    "neurons aligned": {"axes": "mlp"},
    "all aligned, no signs": {"signs": False},
    "all aligned": {},
}
N_WARMUP = 40


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--seeds", type=int, default=3, help="pairs of models")
    parser.add_argument("--steps", type=int, default=300, help="of each model's training")


def trained(seed: int, n_steps: int, known: Text) -> LlamaForCausalLM:
    """A Llama whose first weights and batches are a seed's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
    )
    model = LlamaForCausalLM(config)

    def rate(step: int) -> float:
        return min((step + 1) / N_WARMUP, 1.0, 2 * (n_steps - step) / n_steps)

    batches = itertools.islice(known.batches(seed), n_steps)
    for _ in training.train(model, training.adamw(model), rate, batches):
        pass
    return model


def loss_of(folder: Path, known: Text) -> float:
    """Mean cross-entropy a byte of a saved model, in nats."""
    return training.loss_of(LlamaForCausalLM.from_pretrained(folder), known)


def measured(folder: Path, seeds: tuple[int, int], n_steps: int, known: Text) -> dict[str, float]:
    """Loss of the two ends together, and half way between them in each way."""
    ends = []
    for seed in seeds:
        place = folder / f"seed-{seed}"
        trained(seed, n_steps, known).save_pretrained(place)
        ends.append(place)
    found = {"the two themselves": statistics.fmean(loss_of(end, known) for end in ends)}
    for name, how in WAYS.items():
        first, second = (streammap.open(end) for end in ends)
        second = second if how is None else second.align(first, **how)
        first.blend(second).save(folder / "half", fsync=False, overwrite=True)
        found[name] = loss_of(folder / "half", known)
    return found


def main(options: Options) -> None:
    """Train, blend, print."""
    given = options.given
    n_pairs, n_steps = (1, 20) if options.quick else (given.seeds, given.steps)
    known = text()
    every = [
        measured(options.folder / str(i), (2 * i, 2 * i + 1), n_steps, known)
        for i in range(n_pairs)
    ]
    harness.print_head(
        f"Half way between two models: {n_pairs} pairs, {n_steps} steps each",
        None,
        "a Llama of 2 layers over bytes, 64 hidden units, 192 neurons, 4 heads",
    )
    ends = [one["the two themselves"] for one in every]
    harness.print_table(
        ("", "loss", "+-", "barrier", "+-"),
        [(name, *_row([one[name] for one in every], ends)) for name in every[0]],
    )


def _row(losses: Sequence[float], ends: Sequence[float]) -> tuple[str, ...]:
    barriers = [loss - end for loss, end in zip(losses, ends, strict=True)]
    return tuple(
        f"{value:.3f}"
        for numbers in (losses, barriers)
        for value in (statistics.fmean(numbers), statistics.pstdev(numbers))
    )


if __name__ == "__main__":
    with harness.options(__doc__, add) as asked:
        main(asked)
