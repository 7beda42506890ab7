"""Which numbers of a difference are left: the largest, some at random, or all.

Sets are exact and are functions of the place alone, whatever the tiles and threads: the largest are
found by streamed selection, random numbers are drawn by place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, final

from streammap.errors import PlanError
from streammap.io.dtypes import TensorSpec
from streammap.planning.derived import random_numbers
from streammap.planning.graph import FormReader
from streammap.planning.merging.selection import Selection, chosen, patterns

if TYPE_CHECKING:
    from torch import Tensor

MAX_ROW = 2**20
"""Numbers of a row that is sorted, at most."""
Differences = Callable[[int, int, FormReader], "Sequence[Tensor]"]
"""(first element, number of elements, reader) -> of each model, float32 or float64 [n]."""


@final
@dataclass(frozen=True, slots=True)
class Trim:
    """How one model's difference is trimmed. Counts are rounded down, as in mergekit 0.1.5."""

    kind: Literal["all", "magnitude", "outliers", "random", "ranks"]
    """Left are: all; the largest, one at least; these without the very largest; some at random;
    some at random, the smaller numbers of a row less often."""
    density: float = 1.0
    """The share that is left; at 1 all is, untouched."""
    gamma: float = 0.01
    """Of outliers: the share of the very largest, less where that leaves too few."""
    epsilon: float = 0.15
    """Of ranks: the smallest number of a row is left with probability density - epsilon, the
    largest with density + epsilon, those between in a straight line by rank."""

    def __post_init__(self) -> None:
        """Refuse what is no share, and no probability.

        Raises:
            PlanError: gamma, density - epsilon or density + epsilon is not between 0 and 1.
        """
        if not 0 <= self.gamma <= 1:
            raise PlanError(
                f"gamma {self.gamma:g}, expected a share from 0 to 1", hint="give gamma 0.01"
            )
        low, high = self.density - self.epsilon, self.density + self.epsilon
        if self.kind == "ranks" and 0 < self.density < 1 and not 0 < low <= high < 1:
            raise PlanError(
                f"density {self.density:g} and epsilon {self.epsilon:g}: probabilities from "
                f"{low:g} to {high:g}, expected between 0 and 1",
                hint="give a smaller epsilon",
            )

    @property
    def is_partial(self) -> bool:
        """Whether something goes, and something is left."""
        return self.kind != "all" and 0 < self.density < 1

    @property
    def is_sorted(self) -> bool:
        """Whether all numbers decide which are left."""
        return self.is_partial and self.kind in ("magnitude", "outliers")

    def counts(self, n: int) -> tuple[int, ...]:
        """What is left of `n` numbers: so many of the largest, without so many of them; or none."""
        left = int(self.density * n)
        if self.kind == "magnitude":
            return (max(1, left),)
        most = min(n, left + int(self.gamma * n))
        return tuple(count for count in (most, most - left) if count > 0) if left else ()


