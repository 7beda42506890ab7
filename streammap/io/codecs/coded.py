"""One tensor stored as codes and scales, and how a part of it is decoded.

The codes are a matrix, row by row; so are the scales, one number for each block of codes:

    value[r, n] = (code[r, n] - zero[i, j]) * scale[i, j],    i = r // block rows, j = n // columns

in float32, rounded once to the tensor's dtype. A strip is decoded at a time, so that a tensor of
any size takes the same memory.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from streammap.common.ranges import Range
from streammap.io.codecs.encodings import Decoder
from streammap.io.dtypes import DTYPE_BITS, TensorSpec, to_torch

if TYPE_CHECKING:
    from torch import Tensor

STRIP = 2**17
"""Values decoded at once, or one row: few enough for a processor's cache."""


class ReadInto(Protocol):
    """Reads stored tensors."""

    def __call__(self, key: str, start: int, view: memoryview, /) -> None:
        """Fill `view` from the tensor's byte `start` on."""
        ...


@dataclass(frozen=True, slots=True)
class Numbers:
    """A stored matrix of scales, or of zero points."""

    key: str
    n_columns: int
    dtype: str
    decode: Decoder | None = None
    """What its codes mean; None for floats."""

    def part(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """A part of it as float32 [rows, columns]."""
        import torch

        item = DTYPE_BITS[self.dtype] // 8
        stored = _part(read, self.key, self.n_columns * item, rows, _times(columns, item))
        if self.decode is not None:
            numbers = self.decode(stored.flatten())
        else:
            numbers = stored.view(to_torch(self.dtype)).to(torch.float32)
        return numbers.view(rows[1] - rows[0], -1)


@dataclass(frozen=True, slots=True)
class PackedZeros:
    """Zero points of a few bits, packed along the rows: int32 [rows / codes a word, columns]."""

    key: str
    n_columns: int
    bits: int

    def part(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """See Numbers."""
        import torch

        a_word = 32 // self.bits
        first, last = rows[0] // a_word, -(-rows[1] // a_word)
        stored = _part(read, self.key, self.n_columns * 4, (first, last), _times(columns, 4))
        words = stored.view(torch.int32).unsqueeze(1)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32).view(1, -1, 1)
        codes = (words >> shifts).bitwise_and_((1 << self.bits) - 1).flatten(0, 1)
        skipped = rows[0] - first * a_word
        numbers = codes[skipped : skipped + rows[1] - rows[0]].to(torch.float32)
        return numbers.sub_(float(1 << (self.bits - 1)))


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor as it is read, and the stored tensors that it is made of."""

    spec: TensorSpec
    """Its dtype and shape once decoded."""
    key: str
    """The codes: a matrix of `n_columns` codes a row."""
    decode: Decoder
    code_bits: int
    n_rows: int
    """Rows of one matrix; a stack has several, each with scales of its own."""
    n_columns: int
    scales: Numbers | None = None
    block: tuple[int, int] = (1, 1)
    """Rows and columns of codes that share a scale."""
    zeros: Numbers | PackedZeros | None = None
    factor: Numbers | None = None
    """One number for all, with which each scale is multiplied."""
    divisor: Numbers | None = None
    """One number for all, by which each scale is divided."""
    is_transposed: bool = False
    """Whether the tensor is [..., columns, rows] of the stored matrices."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Keys of the stored tensors that it is made of."""
        parts = (self.scales, self.zeros, self.factor, self.divisor)
        return (self.key, *(part.key for part in parts if part is not None))

    def fill(self, read: ReadInto, start: int, out: "Tensor") -> None:
        """Decode the elements from `start` on into `out` (1-D, of the tensor's dtype)."""
        length = self.n_rows if self.is_transposed else self.n_columns
        while len(out):
            line, place = divmod(start, length)
            whole = not place and len(out) >= length
            lines, n = (len(out) // length, length) if whole else (1, min(len(out), length - place))
            target = out[: lines * n].view(lines, n)
            if self.is_transposed:
                lines = self._fill_columns(read, line, place, target)
            else:
                self._fill_rows(read, (line, line + lines), (place, place + n), target)
            out, start = out[lines * n :], start + lines * n

    def _fill_rows(self, read: ReadInto, rows: Range, columns: Range, out: "Tensor") -> None:
        """A part of the matrix, a strip of whole rows at a time."""
        row = rows[0]
        while row < rows[1]:
            end = min(rows[1], self._end_of_strip(row, columns[1] - columns[0]))
            out[row - rows[0] : end - rows[0]].copy_(self._values(read, (row, end), columns))
            row = end

    def _fill_columns(self, read: ReadInto, line: int, place: int, out: "Tensor") -> int:
        """Lines of the transposed tensor: columns of one matrix. Returns how many were filled.

        The matrix is read row by row all the same, whole rows of which a part is kept.
        """
        matrix, column = divmod(line, self.n_columns)
        lines = min(len(out), self.n_columns - column)
        row = matrix * self.n_rows + place
        last = row + out.shape[1]
        done = 0
        while row < last:
            end = min(last, self._end_of_strip(row, lines))
            values = self._values(read, (row, end), (column, column + lines))
            # torch transposes in blocks if both sides are whole and of one dtype.
            turned = values.to(out.dtype).t().contiguous()
            out[:lines, done : done + end - row].copy_(turned)
            row, done = end, done + end - row
        return lines

    def _end_of_strip(self, row: int, width: int) -> int:
        """The row before which a strip that begins at `row` ends."""
        end = row + max(1, STRIP // max(1, width))
        if self.block[0] == 1:
            return end
        inner = row % self.n_rows  # all rows of a strip share their scales
        shared = min(self.block[0] - inner % self.block[0], self.n_rows - inner)
        return min(end, row + shared)

    def _values(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """float32 [rows, columns] of a strip."""
        step = self.block[1]
        groups = columns[0] // step, -(-columns[1] // step)
        covered = groups[0] * step, min(groups[1] * step, self.n_columns)
        values = self._codes(read, rows, covered)
        if self.zeros is not None:
            values = values - self._spread(self.zeros.part(read, self._rows(rows), groups), values)
        if self.scales is not None:
            scales = self.scales.part(read, self._rows(rows), groups)
            if self.factor is not None:
                scales = scales * self.factor.part(read, (0, 1), (0, 1))
            if self.divisor is not None:
                scales = scales / self.divisor.part(read, (0, 1), (0, 1))
            values = values.mul_(self._spread(scales, values))
        return values[:, columns[0] - covered[0] : columns[1] - covered[0]]

    def _rows(self, rows: Range) -> Range:
        """The rows of scales for rows of codes."""
        if self.block[0] == 1:
            return rows
        matrix, inner = divmod(rows[0], self.n_rows)
        row = matrix * -(-self.n_rows // self.block[0]) + inner // self.block[0]
        return row, row + 1

    def _spread(self, numbers: "Tensor", values: "Tensor") -> "Tensor":
        """Each number for all columns of its block; rows and single columns broadcast."""
        if numbers.shape[1] == 1:
            return numbers
        return numbers.repeat_interleave(self.block[1], 1)[:, : values.shape[1]]

    def _codes(self, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """What the codes of a part mean, as float32."""
        unit = 8 if self.code_bits >= 8 else 32  # small codes are decoded by the word
        width = -(-self.n_columns * self.code_bits // unit) * unit
        first = columns[0] * self.code_bits // unit * unit
        last = min(width, -(-columns[1] * self.code_bits // unit) * unit)
        stored = _part(read, self.key, width // 8, rows, (first // 8, last // 8))
        values = self.decode(stored.flatten()).view(rows[1] - rows[0], -1)
        skipped = columns[0] - first // self.code_bits
        return values[:, skipped : skipped + columns[1] - columns[0]]


def _times(columns: Range, item: int) -> Range:
    return columns[0] * item, columns[1] * item


def _part(read: ReadInto, key: str, row_nbytes: int, rows: Range, columns: Range) -> "Tensor":
    """Bytes of a stored matrix, uint8 [rows, columns]; of several rows, read all of each."""
    import torch

    height = rows[1] - rows[0]
    start, end = columns if height == 1 else (0, row_nbytes)
    stored = bytearray(height * (end - start))
    read(key, rows[0] * row_nbytes + start, memoryview(stored))
    matrix = torch.frombuffer(stored, dtype=torch.uint8).view(height, -1)
    return matrix[:, columns[0] - start : columns[1] - start].contiguous()
