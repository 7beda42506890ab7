"""Room for the blocks of matrices that one thread multiplies with, one at a time."""

import math
from typing import TYPE_CHECKING, final

from streammap.common.ranges import Range
from streammap.io.buffers import Buffer
from streammap.io.dtypes import DTYPE_BITS, FROM_TORCH
from streammap.planning.dense import matrix as matrices
from streammap.planning.dense.matrix import Matrix

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def room(matrix: Matrix, dtype: str) -> int:
    """Bytes that the blocks of a matrix take, where sums are kept in `dtype`."""
    n = min(math.prod(matrix.shape), max(matrices.BLOCK, math.prod(matrix.block())))
    converted = 0 if matrix.dtype == dtype else DTYPE_BITS[dtype] // 8
    return n * (matrix.n_rooms * DTYPE_BITS[matrix.dtype] // 8 + converted)


@final
class Blocks:
    """Reads parts of matrices; what is near a part is read with it, and kept for the next."""

    def __init__(self) -> None:
        """Take nothing yet."""
        self._buffer = Buffer(0)
        self._held: tuple[Matrix, torch.dtype, Range, Range, Tensor] | None = None

    def part(self, matrix: Matrix, rows: Range, columns: Range, dtype: "torch.dtype") -> "Tensor":
        """Rows and columns in a dtype; valid until the next call."""
        if self._held is not None:
            known, kind, its_rows, its_columns, block = self._held
            inside = its_columns[0] <= columns[0] and columns[1] <= its_columns[1]
            if known is matrix and kind == dtype and its_rows == rows and inside:
                return block[:, slice(*(j - its_columns[0] for j in columns))]
        n_rows, n_columns = rows[1] - rows[0], matrix.shape[1]
        end = n_columns
        if n_rows * n_columns > matrices.BLOCK:
            end = max(columns[1], min(n_columns, columns[0] + matrices.BLOCK // n_rows))
        start = 0 if n_rows * n_columns <= matrices.BLOCK else columns[0]
        block = self._read(matrix, rows, (start, end), dtype)
        self._held = matrix, dtype, rows, (start, end), block
        return block[:, slice(*(j - start for j in columns))]

    def _read(self, matrix: Matrix, rows: Range, columns: Range, dtype: "torch.dtype") -> "Tensor":
        n = (rows[1] - rows[0]) * (columns[1] - columns[0])
        taken = n * matrix.n_rooms
        kind = FROM_TORCH[str(dtype).removeprefix("torch.")]
        most = room(matrix, kind)
        if len(self._buffer.view) < most:
            self._buffer = Buffer(most)
        found = matrix.part(rows, columns, self._buffer.typed(matrix.dtype)[:taken])
        if found.dtype == dtype:
            return found
        first = -(-taken * found.element_size() // dtype.itemsize)
        return self._buffer.typed(kind)[first : first + n].view(found.shape).copy_(found)
