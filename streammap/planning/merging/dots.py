"""Sums of tensors with coefficients that their norms and dot products decide: a reading of its own.

The vectors whose dot products are meant may be whole tensors, their rows (along the last dimension)
or their columns (along the first). Those of whole tensors and of columns are found out before the
first number is computed; those of rows as they are met.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, final

from streammap.errors import CheckpointError, PlanError, StreammapError
from streammap.io.dtypes import TensorSpec, to_torch
from streammap.planning import graph
from streammap.planning.derived import elementwise
from streammap.planning.derived.elementwise import BLOCK, Elementwise, numbers, sums, totals
from streammap.planning.derived.statistic import N_AHEAD, Statistic
from streammap.planning.graph import Derived, FormReader, LinearForm
from streammap.planning.merging.directions import Dots, Rule

if TYPE_CHECKING:
    from torch import Tensor

By = Literal["whole", "rows", "columns"]
_MAX_COLUMNS = 2**16
_N_AT_ONCE = 6
"""Pairs whose products are added up at once."""


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
    if by == "whole" or len(shape) < 2:
        made = _Whole(inputs, key, rule, base is not None)
    elif by == "rows":
        made = _ByRow(inputs, key, rule, base is not None)
    else:
        made = _ByColumn(inputs, key, rule, base is not None)
    return graph.derive(made, dtype=dtype or forms[0].spec.dtype)


@dataclass(frozen=True, eq=False)
class _Terms:
    """What the three kinds have in common."""

    inputs: tuple[LinearForm, ...]
    key: str
    rule: Rule
    has_base: bool

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


@final
@dataclass(frozen=True, eq=False)
class _Whole(_Terms, Elementwise):
    n_passes: int = field(default=2, init=False)
    found: Statistic[Sequence[float], Sequence[float]] = field(init=False)

    def __post_init__(self) -> None:
        n = self.inputs[0].spec.n_elements
        found = Statistic(n, self._products, _both, self._finish)
        object.__setattr__(self, "found", found)

    @property
    def formula(self) -> Mapping[str, object]:
        return {**self.rule.formula, "base": self.has_base}

    @property
    def scratch_nbytes(self) -> int:
        return _blocks_nbytes(self)

    def values(self, start: int, parts: Sequence["Tensor"], read: FormReader) -> "Tensor":
        """The sum of coefficient * vector."""
        return _combined(_vectors(parts, self.has_base), self.found.get(read))

    def _products(self, start: int, n: int, read: FormReader) -> Sequence[float]:
        import torch

        parts = [numbers(form, start, n, read) for form in self.inputs]
        vectors, _ = _vectors(parts, self.has_base)
        pairs, found = list(_pairs(vectors)), list[float]()
        for first in range(0, len(pairs), _N_AT_ONCE):
            some = pairs[first : first + _N_AT_ONCE]
            made = torch.empty((len(some), n), dtype=torch.float64)
            for i, (a, b) in enumerate(some):
                torch.mul(a, b, out=made[i])
            found += totals(made)
        return found

    def _finish(self, products: Sequence[float], read: FormReader) -> Sequence[float]:
        return self.coefficients(products)


@final
@dataclass(frozen=True, eq=False)
class _ByColumn(_Terms, Elementwise):
    n_passes: int = field(default=2, init=False)
    found: Statistic["Tensor", "Tensor"] = field(init=False)

    def __post_init__(self) -> None:
        n = self.inputs[0].spec.n_elements
        # A vector of coefficients each: too much to be kept for every tensor of a model.
        found = Statistic(n, self._products, _add, self._finish, lasts=False)
        object.__setattr__(self, "found", found)

    @property
    def formula(self) -> Mapping[str, object]:
        return {**self.rule.formula, "base": self.has_base, "by": "columns"}

    @property
    def n_columns(self) -> int:
        return math.prod(self.inputs[0].spec.shape[1:])

    @property
    def scratch_nbytes(self) -> int:
        """With the sums and the coefficients of all columns."""
        columns = 8 * self.n_columns * (3 * self.n_pairs + self.n_vectors)
        return _blocks_nbytes(self) + columns + N_AHEAD * 8 * self.n_columns * self.n_pairs

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
        return _blocks_nbytes(self)

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


def _blocks_nbytes(made: _Terms) -> int:
    """Blocks of numbers as they are stored, in float32 and in float64, and of products."""
    n_products = min(made.n_pairs, _N_AT_ONCE)
    return BLOCK * 8 * (3 * len(made.inputs) + 2 * n_products + 2)


def _vectors(parts: Sequence["Tensor"], has_base: bool) -> "tuple[Sequence[Tensor], Tensor | None]":
    """The vectors, and the base, in float64."""
    if not has_base:
        return [part.double() for part in parts], None
    base = parts[-1].double()
    return [part.double().sub_(base) for part in parts[:-1]], base


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
