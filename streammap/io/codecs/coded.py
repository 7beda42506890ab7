"""One tensor stored as codes and scales, and how a part of it is decoded.

The codes are a matrix, row by row; so are the scales, one number for each block of codes:

    value[r, n] = (code[r, n] - zero[i, j]) * scale[i, j],    i = r // block rows, j = n // columns

in float32, rounded once to the tensor's dtype. A strip is decoded at a time, so that a tensor of
any size takes the same memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammap.common.ranges import Range
from streammap.io.codecs.matrices import Groups, Matrix, Numbers, ReadInto
from streammap.io.dtypes import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor

STRIP = 2**17
"""Values decoded at once: few enough for a processor's cache."""
SCRATCH_NBYTES = 28 * STRIP
"""What decoding takes in each thread: codes, words or halves, float32, and spread scales."""


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor as it is read, and the stored tensors that it is made of."""

    spec: TensorSpec
    """Its dtype and shape once decoded."""
    format: str
    """What people call it, for notes: "fp8 blocks of 128 x 128"."""
    codes: Matrix
    n_rows: int
    """Rows of one matrix; a stack has several, each with scales of its own."""
    n_columns: int
    scales: Matrix | None = None
    block: tuple[int, int] = (1, 1)
    """Rows and columns of codes that share a scale."""
    zeros: Matrix | None = None
    factor: Numbers | None = None
    """One number for all, with which each scale is multiplied."""
    divisor: Numbers | None = None
    """One number for all, by which each scale is divided."""
    groups: Groups | None = None
    """Which rows share a scale, where these do not stand side by side."""
    is_transposed: bool = False
    """Whether the tensor is [..., columns, rows] of the stored matrices."""

    @property
    def stored(self) -> tuple[str, ...]:
        """Keys of the stored tensors that it is made of, the codes first."""
        parts = (self.codes, self.scales, self.zeros, self.factor, self.divisor, self.groups)
        return tuple(part.key for part in parts if part is not None)

    def stretches(self, start: int, end: int) -> Iterator[tuple[str, int, int]]:
        """Stored bytes that hold the elements from `start` to `end`: (key, first, past the last).

        Those of scalars are left out, and of what is transposed all: it is spread over the tensor.
        """
        if self.is_transposed or end <= start:
            return
        rows = start // self.n_columns, -(-end // self.n_columns)
        yield self.codes.key, *self.codes.stretch(rows)
        first, last = self._rows((rows[0], rows[0] + 1)), self._rows((rows[1] - 1, rows[1]))
        for part in (self.scales, self.zeros):
            if part is not None:
                yield part.key, *part.stretch((first[0], last[1]))

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
        """A part of the matrix: strips of whole rows, or, of very long ones, pieces of each."""
        width = columns[1] - columns[0]
        row = rows[0]
        while row < rows[1]:
            end = min(rows[1], self._end_of_strip(row, width))
            target = out[row - rows[0] : end - rows[0]]
            for at in range(0, width, STRIP):
                piece = columns[0] + at, columns[0] + min(at + STRIP, width)
                target[:, at : at + STRIP].copy_(self._values(read, (row, end), piece))
            row = end

    def _fill_columns(self, read: ReadInto, line: int, place: int, out: "Tensor") -> int:
        """Lines of the transposed tensor: columns of one matrix. Returns how many were filled."""
        matrix, column = divmod(line, self.n_columns)
        lines = min(len(out), self.n_columns - column)
        n = min(lines, STRIP)
        for at in range(0, lines, n):
            width = min(n, lines - at)
            row = matrix * self.n_rows + place
            last, done = row + out.shape[1], 0
            while row < last:
                end = min(last, self._end_of_strip(row, width))
                first = column + at
                values = self._values(read, (row, end), (first, first + width))
                if not values.is_contiguous():
                    # torch transposes in blocks if both sides are whole and of one dtype.
                    values = values.to(out.dtype).contiguous()
                out[at : at + width, done : done + end - row].copy_(values)
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
        """float32 [rows, columns] of a strip; [columns, rows] if it is transposed."""
        step = self.block[1]
        part = self.codes.turned if self.is_transposed else self.codes.part
        values = part(read, rows, columns)
        cut = columns[0] // step, -(-columns[1] // step)
        if self.zeros is not None:
            self._spread(values, self._of_rows(self.zeros, read, rows, cut), columns, "-")
        if self.scales is not None:
            scales = self._of_rows(self.scales, read, rows, cut)
            if self.factor is not None:
                scales = scales * self.factor.part(read, (0, 1), (0, 1))
            if self.divisor is not None:
                scales = scales / self.divisor.part(read, (0, 1), (0, 1))
            self._spread(values, scales, columns, "*")
        return values

    def _of_rows(self, part: Matrix, read: ReadInto, rows: Range, columns: Range) -> "Tensor":
        """Scales or zero points of rows, float32 [rows or 1, columns]; transposed like values."""
        if self.groups is None:
            numbers = part.part(read, self._rows(rows), columns)
        else:
            groups = self.groups.part(read, rows)
            first = int(groups.min())
            numbers = part.part(read, (first, int(groups.max()) + 1), columns)
            numbers = numbers.index_select(0, groups - first)
        return numbers.t().contiguous() if self.is_transposed else numbers

    def _rows(self, rows: Range) -> Range:
        """The rows of scales for rows of codes."""
        if self.block[0] == 1:
            return rows
        matrix, inner = divmod(rows[0], self.n_rows)
        row = matrix * -(-self.n_rows // self.block[0]) + inner // self.block[0]
        return row, row + 1

    def _spread(self, values: "Tensor", numbers: "Tensor", columns: Range, how: str) -> None:
        """`values` times or less `numbers`, each for the columns of its block; in place."""
        import torch

        apply = torch.Tensor.mul_ if how == "*" else torch.Tensor.sub_
        dim, step, width = 0 if self.is_transposed else 1, self.block[1], columns[1] - columns[0]
        if numbers.shape[dim] == 1 or step == 1:
            apply(values, numbers)
            return
        begun = min(-columns[0] % step, width)  # columns of a block that began before
        whole, rest = divmod(width - begun, step)
        n, first = whole * step, 1 if begun else 0
        if begun:
            apply(values.narrow(dim, 0, begun), numbers.narrow(dim, 0, 1))
        if whole:
            shape = (whole, step, -1) if self.is_transposed else (-1, whole, step)
            blocks = values.narrow(dim, begun, n).view(shape)
            apply(blocks, numbers.narrow(dim, first, whole).unsqueeze(dim + 1))
        if rest:
            apply(values.narrow(dim, begun + n, rest), numbers.narrow(dim, first + whole, 1))
