"""Which parts of its sources a tile needs. No torch here.

A recipe belongs to one tile of one form. Its requests say what is read. Its operations depend on
less (compiler.py): tiles of other tensors often share its program.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

from streammap.common.ranges import Range, Tile
from streammap.engine import group_sums, pullback
from streammap.engine.pullback import Pullback
from streammap.io.dtypes import DTYPE_BITS
from streammap.planning import graph
from streammap.planning.graph import LinearForm, TensorRef, Term
from streammap.planning.maps import BlockMap, DenseMap

STRIP = 512
"""Units that a dense map takes in at once, at most."""
_STRIP_NBYTES = 2**20
"""Or fewer, where a unit has many bytes."""


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A part of source tensors that a tile needs: a product of ranges, all but whole at the end.

    Its elements stand in order; where a leading dimension has several ranges, side by side. Several
    tensors are of one dtype and shape, and stand one after the other.
    """

    sources: tuple[TensorRef, ...]
    ranges: tuple[tuple[Range, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Tensors, and units of each dimension."""
        return len(self.sources), *(sum(end - start for start, end in r) for r in self.ranges)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * DTYPE_BITS[self.sources[0].spec.dtype] // 8

    @property
    def cache_key(self) -> object:
        """Equal for requests of the same bytes."""
        return tuple((id(load.source), load.key) for load in self.sources), self.ranges

    def stretches(self) -> Iterator[tuple[TensorRef, int, int]]:
        """Bytes of tensors that are read, one after the other."""
        spec = self.sources[0].spec
        shape = spec.shape or (1,)
        cut = [d for d, n in enumerate(shape) if self.ranges[d] != ((0, n),)]
        dim = max(cut, default=0)
        inner = math.prod(shape[dim + 1 :]) * DTYPE_BITS[spec.dtype] // 8
        units = [[i for start, end in r for i in range(start, end)] for r in self.ranges[:dim]]
        for load in self.sources:
            for index in itertools.product(*units):
                base = 0
                for i, n in zip(index, shape[1:], strict=False):
                    base = (base + i) * n
                for start, end in self.ranges[dim]:
                    yield load, (base + start) * inner, (base + end) * inner


@dataclass(frozen=True, slots=True)
class DimRead:
    """What a dimension of a term's source gives to a tile."""

    m: BlockMap | DenseMap | None
    pulled: Pullback
    rows: Range
    """Units of the result."""

    @property
    def changes(self) -> bool:
        """Whether its map changes anything here."""
        return isinstance(self.m, DenseMap) or self.pulled.segments is not None

    @property
    def n_out(self) -> int:
        """Units of the result."""
        return self.rows[1] - self.rows[0]


Part = tuple[DimRead, ...]
"""One pass over a term: all of it, or, where dense maps are tiled, a strip."""


def form_key(form: LinearForm) -> object:
    """Equal for forms whose tiles share programs: all of a form, but for which tensors it reads."""
    return (
        form.spec,
        form.accumulator,
        form.wide,
        tuple(
            (
                term.maps,
                term.blend[0][1].spec.shape,
                tuple((c, load.spec.dtype, graph.is_constant(load)) for c, load in term.blend),
            )
            for term in form.terms
        ),
    )


@final
class Recipe:
    """A tile of a form: what it reads and, once asked for, its program."""

    def __init__(self, form: LinearForm, tile: Tile) -> None:
        """Find out which parts of the sources the tile needs."""
        self.form, self.tile = form, tile
        self.parts = tuple(_parts(term, tile, _item_nbytes(term)) for term in form.terms)

    @property
    def reads_key(self) -> object:
        """Equal for tiles of one form that compute the same numbers from the same bytes."""
        return tuple(
            tuple((d.pulled, d.rows if isinstance(d.m, DenseMap) else d.n_out) for d in part)
            for parts in self.parts
            for part in parts
        )

    @cached_property
    def is_dense(self) -> bool:
        """Whether a matrix is multiplied with."""
        return any(isinstance(d.m, DenseMap) for parts in self.parts for d in parts[0])

    @property
    def program_key(self) -> object:
        """Equal for tiles that share a program, if the keys of their forms are equal too."""
        dims = [d.pulled for parts in self.parts for part in parts for d in part]
        sources = [(pulled.n_in, pulled.segments) for pulled in dims]
        return len(self.tile.prefix), self.tile.shape, *sources

    @cached_property
    def requests(self) -> tuple[ReadRequest, ...]:
        """What is read, in the order in which the program does."""
        terms = zip(self.form.terms, self.parts, strict=True)
        return tuple(
            ReadRequest(load, tuple(d.pulled.ranges for d in part))
            for term, parts in terms
            for part in parts
            for load in self._together(term)
        )

    def _together(self, term: Term) -> list[tuple[TensorRef, ...]]:
        """The sources of a term; in one request those that are added up as they are."""
        if len(term.blend) > 1 and group_sums.divisor_of(self.form) is not None:
            return [tuple(load for _, load in term.blend)]
        return [(load,) for c, load in term.blend if c != 0.0 and not graph.is_constant(load)]


def _item_nbytes(term: Term) -> int:
    return DTYPE_BITS[term.blend[0][1].spec.dtype] // 8


def _parts(term: Term, tile: Tile, item: int) -> tuple[Part, ...]:
    source = term.blend[0][1].spec.shape
    if not source:
        return ((DimRead(None, pullback.whole(None, 1), (0, 1)),),)
    last = len(tile.prefix)
    choices: list[list[DimRead]] = []
    for dim, (n, m) in enumerate(zip(source, term.maps, strict=True)):
        n_out = n if m is None else m.n_out
        if dim > last:
            blocks = m if isinstance(m, BlockMap) else None  # no cache is to hold a matrix
            choices.append([DimRead(m, pullback.whole(blocks, n), (0, n_out))])
            continue
        rows = (tile.start, tile.end) if dim == last else (tile.prefix[dim], tile.prefix[dim] + 1)
        if isinstance(m, DenseMap):
            unit = math.prod(source[dim + 1 :]) * item
            step = max(1, min(STRIP, _STRIP_NBYTES // unit))
            strips = [((at, min(at + step, n)),) for at in range(0, n, step)]
            choices.append([DimRead(m, Pullback(strip, None), rows) for strip in strips])
        else:
            unit = math.prod(source[dim + 1 :]) * item
            choices.append([DimRead(m, pullback.pull(m, *rows, unit), rows)])
    return tuple(itertools.product(*choices))
