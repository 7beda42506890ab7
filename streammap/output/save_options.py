"""Options of saving a result: what LazyCheckpoint.save takes, and every command that writes."""

from typing import Literal, final

from streammap.common.declare import declared, option
from streammap.common.kinds import Anything
from streammap.common.ranks import Ranks
from streammap.engine.options import RunOptions, Size

MAX_SHARD_SIZE = "5GB"
ClassCheck = Literal["auto", "always", "never"]
OUTPUT = "Output"
"""Heading of these options in help."""


@declared
class SaveOptions(RunOptions):
    """How a result is written, and what the run may use."""

    max_shard_size: str | int = option(
        default=MAX_SHARD_SIZE,
        help="Largest file: 5GB is 5*10^9 bytes, 5GiB is 5*2^30.",
        group=OUTPUT,
        kind=Size(),
        metavar="SIZE",
    )
    overwrite: bool = option(
        default=False, help="Replace an output that already exists.", group=OUTPUT
    )
    restart: bool = option(
        default=False,
        help="Start over: discard an interrupted run's work instead of resuming it.",
        group=OUTPUT,
    )
    fsync: bool = option(
        default=True,
        help="Wait until the data is on the disk.",
        off="Do not wait until the data is on the disk.",
        group=OUTPUT,
    )
    format: Literal["safetensors", "torch", "dcp"] = option(
        default="safetensors",
        help="Form of the weights: torch makes pytorch_model.bin; dcp is "
        "torch.distributed.checkpoint.",
        group=OUTPUT,
    )
    nest: str | None = option(
        default=None,
        help="Top-level entry of a dcp result's tensors: model.  [default: the source's]",
        group=OUTPUT,
        metavar="NAME",
    )
    class_check: ClassCheck = option(
        default="auto",
        help="Whether the result's class in transformers or timm is asked before the run if it "
        "would load it; auto: where that takes little time.",
        group=OUTPUT,
    )
    ranks: Ranks | bool = option(
        default=False,
        help="True where all processes of a torchrun or srun make this call; each writes some "
        "shards, and all return when the result is whole.",
        kind=Anything(),
    )

    @property
    def max_shard_nbytes(self) -> int:
        """The largest file, in bytes."""
        return Size().parse(self.max_shard_size, "max_shard_size")


@final
@declared
class PushOptions(SaveOptions):
    """How a result is pushed to the Hub."""

    private: bool = option(
        default=True, help="Whether a repository that is created is private.", kind=Anything()
    )
    branch: str = option(default="main", help="Branch; it is created when needed.")
    message: str | None = option(default=None, help="Message of the commits.")
