"""streammap: resize and blend transformer checkpoints without loading them."""

from importlib import import_module
from typing import TYPE_CHECKING

from streammap import collection

if TYPE_CHECKING:
    from streammap import progress
    from streammap.api import LazyCheckpoint, coalesce, decoalesce, interpolate, load_into, open
    from streammap.difference import Difference, diff
    from streammap.errors import (
        ArchitectureError,
        CheckpointError,
        OutputError,
        PlanError,
        SchemeError,
        StreammapError,
    )
    from streammap.executor import Report
    from streammap.loading import LoadReport
    from streammap.mapper import BertMapper, DeiTMapper, GPT2Mapper
    from streammap.ranks import Ranks
    from streammap.verification import Verification, verify
    from streammap.version import VERSION as __version__

__all__ = [
    "ArchitectureError",
    "BertMapper",
    "CheckpointError",
    "DeiTMapper",
    "Difference",
    "GPT2Mapper",
    "LazyCheckpoint",
    "LoadReport",
    "OutputError",
    "PlanError",
    "Ranks",
    "Report",
    "SchemeError",
    "StreammapError",
    "Verification",
    "__version__",
    "coalesce",
    "decoalesce",
    "diff",
    "interpolate",
    "load_into",
    "open",
    "progress",
    "verify",
]
_HOMES = {
    "difference": ("Difference", "diff"),
    "api": ("LazyCheckpoint", "coalesce", "decoalesce", "interpolate", "load_into", "open"),
    "loading": ("LoadReport",),
    "executor": ("Report",),
    "mapper": ("BertMapper", "DeiTMapper", "GPT2Mapper"),
    "ranks": ("Ranks",),
    "verification": ("Verification", "verify"),
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a name's module when it is first used: `streammap --help` needs none of them."""
        if name == "__version__":
            return import_module("streammap.version").VERSION
        if name not in __all__:
            raise AttributeError(f"module 'streammap' has no attribute {name!r}")
        if name == "progress":
            return import_module("streammap.progress")
        home = next((module for module, names in _HOMES.items() if name in names), "errors")
        with collection.paused():
            module = import_module(f"streammap.{home}")
        return getattr(module, name)
