"""Sums of tensors with coefficients that their norms and dot products decide: a reading of its own.

The vectors whose dot products are meant may be whole tensors, their rows (along the last dimension)
or their columns (along the first). Those of whole tensors and of columns are found out before the
first number is computed; those of rows as they are met.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, final

from streammap.errors import CheckpointError, PlanError, StreammapError
from streammap.io.dtypes import HALVES, TensorSpec, to_torch
from streammap.planning import graph
from streammap.planning.derived import elementwise
from streammap.planning.derived.elementwise import Elementwise, numbers, sums, totals
from streammap.planning.derived.statistic import BLOCK, N_AHEAD, Statistic
from streammap.planning.graph import Derived, FormReader, LinearForm
from streammap.planning.merging.directions import Dots, Rule

if TYPE_CHECKING:
    from torch import Tensor

By = Literal["whole", "rows", "columns"]
_MAX_COLUMNS = 2**16
_LARGE = 2.0**100
"""A sum of squares for which float32 may have no room; where it has no bits for small ones, the
rules take the tensor for zero."""


def derive(
    key: str,
    rule: Rule,
    forms: Sequence[LinearForm],
    base: LinearForm | None = None,
    *,
    by: By = "whole",
    dtype: str | None = None,
) -> LinearForm:
    """A sum whose coefficients a rule decides.

    Args:
        key: The tensor's, for messages.
        forms: The models' tensors, of one shape.
        base: Where given, vectors are differences from it, and it is added to their sum.
        by: What is taken for a vector. A tensor of one dimension is one.
        dtype: Of the result; that of the first form by default.

    Raises:
        PlanError: there are too many columns.
    """
    inputs = (*forms, base) if base is not None else tuple(forms)
    shape = forms[0].spec.shape
    if by == "columns" and len(shape) > 1 and math.prod(shape[1:]) > _MAX_COLUMNS:
        raise PlanError(
            f"{key}: {rule.name} by columns, of which it has {math.prod(shape[1:])}, takes at most "
            f"{_MAX_COLUMNS}",
            hint="take the whole tensor for a vector, or its rows",
        )
    made: Derived
    given = dtype or forms[0].spec.dtype
    if by == "whole" or len(shape) < 2:
        is_short = {given, *(form.spec.dtype for form in inputs)} <= HALVES
        made = _Whole(inputs, key, rule, base is not None, is_short)
    elif by == "rows":
        made = _ByRow(inputs, key, rule, base is not None)
    else:
        made = _ByColumn(inputs, key, rule, base is not None)
    return graph.derive(made, dtype=given)


@dataclass(frozen=True, eq=False)
class _Terms:
    """What the three kinds have in common."""

    inputs: tuple[LinearForm, ...]
    key: str
    rule: Rule
    has_base: bool
    by_small_calls: ClassVar[bool] = True

    @property
    def name(self) -> str:
        """See Derived."""
        return f"{self.rule.name}, read twice"

    @property
    def n_vectors(self) -> int:
        """The models' tensors."""
        return len(self.inputs) - self.has_base

    @property
    def n_pairs(self) -> int:
        """Dot products."""
        return self.n_vectors * (self.n_vectors + 1) // 2

    def coefficients(self, products: Sequence[float]) -> Sequence[float]:
        """From the dot products of `pairs`.

        Raises:
            CheckpointError: they are not finite.
            PlanError: the rule has no coefficients for them.
        """
        if not all(map(math.isfinite, products)):
            raise CheckpointError(
                f"{self.key}: {self.rule.name} asks for norms, and a source has numbers that are "
                "not finite, or too large",
                hint="streammap inspect CHECKPOINT --health counts NaN and infinite numbers",
            )
        try:
            return self.rule.coefficients(_matrix(products, self.n_vectors))
        except StreammapError as error:
            raise PlanError(
                f"{self.key}: {self.rule.name}: {error.message}", hint=error.hint
            ) from error


class _Found(NamedTuple):
    coefficients: Sequence[float]
    is_small: bool
    """Whether float32 has room for all numbers, and what they are multiplied with."""


