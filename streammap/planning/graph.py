"""The graph of one tensor: a linear function of source tensors, kept in normal form.

    Form   =  sum of terms                          one per result tensor
    Term   =  M_0 x M_1 x ... applied to a blend    one map a dimension (None keeps it)
    blend  =  sum of coefficient * Load             tensors of one shape (a constant: ones)

Almost all that streammap does is of this kind, and the kind is closed: a map of a sum is a sum of
maps, maps of one dimension compose, equal maps share one blend. So each function below returns the
normal form at once, and a chain of operators costs one pass over the sources. A tensor that nothing
changes is one bare Load, and is copied byte for byte.

What is not linear, or has no maps of its own (spherical means, low-rank products, noise), is a
Derived tensor: a source like any other, computed from forms while it is read.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, ClassVar, Protocol, final

from streammap.io import dtypes
from streammap.io.dtypes import HALVES, TensorSpec
from streammap.io.storage.base import Reader
from streammap.planning import maps
from streammap.planning.maps import AxisMap, BlockMap, DenseMap

if TYPE_CHECKING:
    from streammap.io.storage.mapping import MappedPart


class TensorSource(Protocol):
    """Where tensors come from: what a graph needs of a checkpoint."""

    @property
    def name(self) -> str:
        """Its name, for messages."""
        ...

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape."""
        ...

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """Fill `view` with the tensor's bytes, row by row, from its byte `start` on."""
        ...

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """Map bytes `start` to `end` of the tensor; gives False if they are to be read instead."""
        ...


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A planned read of one tensor."""

    source: TensorSource
    key: str
    spec: TensorSpec

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, TensorRef) and other.source is self.source and other.key == self.key
        )

    def __hash__(self) -> int:
        return hash((id(self.source), self.key))


Blend = tuple[tuple[float, TensorRef], ...]
_MAX_F32_ADDENDS = 4


@dataclass(frozen=True, slots=True)
class Term:
    """Maps over a blend of tensors of one shape."""

    maps: tuple[AxisMap | None, ...]
    """One a dimension; None keeps it."""
    blend: Blend

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        source = self.blend[0][1].spec.shape
        return tuple(n if m is None else m.n_out for n, m in zip(source, self.maps, strict=True))

    @property
    def n_addends(self) -> int:
        """Numbers that are added up in one go, at most: along the rows, or along the columns."""
        longest = [m.longest if isinstance(m, BlockMap) else 1 for m in self.maps]
        return max(len(self.blend) * math.prod(longest[:-1] or longest), *longest, 1)


@dataclass(frozen=True, slots=True)
class LinearForm:
    """One result tensor as a function of source tensors."""

    spec: TensorSpec
    terms: tuple[Term, ...]
    wide: bool = False
    """Whether it is computed in float64 whatever its dtype, and rounded once; but for a short
    average."""

    @property
    def accumulator(self) -> str:
        """The dtype sums are kept in: float32, or float64 for float64 and for long float32 sums.

        What is read in float64 stays so until the result is rounded, once.

        In float32 the sum of 2 or 4 equal parts is the whole, bit for bit (of -0.0 it may be +0.0);
        of 8 it is not.
        """
        wide = any(ref.spec.dtype == "F64" for ref in self.reads())
        if (self.wide and not self.is_short_average) or wide or self.spec.dtype == "F64":
            return "F64"
        long = any(term.n_addends > _MAX_F32_ADDENDS for term in self.terms)
        return "F64" if self.spec.dtype == "F32" and long else "F32"

    @property
    def is_short_average(self) -> bool:
        """Whether it is an average of 16-bit tensors in 16 bits, with unequal weights.

        Float32 has 2**16 times their digits; the mean with equal weights is one sum and one
        division, and is rounded from float64.
        """
        if not {self.spec.dtype, *(ref.spec.dtype for ref in self.reads())} <= HALVES:
            return False
        weights = {c for term in self.terms for c, _ in term.blend}
        moves = any(m is not None for term in self.terms for m in term.maps)
        return not moves and len(weights) > 1 and min(weights) > 0.0

    @property
    def is_dense(self) -> bool:
        """Whether it is multiplied with a matrix."""
        return any(isinstance(m, DenseMap) for term in self.terms for m in term.maps)

    @property
    def narrows(self) -> bool:
        """Whether it may have numbers of a source that its dtype has not."""
        return any(
            not dtypes.holds(self.spec.dtype, ref.spec.dtype)
            for ref in self.reads()
            if not is_constant(ref)
            and (not isinstance(ref.source, Derived) or ref.source.only_moves)
        )

    @property
    def bare(self) -> TensorRef | None:
        """The source tensor that this is byte for byte, stored or derived, if it is one."""
        if len(self.terms) != 1:
            return None
        term = self.terms[0]
        coefficient, ref = term.blend[0]
        same = coefficient == 1.0 and ref.spec == self.spec and len(term.blend) == 1
        return ref if same and all(m is None for m in term.maps) else None

    @property
    def copied(self) -> TensorRef | None:
        """The stored tensor that this is byte for byte, if it is one."""
        ref = self.bare
        return None if ref is None or isinstance(ref.source, Derived) else ref

    def reads(self) -> Iterator[TensorRef]:
        """What its terms read, stored or derived, once for each term that reads it."""
        for term in self.terms:
            for _, ref in term.blend:
                yield ref

    def loads(self) -> Iterator[TensorRef]:
        """Each stored tensor, once for each term that reads it, or derives from it."""
        for ref in self.reads():
            if isinstance(ref.source, Derived):
                for form in ref.source.inputs:
                    yield from form.loads()
            else:
                yield ref

    def derived(self) -> "Iterator[Derived]":
        """The derived tensors that it reads, those that they are made of first."""
        for ref in self.reads():
            if isinstance(ref.source, Derived):
                for form in ref.source.inputs:
                    yield from form.derived()
                yield ref.source


class FormReader(Protocol):
    """Reads numbers of forms, for one thread: what the engine gives to a derived tensor."""

    kept: dict[object, object]
    """What a derived tensor may keep from one call to the next; its scratch counts it. Emptied
    when another one is read."""

    def __call__(self, form: LinearForm, start: int, view: memoryview) -> None:
        """Fill `view` with a form's numbers, in its dtype, from its element `start` on."""
        ...


