"""Stored matrices of numbers, of which a part is read: codes, scales, zero points.

    Numbers       one number each: floats, or bytes that stand for one
    Codes         small codes along the columns, several a byte or a word
    RowWords      small integers along the rows, several an int32 word

Each gives a part as float32. What is read for it takes little more than the part itself.
"""

import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from streammap.common.ranges import Range
from streammap.errors import CheckpointError
from streammap.io.codecs.encodings import Decoder, Halves, unpacked
from streammap.io.dtypes import DTYPE_BITS, to_torch

if TYPE_CHECKING:
    from torch import Tensor

_GAP_NBYTES = 2**14
"""Bytes between two rows' parts that are rather read than skipped: a call costs as much."""
_BLOCK_NBYTES = 2**20
"""Whole rows of which parts are kept, read at once."""
_local = threading.local()


class ReadInto(Protocol):
    """Reads stored tensors."""

    def __call__(self, key: str, start: int, view: memoryview, /) -> None:
        """Fill `view` from the tensor's byte `start` on."""
        ...


@dataclass(frozen=True, slots=True)
class Matrix(ABC):
    """A stored matrix of numbers."""

    key: str
    """The stored tensor."""
    n_columns: int

    @abstractmethod
    def part(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """A part of it as float32 [rows, columns], in memory of its own."""

    def turned(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """The same part as float32 [columns, rows]."""
        return self.part(read, rows, columns).t()

    @abstractmethod
    def stretch(self, rows: Range) -> Range:
        """The bytes in which rows lie."""


@dataclass(frozen=True, slots=True)
class Numbers(Matrix):
    """One number each."""

    dtype: str
    decode: Decoder | None = None
    """What its bytes mean; None for floats."""

    def part(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """See Matrix."""
        import torch

        item = DTYPE_BITS[self.dtype] // 8
        stored = _part(read, self.key, self.n_columns * item, rows, _times(columns, item))
        if self.decode is not None:
            numbers = self.decode(stored.flatten())
        else:
            numbers = stored.view(to_torch(self.dtype)).to(torch.float32)
        return numbers.view(rows[1] - rows[0], -1)

    def stretch(self, rows: Range) -> Range:
        """See Matrix."""
        return _times(rows, self.n_columns * DTYPE_BITS[self.dtype] // 8)


@dataclass(frozen=True, slots=True)
class Codes(Matrix):
    """Codes of a few bits, one after the other along each row."""

    bits: int
    decode: Decoder
    """What whole words of codes mean, or whole bytes of 8-bit codes and pairs."""
    unit: int = 8
    """Bits that are decoded together: 8, or 32 for words."""

    def part(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """See Matrix."""
        first = columns[0] * self.bits // self.unit * self.unit
        last = -(-columns[1] * self.bits // self.unit) * self.unit
        span = first // 8, min(last // 8, self._row_nbytes)
        stored = _part(read, self.key, self._row_nbytes, rows, span)
        values = self.decode(stored.flatten()).view(rows[1] - rows[0], -1)
        skipped, n = columns[0] - first // self.bits, columns[1] - columns[0]
        return values[:, skipped : skipped + n] if values.shape[1] != n else values

    def turned(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """See Matrix. Of two codes a byte the bytes are turned, which are fewer."""
        import torch

        if not isinstance(self.decode, Halves):
            return Matrix.turned(self, read, rows, columns)
        first = columns[0] // 2
        stored = _part(read, self.key, self._row_nbytes, rows, (first, -(-columns[1] // 2)))
        codes = stored.t().contiguous().to(torch.int32)
        values = torch.empty((2 * len(codes), codes.shape[1]))
        for half, table in enumerate(self.decode.tables):
            values[half::2] = table.index_select(0, codes.flatten()).view(codes.shape)
        return values[columns[0] - 2 * first :][: columns[1] - columns[0]]

    def stretch(self, rows: Range) -> Range:
        """See Matrix."""
        return _times(rows, self._row_nbytes)

    @property
    def _row_nbytes(self) -> int:
        return -(-self.n_columns * self.bits // self.unit) * self.unit // 8


@dataclass(frozen=True, slots=True)
class RowWords(Matrix):
    """Unsigned integers of `bits` bits along the rows: int32 [rows / codes a word, columns]."""

    bits: int
    less: float = 0.0
    """What is subtracted from each."""

    def part(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """See Matrix."""
        import torch

        a_word = 32 // self.bits
        first, last = rows[0] // a_word, -(-rows[1] // a_word)
        stored = _part(read, self.key, self.n_columns * 4, (first, last), _times(columns, 4))
        codes = unpacked(stored.view(torch.int32).unsqueeze(1), self.bits, 1).flatten(0, 1)
        skipped = rows[0] - first * a_word
        numbers = codes[skipped : skipped + rows[1] - rows[0]].to(torch.float32)
        return numbers.sub_(self.less) if self.less else numbers

    def stretch(self, rows: Range) -> Range:
        """See Matrix."""
        a_word = 32 // self.bits
        return _times((rows[0] // a_word, -(-rows[1] // a_word)), self.n_columns * 4)


@dataclass(frozen=True, slots=True)
class Groups:
    """For each row the row of scales that it has: int32 [rows]."""

    key: str
    n_groups: int

    def part(self, read: ReadInto, rows: Range) -> "Tensor":
        """The groups of some rows, int64.

        Raises:
            CheckpointError: a group that is none.
        """
        import torch

        stored = _part(read, self.key, 4, rows, (0, 4))
        groups = stored.view(torch.int32).flatten().to(torch.int64)
        low, high = torch.aminmax(groups)
        if low < 0 or high >= self.n_groups:
            raise CheckpointError(
                f"{self.key}: group {int(low if low < 0 else high)}, expected 0 to "
                f"{self.n_groups - 1}",
                hint="download the checkpoint again, or ask who made it",
            )
        return groups


def _times(columns: Range, item: int) -> Range:
    return columns[0] * item, columns[1] * item


def _block(nbytes: int) -> bytearray:
    """This thread's buffer for whole rows; a new one would be filled with zeros each time."""
    block: bytearray | None = vars(_local).get("block")
    if block is None or len(block) < nbytes:
        block = _local.block = bytearray(max(nbytes, _BLOCK_NBYTES))
    return block


def _part(read: ReadInto, key: str, row_nbytes: int, rows: Range, columns: Range) -> "Tensor":
    """Bytes of a stored matrix, uint8 [rows, columns].

    Rows of which a part is wanted are read whole, a few at a time, where the rest is little.
    """
    import torch

    height, width = rows[1] - rows[0], columns[1] - columns[0]
    first = rows[0] * row_nbytes + columns[0]
    stored = bytearray(height * width)
    if not stored:
        return torch.empty((height, width), dtype=torch.uint8)
    view, matrix = memoryview(stored), torch.frombuffer(stored, dtype=torch.uint8)
    matrix = matrix.view(height, width)
    if height == 1 or width == row_nbytes:
        read(key, first, view)
    elif row_nbytes - width > _GAP_NBYTES:
        for i in range(height):
            read(key, first + i * row_nbytes, view[i * width : (i + 1) * width])
    else:
        step = max(1, _BLOCK_NBYTES // row_nbytes)
        block = _block(step * row_nbytes)
        whole = torch.frombuffer(block, dtype=torch.uint8)[: step * row_nbytes].view(step, -1)
        for i in range(0, height, step):
            n = min(step, height - i)
            read(key, (rows[0] + i) * row_nbytes, memoryview(block)[: n * row_nbytes])
            matrix[i : i + n].copy_(whole[:n, columns[0] : columns[1]])
    return matrix
