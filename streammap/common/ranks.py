"""The rank of this process among those of its launch, by the variables of the launcher.

    torchrun    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID MASTER_ADDR ...
    srun        SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_JOB_ID SLURM_STEP_ID ...

Nothing but the environment is read: no process has to hear from another.
"""

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from streammap.errors import OutputError


@final
@dataclass(frozen=True, slots=True)
class Ranks:
    """One process of several that write a result together."""

    rank: int = 0
    """Counted from 0, the rank that leads."""
    world_size: int = 1
    """How many processes there are."""
    local_rank: int = 0
    local_world_size: int = 1
    """How many of them share this machine and its processors."""
    launch: str = ""
    """The same for all processes of a launch, and different for those of another."""

    def __post_init__(self) -> None:
        """Refuse a rank that is not below the number of ranks."""
        if not 0 <= self.rank < self.world_size:
            raise OutputError(
                f"rank {self.rank} of {self.world_size}: expected 0 to {self.world_size - 1}",
                hint="give each process its own rank",
            )
        if self.local_rank < 0 or self.local_world_size < 1:
            raise OutputError(
                f"local rank {self.local_rank} of {self.local_world_size}: expected 0 or more",
                hint="give each process of a machine its own local rank",
            )

    @classmethod
    def of(cls, given: "Ranks | bool") -> "Ranks":
        """What a caller asks for: True for what the launcher says, False to work alone."""
        return (cls.here() if given else ALONE) if isinstance(given, bool) else given

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> "Ranks":
        """This process by the variables of its launcher; alone where there is none.

        Raises:
            OutputError: a launcher's variable that makes no sense.
        """
        env = os.environ if environ is None else environ
        if "RANK" in env and "WORLD_SIZE" in env:
            return cls(
                rank=_number(env, "RANK"),
                world_size=_number(env, "WORLD_SIZE"),
                local_rank=_number(env, "LOCAL_RANK", 0),
                local_world_size=_number(env, "LOCAL_WORLD_SIZE", 1),
                launch=_joined(
                    "torchrun", env, "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT"
                ),
            )
        # A batch script is one process, and has SLURM_NTASKS too: only srun sets STEP variables.
        if "SLURM_PROCID" in env and "SLURM_STEP_NUM_TASKS" in env:
            return cls(
                rank=_number(env, "SLURM_PROCID"),
                world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
                local_rank=_number(env, "SLURM_LOCALID", 0),
                local_world_size=_sharing(env),
                launch=_joined("slurm", env, "SLURM_JOB_ID", "SLURM_STEP_ID"),
            )
        return ALONE


ALONE = Ranks()


def rank() -> int:
    """This process's rank: torch.distributed's if initialised, else the launcher's, else 0."""
    module = sys.modules.get("torch.distributed")
    if module is not None and module.is_available() and module.is_initialized():
        number: int = module.get_rank()
        return number
    with contextlib.suppress(OutputError):
        if (here := Ranks.here()) is not ALONE:
            return here.rank
    text = os.environ.get("RANK", "")  # of a launcher that says no more
    return int(text) if text.isdecimal() else 0


def is_relayed(message: str) -> bool:
    """Whether this process is not rank 0, and an error only repeats what rank 0 says of another."""
    return message.startswith("rank ") and rank() > 0


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if re.fullmatch(r"\d{1,9}", text) is None:
        raise OutputError(
            f"environment: {name} is {text[:40]!r}, expected a number",
            hint="start with torchrun or srun, or work alone (--no-ranks)",
        )
    return int(text)


def _joined(launcher: str, env: Mapping[str, str], *names: str) -> str:
    return " ".join([launcher, *(env.get(name, "-") for name in names)])


def _sharing(env: Mapping[str, str]) -> int:
    """Tasks that share this one's processors."""
    if "SLURM_CPUS_PER_TASK" in env:
        return 1  # each task is bound to processors of its own
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return max((1, *map(int, counts)))