@final
class Masks:
    """The numbers that are left, for the models of one tensor."""

    def __init__(
        self,
        tensor: TensorSpec,
        key: str,
        trims: Sequence[Trim],
        seed: int,
        differences: Differences,
        block: int,
    ) -> None:
        """Find nothing yet.

        Args:
            tensor: The dtype of differences, and their shape.
            key: With the seed and the model's number, it names the stream of random numbers.
            block: Numbers that are asked for at once, at most.
        """
        self._row = tensor.shape[-1] if tensor.shape else 1
        self._key, self._seed = key, seed
        self._trims, self._differences = trims, differences
        n = tensor.n_elements
        self._counts = [trim.counts(n) if trim.is_sorted and n else () for trim in trims]
        n_bits = 63 if tensor.dtype == "F64" else 31
        self._block = block
        self._selection = Selection(n, self._patterns, self._counts, n_bits=n_bits, block=block)

    @property
    def n_passes(self) -> int:
        """How often differences are read before the first number is computed."""
        return _sorts_rows(self._trims) + (self._selection.n_passes if any(self._counts) else 0)

    @property
    def is_random(self) -> bool:
        """Whether random numbers decide."""
        return _is_random(self._trims)

    @property
    def scratch_nbytes(self) -> int:
        """In one thread, beside `each_nbytes` of a block."""
        nbytes = 2 * self._row * _rank_nbytes(self._trims)
        if any(self._counts):
            nbytes += self._selection.scratch_nbytes
        return nbytes

    def shares(
        self, i: int, start: int, difference: "Tensor", read: FormReader, rescale: bool
    ) -> "Tensor | None":
        """What numbers of model `i` are multiplied by, bool or float64 [n]; None for nothing.

        Args:
            difference: Its numbers from element `start` on.
            rescale: Whether those that are left at random are divided by their probability, so that
                the mean over all seeds is what it was.
        """
        import torch

        trim, n = self._trims[i], len(difference)
        if trim.kind == "all" or trim.density >= 1:
            return None
        if trim.density <= 0 or (trim.is_sorted and not self._counts[i]):
            return torch.zeros(n, dtype=torch.bool)
        if trim.is_sorted:
            pattern, cuts = patterns(difference), self._selection.cuts(read)[i]
            made = chosen(pattern, cuts[0], start)
            return made if len(cuts) == 1 else made & ~chosen(pattern, cuts[1], start)
        probability: float | Tensor = trim.density
        if trim.kind == "ranks":
            probability = self._probabilities(start, n, read)[i]
        made = random_numbers.keeps(self._seed, f"{self._key} {i}", start, n, probability)
        return made.double().div_(probability) if rescale else made

    def _patterns(self, start: int, n: int, read: FormReader) -> "Sequence[Tensor]":
        return [patterns(x) for x in self._differences(start, n, read)]

    def _probabilities(self, start: int, n: int, read: FormReader) -> "Sequence[Tensor]":
        """Of each model's numbers, by their ranks in their rows, float64 [n] each."""
        import torch

        kept = read.kept.get((start, n))
        if isinstance(kept, list):
            return kept
        length = self._row
        first, last = start // length * length, -(-(start + n) // length) * length
        made = torch.empty((len(self._trims), last - first), dtype=torch.float64)
        step = max(1, self._block // length) * length
        for at in range(first, last, step):
            size = min(step, last - at)
            for i, x in enumerate(self._differences(at, size, read)):
                made[i, at - first :][:size] = _by_rank(x.abs().view(-1, length), self._trims[i])
        read.kept.clear()
        found = list(made[:, start - first :][:, :n])
        read.kept[start, n] = found
        return found


def each_nbytes(trims: Sequence[Trim]) -> int:
    """What each number of a block takes while it is found out what is left."""
    return _rank_nbytes(trims) + _is_random(trims) * random_numbers.EACH_NBYTES


def _is_random(trims: Sequence[Trim]) -> bool:
    return any(trim.is_partial and trim.kind in ("random", "ranks") for trim in trims)


def _sorts_rows(trims: Sequence[Trim]) -> bool:
    return any(trim.is_partial and trim.kind == "ranks" for trim in trims)


def _rank_nbytes(trims: Sequence[Trim]) -> int:
    return _sorts_rows(trims) * 8 * (3 * len(trims) + 6)


def _by_rank(magnitudes: "Tensor", trim: Trim) -> "Tensor":
    """Probabilities of numbers [rows, n] -> [rows * n]; of equal ones later ones rank higher."""
    import torch

    n = magnitudes.shape[1]
    if n == 1:
        return torch.full((len(magnitudes),), trim.density, dtype=torch.float64)
    order = magnitudes.argsort(dim=1, stable=True)
    low, slope = trim.density - trim.epsilon, 2.0 * trim.epsilon / (n - 1)
    line = torch.arange(n, dtype=torch.float64).mul_(slope).add_(low)
    made = torch.empty(magnitudes.shape, dtype=torch.float64)
    return made.scatter_(1, order, line.expand_as(made)).view(-1)
