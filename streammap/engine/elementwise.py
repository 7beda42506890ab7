"""Elementwise forms, whose numbers depend on those at the same place of each source, by pieces.

No map moves a number, so the same calls on the same buffers compute a piece of any tensor: they are
bound once, and a piece stays in a processor's cache from the reading of its sources to the writing
of the result. No torch here.
"""

from dataclasses import dataclass

from streammap.common import ranges
from streammap.engine import compiler
from streammap.engine.memory import N_PLACES, Limits
from streammap.engine.program import Program
from streammap.engine.schedule import fits
from streammap.engine.tile_reads import Recipe
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.planning import graph
from streammap.planning.graph import LinearForm, TensorRef, Term

_MOST_NBYTES = 2 * ranges.PIECE_NBYTES
"""Of a piece: smaller ones cost more calls than a cache saves."""
FlatKey = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """How pieces of a flat form (graph.flat) are computed, whatever its length."""

    program: Program
    nbytes: int
    """Bytes of the result that are computed at once."""


def flat_key(form: LinearForm) -> FlatKey | None:
    """Equal for flat forms whose pieces share a program; None if the form is not flat."""
    if len(form.spec.shape) != 1 or any(term.maps != (None,) for term in form.terms):
        return None
    blends = (
        tuple((c, load.spec.dtype, graph.is_constant(load)) for c, load in term.blend)
        for term in form.terms
    )
    return (form.spec.dtype, form.accumulator, form.wide, *blends)


def loads_of(form: LinearForm) -> list[TensorRef]:
    """The tensors that are read, in the order of the program."""
    return [
        load
        for term in form.terms
        for coefficient, load in term.blend
        if coefficient != 0.0 and not graph.is_constant(load)
    ]


def pieces_of(form: LinearForm, limits: Limits) -> Pieces | None:
    """The largest pieces within the limits; None if none fits, or there are too many sources."""
    if len(loads_of(form)) > N_PLACES:
        return None
    item = DTYPE_BITS[form.spec.dtype] // 8
    n = min(_MOST_NBYTES, limits.out_nbytes) // item
    while n:
        program = program_of(form, n, limits)
        if fits(program, limits):
            return Pieces(program, n * item)
        n //= 2
    return None


def program_of(form: LinearForm, n: int, limits: Limits) -> Program:
    """How `n` numbers of a flat form are computed."""
    one = LinearForm(
        TensorSpec(form.spec.dtype, (n,)),
        tuple(Term((None,), _cut(term.blend, n)) for term in form.terms),
        form.wide,
    )
    return compiler.program(Recipe(one, ranges.tile_at((n,), (), 0, n)), limits.chunk_nbytes)


def _cut(blend: graph.Blend, n: int) -> graph.Blend:
    return tuple(
        (c, TensorRef(load.source, load.key, TensorSpec(load.spec.dtype, (n,))))
        for c, load in blend
    )
