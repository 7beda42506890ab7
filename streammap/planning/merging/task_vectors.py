"""Task vectors, trimmed and brought to agree: base + lambda * sum(w_i * d_i), and what grew of it.

    d_i = x_i - base                      what a model learned
    trimmed     some numbers of d_i are zero: all but the largest (TIES, arXiv:2306.01708), all but
                the largest without the very largest (Breadcrumbs, arXiv:2312.06795), some at random
                (DARE, arXiv:2311.03099), or at random, the smaller of a row more often (DELLA,
                arXiv:2406.11617)
    elected     at each place the sign of sum(w_i * d_i); what has another sign is left out
    normalised  divided by the sum of the weights, of those that are left at this place

Magnitudes are compared in float32 (float64 where a form is), as they are in mergekit 0.1.5; where
they are equal, earlier places count as larger, so that the result does not depend on a sort. All
else is computed in float64.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal, final

from streammap.errors import PlanError
from streammap.io.dtypes import DTYPE_BITS, to_torch
from streammap.planning import graph
from streammap.planning.derived.elementwise import Elementwise, number_nbytes, numbers, sums
from streammap.planning.derived.statistic import Statistic, block_of
from streammap.planning.graph import FormReader, LinearForm
from streammap.planning.merging import trimming
from streammap.planning.merging.trimming import Trim

if TYPE_CHECKING:
    from torch import Tensor

Elect = Literal["sum", "count"]
_KEPT_NBYTES = 900
"""For each reading: what it found, and how; measured."""
_SHORTEST = 1e-7
"""Vectors with a smaller sum of magnitudes are not rescaled."""


@final
@dataclass(frozen=True, slots=True)
class TaskRule:
    """What is done with the differences from a base."""

    name: str
    """Of the method, in recipes."""
    weights: tuple[float, ...]
    trims: tuple[Trim, ...] = ()
    """Of each model; none of any if empty."""
    elect: Elect | None = None
    """By the sum of the numbers, or by how many are positive or negative."""
    normalize: bool = False
    rescale: bool = False
    """Whether what trimming takes away is made up for (trimming.Trim)."""
    scale: float = 1.0
    """The recipes' lambda."""
    seed: int = 0


def derive(
    key: str,
    rule: TaskRule,
    forms: Sequence[LinearForm],
    base: LinearForm,
    *,
    dtype: str | None = None,
) -> LinearForm:
    """The base and a sum of differences from it.

    Args:
        key: The tensor's: random numbers depend on it.
        forms: The models' tensors, of one shape; one for each weight of the rule.
        dtype: Of the result; the base's by default.

    Raises:
        PlanError: a row is too long to be sorted.
    """
    shape = base.spec.shape
    longest = trimming.MAX_ROW
    if any(trim.kind == "ranks" for trim in rule.trims) and shape and shape[-1] > longest:
        raise PlanError(
            f"{key}: {rule.name} sorts rows, of {shape[-1]} numbers here, at most {longest}",
            hint="give it another method",
        )
    return graph.derive(TaskVectors(key, rule, (*forms, base)), dtype=dtype or base.spec.dtype)


