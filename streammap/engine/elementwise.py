"""Numbers that are made of those at their places in sources: computed piece by piece.

Where no map moves a number, the same calls on the same buffers compute a piece of any tensor: they
are bound once, and a piece stays in a processor's cache from the reading of its sources to the
writing of the result. No torch here.
"""

from dataclasses import dataclass

from streammap.common import ranges
from streammap.engine import compiler
from streammap.engine.memory import N_PLACES, Limits
from streammap.engine.program import Program
from streammap.engine.schedule import fits
from streammap.engine.tile_reads import Recipe
from streammap.io.tensor_spec import DTYPE_BITS, TensorSpec
from streammap.planning import graph
from streammap.planning.graph import LinearForm, TensorRef, Term

_MOST_NBYTES = 2 * ranges.PIECE_NBYTES
"""Of a piece: smaller ones cost more calls than a cache saves."""
FlatKind = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Pieces:
    """How pieces of a flat form (graph.flat) are computed, whatever its length."""

    program: Program
    nbytes: int
    """Bytes of the result that are computed at once."""


def kind_of(form: LinearForm) -> FlatKind | None:
    """Equal for flat forms whose pieces are computed alike; None where they can't be."""
    if len(form.spec.shape) != 1 or any(term.maps != (None,) for term in form.terms):
        return None
    blends = (
        tuple((c, found.spec.dtype, graph.is_constant(found)) for c, found in term.blend)
        for term in form.terms
    )
    return (form.spec.dtype, *blends)


def loads_of(form: LinearForm) -> list[TensorRef]:
    """What is read, in the order of the program."""
    return [
        found
        for term in form.terms
        for coefficient, found in term.blend
        if coefficient != 0.0 and not graph.is_constant(found)
    ]


def pieces_of(form: LinearForm, limits: Limits) -> Pieces | None:
    """The largest pieces within the limits; None where there are none, or too many sources."""
    if len(loads_of(form)) > N_PLACES:
        return None
    item = DTYPE_BITS[form.spec.dtype] // 8
    n = min(_MOST_NBYTES, limits.out_nbytes) // item
    while n:
        one = LinearForm(
            TensorSpec(form.spec.dtype, (n,)),
            tuple(Term((None,), _cut(term.blend, n)) for term in form.terms),
        )
        found = compiler.program(Recipe(one, ranges.tile_at((n,), (), 0, n)), limits.chunk_nbytes)
        if fits(found, limits):
            return Pieces(found, n * item)
        n //= 2
    return None


def _cut(blend: graph.Blend, n: int) -> graph.Blend:
    return tuple(
        (c, TensorRef(found.source, found.key, TensorSpec(found.spec.dtype, (n,))))
        for c, found in blend
    )
