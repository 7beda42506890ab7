"""Task vectors, trimmed and elected (planning/merging/task_vectors.py), by the names of recipes."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, final

from streammap.errors import PlanError
from streammap.planning.graph import LinearForm
from streammap.planning.merging import task_vectors
from streammap.planning.merging.methods.base import Method, Parameter, Part
from streammap.planning.merging.task_vectors import TaskRule
from streammap.planning.merging.trimming import Trim


def _parameters(
    *, normalize: bool, rescale: bool, elects: bool, draws: bool = False, **of_sources: float
) -> Mapping[str, Parameter]:
    """What all have, and what is different: defaults, and numbers of the models' own."""
    signs = {"count_signs": Parameter(default=0.0, is_flag=True)} if elects else {}
    return {
        "weight": Parameter("source"),
        "density": Parameter("source", default=1.0),
        **{name: Parameter("source", default=value) for name, value in of_sources.items()},
        "normalize": Parameter(default=float(normalize), is_flag=True),
        "rescale": Parameter(default=float(rescale), is_flag=True),
        "lambda": Parameter(default=1.0),
        **signs,
        **({"seed": Parameter(default=0.0)} if draws else {}),
    }


class _Trimmed(Method):
    """Differences from a base."""

    takes_base: ClassVar[bool] = True
    kind: ClassVar[Literal["magnitude", "outliers", "random", "ranks"]]

    def form(
        self,
        key: str,
        parts: Sequence[Part],
        base: LinearForm | None,
        numbers: Mapping[str, float],
    ) -> LinearForm:
        """The base, and what is left of the differences from it.

        Raises:
            PlanError: a density that is no share; a percentage, say.
        """
        assert base is not None
        for part in parts:
            if not 0 <= part.numbers["density"] <= 1:
                raise PlanError(
                    f"{key}: {self.name}: density {part.numbers['density']:g}, expected a share "
                    "from 0 to 1",
                    hint="give density 0.5 for a half",
                )
        own = [{k: v for k, v in part.numbers.items() if k != "weight"} for part in parts]
        by_count = numbers.get("count_signs")
        rule = TaskRule(
            self.name,
            tuple(part.numbers["weight"] for part in parts),
            tuple(Trim(self.kind, **each) for each in own),
            None if by_count is None else "count" if by_count else "sum",
            bool(numbers["normalize"]),
            bool(numbers["rescale"]),
            numbers["lambda"],
            int(numbers.get("seed", 0)),
        )
        return task_vectors.derive(key, rule, [part.form for part in parts], base)


@final
class Ties(_Trimmed):
    """The largest numbers, of the elected sign (arXiv:2306.01708)."""

    name: ClassVar[str] = "ties"
    kind = "magnitude"
    parameters: ClassVar[Mapping[str, Parameter]] = _parameters(
        normalize=True, rescale=False, elects=True
    )


@final
class DareLinear(_Trimmed):
    """Numbers at random, divided by how probable they were (arXiv:2311.03099)."""

    name: ClassVar[str] = "dare_linear"
    kind = "random"
    parameters: ClassVar[Mapping[str, Parameter]] = _parameters(
        normalize=False, rescale=True, elects=False, draws=True
    )


@final
class DareTies(_Trimmed):
    """The same, of the elected sign."""

    name: ClassVar[str] = "dare_ties"
    kind = "random"
    parameters: ClassVar[Mapping[str, Parameter]] = _parameters(
        normalize=False, rescale=True, elects=True, draws=True
    )


@final
class Breadcrumbs(_Trimmed):
    """The largest numbers without the very largest (arXiv:2312.06795)."""

    name: ClassVar[str] = "breadcrumbs"
    kind = "outliers"
    parameters: ClassVar[Mapping[str, Parameter]] = _parameters(
        normalize=False, rescale=False, elects=False, gamma=0.01
    )


@final
class BreadcrumbsTies(_Trimmed):
    """The same, of the elected sign."""

    name: ClassVar[str] = "breadcrumbs_ties"
    kind = "outliers"
    parameters: ClassVar[Mapping[str, Parameter]] = _parameters(
        normalize=False, rescale=False, elects=True, gamma=0.01
    )


@final
class Della(_Trimmed):
    """Numbers at random, the larger of a row more often, of the elected sign (arXiv:2406.11617)."""

    name: ClassVar[str] = "della"
    kind = "ranks"
    parameters: ClassVar[Mapping[str, Parameter]] = _parameters(
        normalize=True, rescale=True, elects=True, epsilon=0.15, draws=True
    )


@final
class DellaLinear(_Trimmed):
    """The same, of any sign."""

    name: ClassVar[str] = "della_linear"
    kind = "ranks"
    parameters: ClassVar[Mapping[str, Parameter]] = _parameters(
        normalize=False, rescale=True, elects=False, epsilon=0.15, draws=True
    )
