"""New rows behind those of a matrix: zero, their mean, or drawn around it."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, final

from streammap.io.dtypes import TensorSpec
from streammap.planning.derived.elementwise import numbers
from streammap.planning.graph import Derived, FormReader, LinearForm

if TYPE_CHECKING:
    from torch import Tensor

Fill = Literal["mean", "zero", "normal"]
SPREAD = 1e-9
"""Factor on the covariance of the rows that new ones are drawn by.

Source: Hewitt, Initializing new word embeddings for pretrained language models, 2021, where the
mean bounds the change of the model's distribution; and transformers' resize_token_embeddings.
"""
_BLOCK = 2**15
"""Numbers of the matrix that are read at once, or one row."""
_HELD_NBYTES = 2**20
"""New rows that are drawn in one reading of the matrix, in float64; or one row."""


@final
class NewRows(Derived):
    """Rows behind the last one of a matrix [n, width], or numbers behind those of a vector [n].

    "normal" draws from N(mean, SPREAD * covariance) of the matrix' rows without their covariance:

        new row i  =  mean + sqrt(SPREAD / n) * sum over rows j of  z[i, j] * (row j - mean)

    has just this distribution where all z are N(0, 1). They are a function of seed, i and j, so
    that the same rows come whoever asks for which.
    """

    def __init__(self, form: LinearForm, n_new: int, fill: Fill, seed: int) -> None:
        """Read nothing yet."""
        self._form, self._fill, self._seed = form, fill, seed
        self._n, *rest = form.spec.shape
        self._width = math.prod(rest)
        wide = "F64" if form.spec.dtype == "F64" else "F32"
        self._spec = TensorSpec(wide, (n_new, *rest))
        self._at_once = max(1, min(n_new, _HELD_NBYTES // (8 * max(1, self._width))))
        self.inputs = () if fill == "zero" else (form,)
        self.n_passes = 1 if fill != "normal" else 1 + -(-n_new // self._at_once)

    @property
    def name(self) -> str:
        """How many, and what they are."""
        return f"{self._spec.shape[0]} new rows ({self._fill})"

    @property
    def formula(self) -> Mapping[str, object]:
        """What they are, and the seed of what is drawn."""
        what: dict[str, object] = {"new_rows": self._fill, "shape": list(self._spec.shape)}
        return what | ({"seed": self._seed} if self._fill == "normal" else {})

    @property
    def tensor(self) -> TensorSpec:
        """F32, or F64 where the matrix is."""
        return self._spec

    @property
    def scratch_nbytes(self) -> int:
        """A block of rows, the mean, and the rows that are drawn at once with what draws them."""
        row = max(1, self._width)
        rows = max(1, _BLOCK // row)
        block = rows * row * 24
        drawn = self._at_once * (2 * 8 * row + 6 * 8 * rows)
        return block + 4 * 8 * row + (drawn if self._fill == "normal" else 0)

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """Row by row, as far as they are asked for."""
        import torch

        dtype = torch.float64 if self._spec.dtype == "F64" else torch.float32
        out = torch.frombuffer(view, dtype=dtype)
        if self._fill == "zero":
            out.zero_()
            return
        at = 0
        while at < len(out):
            row, column = divmod(start + at, self._width)
            n = min(self._width - column, len(out) - at)
            out[at : at + n] = self._row(row, read)[column : column + n]
            at += n

    def _row(self, i: int, read: FormReader) -> "Tensor":
        """New row i, float64 [width]."""
        if self._fill == "mean":
            return self._mean(read)
        first = i - i % self._at_once
        if read.kept.get("first") != first:
            read.kept |= {"drawn": self._drawn(first, read), "first": first}
        drawn: Tensor = read.kept["drawn"][i - first]  # type: ignore[index]
        return drawn

    def _mean(self, read: FormReader) -> "Tensor":
        """The mean of the matrix' rows, float64 [width]."""
        import torch

        if "mean" not in read.kept:
            total = torch.zeros(self._width, dtype=torch.float64)
            for _, rows in self._blocks(read):
                total += rows.sum(0)
            read.kept["mean"] = total / self._n
        mean: Tensor = read.kept["mean"]  # type: ignore[assignment]
        return mean

    def _drawn(self, first: int, read: FormReader) -> "Tensor":
        """New rows from `first` on, float64 [at_once, width]."""
        import torch

        from streammap.planning.derived.draws import normals

        mean = self._mean(read)
        n = min(self._at_once, self._spec.shape[0] - first)
        drawn = torch.zeros((n, self._width), dtype=torch.float64)
        for start, rows in self._blocks(read):
            z = normals(self._seed, (first, first + n), (start, start + len(rows)))
            drawn += z @ rows.sub_(mean)
        return drawn.mul_(math.sqrt(SPREAD / self._n)).add_(mean)

    def _blocks(self, read: FormReader) -> "Iterator[tuple[int, Tensor]]":
        """First row and rows of each block of the matrix, float64 [rows, width]."""
        step = max(1, _BLOCK // max(1, self._width))
        for start in range(0, self._n, step):
            n = min(step, self._n - start)
            found = numbers(self._form, start * self._width, n * self._width, read)
            yield start, found.double().view(n, self._width)