@final
@dataclass(frozen=True, eq=False)
class _Whole(_Terms, Elementwise):
    is_short: bool
    """Whether all are of 16 bits, the result too: float32 has digits to spare, if it has room for
    the numbers."""
    n_passes: int = field(default=2, init=False)
    found: Statistic[Sequence[float], _Found] = field(init=False)

    def __post_init__(self) -> None:
        n = self.inputs[0].spec.n_elements
        found = Statistic(n, self._products, _both, self._finish, block=self.block)
        object.__setattr__(self, "found", found)

    @property
    def formula(self) -> Mapping[str, object]:
        return {**self.rule.formula, "base": self.has_base, "short": self.is_short}

    @property
    def exact(self) -> Derived:
        return replace(self, is_short=False) if self.is_short else self

    @property
    def each_nbytes(self) -> int:
        return _each_nbytes(self, wide=not self.is_short)

    def values(self, start: int, parts: Sequence["Tensor"], read: FormReader) -> "Tensor":
        """The sum of coefficient * vector."""
        found = self.found.get(read)
        vectors = _vectors(parts, self.has_base, wide=not (self.is_short and found.is_small))
        return _combined(vectors, found.coefficients)

    def _products(self, start: int, n: int, read: FormReader) -> Sequence[float]:
        if self.is_short:
            found = self._products_in(start, n, read, wide=False)
            if all(abs(product) < _LARGE for product in found):
                return found
        return self._products_in(start, n, read, wide=True)

    def _products_in(self, start: int, n: int, read: FormReader, *, wide: bool) -> list[float]:
        parts = [numbers(form, start, n, read) for form in self.inputs]
        vectors, _ = _vectors(parts, self.has_base, wide=wide)
        return totals(a * b for a, b in _pairs(vectors))

    def _finish(self, products: Sequence[float], read: FormReader) -> _Found:
        coefficients = self.coefficients(products)
        largest = max(map(abs, (*products, *coefficients)))
        return _Found(coefficients, largest < _LARGE)


