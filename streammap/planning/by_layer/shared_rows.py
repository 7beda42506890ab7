"""What maps of many layers have in common is kept once."""

from typing import final, overload

from streammap.planning.maps import AxisMap, BlockMap, DenseMap
from streammap.planning.segments import Row


@final
class SharedRows:
    """Maps that differ, made of the same rows and pairs: those of many layers take little more."""

    def __init__(self) -> None:
        self._rows: dict[Row, Row] = {}
        self._pairs: dict[tuple[int, float], tuple[int, float]] = {}

    @overload
    def of(self, m: BlockMap) -> BlockMap: ...
    @overload
    def of(self, m: AxisMap) -> AxisMap: ...
    def of(self, m: AxisMap) -> AxisMap:
        """An equal map."""
        if isinstance(m, DenseMap):
            return m
        return BlockMap(tuple(map(self._row, m.rows)), m.n_in_blocks, m.block)

    def _row(self, row: Row) -> Row:
        if len(row) == 1:
            return self._rows.setdefault(row, row)
        return tuple(self._pairs.setdefault(pair, pair) for pair in row)
