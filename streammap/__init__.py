"""streammap: resize and blend transformer checkpoints without loading them."""

from streammap.api import LazyCheckpoint, coalesce, decoalesce, interpolate, open
from streammap.errors import (
    ArchitectureError,
    CheckpointError,
    OutputError,
    PlanError,
    SchemeError,
    StreammapError,
)
from streammap.executor import Report
from streammap.mapper import BertMapper, DeiTMapper, GPT2Mapper
from streammap.version import VERSION as __version__

__all__ = [
    "ArchitectureError",
    "BertMapper",
    "CheckpointError",
    "DeiTMapper",
    "GPT2Mapper",
    "LazyCheckpoint",
    "OutputError",
    "PlanError",
    "Report",
    "SchemeError",
    "StreammapError",
    "__version__",
    "coalesce",
    "decoalesce",
    "interpolate",
    "open",
]