@final
@dataclass(frozen=True, eq=False)
class _ByColumn(_Terms, Elementwise):
    n_passes: int = field(default=2, init=False)
    found: Statistic["Tensor", "Tensor"] = field(init=False)

    def __post_init__(self) -> None:
        n = self.inputs[0].spec.n_elements
        # A vector of coefficients each: too much to be kept for every tensor of a model.
        found = Statistic(n, self._products, _add, self._finish, lasts=False, block=self.block)
        object.__setattr__(self, "found", found)

    @property
    def formula(self) -> Mapping[str, object]:
        return {**self.rule.formula, "base": self.has_base, "by": "columns"}

    @property
    def n_columns(self) -> int:
        return math.prod(self.inputs[0].spec.shape[1:])

    @property
    def each_nbytes(self) -> int:
        """With the number of its column."""
        return _each_nbytes(self, wide=True) + 24

    @property
    def scratch_nbytes(self) -> int:
        """With the sums and the coefficients of all columns."""
        columns = 8 * self.n_columns * (3 * self.n_pairs + self.n_vectors)
        ahead = N_AHEAD * 8 * self.n_columns * self.n_pairs
        return super().scratch_nbytes + columns + ahead

    def values(self, start: int, parts: Sequence["Tensor"], read: FormReader) -> "Tensor":
        """The sum of coefficient * vector."""
        import torch

        column = torch.arange(start, start + len(parts[0])) % self.n_columns
        coefficients = self.found.get(read)
        return _combined(_vectors(parts, self.has_base), [c[column] for c in coefficients])

    def _products(self, start: int, n: int, read: FormReader) -> "Tensor":
        import torch

        parts = [numbers(form, start, n, read) for form in self.inputs]
        vectors, _ = _vectors(parts, self.has_base)
        m, offset = self.n_columns, start % self.n_columns
        n_rows = -(-(offset + n) // m)
        made = torch.empty((self.n_pairs, m), dtype=torch.float64)
        for i, (a, b) in enumerate(_pairs(vectors)):
            rows = torch.zeros(n_rows * m, dtype=torch.float64)
            torch.mul(a, b, out=rows[offset : offset + n])
            made[i] = sums(rows.view(n_rows, m), dim=0)
        return made

    def _finish(self, products: "Tensor", read: FormReader) -> "Tensor":
        import torch

        found = [self.coefficients(column) for column in products.T.tolist()]
        return torch.tensor(found, dtype=torch.float64).T.contiguous()


@final
@dataclass(frozen=True, eq=False)
class _ByRow(_Terms, Derived):
    n_passes: int = field(default=2, init=False)

    @property
    def formula(self) -> Mapping[str, object]:
        return {**self.rule.formula, "base": self.has_base, "by": "rows"}

    @property
    def tensor(self) -> TensorSpec:
        return elementwise.spec_of(self.inputs)

    @property
    def scratch_nbytes(self) -> int:
        return BLOCK * (_each_nbytes(self, wide=True) + 24)

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """Some rows at a time, or a part of one."""
        import torch

        out = torch.frombuffer(view, dtype=to_torch(self.tensor.dtype))
        length = self.inputs[0].spec.shape[-1]
        n_rows, end = max(1, BLOCK // length), start + len(out)
        for row in range(start // length, -(-end // length), n_rows):
            first, last = row * length, min((row + n_rows) * length, -(-end // length) * length)
            coefficients = self._of_rows(first, last, length, read)
            for at in range(max(first, start), min(last, end), BLOCK):
                n = min(BLOCK, min(last, end) - at)
                parts = [numbers(form, at, n, read) for form in self.inputs]
                rows = torch.arange(at, at + n) // length - row
                made = _combined(_vectors(parts, self.has_base), [c[rows] for c in coefficients])
                out[at - start :][:n] = made

    def _of_rows(self, first: int, last: int, length: int, read: FormReader) -> "Tensor":
        """Coefficients of the rows from element `first` to `last`, float64 [vectors, rows]."""
        import torch

        found = read.kept.get((first, last))
        if isinstance(found, torch.Tensor):
            return found
        n_rows = (last - first) // length
        products = torch.zeros((self.n_pairs, n_rows), dtype=torch.float64)
        for at in range(first, last, BLOCK):  # more than one only where a row is long
            n = min(BLOCK, last - at)
            parts = [numbers(form, at, n, read) for form in self.inputs]
            vectors, _ = _vectors(parts, self.has_base)
            for i, (a, b) in enumerate(_pairs(vectors)):
                products[i] += sums((a * b).view(n_rows, -1), dim=1)
        rows = [self.coefficients(row) for row in products.T.tolist()]
        found = torch.tensor(rows, dtype=torch.float64).T.contiguous()
        read.kept.clear()
        read.kept[first, last] = found
        return found


def _each_nbytes(made: _Terms, *, wide: bool) -> int:
    """Of a number of each form: as it is stored, and in float32 (float64); of a product, its sums,
    the result, and what is left of all products.
    """
    item = 8 if wide else 4
    read = sum(map(elementwise.number_nbytes, made.inputs))
    return read + item * (wide * len(made.inputs) + 4) + 2 * made.n_pairs


def _vectors(
    parts: Sequence["Tensor"], has_base: bool, *, wide: bool = True
) -> "tuple[Sequence[Tensor], Tensor | None]":
    """The vectors, and the base, in float64 or as they are; written over the parts, perhaps."""
    found = [part.double() if wide else part for part in parts]
    if not has_base:
        return found, None
    base = found.pop()
    return [part.sub_(base) for part in found], base


def _combined(
    vectors: "tuple[Sequence[Tensor], Tensor | None]", coefficients: "Sequence[float | Tensor]"
) -> "Tensor":
    """The base and the sum of coefficient * vector; products and sums are rounded each."""
    terms, total = vectors
    for vector, coefficient in zip(terms, coefficients, strict=True):
        term = vector.mul_(coefficient)
        total = term if total is None else total.add_(term)
    if total is None:
        raise ValueError("a sum of nothing")
    return total


def _pairs(vectors: Sequence["Tensor"]) -> "Iterator[tuple[Tensor, Tensor]]":
    return itertools.combinations_with_replacement(vectors, 2)


def _matrix(products: Sequence[float], n: int) -> Dots:
    """The dot products of `pairs`, each with each."""
    made = [[0.0] * n for _ in range(n)]
    places = itertools.combinations_with_replacement(range(n), 2)
    for (i, j), product in zip(places, products, strict=True):
        made[i][j] = made[j][i] = product
    return made


def _both(total: Sequence[float], block: Sequence[float]) -> Sequence[float]:
    return [a + b for a, b in zip(total, block, strict=True)]


def _add(total: "Tensor", block: "Tensor") -> "Tensor":
    return total.add_(block)
