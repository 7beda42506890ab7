"""A checkpoint and its optimizer's state, as one."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, final

from streammap.io.checkpoint import Checkpoint
from streammap.io.storage.base import OpenFile, Reader
from streammap.io.tensor_readers import TensorReader

if TYPE_CHECKING:
    from torch import Tensor

    from streammap.io.storage.mapping import MappedPart


def join(weights: Checkpoint, state: Checkpoint) -> Checkpoint:
    """Both tensors and files; everything else is that of the weights."""
    files = {file.name: file for file in (*weights.files, *state.files)}
    return replace(
        weights,
        files=tuple(files.values()),
        slots={**weights.slots, **state.slots},
        file_of={**weights.file_of, **state.file_of},
        others=(),
        _opened={**state._opened, **weights._opened},
        reader=_Both(weights.reader, state.reader, frozenset(state.slots)),
    )


@final
@dataclass(frozen=True, slots=True)
class _Both(TensorReader):
    """Reads either."""

    weights: TensorReader
    state: TensorReader
    keys: frozenset[str]
    """Those of the state."""

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """See TensorReader."""
        self._of(key).read_into(key, start, view)

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """See TensorReader."""
        return self._of(key).map_into(key, start, end, part, reader)

    def tensor(self, key: str) -> "Tensor":
        """See TensorReader."""
        return self._of(key).tensor(key)

    def stretches(self, key: str, start: int, end: int) -> Iterator[tuple[OpenFile, int, int]]:
        """See TensorReader."""
        return self._of(key).stretches(key, start, end)

    def _of(self, key: str) -> TensorReader:
        return self.state if key in self.keys else self.weights
