"""Tensors of a DCP folder, read region by region out of their chunks.

A chunk's stream is a zip file that torch.save wrote. Its numbers are located when the chunk is
first read; then any region is read in place. A tensor's rows may be spread over chunks and files;
the parts are put together here.
"""

import itertools
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from streammap.common.ranges import Range, boxes, intersect, relative
from streammap.errors import CheckpointError, some
from streammap.io.buffers import Buffer
from streammap.io.dtypes import DTYPE_BITS, TensorSpec, to_torch
from streammap.io.formats import dcp_stream
from streammap.io.formats.dcp_metadata import Chunk, Metadata, Path_
from streammap.io.formats.dcp_stream import ChunkLocation
from streammap.io.formats.torch_zip import NESTS
from streammap.io.storage.local import LocalFile
from streammap.io.tensor_readers import TensorReader

if TYPE_CHECKING:
    from torch import Tensor

_SCRATCH_NBYTES = 2**18
_BY_ITEM = {1: "U8", 2: "I16", 4: "I32", 8: "I64"}
"""Item size in bytes -> a dtype to move items with."""
_WASTE = 4
"""To save requests, up to this many bytes are read for each byte that is needed."""


@dataclass(frozen=True, slots=True)
class Selected:
    """The model's state dict among the entries of a folder."""

    keys: Mapping[str, str]
    """Key -> flat name."""
    nest: str | None
    """The key that it is nested under: "model", "app.model"."""
    others: tuple[str, ...]
    """Other entries: optimizer, step ..."""


def select(metadata: Metadata, *, folder: str) -> Selected:
    """Select the model's tensors: those under "model" or "state_dict", else those at the top.

    Raises:
        CheckpointError: there are none, or two with the same key.
    """
    paths = {name: metadata.paths[name] for name in metadata.tensors}
    nest = _nest(paths.values())
    inside = {
        name: path
        for name, path in paths.items()
        if (len(path) == 1 if nest is None else path[: len(nest)] == nest and len(path) > len(nest))
    }
    tops = dict.fromkeys(str(path[0]) for path in metadata.paths.values())
    if not inside:
        raise CheckpointError(
            f"{folder}: no state dict at its top or under 'model' or 'state_dict', metadata "
            f"{some(list(tops), limit=5)}",
            hint='save {"model": model.state_dict()}',
        )
    n = 0 if nest is None else len(nest)
    keys: dict[str, str] = {}
    for name, path in inside.items():
        key = ".".join(map(str, path[n:]))
        if key in keys:
            raise CheckpointError(f"{folder}: {keys[key]} and {name} are both {key}")
        keys[key] = name
    taken = {str(metadata.paths[name][0]) for name in inside}
    others = tuple(top for top in tops if top not in taken)
    return Selected(keys, None if nest is None else ".".join(map(str, nest)), others)


def _nest(paths: Iterable[Path_]) -> Path_ | None:
    candidates = {
        path[: i + 1]
        for path in paths
        for i, part in enumerate(path[:-1])
        if part in NESTS and not any("optim" in str(before) for before in path[:i])
    }
    return min(candidates, key=lambda path: (len(path), NESTS.index(str(path[-1]))), default=None)


