"""Products of two thin matrices: what a LoRA adapter adds to a weight.

Each product is left . right^T, with left [rows, rank] and right [columns, rank], in some rows of
one matrix of a stack; products in the same place are added up. They are computed a band of rows at
a time, always the same whole bands, so that a number has the same bits whoever asks for which part.

Shapes: R rows of a band, C columns of a panel, K rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, final

from streammap.io.dtypes import TensorSpec, to_torch
from streammap.planning.derived.elementwise import numbers
from streammap.planning.derived.statistic import BLOCK
from streammap.planning.graph import Derived, FormReader, LinearForm

if TYPE_CHECKING:
    from torch import Tensor

PRODUCT_NBYTES = 10 * 2**20
"""What the matrix product library keeps for each thread; measured."""
_BAND = 2**17
"""Numbers of a band, and of each panel that it is made of: what a processor's cache holds."""
_MAX_ROWS = 256
_KEPT_NBYTES = 2**22
"""Right factors of a matrix that are kept from band to band, if they are no larger."""
_KEPT_NBYTES = 1000
"""What a plan keeps for the tensor itself."""
_PRODUCT_NBYTES = 1000
"""What a plan keeps for each product; measured, with room to spare."""
_READ_NBYTES = 16
"""Of a number while it is read: as it is stored, and in the dtype that is computed with."""


