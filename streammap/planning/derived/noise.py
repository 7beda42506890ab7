"""Noise of a given level: so many dB below a weight, block by block.

A block is what one copy of a weight is: of a matrix that is repeated twice along rows and columns,
a quarter. The noise of each block has the mean square of the weight there, divided by
10^(dB / 10): of small blocks exactly, of those of a million numbers and more up to chance, which is
less than 0.05 dB. Numbers are normal ones by place (random_numbers.py), so any part of the tensor
has the same bits, whoever asks for it.

Source: Samragh et al., HyperCloning, 2024, arXiv:2409.12903.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

from streammap.io.dtypes import TensorSpec, to_torch
from streammap.planning.copies.blocks import Blocks, Cut, Dim
from streammap.planning.derived import random_numbers
from streammap.planning.derived.elementwise import numbers
from streammap.planning.derived.statistic import BLOCK, Statistic
from streammap.planning.graph import Derived, FormReader, LinearForm

if TYPE_CHECKING:
    from torch import Tensor

_LARGE = 2**20
"""Numbers of a block whose own level is so near to the expected one that it is not found out."""
_LEAST = 1e-12
"""What is left of a vector's square beside another one: less may be rounding alone."""
_LABEL_NBYTES = 400
"""What is kept for a block, and for finding out its level."""


@final
@dataclass(frozen=True, slots=True)
class Stream:
    """Where the numbers come from."""

    seed: int
    name: str
    partner: str = ""
    """The stream that it is made square to, where that one makes a tensor of its own."""

    def part(self, start: int, n: int) -> "Tensor":
        """Standard normal numbers, float64 [n]."""
        return random_numbers.normal(self.seed, self.name, start, n)


@final
@dataclass(frozen=True, slots=True)
class _Levels:
    """What the numbers of each block are multiplied by, float64 [labels]."""

    factor: "Tensor"
    beside: "Tensor"
    """How much of the partner is taken off before."""


