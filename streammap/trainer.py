"""transformers.Trainer: switch from one model to the next in the middle of training.

    Switch(at=100, then=lambda saved: streammap.coalesce(saved, "small", width=2, depth=2))

Needs transformers (`pip install accelerate transformers`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@final
class Switch(TrainerCallback):
    """Ends a training after some steps, and makes the next model from what it has come to.

    The Trainer itself saves its checkpoint (whole, sharded or by FSDP, as it is set up to), whose
    folder is given to `then`: in the first process only, while the others wait.
    """

    def __init__(self, *, at: int, then: Callable[[Path], object]) -> None:
        """Stop after `at` optimizer steps (at least 1)."""
        if at < 1:
            raise ValueError(f"at={at}: expected 1 step or more")
        self._at, self._then = at, then
        self.done = False
        """Whether the switch was made."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: object,
    ) -> TrainerControl:
        """Ask the Trainer to save and to stop."""
        if state.global_step >= self._at and not self.done:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: object,
    ) -> None:
        """Make the next model from the checkpoint that was saved for it."""
        if state.global_step < self._at or self.done:
            return
        if state.is_world_process_zero:
            self._then(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.done = True