@final
@dataclass(frozen=True, slots=True)
class Factor:
    """A matrix [n, rank] inside a stored tensor."""

    form: LinearForm
    n: int
    rank: int
    first: int
    """The element that number (0, 0) is."""
    step: int
    """Elements from one row to the next."""
    rank_step: int
    """Elements from one column to the next."""

    @property
    def is_upright(self) -> bool:
        """Whether a row's numbers are nearer to each other than a column's."""
        return self.rank_step <= self.step

    @property
    def most_read(self) -> int:
        """Elements that `panel` reads at once, at most."""
        span = (self.rank - 1) * self.rank_step + 1
        return max(BLOCK, span) if self.is_upright else BLOCK

    def panel(self, start: int, end: int, read: FormReader, *, dtype: str) -> "Tensor":
        """Rows from `start` to `end` in float32 or float64 [end - start, K]."""
        import torch

        n, rank = end - start, self.rank
        # A tensor of its own, for its alignment: what a product rounds to may depend on it.
        if self.is_upright:
            out = torch.empty((n, rank), dtype=to_torch(dtype))
            span = (rank - 1) * self.rank_step + 1
            for at in range(0, n, size := max(1, (BLOCK - span) // max(1, self.step) + 1)):
                rows = min(size, n - at)
                first = self.first + (start + at) * self.step
                part = numbers(self.form, first, (rows - 1) * self.step + span, read)
                out[at : at + rows] = part.as_strided((rows, rank), (self.step, self.rank_step))
            return out
        out = torch.empty((rank, n), dtype=to_torch(dtype))
        for k in range(rank):
            for at in range(0, n, size := max(1, (BLOCK - 1) // self.step)):
                rows = min(size, n - at)
                first = self.first + (start + at) * self.step + k * self.rank_step
                part = numbers(self.form, first, (rows - 1) * self.step + 1, read)
                out[k, at : at + rows] = part[:: self.step]
        return out.T


@final
@dataclass(frozen=True, slots=True)
class Product:
    """scale * left . right^T, from a row of a matrix of the stack on."""

    left: Factor
    right: Factor
    scale: float
    matrix: int = 0
    row: int = 0

    @property
    def rows(self) -> range:
        """Its rows in the matrix."""
        return range(self.row, self.row + self.left.n)


@final
@dataclass(frozen=True, eq=False)
class LowRank(Derived):
    """A sum of products, of the shape of a weight: zero where there are none."""

    result: TensorSpec
    """F32 or F64; a stack of matrices, or one whose columns may be several dimensions."""
    n_rows: int
    n_columns: int
    products: tuple[Product, ...]
    precise: bool = False
    """Whether products are computed in float64, and rounded once."""
    inputs: tuple[LinearForm, ...] = field(init=False)

    def __post_init__(self) -> None:
        forms = (f.form for p in self.products for f in (p.left, p.right))
        object.__setattr__(self, "inputs", tuple(dict.fromkeys(forms)))

    @property
    def name(self) -> str:
        """What it is."""
        return "B A"

    @property
    def tensor(self) -> TensorSpec:
        """Its dtype and shape."""
        return self.result

    @property
    def formula(self) -> Mapping[str, object]:
        """Where each product is, and what of which input its factors are."""
        number = {form: i for i, form in enumerate(self.inputs)}
        return {
            "rows": self.n_rows,
            "columns": self.n_columns,
            "precise": self.precise,
            "products": [
                [p.scale, p.matrix, p.row]
                + [
                    [number[f.form], f.n, f.rank, f.first, f.step, f.rank_step]
                    for f in (p.left, p.right)
                ]
                for p in self.products
            ],
        }

    @property
    def kept_nbytes(self) -> int:  # type: ignore[override]
        """What is known of each product: a stack has hundreds."""
        return _KEPT_NBYTES + _PRODUCT_NBYTES * len(self.products)

    @property
    def scratch_nbytes(self) -> int:
        """A band, the panels that it is made of, and what is kept."""
        factors = [f for p in self.products for f in (p.left, p.right)]
        panel = max(self._columns * self._rank, self._rows * self._rank, _BAND)
        computed = self._rows * self.n_columns + 2 * panel
        kept = max(map(self._kept_nbytes, self._of_matrix), default=0)
        read = max((f.most_read for f in factors), default=0)
        return PRODUCT_NBYTES + computed * self._item + kept + read * _READ_NBYTES

    @cached_property
    def _of_matrix(self) -> Mapping[int, tuple[Product, ...]]:
        """The products of each matrix, in order."""
        found: dict[int, list[Product]] = {}
        for product in self.products:
            found.setdefault(product.matrix, []).append(product)
        return {matrix: tuple(products) for matrix, products in found.items()}

    @cached_property
    def _rank(self) -> int:
        return max((p.left.rank for p in self.products), default=1)

    @cached_property
    def _rows(self) -> int:
        """Rows of a band."""
        return max(1, min(_MAX_ROWS, _BAND // max(self.n_columns, self._rank, 1)))

    @cached_property
    def _columns(self) -> int:
        """Columns of a panel."""
        return max(1, min(self.n_columns, _BAND // max(self._rank, self._rows)))

    @property
    def _dtype(self) -> str:
        return "F64" if self.precise else "F32"

    @property
    def _item(self) -> int:
        return 8 if self.precise else 4

    def _kept_nbytes(self, matrix: int) -> int:
        """Bytes of a matrix' right factors; 0 where they are too large to be kept."""
        rights = (p.right for p in self._of_matrix.get(matrix, ()))
        nbytes = sum(f.n * f.rank for f in rights) * self._item
        return nbytes if nbytes <= _KEPT_NBYTES else 0

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """From the bands that the numbers are in; the last one is kept."""
        import torch

        out = torch.frombuffer(view, dtype=to_torch(self.result.dtype))
        n, at = self.n_columns, 0
        while at < len(out):
            row, column = divmod(start + at, n)
            matrix, row = divmod(row, self.n_rows)
            number, row = divmod(row, self._rows)
            band = self._band(matrix, number, read).view(-1)
            first = row * n + column
            part = band[first : first + len(out) - at]
            out[at : at + len(part)] = part
            at += len(part)

    def _band(self, matrix: int, number: int, read: FormReader) -> "Tensor":
        """A band of rows of a matrix [R, n_columns]."""
        held = read.kept.get("band")
        if isinstance(held, tuple) and held[0] == (matrix, number):
            kept: Tensor = held[1]
            return kept
        read.kept.pop("band", None)  # its memory is that of the next one
        import torch

        start = number * self._rows
        end = min(self.n_rows, start + self._rows)
        band = torch.zeros((end - start, self.n_columns), dtype=to_torch(self._dtype))
        for index, product in enumerate(self._of_matrix.get(matrix, ())):
            first, last = max(start, product.rows.start), min(end, product.rows.stop)
            if first < last:
                rows = band[first - start : last - start]
                self._add(rows, product, first - product.row, (matrix, index), read)
        read.kept["band"] = (matrix, number), band
        return band

    def _add(
        self,
        rows: "Tensor",
        product: Product,
        first: int,
        place: tuple[int, int],
        read: FormReader,
    ) -> None:
        """Add rows of a product, from its row `first` on.

        Args:
            place: Matrix and number of the product.
        """
        left = product.left.panel(first, first + len(rows), read, dtype=self._dtype)  # R K
        left *= product.scale
        for start in range(0, self.n_columns, self._columns):
            end = min(self.n_columns, start + self._columns)
            right = self._right(product.right, place, start, end, read)  # C K
            rows[:, start:end].addmm_(left, right.T)

    def _right(
        self, factor: Factor, place: tuple[int, int], start: int, end: int, read: FormReader
    ) -> "Tensor":
        """Rows of a right factor [C, K]; the whole factor is kept, where it is small."""
        matrix, _ = place
        if not self._kept_nbytes(matrix):
            return factor.panel(start, end, read, dtype=self._dtype)
        rights = read.kept.get("rights")
        if not isinstance(rights, dict) or read.kept.get("matrix") != matrix:
            read.kept["rights"] = rights = {}
            read.kept["matrix"] = matrix
        if place not in rights:
            rights[place] = factor.panel(0, factor.n, read, dtype=self._dtype)
        part: Tensor = rights[place][start:end]
        return part