@final
class Noise(Derived):
    """Normal numbers with the mean square of a weight, some dB below it."""

    def __init__(
        self,
        weight: LinearForm,
        dims: Sequence[Dim],
        stream: Stream,
        *,
        decibels: float,
        factor: float,
    ) -> None:
        """Read nothing yet.

        Args:
            weight: What it is measured on, as it was before its dimensions changed.
            dims: One for each of its dimensions.
            factor: On the weight.
        """
        self._weight, self._dims, self._stream = weight, tuple(dims), stream
        self._decibels, self._factor = decibels, factor
        dtype = "F64" if weight.spec.dtype == "F64" else "F32"
        self._spec = TensorSpec(dtype, tuple(dim.size for dim in dims))
        self._at = next((d for d, dim in enumerate(dims) if dim.kinds), -1)
        """The dimension of fields, if there is one."""
        self._has_partners = bool(stream.partner) or any(k.follows for d in dims for k in d.kinds)
        self._n_labels = math.prod(dim.most for dim in dims)
        self.inputs = (weight,)
        self.kept_nbytes = 5000 + _LABEL_NBYTES * self._n_labels
        self._of_weight = Statistic(weight.spec.n_elements, self._weight_sums, _sum, _same)
        self._of_noise = Statistic(self._spec.n_elements, self._noise_sums, _sum, _same)

    @property
    def name(self) -> str:
        """What it is."""
        return f"noise ({self._decibels:g} dB)"

    @property
    def formula(self) -> Mapping[str, object]:
        """What it is drawn by; its level follows from the weight."""
        stream = self._stream
        return {
            "noise": self._decibels,
            "stream": [stream.seed, stream.name, stream.partner],
            "factor": self._factor,
            "dims": [[dim.what, dim.size] for dim in self._dims],
        }

    @property
    def tensor(self) -> TensorSpec:
        """F32, or F64 where the weight is."""
        return self._spec

    @property
    def scratch_nbytes(self) -> int:
        """A block of numbers, as they are drawn and labelled; which part each unit is in."""
        block = BLOCK * (2 * random_numbers.EACH_NBYTES + 64)
        units = sum(dim.size + dim.before for dim in self._dims if dim.what != "whole")
        return block + 40 * units + _LABEL_NBYTES * self._n_labels

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """A block at a time."""
        import torch

        out, cut = (
            torch.frombuffer(view, dtype=to_torch(self._spec.dtype)),
            self._blocks(read).noise,
        )
        levels = self._levels(read)
        for first in range(0, len(out), BLOCK):
            n = min(BLOCK, len(out) - first)
            drawn, labels = self._stream.part(start + first, n), cut.labels(start + first, n)
            if self._has_partners:
                drawn.sub_(self._partner(start + first, n).mul_(levels.beside[labels]))
            out[first : first + n] = drawn.mul_(levels.factor[labels])

    def _partner(self, start: int, n: int) -> "Tensor":
        """What each number that follows is made square to: that of the field before [n]."""
        if self._stream.partner:
            return Stream(self._stream.seed, self._stream.partner).part(start, n)
        m = self._dims[self._at].m
        assert m is not None
        return self._stream.part(start - m.block * math.prod(self._spec.shape[self._at + 1 :]), n)

    def _blocks(self, read: FormReader) -> Blocks:
        found = read.kept.get("blocks")
        if not isinstance(found, Blocks):
            found = read.kept["blocks"] = Blocks(self._dims)
        return found

    def _levels(self, read: FormReader) -> _Levels:
        """The levels of all blocks, from the squares of the weight and of what is drawn."""
        import torch

        found = read.kept.get("levels")
        if isinstance(found, _Levels):
            return found
        blocks = self._blocks(read)
        squares, counts = self._of_weight.get(read)
        loud = (squares / counts.clamp_min(1.0)).sqrt_().tolist()
        shares = [1.0 if kind is None else kind.share for kind in blocks.kinds]
        quiet = 10.0 ** (-self._decibels / 20.0) * abs(self._factor)
        wanted = [
            0.0 if at < 0 else loud[at] * share * quiet
            for at, share in zip(blocks.origins, shares, strict=True)
        ]
        factor = torch.tensor(wanted, dtype=torch.float64)
        beside = torch.zeros_like(factor)
        if self._is_small(blocks):
            own, beside = self._drawn(blocks, read)
            factor.div_(own)
        levels = read.kept["levels"] = _Levels(factor, beside)
        return levels

    def _is_small(self, blocks: Blocks) -> bool:
        """Whether a block is so small that chance would count."""
        return self._spec.n_elements < _LARGE * blocks.noise.n_labels or any(
            dim.m is not None and len(set(dim.m.uses)) > 1 for dim in self._dims
        )

    def _drawn(self, blocks: Blocks, read: FormReader) -> "tuple[Tensor, Tensor]":
        """The root mean square of what is drawn in each block, and what is to be taken off it.

        Of b beside a, that is (a b) / (a a) times a: what is left is square to a.
        """
        import torch

        squares, counts, *products = self._of_noise.get(read)
        beside = torch.zeros_like(squares)
        left = squares
        if products:
            follows = [
                bool(self._stream.partner) or (kind is not None and kind.follows)
                for kind in blocks.kinds
            ]
            theirs, both = products
            share = both / theirs.clamp_min(_LEAST)
            beside = torch.where(torch.tensor(follows), share, beside)
            left = (squares - beside * both).clamp_min(_LEAST * squares)
        own = (left / counts.clamp_min(1.0)).sqrt_()
        return own.masked_fill_(own == 0.0, 1.0), beside

    def _weight_sums(self, start: int, n: int, read: FormReader) -> "Tensor":
        """Of a part of the weight, for each block: the sum of squares, and how many [2, labels]."""
        cut = self._blocks(read).weight
        found = numbers(self._weight, start, n, read).double()
        return _sums(cut, start, n, [found.square_()])

    def _noise_sums(self, start: int, n: int, read: FormReader) -> "Tensor":
        """The same of what is drawn; after it the partner's, and their product [2 or 4, labels]."""
        cut, drawn = self._blocks(read).noise, self._stream.part(start, n)
        values = [drawn * drawn]
        if self._has_partners:
            partner = self._partner(start, n)
            values += [partner * partner, drawn * partner]
        return _sums(cut, start, n, values)


def _sums(cut: Cut, start: int, n: int, values: "Sequence[Tensor]") -> "Tensor":
    """The sum of the first values in each block, how many there are, and the sums of the others.

    A number after the other, so in one order.
    """
    import torch

    labels, most = cut.labels(start, n), cut.n_labels
    first, *others = [torch.bincount(labels, weights=x, minlength=most) for x in values]
    return torch.stack([first, torch.bincount(labels, minlength=most).double(), *others])


def _sum(a: "Tensor", b: "Tensor") -> "Tensor":
    return a.add_(b)


def _same(x: "Tensor", read: FormReader) -> "Tensor":
    return x