class Derived(ABC):
    """A tensor that is computed from forms while it is read, a part at a time.

    The same part is read again, in other sizes, by other threads, after a kill: equal places must
    have equal bits each time. What it knows of all its numbers (a norm, a threshold) it finds out
    when it is first asked, by reading its forms.
    """

    inputs: tuple[LinearForm, ...] = ()
    """What it is computed from."""
    n_passes: int = 1
    """How often it reads them."""
    kept_nbytes: int = 1000
    """What is kept for it, what it found out included, as long as the plan or the run is there."""
    only_moves: bool = False
    """Whether its numbers are those of the forms, each as it is."""
    by_small_calls: ClassVar[bool] = False
    """Whether threads that compute it wait for the interpreter's lock more than they gain."""
    rounds: bool = True
    """Whether something of the function is lost where they are rounded to the result's dtype."""

    @property
    @abstractmethod
    def name(self) -> str:
        """What it is, in a few words, for plans and messages."""

    @property
    @abstractmethod
    def formula(self) -> Mapping[str, object]:
        """All that determines its numbers but the forms it reads, as JSON: equal for equal ones."""

    @property
    @abstractmethod
    def tensor(self) -> TensorSpec:
        """Its dtype and shape; F32, unless its forms have more digits."""

    @property
    def exact(self) -> "Derived":
        """Itself, or the same computed with more digits, for a result that has these."""
        return self

    @property
    @abstractmethod
    def scratch_nbytes(self) -> int:
        """Memory that `fill` takes in one thread, with all that it keeps, at most."""

    @abstractmethod
    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """Fill `view` with its numbers, row by row, from its element `start` on."""

    def spec(self, key: str) -> TensorSpec:
        """See TensorSource."""
        return self.tensor

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """See TensorSource; an engine asks `fill` instead."""
        raise TypeError(f"{self.name}: is computed, not read")

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """See TensorSource."""
        return False


def derive(made: Derived, *, dtype: str | None = None) -> LinearForm:
    """A derived tensor, rounded to `dtype`."""
    form = load(made, "")
    return LinearForm(TensorSpec(dtype or form.spec.dtype, form.spec.shape), form.terms)


def load(source: TensorSource, key: str) -> LinearForm:
    """A source tensor as it is."""
    spec = source.spec(key)
    keep = (None,) * len(spec.shape)
    return LinearForm(spec, (Term(keep, ((1.0, TensorRef(source, key, spec)),)),))


def flat(form: LinearForm) -> LinearForm | None:
    """The same numbers in one dimension; None where a map moves some along one of several."""
    if any(m is not None for term in form.terms for m in term.maps):
        return None
    shape = (form.spec.n_elements,)
    terms = (
        tuple(
            (c, TensorRef(ref.source, ref.key, TensorSpec(ref.spec.dtype, shape)))
            for c, ref in term.blend
        )
        for term in form.terms
    )
    return LinearForm(
        TensorSpec(form.spec.dtype, shape),
        tuple(Term((None,), blend) for blend in terms),
        form.wide,
    )


def map_dims(form: LinearForm, dims: Sequence[AxisMap | None]) -> LinearForm:
    """`form` with a map applied to each dimension that has one.

    Shapes: [n_0, n_1, ...] -> [dims[0].n_out, ...].
    """
    changes = [None if m is None or m.is_identity else m for m in dims]
    if not any(changes):
        return form
    shape = tuple(
        n if m is None else m.n_out for n, m in zip(form.spec.shape, changes, strict=True)
    )
    terms = [Term(_composed(changes, term.maps), term.blend) for term in form.terms]
    return _collected(TensorSpec(form.spec.dtype, shape), terms, wide=form.wide)


