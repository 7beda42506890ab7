"""Where and how a result is written: what a run is told beside its plan."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from streammap.engine.options import Engine
from streammap.io import filenames
from streammap.output import record
from streammap.output.ranks.launcher import ALONE, Ranks

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
    """Whether to forget what an earlier run left unfinished."""
    ranks: Ranks = ALONE
    """This process's place among those that make the result."""
    format: Format = "safetensors"
    nest: str | None = None
    """Entry that a DCP result's tensors stand under; "" for none, None for the source's."""

    @property
    def is_file(self) -> bool:
        """Whether the result is one file instead of a folder."""
        is_named = self.path.suffix == ".safetensors" or self.is_torch
        return is_named and self.format == "safetensors"

    @property
    def is_torch(self) -> bool:
        """Whether that is torch's."""
        return self.path.suffix in filenames.TORCH and self.format == "safetensors"

    @property
    def folder(self) -> Path:
        """The folder that all files go to."""
        return self.path.parent if self.is_file else self.path

    @property
    def record(self) -> str:
        """Name of the record."""
        return record.beside(self.path).name if self.is_file else record.NAME
