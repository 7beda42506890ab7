"""Recipe -> program: the operations that compute a tile, and in which order.

Each element is computed by the same operations in the same order whatever the tile: sources are
added up in the order of the blend, then each dimension is mapped in turn, members of a unit in the
order of its row (or all in one go, see pooling.py: that depends on the form, not on the tile). Sums
are kept in the form's accumulator; a factor that all members share is applied after the sum (1/n as
a division, where a form is wide), and the result is rounded once. So tiles of any size give the
same bits, but for matrix products, whose kernels add in an order of their own: the tiles of these
are the same in each run. No torch here.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import final

from streammap.common.ranges import Range
from streammap.common.weighed_cache import WeighedCache
from streammap.engine import group_sums, pullback
from streammap.engine.memory import MAX_NUMBERS, N_PLACES
from streammap.engine.program import OUT, WORK, Op, OpKind, Program, Strip, View, contiguous
from streammap.engine.pullback import Pullback
from streammap.engine.tile_reads import DimRead, Part, ReadRequest, Recipe
from streammap.io.dtypes import DTYPE_BITS, HALVES
from streammap.planning import graph, segments
from streammap.planning.graph import TensorRef, Term
from streammap.planning.maps import BlockMap, DenseMap
from streammap.planning.segments import Segment

_ALIGN_NBYTES = 64
_MAX_MOVES = 64
_MAX_PROGRAMS = 1024
_OP_WEIGHT = 8
"""An operation with its views is as large as so many numbers."""


def program(recipe: Recipe, chunk_nbytes: int) -> Program:
    """The operations of a tile, in chunks of `chunk_nbytes` of a source, or of one row."""
    return _ProgramBuilder(recipe, chunk_nbytes).written()


@final
class Programs:
    """The programs of a run: tiles of equal keys share one."""

    def __init__(self) -> None:
        """None yet."""
        self._programs = WeighedCache[Program](
            most=_MAX_PROGRAMS, heaviest=MAX_NUMBERS, weight=_n_numbers
        )

    def of(self, recipe: Recipe, form_key: object, chunk_nbytes: int) -> Program:
        """The program of a recipe; `form_key` is that of its form."""
        if recipe.is_dense:  # each tile cuts its matrices at another place
            return program(recipe, chunk_nbytes)
        key = form_key, recipe.program_key
        return self._programs.of(key, lambda: program(recipe, chunk_nbytes))


def _n_numbers(made: Program) -> int:
    return sum(_OP_WEIGHT + len(op.indices) + len(op.numbers) for op in made.ops)


@final
class _ProgramBuilder:
    """Writes the operations of one tile."""

    def __init__(self, recipe: Recipe, chunk_nbytes: int) -> None:
        self._form, self._parts, self._chunk_nbytes = recipe.form, recipe.parts, chunk_nbytes
        tile = recipe.tile
        self._dim = len(tile.prefix)
        self._shape = tile.shape or (1,)
        # Maps act on the dimensions of the source, so the tile gets its leading ones back, as 1.
        self._shape = (*(1,) * self._dim, *self._shape)
        self._ops: list[Op] = []
        self._used = self._peak = self._largest = 0
        self._staged: dict[tuple[int, tuple[int, ...], Part], View] = {}
        self._number = 0  # of the current term

    def written(self) -> Program:
        """The program."""
        out = contiguous(OUT, self._form.spec.dtype, 0, self._shape)
        short = (self._rounded, self._moved, self._blended, self._pooled)
        if not any(write(out) for write in short):
            self._summed(out)
        return Program(tuple(self._ops), self._peak, self._largest)

    def _rounded(self, out: View) -> bool:
        """One source in another dtype: no accumulator."""
        form = self._form
        term = form.terms[0]
        coefficient, load = term.blend[0]
        if len(form.terms) > 1 or len(term.blend) > 1 or coefficient != 1.0 or any(term.maps):
            return False
        if graph.is_constant(load) or load.spec.dtype == form.spec.dtype:
            return False
        (part,) = self._parts[0]
        self._round(out, self._read(part, load))
        return True

    def _round(self, out: View, source: View) -> None:
        """Numbers in the result's dtype; counted, where some may be lost."""
        halved = source.dtype == "F64" and out.dtype in HALVES
        overflows = source.dtype == "F32" and out.dtype == "F16"
        kind: OpKind = "round" if halved or overflows or self._form.narrows else "copy"
        self._ops.append(Op(kind, out, (source,)))

    def _moved(self, out: View) -> bool:
        """One source whose elements are moved, each scaled by one number: no accumulator."""
        form = self._form
        term = form.terms[0]
        coefficient, load = term.blend[0]
        if len(form.terms) > 1 or len(term.blend) > 1 or coefficient == 0.0:
            return False
        if not any(term.maps) or not _moves(term) or (form.wide and coefficient != 1.0):
            return False
        if not graph.is_stored(load, form.spec.dtype):
            return False
        (part,) = self._parts[0]
        self._place(part, self._read(part, load), out, coefficient)
        return True

    def _place(self, part: Part, held: View, out: View, coefficient: float) -> None:
        """Move each element to all of its places."""
        dims = [(d, dim.pulled.segments) for d, dim in enumerate(part) if dim.pulled.segments]
        for chosen in itertools.product(*(moves for _, moves in dims)):
            to, source, factor = out, held, coefficient
            # From the last dimension on: `blocks` moves those behind it.
            for (d, _), segment in reversed(list(zip(dims, chosen, strict=True))):
                to = to.blocks(d, segment, source=False)
                factor *= segment.coefficient
                if segment.coefficient != 0.0:
                    source = source.blocks(d, segment, source=True)
            self._put(to, source, factor)

    def _blended(self, out: View) -> bool:
        """(1 - w) a + w b of 16-bit sources: one kernel, which rounds once."""
        dtype, terms = self._form.spec.dtype, self._form.terms
        sides = [(number, *pair) for number, term in enumerate(terms) for pair in term.blend]
        if len(sides) != 2 or dtype not in HALVES or self._form.accumulator == "F64":
            return False
        (_, u, a), (_, w, b) = sides
        if u == 0.0 or w == 0.0 or u != 1.0 - w:
            return False
        if not graph.is_stored(a, dtype) or not graph.is_stored(b, dtype):
            return False
        if not all(_moves_exactly(term, dtype) for term in terms):
            return False
        sources = []
        for number, _, load in sides:
            self._number = number
            (part,) = self._parts[number]
            held = self._read(part, load)
            if any(dim.changes for dim in part):
                moved = self._new(dtype, out.shape)
                self._place(part, held, moved, 1.0)
                held = moved
            sources.append(held)
        self._ops.append(Op("blend", out, tuple(sources), number=w))
        return True

    def _pooled(self, out: View) -> bool:
        """Group sums of sources in their own dtype: one kernel, which rounds once."""
        divisor = group_sums.divisor_of(self._form)
        if divisor is None:
            return False
        from streammap.engine import pooling

        sources = [load for _, load in self._form.terms[0].blend]
        (part,) = self._parts[0]
        held = self._read(part, *sources)
        self._ops += pooling.ops(part, len(sources), held, out, divisor, self._new)
        return True

    def _summed(self, out: View) -> None:
        """Any form, in chunks of rows."""
        dtype = self._form.accumulator
        direct = dtype == self._form.spec.dtype
        for start, end in self._chunks():
            self._used = 0
            target = out.narrow(self._dim, start, end)
            total = target if direct else self._new(dtype, target.shape)
            is_first = True
            for number, term in enumerate(self._form.terms):
                self._number, mark = number, self._used
                self._add(term, self._parts[number], (start, end), total, is_first=is_first)
                self._used = mark
                is_first = False
            if not direct:
                self._round(target, total)

    def _chunks(self) -> list[Range]:
        """The tile's rows, some start a time."""
        n = self._shape[self._dim]
        n_requests = sum(
            len(parts) * len(term.blend)
            for term, parts in zip(self._form.terms, self._parts, strict=True)
        )
        dense = any(
            isinstance(dim.m, DenseMap)
            for parts in self._parts
            for dim in parts[0][: self._dim + 1]
        )
        # Each chunk goes over all sources again: they must still be in their places. Strips of a
        # dense map are read one after the other, and would be read again for each chunk.
        if dense or n_requests > N_PLACES:
            return [(0, n)]
        item = DTYPE_BITS[self._form.accumulator] // 8
        largest = max(math.prod(d.pulled.n_in for d in part) for (part,) in self._parts) * item
        n_chunks = max(1, min(n, -(-largest // self._chunk_nbytes)))
        step = -(-n // n_chunks)
        return [(start, min(start + step, n)) for start in range(0, n, step)]

    def _add(
        self, term: Term, parts: Sequence[Part], rows: Range, total: View, *, is_first: bool
    ) -> None:
        """Add a term to the total, or put it there."""
        if len(parts) > 1:
            held, part, factor = self._strips(term, parts, rows, total, is_first=is_first)
            dims = [(d, part[d]) for d in range(self._dim + 1, len(part)) if part[d].changes]
        else:
            held, part, factor = self._blend(term, parts[0], rows, total, is_first=is_first)
            dims = [(d, dim) for d, dim in enumerate(part) if dim.changes]
        for number, (d, dim) in enumerate(dims):
            lands = is_first and number == len(dims) - 1
            shape = (*held.shape[:d], dim.n_out, *held.shape[d + 1 :])
            to = total if lands else self._new(total.dtype, shape)
            factor *= self._map(dim, held, to, d)
            held = to
        if held == total or is_first:
            self._shared(total, held, factor)
            return
        if factor != 1.0:
            scaled = held if held.place == WORK else self._new(held.dtype, held.shape)
            self._shared(scaled, held, factor)
            held = scaled
        self._ops.append(Op("add", total, (total, held)))

    def _strips(
        self, term: Term, parts: Sequence[Part], rows: Range, total: View, *, is_first: bool
    ) -> tuple[View, Part, float]:
        """The sum of a term's strips, mapped as far as they are strips: the rest is mapped once."""
        first = parts[0]
        lands = is_first and not any(dim.changes for dim in first[self._dim + 1 :])
        shape = [dim.n_out for dim in first[: self._dim + 1]]
        shape += [dim.pulled.n_in for dim in first[self._dim + 1 :]]
        summed = total if lands else self._new(total.dtype, tuple(shape))
        common = 1.0
        for number, strip in enumerate(parts):
            mark = self._used
            held, part, common = self._blend(term, strip, rows, total, is_first=False)
            dims = [(d, dim) for d, dim in enumerate(part[: self._dim + 1]) if dim.changes]
            for at, (d, dim) in enumerate(dims):
                is_last, adds = at == len(dims) - 1, number > 0
                direct = is_last and (isinstance(dim.m, DenseMap) or not adds)
                to_shape = (*held.shape[:d], dim.n_out, *held.shape[d + 1 :])
                to = summed if direct else self._new(total.dtype, to_shape)
                common *= self._map(dim, held, to, d, adds=direct and adds)
                held = to
                if is_last and not direct:
                    self._ops.append(Op("add", summed, (summed, held)))
            self._used = mark
        return summed, first, common

    def _blend(
        self, term: Term, whole: Part, rows: Range, total: View, *, is_first: bool
    ) -> tuple[View, Part, float]:
        """The blend, the part that it is, and a factor that is still to be applied.

        If all coefficients are equal, the sources are added unscaled, and the common factor comes
        after the last map: fewer kernels, and the same order of operations in each tile.
        """
        blend = [(c, load) for c, load in term.blend if c != 0.0]
        values = {c for c, _ in blend}
        factor = values.pop() if len(values) == 1 else 1.0
        if len(blend) == 1 and not graph.is_constant(blend[0][1]):
            staged = self._as_read(blend[0][1], whole, rows, total.dtype)
            if staged is not None:
                return *staged, factor
        part = self._within(whole, rows)
        shape = tuple(dim.pulled.n_in for dim in part)
        lands = is_first and not any(dim.changes for dim in part)
        held = total if lands else self._new(total.dtype, shape)
        if not blend:
            self._ops.append(Op("fill", held, number=0.0))
        spare: View | None = None
        for position, (coefficient, load) in enumerate(blend):
            weight = coefficient / factor
            to = held
            if position:
                spare = spare or self._new(total.dtype, shape)
                to = spare
            if graph.is_constant(load):
                self._ops.append(Op("fill", to, number=weight))
            else:
                self._gather(self._read(whole, load), whole, part, to, weight)
            if position:
                self._ops.append(Op("add", held, (held, to)))
        return held, part, factor

    def _as_read(
        self, load: TensorRef, whole: Part, rows: Range, dtype: str
    ) -> tuple[View, Part] | None:
        """A source that is computed with in place, unconverted; None if it can't be."""
        if load.spec.dtype != dtype or any(d.pulled.n_in != 1 for d in whole[: self._dim]):
            return None
        staged, dim = self._read(whole, load), whole[self._dim]
        moves = dim.pulled.segments
        if moves is None:
            if isinstance(dim.m, DenseMap):
                return staged, whole
            return staged.narrow(self._dim, *rows), self._within(whole, rows)
        pulled = Pullback(dim.pulled.ranges, pullback.clipped(moves, *rows))
        return staged, self._with(whole, pulled, rows)

    def _within(self, whole: Part, rows: Range) -> Part:
        """A part cut down to some rows of the tile, and what they are made of."""
        if isinstance(whole[self._dim].m, DenseMap):
            return whole
        return self._with(whole, pullback.within(whole[self._dim].pulled, *rows), rows)

    def _with(self, whole: Part, pulled: Pullback, rows: Range) -> Part:
        dim = whole[self._dim]
        start = dim.rows[0]
        cut = DimRead(dim.m, pulled, (start + rows[0], start + rows[1]))
        return (*whole[: self._dim], cut, *whole[self._dim + 1 :])

    def _gather(self, staged: View, whole: Part, part: Part, to: View, weight: float) -> None:
        """Copy what a chunk is made of to scratch, in the accumulator's dtype, and scale it."""
        converts = staged.dtype != to.dtype  # kernels that mix dtypes take memory of their own
        number = 1.0 if converts else weight
        if isinstance(part[self._dim].m, DenseMap):
            self._put(to, staged, number)
        else:
            for move in _side_by_side(part[self._dim].pulled.ranges):
                place = to.blocks(self._dim, move, source=False)
                self._put(place, staged.blocks(self._dim, move, source=True), number)
        if converts:
            self._put(to, to, weight)

    def _map(self, dim: DimRead, held: View, to: View, d: int, *, adds: bool = False) -> float:
        """Apply a dimension's map; gives a factor that is still to be applied.

        Args:
            adds: Whether a dense map adds to what is there.
        """
        if isinstance(dim.m, DenseMap):
            ((start, end),) = dim.pulled.ranges
            strip = Strip(dim.m, dim.rows, (start, end))
            sides = to.folded(d), (held.folded(d),)
            self._ops.append(Op("matmul", *sides, number=float(adds), matrix=strip))
            return 1.0
        assert isinstance(dim.m, BlockMap)
        factor = dim.m.common or 1.0
        moves = [
            replace(s, coefficient=s.coefficient and 1.0) if dim.m.common else s
            for s in dim.pulled.segments or ()
        ]
        if len(moves) > _MAX_MOVES:
            self._take(moves, held, to, d)
        else:
            self._move(moves, held, to, d)
        return factor

    def _move(self, moves: Sequence[Segment], held: View, to: View, d: int) -> None:
        """A regular map: one strided kernel for each segment."""
        # The first n moves write, all others add. Where the next n add to the same blocks, the
        # two are one kernel, which writes each block once instead of twice.
        n = sum(1 for s in moves if not s.adds)
        paired = len(moves) >= 2 * n and all(
            b.adds and segments.alike(a, b)
            for a, b in zip(moves[:n], moves[n : 2 * n], strict=True)
        )
        mark = self._used
        for i, segment in enumerate(moves):
            place = to.blocks(d, segment, source=False)
            if segment.coefficient == 0.0:
                if not segment.adds:
                    self._ops.append(Op("fill", place, number=0.0))
                continue
            source = held.blocks(d, segment, source=True)
            if paired and i < n:
                other = held.blocks(d, moves[n + i], source=True)
                self._ops.append(Op("add", place, (source, other)))
            elif not segment.adds:
                self._put(place, source, segment.coefficient)
            elif not (paired and i < 2 * n):
                if segment.coefficient != 1.0:
                    scaled = self._new(held.dtype, place.shape)
                    self._ops.append(Op("mul", scaled, (source,), number=segment.coefficient))
                    source = scaled
                self._ops.append(Op("add", place, (place, source)))
                self._used = mark

    def _take(self, moves: Sequence[Segment], held: View, to: View, d: int) -> None:
        """An irregular map: units by number, one slot of its rows after the other."""
        mark = self._used
        for slot in segments.slots(moves):
            units = [unit for segment in slot for unit in segments.units(segment)]
            kept = [(to_unit, at, c) for to_unit, at, c in units if c != 0.0]
            if not slot[0].adds:
                target, places = to, dict.fromkeys(range(to.shape[d]), (0, 1.0))
                places |= {to_unit: (at, c) for to_unit, at, c in kept}
            else:
                places = {to_unit: (at, c) for to_unit, at, c in kept}
                shape = (*to.shape[:d], len(places), *to.shape[d + 1 :])
                target = self._new(held.dtype, shape)
            indices = tuple(at for at, _ in places.values())
            numbers = tuple(c for _, c in places.values())
            self._ops.append(Op("take", target.folded(d), (held.folded(d),), indices=indices))
            if any(number != 1.0 for number in numbers):
                self._ops.append(Op("scale", target.folded(d), numbers=numbers))
            empty = tuple(to_unit for to_unit, _, c in units if c == 0.0)
            if slot[0].adds:
                into = tuple(places)
                self._ops.append(Op("put", to.folded(d), (target.folded(d),), indices=into))
            elif empty:
                self._ops.append(Op("clear", to.folded(d), indices=empty))
            self._used = mark

    def _read(self, part: Part, *sources: TensorRef) -> View:
        """Where a source is read to, or several; a program reads them once for a part."""
        key = self._number, tuple(id(found) for found in sources), part
        if key not in self._staged:
            request = ReadRequest(sources, tuple(dim.pulled.ranges for dim in part))
            self._largest = max(self._largest, request.nbytes)
            shape = tuple(dim.pulled.n_in for dim in part)
            dtype = sources[0].spec.dtype
            whole = contiguous(len(self._staged), dtype, 0, (len(sources), *shape))
            self._staged[key] = whole.at(0, 0) if len(sources) == 1 else whole
            self._ops.append(Op("read", whole))
        return self._staged[key]

    def _shared(self, to: View, source: View, factor: float) -> None:
        """Put a sum, times the factor that all of it share: a mean is divided by its number."""
        n = group_sums.whole_divisor(factor) if self._form.wide else None
        if n is None:
            self._put(to, source, factor)
        else:
            self._ops.append(Op("div", to, (source,), number=n))

    def _put(self, to: View, source: View, factor: float) -> None:
        if factor == 0.0:
            self._ops.append(Op("fill", to, number=0.0))
        elif factor != 1.0:
            self._ops.append(Op("mul", to, (source,), number=factor))
        elif to != source:
            self._ops.append(Op("copy", to, (source,)))

    def _new(self, dtype: str, shape: tuple[int, ...]) -> View:
        item = DTYPE_BITS[dtype] // 8
        offset = self._used // item
        nbytes = math.prod(shape) * item
        self._used += -(-nbytes // _ALIGN_NBYTES) * _ALIGN_NBYTES
        self._peak = max(self._peak, self._used)
        return contiguous(WORK, dtype, offset, shape)


def _moves(term: Term) -> bool:
    """Whether a term's maps move numbers, none of them added up, and in few runs."""
    blocks = [m for m in term.maps if m is not None]
    return (
        all(isinstance(m, BlockMap) and m.longest <= 1 for m in blocks)
        and math.prod(len(m.segments) for m in blocks if isinstance(m, BlockMap)) <= _MAX_MOVES
    )


def _moves_exactly(term: Term, dtype: str) -> bool:
    """Whether they move a number to each place, by a factor that takes no rounding."""
    for m in term.maps:
        if isinstance(m, BlockMap):
            # Halves of small numbers: bfloat16 has float32's exponents, float16 has not.
            takes_none = m.common == 1.0 or (
                dtype == "BF16" and math.frexp(m.common or 0)[0] == 0.5
            )
            if m.n_members != 1 or not takes_none:
                return False
    return _moves(term)


def _side_by_side(ranges: Sequence[Range]) -> Iterator[Segment]:
    """The moves that put ranges one after the other: one, where they are alike and evenly apart."""
    steps = {b[0] - a[0] for a, b in itertools.pairwise(ranges)}
    lengths = {end - start for start, end in ranges}
    if len(steps) <= 1 and len(lengths) == 1:
        (length,) = lengths
        yield Segment(
            0, length, ranges[0][0], max(steps, default=0), len(ranges), length, 1.0, False
        )
        return
    at = 0
    for start, end in ranges:
        yield Segment(at, 0, start, 0, 1, end - start, 1.0, False)
        at += end - start
