"""Means of tensors as vectors (planning/merging/directions.py), by the names of recipes."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from streammap.errors import PlanError
from streammap.planning.graph import LinearForm
from streammap.planning.merging import dots
from streammap.planning.merging.directions import (
    Karcher,
    ModelStock,
    MultiSlerp,
    NuSlerp,
    Rule,
    Slerp,
)
from streammap.planning.merging.dots import By
from streammap.planning.merging.methods.base import Method, Parameter, Part


class _ByDots(Method):
    """A rule for coefficients, and what it is applied to."""

    least: ClassVar[int] = 1
    """Sources, at least, beside a base."""

    def form(
        self,
        key: str,
        parts: Sequence[Part],
        base: LinearForm | None,
        numbers: Mapping[str, float],
    ) -> LinearForm:
        """The sum.

        Raises:
            PlanError: there are too few sources, or numbers that make no sense together.
        """
        if len(parts) < self.least:
            raise PlanError(
                f"{key}: {self.name} takes {self.least} sources beside a base, and there are "
                f"{len(parts)}",
                hint="name further checkpoints",
            )
        rule, by = self.rule(key, parts, numbers), self.by(numbers)
        return dots.derive(key, rule, [part.form for part in parts], base, by=by)

    @abstractmethod
    def rule(self, key: str, parts: Sequence[Part], numbers: Mapping[str, float]) -> Rule:
        """How the coefficients follow from dot products."""

    def by(self, numbers: Mapping[str, float]) -> By:
        """What is taken for a vector."""
        if "nuslerp_flatten" in numbers and not numbers["nuslerp_flatten"]:
            return "columns" if numbers["nuslerp_row_wise"] else "rows"
        return "rows" if numbers.get("filter_wise") else "whole"


@final
class SlerpMethod(_ByDots):
    """Spherical interpolation of two: t is 0 at the first, which is the base of recipes."""

    name: ClassVar[str] = "slerp"
    parameters: ClassVar[Mapping[str, Parameter]] = {"t": Parameter()}
    least: ClassVar[int] = 2
    max_sources: ClassVar[int | None] = 2

    def rule(self, key: str, parts: Sequence[Part], numbers: Mapping[str, float]) -> Rule:
        """See _ByDots."""
        return Slerp(numbers["t"])


@final
class NuSlerpMethod(_ByDots):
    """The same by weights, of tensors, their rows or columns; or of differences from a base.

    mergekit's words: with nuslerp_flatten false, vectors are rows; columns with nuslerp_row_wise.
    """

    name: ClassVar[str] = "nuslerp"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "weight": Parameter("source"),
        "nuslerp_flatten": Parameter(default=1.0, is_flag=True),
        "nuslerp_row_wise": Parameter(default=0.0, is_flag=True),
    }
    takes_base: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False
    least: ClassVar[int] = 2
    max_sources: ClassVar[int | None] = 2

    def rule(self, key: str, parts: Sequence[Part], numbers: Mapping[str, float]) -> Rule:
        """See _ByDots."""
        first, second = (part.numbers["weight"] for part in parts)
        return NuSlerp((first, second))


@final
class MultiSlerpMethod(_ByDots):
    """The mean direction of any number of tensors, or of differences from a base."""

    name: ClassVar[str] = "multislerp"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "weight": Parameter("source"),
        "normalize_weights": Parameter(default=1.0, is_flag=True),
        "eps": Parameter(default=1e-8),
    }
    takes_base: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    def rule(self, key: str, parts: Sequence[Part], numbers: Mapping[str, float]) -> Rule:
        """See _ByDots."""
        weights = tuple(part.numbers["weight"] for part in parts)
        divides = bool(numbers["normalize_weights"])
        if divides and sum(weights) == 0.0:
            raise PlanError(
                f"{key}: multislerp: the weights add up to 0 and can't be divided by that",
                hint="give other weights, or normalize_weights 0",
            )
        return MultiSlerp(weights, divides, numbers["eps"])


@final
class KarcherMethod(_ByDots):
    """The point of the sphere that is nearest to all."""

    name: ClassVar[str] = "karcher"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "max_iter": Parameter(default=10.0),
        "tol": Parameter(default=1e-5),
    }

    def rule(self, key: str, parts: Sequence[Part], numbers: Mapping[str, float]) -> Rule:
        """See _ByDots."""
        steps = numbers["max_iter"]
        if not 0 <= steps <= _MAX_STEPS or steps != int(steps):
            raise PlanError(
                f"{key}: karcher: max_iter {steps:g}, expected a whole number from 0 to "
                f"{_MAX_STEPS}",
                hint="10 are enough for most models",
            )
        return Karcher(int(steps), numbers["tol"])


@final
class ModelStockMethod(_ByDots):
    """The mean of models, drawn to their base the more, the wider they stand."""

    name: ClassVar[str] = "model_stock"
    parameters: ClassVar[Mapping[str, Parameter]] = {
        "filter_wise": Parameter(default=0.0, is_flag=True)
    }
    takes_base: ClassVar[bool] = True
    least: ClassVar[int] = 2

    def rule(self, key: str, parts: Sequence[Part], numbers: Mapping[str, float]) -> Rule:
        """See _ByDots."""
        return ModelStock()


_MAX_STEPS = 10_000
