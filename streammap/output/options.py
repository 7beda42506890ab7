"""Where a run writes to, beside the options that its user gave."""

from dataclasses import dataclass
from pathlib import Path

from streammap.common.ranks import Ranks
from streammap.io import filenames
from streammap.output import record
from streammap.output.save_options import SaveOptions


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """Where and how a result is written."""

    path: Path
    """A folder, or a file that ends in .safetensors, .pth, .pt or .bin."""
    save: SaveOptions
    may_replace_sources: bool = False
    """Whether the output may be the folder of a source; its files are replaced at the end."""

    @property
    def ranks(self) -> Ranks:
        """This process's rank among those that write the result together."""
        return Ranks.of(self.save.ranks)

    @property
    def is_file(self) -> bool:
        """Whether the result is one file instead of a folder."""
        endings = {"safetensors": filenames.WEIGHTS, "torch": filenames.TORCH, "dcp": ()}
        return self.path.suffix in endings[self.save.format]

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