@final
@dataclass(frozen=True, eq=False)
class TaskVectors(Elementwise):
    """The base and a sum of differences from it."""

    key: str
    rule: TaskRule
    inputs: tuple[LinearForm, ...]
    """Those of the models, and the base's."""
    by_small_calls: ClassVar[bool] = True
    n_passes: int = field(init=False)
    kept_nbytes: int = field(init=False)
    _masks: trimming.Masks | None = field(init=False)
    _lengths: Statistic["Tensor", Sequence[float]] = field(init=False)

    def __post_init__(self) -> None:
        rule, n, masks = self.rule, self.inputs[0].spec.n_elements, None
        block = block_of(self._compared_nbytes)
        if any(trim.kind != "all" for trim in rule.trims):
            masks = trimming.Masks(self.tensor, self.key, rule.trims, rule.seed, self._low, block)
        found = Statistic(n, self._lengths_of_block, _add, self._factors, block=block)
        object.__setattr__(self, "_masks", masks)
        object.__setattr__(self, "_lengths", found)
        more = 0 if masks is None else masks.n_passes + self._asks_lengths
        object.__setattr__(self, "n_passes", 1 + more)
        object.__setattr__(self, "kept_nbytes", _KEPT_NBYTES * (1 + more))

    @property
    def name(self) -> str:
        """See Derived."""
        times = "" if self.n_passes == 1 else f", read up to {self.n_passes} times"
        return self.rule.name + times

    @property
    def formula(self) -> Mapping[str, object]:
        """See Derived."""
        is_random = self._masks is not None and self._masks.is_random
        return {**asdict(self.rule), "key": self.key if is_random else None}

    @property
    def each_nbytes(self) -> int:
        """Of numbers as they are read, of differences, of the base, of votes and a sum."""
        item = DTYPE_BITS[self.tensor.dtype] // 8
        read = sum(map(number_nbytes, self.inputs))
        each = read + 8 * (len(self.inputs) + 4) + 3 * item
        return each + trimming.each_nbytes(self.rule.trims)

    @property
    def _compared_nbytes(self) -> int:
        """Of numbers that are only compared: of differences, patterns, and what is counted."""
        item = DTYPE_BITS[self.tensor.dtype] // 8
        read = sum(map(number_nbytes, self.inputs))
        each = read + 2 * item * len(self.inputs) + 8 + 32 * self._asks_lengths
        return each + trimming.each_nbytes(self.rule.trims)

    @property
    def scratch_nbytes(self) -> int:
        """A block, of one kind or the other, and what the masks take beside it."""
        if self._masks is None:
            return super().scratch_nbytes
        compared = block_of(self._compared_nbytes) * self._compared_nbytes
        return max(super().scratch_nbytes, compared) + self._masks.scratch_nbytes

    def values(self, start: int, parts: Sequence["Tensor"], read: FormReader) -> "Tensor":
        """The base, and what is left of the differences."""
        rule = self.rule
        vectors = self._left(start, parts, read)
        for vector, weight in zip(vectors, rule.weights, strict=True):
            vector.mul_(weight)
        if rule.elect is not None:
            mixed = self._elected(vectors)
        else:
            mixed, total = _added(vectors), sum(rule.weights)
            if rule.normalize and abs(total) >= 1e-8:
                mixed /= total
        return mixed.mul_(rule.scale).add_(parts[-1])

    def _elected(self, vectors: "Sequence[Tensor]") -> "Tensor":
        """The sum of what has the sign that was elected; normalised, if the rule says so.

        Numbers are multiplied by signs, not chosen by them: that is several times faster.
        """
        import torch

        votes = (v.sign() for v in vectors) if self.rule.elect == "count" else vectors
        direction = _added(votes).add_(0.0)  # there is no -0.0: of 0 the sign is 1
        torch.copysign(torch.ones((), dtype=direction.dtype), direction, out=direction)
        for vector in vectors:
            vector.mul_(direction).clamp_(min=0.0)
        divisor = None
        if self.rule.normalize:
            divisor = torch.zeros_like(direction)
            for vector, weight in zip(vectors, self.rule.weights, strict=True):
                divisor.add_(vector.sign(), alpha=weight)
            divisor.masked_fill_(divisor == 0.0, 1.0)
        mixed = _added(vectors).mul_(direction)
        return mixed if divisor is None else mixed.div_(divisor)

    def _left(self, start: int, parts: Sequence["Tensor"], read: FormReader) -> "list[Tensor]":
        """What is left of each difference, float64 [n]."""
        base = parts[-1].double()
        made = [x.double().sub_(base) for x in parts[:-1]]
        if self._masks is None:
            return made
        factors = self._lengths.get(read) if self._asks_lengths else None
        for i, x in enumerate(made):
            low = self._lows([parts[i], parts[-1]])[0]
            share = self._masks.shares(i, start, low, read, self.rule.rescale)
            if share is not None:
                x.mul_(share)
            if factors is not None:
                x.mul_(factors[i])
        return made

    @property
    def _asks_lengths(self) -> bool:
        """Whether vectors are made as long as they were, in the sum of magnitudes."""
        return self.rule.rescale and any(trim.is_sorted for trim in self.rule.trims)

    def _lengths_of_block(self, start: int, n: int, read: FormReader) -> "Tensor":
        """Sums of magnitudes, of all and of what is left, float64 [models, 2]."""
        import torch

        made = torch.ones((len(self.rule.trims), 2), dtype=torch.float64)
        for i, low in enumerate(self._low(start, n, read)):
            if self._masks is None or not self.rule.trims[i].is_sorted:
                continue
            share = self._masks.shares(i, start, low, read, False)
            size = low.abs().double()
            made[i, 0] = sums(size, dim=0)
            made[i, 1] = sums(size if share is None else size * share, dim=0)
        return made

    def _factors(self, lengths: "Tensor", read: FormReader) -> Sequence[float]:
        made: list[float] = []
        for before, after in lengths.tolist():
            is_short = before < _SHORTEST or after < _SHORTEST
            made.append(1.0 if is_short else before / after)
        return made

    def _low(self, start: int, n: int, read: FormReader) -> "Sequence[Tensor]":
        """Differences as their magnitudes are compared, in the dtype of the result [n] each."""
        return self._lows([numbers(form, start, n, read) for form in self.inputs])

    def _lows(self, parts: Sequence["Tensor"]) -> "Sequence[Tensor]":
        dtype = to_torch(self.tensor.dtype)
        base = parts[-1].to(dtype)
        return [x.to(dtype) - base for x in parts[:-1]]


def _added(terms: Iterable["Tensor"]) -> "Tensor":
    first, *rest = terms
    total = first.clone()
    for term in rest:
        total += term
    return total


def _add(total: "Tensor", block: "Tensor") -> "Tensor":
    return total.add_(block)