def combine(
    parts: Iterable[tuple[float, LinearForm]], *, dtype: str | None = None, wide: bool = False
) -> LinearForm:
    """The sum of coefficient * form; the dtype is that of the first part unless given.

    Args:
        wide: Whether it is computed in float64 and rounded once; so it is where a part is.
    """
    kept = tuple(parts)
    spec = kept[0][1].spec
    terms = [
        Term(term.maps, tuple((c * inner, ref) for inner, ref in term.blend))
        for c, form in kept
        if c != 0.0
        for term in form.terms
    ]
    if not terms:
        terms = [Term(t.maps, tuple((0.0, f) for _, f in t.blend)) for t in kept[0][1].terms[:1]]
    wide = wide or any(form.wide for _, form in kept)
    return _collected(TensorSpec(dtype or spec.dtype, spec.shape), terms, wide=wide)


def cast(form: LinearForm, dtype: str) -> LinearForm:
    """The same numbers, rounded to another dtype."""
    if form.spec.dtype == dtype:
        return form
    spec, terms = TensorSpec(dtype, form.spec.shape), form.terms
    if dtype not in HALVES:
        terms = tuple(
            replace(term, blend=tuple((c, _exact(ref)) for c, ref in term.blend)) for term in terms
        )
    return replace(form, spec=spec, terms=terms)


def _exact(ref: TensorRef) -> TensorRef:
    if not isinstance(ref.source, Derived):
        return ref
    exact = ref.source.exact
    return ref if exact is ref.source else replace(ref, source=exact)


def scale(form: LinearForm, factor: float) -> LinearForm:
    """`factor` times `form`."""
    return form if factor == 1.0 else combine([(factor, form)])


def shift(form: LinearForm, offset: float) -> LinearForm:
    """`form` plus a constant."""
    ones = _ones(form.spec.shape)
    constant = TensorRef(ones, "1", ones.spec("1"))
    term = Term((None,) * len(form.spec.shape), ((offset, constant),))
    return _collected(form.spec, (*form.terms, term), wide=form.wide)


def constant(value: float) -> LinearForm:
    """One number, in float32."""
    ones = _ones(())
    spec = ones.spec("1")
    return LinearForm(spec, (Term((), ((value, TensorRef(ones, "1", spec)),)),))


def is_stored(ref: TensorRef, dtype: str) -> bool:
    """Whether a load reads a tensor of this dtype."""
    return ref.spec.dtype == dtype and not is_constant(ref)


def is_constant(ref: TensorRef) -> bool:
    """Whether a load reads no tensor."""
    return isinstance(ref.source, _Ones)


def is_zero(form: LinearForm) -> bool:
    """Whether a form is 0, whatever its sources hold."""
    return all(value == 0.0 for term in form.terms for value, _ in term.blend)


def _composed(
    after: Sequence[AxisMap | None], before: Sequence[AxisMap | None]
) -> tuple[AxisMap | None, ...]:
    composed: list[AxisMap | None] = []
    for a, b in zip(after, before, strict=True):
        both = maps.compose(a, b) if a is not None and b is not None else a or b
        composed.append(None if both is None or both.is_identity else both)
    return tuple(composed)


def _collected(spec: TensorSpec, terms: Sequence[Term], *, wide: bool) -> LinearForm:
    """Terms of equal maps and source shape share one blend; equal loads add up."""
    groups: list[tuple[Term, dict[TensorRef, float]]] = []
    for term in terms:
        shape = term.blend[0][1].spec.shape
        for first, blend in groups:  # noqa: B007 (used after the loop)
            if first.blend[0][1].spec.shape == shape and first.maps == term.maps:
                break
        else:
            blend = {}
            groups.append((term, blend))
        for coefficient, ref in term.blend:
            blend[ref] = blend.get(ref, 0.0) + coefficient
    merged = [
        Term(first.maps, tuple((c, ref) for ref, c in blend.items() if c != 0.0))
        for first, blend in groups
    ]
    kept = tuple(term for term in merged if term.blend)
    if not kept:
        first, blend = groups[0]
        kept = (Term(first.maps, ((0.0, next(iter(blend))),)),)
    return LinearForm(spec, kept, wide)


@final
class _Ones:
    """A source of one tensor of ones, which takes no memory: it makes constants linear too."""

    name = "1"

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._spec = TensorSpec("F32", shape)

    def spec(self, key: str) -> TensorSpec:
        return self._spec

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        raise KeyError(key)

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        raise KeyError(key)

    def __reduce__(self) -> tuple[object, tuple[tuple[int, ...]]]:
        return _ones, (self._spec.shape,)


@cache
def _ones(shape: tuple[int, ...]) -> _Ones:
    return _Ones(shape)
