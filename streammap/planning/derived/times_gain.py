"""A weight that takes over the gain of the norm before it: W diag(g)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, final

from streammap.io.dtypes import TensorSpec, to_torch
from streammap.planning.derived.elementwise import numbers, spec_of
from streammap.planning.derived.statistic import BLOCK
from streammap.planning.graph import Derived, FormReader, LinearForm

if TYPE_CHECKING:
    from torch import Tensor

_EACH_NBYTES = 40
"""Of a number of a block: as it is read, its place, its gain, and the result, in float64."""


@final
@dataclass(frozen=True, eq=False)
class TimesGain(Derived):
    """A tensor, each unit of one dimension times its gain. Shapes: [.., n, ..], [n]."""

    weight: LinearForm
    gain: LinearForm
    dim: int
    inputs: tuple[LinearForm, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", (self.weight, self.gain))

    @property
    def name(self) -> str:
        """What it is."""
        return "a weight times the gain of a norm"

    @property
    def formula(self) -> Mapping[str, object]:
        """The dimension; its two inputs say the rest."""
        return {"times gain": self.dim}

    @property
    def tensor(self) -> TensorSpec:
        """F32, or F64 where one of the two is."""
        return TensorSpec(spec_of(self.inputs).dtype, self.weight.spec.shape)

    @property
    def scratch_nbytes(self) -> int:
        """A block, and all gains."""
        return (BLOCK + self.gain.spec.n_elements) * _EACH_NBYTES

    def fill(self, start: int, view: memoryview, read: FormReader) -> None:
        """A block at a time; the gains are kept."""
        import torch

        out = torch.frombuffer(view, dtype=to_torch(self.tensor.dtype))
        if "gain" not in read.kept:
            read.kept["gain"] = numbers(self.gain, 0, self.gain.spec.n_elements, read).double()
        gain = read.kept["gain"]
        assert isinstance(gain, torch.Tensor)
        inner = math.prod(self.weight.spec.shape[self.dim + 1 :])
        for at in range(0, len(out), BLOCK):
            n = min(BLOCK, len(out) - at)
            units = torch.arange(start + at, start + at + n)
            units.div_(inner, rounding_mode="floor").remainder_(len(gain))
            weight: Tensor = numbers(self.weight, start + at, n, read).double()
            out[at : at + n] = weight.mul_(gain[units])