@final
class Chunks(TensorReader):
    """Reads the tensors of a folder. A TensorReader."""

    def __init__(
        self,
        tensors: Mapping[str, tuple[TensorSpec, tuple[Chunk, ...]]],
        files: Mapping[str, LocalFile],
    ) -> None:
        """Take tensors by key and files by name.

        Raises:
            CheckpointError: a file ends before one of its chunks.
        """
        for key, (_, chunks) in tensors.items():
            for chunk in chunks:
                end, there = chunk.offset + chunk.nbytes, files[chunk.file].nbytes
                if end > there:
                    raise CheckpointError(
                        f"{chunk.file}: {key}: its chunk ends at byte {end}, the file has {there}",
                        hint="the file was cut short: copy it again",
                    )
        self._tensors, self._files = tensors, files
        self._places: dict[tuple[str, int], ChunkLocation] = {}
        self._local = threading.local()

    def __reduce__(self) -> tuple[type["Chunks"], tuple[object, object]]:
        return Chunks, (self._tensors, self._files)

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """Fill `view` with a tensor's bytes, row by row, from its byte `start` on.

        Raises:
            CheckpointError: a chunk differs from the metadata, or can't be read.
        """
        import torch

        spec, chunks = self._tensors[key]
        item = DTYPE_BITS[spec.dtype] // 8
        first, n = start // item, len(view) // item
        out = torch.frombuffer(view, dtype=to_torch(_BY_ITEM[item]))
        for box in boxes(spec.shape, first, first + n):
            whole = out[box.offset - first :][: box.n_elements]
            target = whole.view((*(1,) * len(box.prefix), *box.shape))
            wanted = box.region(spec.shape)
            for chunk in chunks:
                both = intersect(wanted, chunk.at)
                if both is None:
                    continue
                part = target
                for dim, ((a, b), (low, _)) in enumerate(zip(both, wanted, strict=True)):
                    part = part.narrow(dim, a - low, b - a)
                inside = relative(both, chunk.at)
                self._copy(key, chunk, inside, part, view)

    def tensor(self, key: str) -> "Tensor":
        """A whole tensor, in memory of its own."""
        import torch

        spec, _ = self._tensors[key]
        content = bytearray(spec.nbytes)
        if not content:
            return torch.empty(spec.shape, dtype=to_torch(spec.dtype))
        self.read_into(key, 0, memoryview(content))
        return torch.frombuffer(content, dtype=to_torch(spec.dtype)).view(spec.shape)

    def _copy(
        self,
        key: str,
        chunk: Chunk,
        ranges: Sequence[Range],
        target: "Tensor",
        view: memoryview,
    ) -> None:
        """Copy a region of a chunk to `target`, which is over `view`."""
        place = self._place(key, chunk)
        shape = [end - start for start, end in chunk.at]
        order = place.order
        source = _Source(self._files[chunk.file], place.start, self._scratch())
        sizes, ranges, target = (
            [shape[d] for d in order],
            [ranges[d] for d in order],
            target.permute(order),
        )
        source.copy(*_merged(sizes, ranges, target), view)

    def _scratch(self) -> Buffer:
        """This thread's buffer."""
        scratch: Buffer | None = vars(self._local).get("scratch")
        if scratch is None:
            scratch = self._local.scratch = Buffer(_SCRATCH_NBYTES)
        return scratch

    def _place(self, key: str, chunk: Chunk) -> ChunkLocation:
        known = self._places.get((chunk.file, chunk.offset))
        if known is None:
            spec, _ = self._tensors[key]
            known = dcp_stream.find(key, chunk, spec, self._files[chunk.file])
            self._places[chunk.file, chunk.offset] = known
        return known


def _merged(
    sizes: list[int], ranges: list[Range], target: "Tensor"
) -> tuple[list[int], list[Range], "Tensor"]:
    """The same region in as few dimensions as possible, but at least two."""
    while len(sizes) < 2:
        sizes, ranges, target = [1, *sizes], [(0, 1), *ranges], target.unsqueeze(0)
    for dim in range(len(sizes) - 1, 0, -1):
        inner = sizes[dim]
        is_whole = ranges[dim] == (0, inner)
        if is_whole and target.stride(dim - 1) == inner * target.stride(dim) and len(sizes) > 2:
            low, high = ranges[dim - 1]
            sizes = [*sizes[: dim - 1], sizes[dim - 1] * inner, *sizes[dim + 1 :]]
            ranges = [*ranges[: dim - 1], (low * inner, high * inner), *ranges[dim + 1 :]]
            target = target.flatten(dim - 1, dim)
    return sizes, ranges, target


@dataclass(frozen=True, slots=True)
class _Source:
    """A chunk's numbers, row by row."""

    file: LocalFile
    start: int
    scratch: Buffer

    def copy(
        self, sizes: list[int], ranges: list[Range], target: "Tensor", view: memoryview
    ) -> None:
        """Copy a region; `target` is over `view`."""
        *lead, (top, bottom), columns = ranges
        *outer, n_rows, n_columns = sizes
        for index in itertools.product(*(range(a, b) for a, b in lead)):
            part, row = target, 0
            for i, n, (a, _) in zip(index, outer, lead, strict=True):
                part, row = part[i - a], row * n + i
            self._rows(row * n_rows + top, bottom - top, n_columns, columns, (part, view))

    def _rows(
        self, row: int, n: int, n_columns: int, columns: Range, to: "tuple[Tensor, memoryview]"
    ) -> None:
        """Copy columns of n rows that follow each other in the file."""
        part, view = to
        item = part.element_size()
        left, right = columns
        width = right - left
        at = self.start + row * n_columns * item
        if width == n_columns and part.is_contiguous():
            first = part.storage_offset() * item
            self.file.read_into(at, view[first : first + n * width * item])
            return
        scratch = self.scratch.typed(_BY_ITEM[item])
        step = len(scratch) // n_columns
        if width * _WASTE < n_columns or not step:
            # Few columns of each row: one request per row, or several for a long one.
            piece = len(scratch)
            for i, low in itertools.product(range(n), range(0, width, piece)):
                m = min(piece, width - low)
                self._read(at + (i * n_columns + left + low) * item, m * item)
                part[i, low : low + m].copy_(scratch[:m])
            return
        for first in range(0, n, step):
            m = min(step, n - first)
            self._read(at + first * n_columns * item, m * n_columns * item)
            rows = scratch[: m * n_columns].view(m, n_columns)
            part[first : first + m].copy_(rows[:, left:right])

    def _read(self, at: int, nbytes: int) -> None:
        self.file.read_into(at, self.scratch.view[:nbytes])
