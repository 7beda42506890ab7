"""Symbolic tensors, which only know which part of which source tensor each of their parts is.

transformers stacks, concatenates, splits and transposes tensors as it loads some models. Here these
torch functions run on symbolic tensors; the result says how to fill a parameter from its sources,
region by region. A function that does more than move numbers is refused.

    torch.cat([a, b], dim=1)    pieces of `a` where they were, those of `b` behind them
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar, final

from streammap.common.ranges import Range, Region

_Item = TypeVar("_Item")


class UnmovedError(Exception):
    """A function that does more than move numbers; the message names it."""


@dataclass(frozen=True, slots=True)
class SourceRegion:
    """A region of a source tensor, and where it is in the assembled one."""

    key: str
    at: Region
    """In the whole: a range in each of its dimensions."""
    start: tuple[int, ...]
    """First unit of the source, in each of the source's dimensions."""
    axes: tuple[int | None, ...]
    """For each dimension of the whole, that of the source; None for one that stacking made."""

    def within(self, region: Region) -> "tuple[Region, Region] | None":
        """What of a region this piece is: its place there, and in the source; None for nothing."""
        ours: list[Range] = []
        theirs: list[Range] = [(0, 0)] * len(self.start)
        for (low, high), (start, end), axis in zip(region, self.at, self.axes, strict=True):
            first, last = max(low, start), min(high, end)
            if first >= last:
                return None
            ours.append((first - low, last - low))
            if axis is not None:
                begin = self.start[axis] + first - start
                theirs[axis] = (begin, begin + last - first)
        return tuple(ours), tuple(theirs)


@final
@dataclass(frozen=True, slots=True)
class Assembly:
    """A tensor as pieces of others."""

    shape: tuple[int, ...]
    pieces: tuple[SourceRegion, ...]

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        name = getattr(function, "__name__", str(function))
        made = _FUNCTIONS.get(name)
        if made is None:
            raise UnmovedError(f"torch.{name}")
        return made(*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise UnmovedError(f"Tensor.{name}")

    def __getitem__(self, index: object) -> "Assembly":
        part, dim = self, 0
        for given in index if isinstance(index, tuple) else (index,):
            if isinstance(given, int):
                part = part.narrow(dim, given, given + 1).squeeze(dim)
                continue
            if not isinstance(given, slice) or given.step not in (None, 1):
                raise UnmovedError(f"indexing with {given!r}")
            start, end, _ = given.indices(part.shape[dim])
            part, dim = part.narrow(dim, start, max(start, end)), dim + 1
        return part

    @property
    def ndim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> "tuple[int, ...] | int":
        """Shape, or one size."""
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> "Assembly":
        """Itself: it has no memory."""
        return self

    def narrow(self, dim: int, start: int, end: int) -> "Assembly":
        """The units [start, end) of a dimension."""
        whole: list[Range] = [(0, n) for n in self.shape]
        whole[dim] = (start, end)
        pieces = []
        for piece in self.pieces:
            common = piece.within(tuple(whole))
            if common is not None:
                at, source = common
                pieces.append(SourceRegion(piece.key, at, tuple(a for a, _ in source), piece.axes))
        shape = (*self.shape[:dim], end - start, *self.shape[dim + 1 :])
        return Assembly(shape, tuple(pieces))

    def squeeze(self, dim: int) -> "Assembly":
        """Without a dimension of one unit."""
        dim %= len(self.shape)
        if self.shape[dim] != 1:
            return self
        if any(piece.axes[dim] is not None for piece in self.pieces):
            raise UnmovedError("Tensor.squeeze of a source's own dimension")
        pieces = [replace(p, at=_less(p.at, dim), axes=_less(p.axes, dim)) for p in self.pieces]
        return Assembly(_less(self.shape, dim), tuple(pieces))

    def transpose(self, dim0: int, dim1: int) -> "Assembly":
        """Two dimensions swapped."""
        order = list(range(len(self.shape)))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        pieces = [
            replace(p, at=tuple(p.at[d] for d in order), axes=tuple(p.axes[d] for d in order))
            for p in self.pieces
        ]
        return Assembly(tuple(self.shape[d] for d in order), tuple(pieces))

    def chunk(self, n: int, dim: int = 0) -> "tuple[Assembly, ...]":
        """As torch.chunk."""
        return _split(self, -(-self.shape[dim] // n), dim)

    def split(self, sizes: int | Sequence[int], dim: int = 0) -> "tuple[Assembly, ...]":
        """As torch.split."""
        return _split(self, sizes, dim)


def whole(key: str, shape: tuple[int, ...]) -> Assembly:
    """A source tensor as it is."""
    region = tuple((0, n) for n in shape)
    return Assembly(
        shape, (SourceRegion(key, region, (0,) * len(shape), tuple(range(len(shape)))),)
    )


def _less(items: tuple[_Item, ...], dim: int) -> tuple[_Item, ...]:
    return (*items[:dim], *items[dim + 1 :])


def _cat(parts: Sequence[Assembly], dim: int = 0) -> Assembly:
    first = parts[0]
    dim %= len(first.shape)
    pieces: list[SourceRegion] = []
    n = 0
    for part in parts:
        if _less(part.shape, dim) != _less(first.shape, dim):
            raise UnmovedError(f"torch.cat of {list(first.shape)} and {list(part.shape)}")
        for piece in part.pieces:
            start, end = piece.at[dim]
            at = (*piece.at[:dim], (start + n, end + n), *piece.at[dim + 1 :])
            pieces.append(replace(piece, at=at))
        n += part.shape[dim]
    return Assembly((*first.shape[:dim], n, *first.shape[dim + 1 :]), tuple(pieces))


def _stack(parts: Sequence[Assembly], dim: int = 0) -> Assembly:
    return _cat([_unsqueezed(part, dim) for part in parts], dim)


def _unsqueezed(part: Assembly, dim: int) -> Assembly:
    dim %= len(part.shape) + 1
    pieces = [
        replace(
            p,
            at=(*p.at[:dim], (0, 1), *p.at[dim:]),
            axes=(*p.axes[:dim], None, *p.axes[dim:]),
        )
        for p in part.pieces
    ]
    return Assembly((*part.shape[:dim], 1, *part.shape[dim:]), tuple(pieces))


def _split(part: Assembly, sizes: int | Sequence[int], dim: int = 0) -> tuple[Assembly, ...]:
    dim %= len(part.shape)
    n = part.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, n - start) for start in range(0, n, sizes)]
    if sum(sizes) != n:
        raise UnmovedError(f"torch.split of {n} units into {list(sizes)}")
    parts, start = [], 0
    for size in sizes:
        parts.append(part.narrow(dim, start, start + size))
        start += size
    return tuple(parts)


def _unbind(part: Assembly, dim: int = 0) -> tuple[Assembly, ...]:
    return tuple(piece.squeeze(dim) for piece in _split(part, 1, dim))


_FUNCTIONS: Mapping[str, Callable[..., object]] = {
    "cat": _cat,
    "stack": _stack,
    "chunk": Assembly.chunk,
    "split": _split,
    "unbind": _unbind,
    "transpose": Assembly.transpose,
}
