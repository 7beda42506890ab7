"""Matrices in files: those that a user gives, and those that are made of others.

A file is read at given places, a block at a time. What is made of whole matrices (a product of two)
is put into a file without a name, in the folder for temporary files ($TMPDIR).
"""

import ctypes
import os
import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, final

from streammap.common.ranges import Range
from streammap.common.torch_threads import torch_threads
from streammap.errors import PlanError
from streammap.io.dtypes import DTYPE_BITS, to_torch
from streammap.io.formats.safetensors_header import Slot
from streammap.planning.dense.matrix import PART, Held, Matrix, Transposed

if TYPE_CHECKING:
    from torch import Tensor

_HELD = 2**16
"""Numbers of what is made of others and held: more go into a file."""
_STEP = 2**16
"""Numbers that are converted at a time."""


class Bytes(Protocol):
    """What a stored matrix needs of its file."""

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from a byte on."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Stored(Matrix):
    """A matrix that lies in a file, row by row."""

    file: Bytes
    start: int
    """Its first byte."""
    size: tuple[int, int]
    """Rows and columns."""
    kind: str
    """The dtype that it is stored in."""

    @property
    def shape(self) -> tuple[int, int]:
        """See Matrix."""
        return self.size

    @property
    def dtype(self) -> str:
        """See Matrix."""
        return "F64" if self.kind == "F64" else "F32"

    def part(self, rows: Range, columns: Range, room: "Tensor") -> "Tensor":
        """See Matrix."""
        n_rows, n_columns = rows[1] - rows[0], columns[1] - columns[0]
        found = room[: n_rows * n_columns]
        if columns == (0, self.size[1]):  # in one piece
            self._fill(rows[0] * n_columns, found)
        else:
            for i in range(n_rows):
                first = (rows[0] + i) * self.size[1] + columns[0]
                self._fill(first, found[i * n_columns : (i + 1) * n_columns])
        return found.view(n_rows, n_columns)

    def _fill(self, first: int, out: "Tensor") -> None:
        """Read numbers from the matrix's number `first` on."""
        offset = self.start + first * DTYPE_BITS[self.kind] // 8
        if self.kind == self.dtype:
            self.file.read_into(offset, view_of(out))
            return
        import torch

        for at in range(0, out.numel(), _STEP):
            to = out[at : at + _STEP]
            read = torch.empty(to.numel(), dtype=to_torch(self.kind))
            self.file.read_into(offset + at * read.element_size(), view_of(read))
            to.copy_(read)


def of_slot(file: Bytes, slot: Slot) -> Stored | None:
    """A tensor of a file that lies row by row; None if it is no matrix of floats."""
    spec = slot.spec
    if len(spec.shape) != 2 or not spec.is_float:
        return None
    return Stored(file, slot.start, (spec.shape[0], spec.shape[1]), spec.dtype)


@final
class Spool:
    """A file without a name, which is gone with its last user."""

    def __init__(self) -> None:
        """Make it.

        Raises:
            PlanError: there is no room, or no folder for it.
        """
        try:
            descriptor, path = tempfile.mkstemp(prefix="streammap-")
            Path(path).unlink()
        except OSError as error:
            raise _no_room(error) from error
        self._descriptor, self.nbytes = descriptor, 0
        weakref.finalize(self, os.close, descriptor)

    def append(self, content: "memoryview | bytes") -> None:
        """Write bytes at its end.

        Raises:
            PlanError: the disk is full.
        """
        view, done = memoryview(content), 0
        try:
            while done < len(view):
                done += os.pwrite(self._descriptor, view[done:], self.nbytes + done)
        except OSError as error:
            raise _no_room(error) from error
        self.nbytes += done

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` from a byte on."""
        done = 0
        while done < len(view):
            n = os.preadv(self._descriptor, [view[done:]], offset + done)
            if not n:
                raise PlanError("a temporary file is shorter than it was", hint="check the disk")
            done += n


def _no_room(error: OSError) -> PlanError:
    return PlanError(
        f"{tempfile.gettempdir()}: {error.strerror}, for a matrix that is made of others",
        hint="set TMPDIR to a folder with more room",
    )


def view_of(tensor: "Tensor") -> memoryview:
    """The bytes of a tensor whose numbers lie together. The view does not keep it alive."""
    there = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return memoryview(there).cast("B")


def kept(strips: "Iterator[Tensor]", shape: tuple[int, int], dtype: str) -> Matrix:
    """A matrix of strips of whole rows: in memory if it is small, else in a file."""
    import torch

    if shape[0] * shape[1] <= _HELD:
        found = [strip.to(to_torch(dtype), copy=True) for strip in strips]
        return Held(torch.cat(found) if found else torch.empty(shape, dtype=to_torch(dtype)))
    spool = Spool()
    for strip in strips:
        rows = strip.to(to_torch(dtype)).contiguous()
        spool.append(view_of(rows))
    return Stored(spool, 0, shape, dtype)


def product(a: Matrix, b: Matrix) -> Matrix:
    """The product of two matrices, in the wider of their dtypes."""
    dtype = "F64" if "F64" in (a.dtype, b.dtype) else "F32"
    return kept(_strips(a, b, dtype), (a.shape[0], b.shape[1]), dtype)


def _strips(a: Matrix, b: Matrix, dtype: str) -> "Iterator[Tensor]":
    """Strips of whole rows of a product."""
    import torch

    kind = to_torch(dtype)
    step = max(1, PART // max(1, *b.shape))
    with torch_threads():  # so that the bits are the same on any number of processors
        for start in range(0, a.shape[0], step):
            rows = (start, min(start + step, a.shape[0]))
            total = torch.zeros(rows[1] - start, b.shape[1], dtype=kind)
            left = a.read(rows, (0, a.shape[1])).to(kind)
            for inner, columns, right in b.parts():
                total[:, slice(*columns)] += left[:, slice(*inner)] @ right.to(kind)
            yield total


def same(a: Matrix, b: Matrix) -> bool:
    """Whether two matrices have equal numbers."""
    if a is b:
        return True
    if isinstance(a, Transposed) and isinstance(b, Transposed):
        return same(a.base, b.base)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return all(block.equal(b.read(rows, columns)) for rows, columns, block in a.parts())
