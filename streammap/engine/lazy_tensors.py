"""Tensors of a plan for those who ask one by one: a region of one, or all as a mapping."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, final

from streammap.engine import regions
from streammap.errors import PlanError
from streammap.planning.plan import Plan

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def read(
    plan: Plan,
    key: str,
    region: slice | Sequence[slice] | None,
    *,
    out: "Tensor | None",
    dtype: "torch.dtype | None",
    device: "str | torch.device | None",
) -> "Tensor":
    """A region of a tensor, in `out` or in a new tensor.

    Raises:
        PlanError: an `out` of another shape or given with a dtype or device, a region that is none.
    """
    import torch

    from streammap.io.dtypes import to_torch

    spec = plan.targets[key].spec
    wanted = regions.parse(() if region is None else region, spec.shape, key=key)
    shape = tuple(end - start for start, end in wanted)
    if out is None:
        out = torch.empty(shape, dtype=dtype or to_torch(spec.dtype), device=device)
    elif dtype is not None or device is not None:
        raise PlanError(f"{key}: `out` has a dtype and a device already", hint="pass out alone")
    elif tuple(out.shape) != shape:
        raise PlanError(f"{key}: `out` is {list(out.shape)}, the region {list(shape)}")
    plan.read_into(key, wanted, out)
    return out


@final
class LazyState(Mapping[str, "Tensor"]):
    """A state dict whose tensors are computed when they are asked for, each time anew."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __getitem__(self, key: str) -> "Tensor":
        return self._plan.read(key)

    def __contains__(self, key: object) -> bool:
        return key in self._plan.targets

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan.targets)

    def __len__(self) -> int:
        return len(self._plan.targets)

    def __repr__(self) -> str:
        return f"<lazy state dict of {len(self)} tensors>"
