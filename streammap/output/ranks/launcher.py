"""The processes of one launch that make a result together, and which of them makes which shard.

    torchrun    RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE TORCHELASTIC_RUN_ID MASTER_ADDR ...
    srun        SLURM_PROCID SLURM_STEP_NUM_TASKS SLURM_LOCALID SLURM_JOB_ID SLURM_STEP_ID ...

Nothing but the environment is looked at: they need no network, see coordination.py.
"""

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from streammap.errors import OutputError


@final
@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place among those that make a result together."""

    rank: int = 0
    """Counted from 0, which leads."""
    world_size: int = 1
    """How many processes there are."""
    local_rank: int = 0
    local_world_size: int = 1
    """How many there are on this machine, and share its processors."""
    launch: str = ""
    """What all processes of a launch have in common, and those of others do not."""

    def __post_init__(self) -> None:
        """Refuse what is no place."""
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
        """What callers pass: True for what the launcher says, False for one process alone."""
        return (cls.here() if given else ALONE) if isinstance(given, bool) else given

    @classmethod
    def here(cls, environ: Mapping[str, str] | None = None) -> "Ranks":
        """What the launcher that started this process says; the only one where none did.

        Raises:
            OutputError: a variable of a launcher that makes no sense.
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
        # SLURM_NTASKS is there in a batch script too, which is one process: only srun has STEP.
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


def deal(sizes: Sequence[int], world_size: int) -> tuple[int, ...]:
    """The rank that makes each shard: neighbours go together, since they read the same files.

    Shards lie side by side on a line as long as all of them; the line is cut in equal parts, and a
    shard belongs to the part that its middle is in. No rank gets more than an equal part and the
    largest shard. A shard that is the only one with anything to do is rank 0's.

    Args:
        sizes: Bytes of each shard that are to be written.
    """
    total, before = sum(sizes), 0
    if max(sizes, default=0) == total:
        return (0,) * len(sizes)
    owners = []
    for nbytes in sizes:
        middle = 2 * before + nbytes  # twice, to stay whole
        owners.append(min(world_size * middle // (2 * total), world_size - 1))
        before += nbytes
    return tuple(owners)


def is_relayed(message: str) -> bool:
    """Whether this is one of several ranks, and only repeats what rank 0 says of another."""
    with contextlib.suppress(OutputError):
        return message.startswith("rank ") and Ranks.here().rank > 0
    return False


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
    """Tasks that share the processors that this one may use."""
    if "SLURM_CPUS_PER_TASK" in env:
        return 1  # each is bound to its own
    counts = re.findall(r"(\d+)(?:\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    return max((1, *map(int, counts)))
