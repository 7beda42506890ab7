"""streammap: resize and blend transformer checkpoints without loading them."""

from importlib import import_module
from typing import TYPE_CHECKING

from streammap.common import garbage, moved

if TYPE_CHECKING:
    from streammap import progress
    from streammap.analysis.difference import Difference
    from streammap.analysis.verification import Verification, verify
    from streammap.api import (
        LazyCheckpoint,
        diff,
        load_into,
        load_optimizer_into,
        open,
        open_request,
    )
    from streammap.common.ranks import Ranks
    from streammap.common.version import VERSION as __version__
    from streammap.errors import (
        ArchitectureError,
        CheckpointError,
        OutputError,
        PlanError,
        SchemeError,
        StreammapError,
    )
    from streammap.one_call import (
        align,
        blend,
        coalesce,
        convert,
        decoalesce,
        interpolate,
        merge_lora,
        permute,
        restack,
    )
    from streammap.output.module.load import LoadReport
    from streammap.output.run import Report
    from streammap.tools.original.mappers import BertMapper, DeiTMapper, GPT2Mapper

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
    "align",
    "blend",
    "coalesce",
    "convert",
    "decoalesce",
    "diff",
    "interpolate",
    "load_into",
    "load_optimizer_into",
    "merge_lora",
    "open",
    "open_request",
    "permute",
    "progress",
    "restack",
    "verify",
]
_HOMES = {
    "analysis.difference": ("Difference",),
    "analysis.verification": ("Verification", "verify"),
    "api": (
        "LazyCheckpoint",
        "diff",
        "load_into",
        "load_optimizer_into",
        "open",
        "open_request",
    ),
    "one_call": (
        "align",
        "blend",
        "coalesce",
        "convert",
        "decoalesce",
        "interpolate",
        "merge_lora",
        "permute",
        "restack",
    ),
    "output.module.load": ("LoadReport",),
    "common.ranks": ("Ranks",),
    "output.run": ("Report",),
    "tools.original.mappers": ("BertMapper", "DeiTMapper", "GPT2Mapper"),
}


moved.install()

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import a name's module when it is first used: `streammap --help` needs none of them."""
        if name == "__version__":
            return import_module("streammap.common.version").VERSION
        if name not in __all__:
            registry = import_module("streammap.operators.registry")
            if name.replace("_", "-") in registry.names():
                return getattr(import_module("streammap.one_call"), name)
            raise AttributeError(f"module 'streammap' has no attribute {name!r}")
        if name == "progress":
            return import_module("streammap.progress")
        home = next((module for module, names in _HOMES.items() if name in names), "errors")
        with garbage.paused():
            module = import_module(f"streammap.{home}")
        return getattr(module, name)
