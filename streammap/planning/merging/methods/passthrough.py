"""One source as it is, times a number by place: what slices of layers are stacked with."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, final

from streammap.planning.graph import LinearForm
from streammap.planning.merging.methods.base import Method, Parameter, Part
from streammap.planning.merging.methods.linear import weighted


@final
class Passthrough(Method):
    """Copies, scaled where that is asked for; a scale of 1 copies bytes."""

    name: ClassVar[str] = "passthrough"
    parameters: ClassVar[Mapping[str, Parameter]] = {"scale": Parameter("source", default=1.0)}
    max_sources: ClassVar[int | None] = 1

    def form(
        self,
        key: str,
        parts: Sequence[Part],
        base: LinearForm | None,
        numbers: Mapping[str, float],
    ) -> LinearForm:
        """The source's tensor."""
        return weighted([(parts[0].numbers["scale"], parts[0].form)])
