"""Options of a run: destination, sharding, durability, resources."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streammap.common.ranks import ALONE, Ranks
from streammap.engine.options import Engine
from streammap.io import filenames
from streammap.output import record

Format = Literal["safetensors", "dcp"]
FORMATS: tuple[Format, ...] = ("safetensors", "dcp")


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where and how a result is written."""

    path: Path
    """A folder, or a file that ends in .safetensors, .pth, .pt or .bin."""
    max_shard_nbytes: int
    overwrite: bool
    fsync: bool
    engine: Engine
    may_replace_sources: bool = False
    """Whether the output may be the folder of a source; its files are replaced at the end."""
    restart: bool = False
    """Whether to discard the unfinished work of an earlier run."""
    ranks: Ranks = ALONE
    """This process's rank among those that write the result together."""
    format: Format = "safetensors"
    nest: str | None = None
    """Entry of a DCP result that its tensors stand under; "" for none, None for the source's."""

    @property
    def is_file(self) -> bool:
        """Whether the result is one file instead of a folder."""
        is_named = self.path.suffix == ".safetensors" or self.is_torch
        return is_named and self.format == "safetensors"

    @property
    def is_torch(self) -> bool:
        """Whether that file is one of torch's."""
        return self.path.suffix in filenames.TORCH and self.format == "safetensors"

    @property
    def single(self) -> str | None:
        """Name of the file that the result is; None for a folder."""
        return self.path.name if self.is_file else None

    @property
    def folder(self) -> Path:
        """The folder that all files go to."""
        return self.path.parent if self.is_file else self.path

    @property
    def record(self) -> str:
        """Name of the record."""
        return record.name_for(self.single)
