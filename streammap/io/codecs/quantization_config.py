"""What config.json says of how a checkpoint is quantised."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

FIELDS = ("quantization_config", "compression_config")
"""The second is an older name of compressed-tensors."""


@dataclass(frozen=True)
class QuantizationConfig:
    """A quantization_config, of the model or of a part of it."""

    table: Mapping[str, object]

    @cached_property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of a block."""
        for place in (self.table, *self._weights):
            size = place.get("weight_block_size") or place.get("block_structure")
            match size:
                case [int(rows), int(columns)] if rows > 0 and columns > 0:
                    return rows, columns
        return None

    @cached_property
    def bits(self) -> int | None:
        """Bits of an integer code."""
        for weights in self._weights:
            if isinstance(bits := weights.get("num_bits"), int) and 1 <= bits <= 8:
                return bits
        return None

    def text(self, name: str) -> str:
        """A field as text in lower case; "" without it."""
        return str(self.table.get(name) or "").lower()[:40]

    @property
    def _weights(self) -> Iterator[Mapping[str, object]]:
        groups = self.table.get("config_groups")
        for group in groups.values() if isinstance(groups, Mapping) else ():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                yield weights


def find(config: Mapping[str, object]) -> Mapping[str, object] | None:
    """The quantization_config of a config.json, or of a part of it such as text_config."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            if name in FIELDS:
                return value
            if (inner := find(value)) is not None:
                return inner
    return None


def without(config: Mapping[str, object]) -> dict[str, object]:
    """The config without a quantization_config anywhere."""
    return {
        name: without(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if not (name in FIELDS and isinstance(value, Mapping))
    }
