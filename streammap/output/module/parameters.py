"""The tensors of a module that a checkpoint fills: parameters and persistent buffers.

A tensor that several modules share (a tied head) is one entry with several names, and stays shared.
Tensors on the meta device have no memory: they get some when they are filled, and are put in the
place of what was there.
"""

import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from streammap.errors import PlanError, some
from streammap.output.module import dtensor
from streammap.output.module.dtensor import LocalShard


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """Where a module holds a tensor."""

    module: nn.Module
    attribute: str
    is_parameter: bool

    def put(self, tensor: Tensor) -> None:
        """Put another tensor there."""
        # Past nn.Module.__setattr__, which takes no tensor for a parameter, and FSDP's.
        tables: tuple[dict[str, Any], ...] = (self.module._parameters, self.module._buffers)
        tables[0 if self.is_parameter else 1][self.attribute] = tensor

    @property
    def tensor(self) -> Tensor:
        """The tensor that is there."""
        table = self.module._parameters if self.is_parameter else self.module._buffers
        tensor = table[self.attribute]
        assert tensor is not None
        return tensor


@dataclass(eq=False, slots=True)
class SharedTensor:
    """A tensor of a module, which several of its modules may share."""

    tensor: Tensor
    names: list[str] = field(default_factory=list)
    """All names that it goes by."""
    owners: list[TensorSlot] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def is_meta(self) -> bool:
        """Whether it has no memory yet."""
        return dtensor.local(self.tensor).is_meta

    def replace(self, tensor: Tensor) -> None:
        """Put another tensor in its place, for all owners."""
        made = tensor
        if any(owner.is_parameter for owner in self.owners):
            made = nn.Parameter(tensor, requires_grad=self.tensor.requires_grad)
            made.__dict__.update(self.tensor.__dict__)
        for owner in self.owners:
            owner.put(made)
        self.tensor = made


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def shared_tensors(model: nn.Module) -> dict[str, SharedTensor]:
    """Name -> tensor, for all parameters and persistent buffers.

    Raises:
        PlanError: FSDP1, whose parameters are flat.
    """
    entries: dict[str, SharedTensor] = {}
    known: dict[int, SharedTensor] = {}
    for name, owner, tensor, is_persistent in _tensors(model):
        if not is_persistent:
            continue
        if owner.attribute == "_flat_param":
            raise PlanError(
                f"{name}: a flat parameter of FSDP1, which has no names inside",
                hint="use torch.distributed.fsdp.fully_shard, or fill the model before wrapping it",
            )
        entry = known.setdefault(id(tensor), SharedTensor(tensor))
        entry.names.append(name)
        if not any(
            o.module is owner.module and o.attribute == owner.attribute for o in entry.owners
        ):
            entry.owners.append(owner)
        entries[name] = entry
    return entries


def tie(entry: SharedTensor, other: SharedTensor) -> None:
    """Make two tensors one again: `to_empty` separates tied ones.

    Under FSDP they stay two, with equal numbers.
    """
    sharded = (dtensor.as_dtensor(e.tensor) is not None for e in (entry, other))
    if entry is not other and not any(sharded):
        for owner in entry.owners:
            owner.put(other.tensor)


def lost_buffers(model: nn.Module) -> dict[str, TensorSlot]:
    """Buffers on the meta device that no checkpoint holds: rotary frequencies, masks ..."""
    return {
        name: owner
        for name, owner, tensor, is_persistent in _tensors(model)
        if not is_persistent and tensor.is_meta
    }


def on_meta(model: nn.Module) -> dict[str, TensorSlot]:
    """Tensors without memory."""
    return {name: owner for name, owner, tensor, _ in _tensors(model) if tensor.is_meta}


def is_sharded(owner: TensorSlot) -> bool:
    """Whether the tensor is a DTensor."""
    return dtensor.as_dtensor(owner.tensor) is not None


def materialize(owner: TensorSlot, device: torch.device) -> None:
    """Give a tensor memory, uninitialised."""
    tensor = owner.tensor
    if tensor.is_meta:  # not yet, by another owner
        SharedTensor(tensor, owners=[owner]).replace(torch.empty_like(tensor, device=device))


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Move the buffers that no checkpoint holds to the device of everything else."""
    for _, owner, tensor, is_persistent in _tensors(model):
        if not is_persistent and not tensor.is_meta and not _is_same(tensor.device, device):
            owner.module._buffers[owner.attribute] = tensor.to(device)


def _tensors(model: nn.Module) -> Iterator[tuple[str, TensorSlot, Tensor, bool]]:
    """(name, owner, tensor, whether a checkpoint has it), modules of two names twice."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for table in (module._parameters, module._buffers):
            for attribute, tensor in table.items():
                if tensor is None:
                    continue
                name = f"{prefix}.{attribute}" if prefix else attribute
                is_parameter = table is module._parameters
                owner = TensorSlot(module, attribute, is_parameter)
                lost = not is_parameter and attribute in module._non_persistent_buffers_set
                yield name, owner, tensor, not lost


def reshard(model: nn.Module) -> None:
    """Make FSDP2 reshard parameters that a forward pass gathered."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return
    for module in model.modules():
        if isinstance(module, kind):
            module.reshard()


@final
class FillTarget:
    """A tensor of a module while it is filled. Several threads may fill it."""

    def __init__(
        self, entry: SharedTensor, *, dtype: torch.dtype | None, device: torch.device | None
    ) -> None:
        """Memory is allocated when `out` is first used.

        Args:
            dtype: What it becomes; None keeps it.
            device: Where it goes; None keeps it there, or takes the processor for meta tensors.

        Raises:
            PlanError: a shard of a DTensor that would become another tensor under FSDP's hands.
        """
        self.entry = entry
        now = dtensor.local(entry.tensor)
        self.dtype = dtype or now.dtype
        self.device = device or (_device_of(entry.tensor) if now.is_meta else now.device)
        self.shards: tuple[LocalShard, ...] = dtensor.local_shards(entry.tensor, name=entry.name)
        stays = now.dtype == self.dtype and _is_same(now.device, self.device)
        if not stays and not now.is_meta and dtensor.as_dtensor(entry.tensor) is not None:
            raise PlanError(
                f"{entry.name}: a DTensor, {now.dtype} on {now.device}, can't become {self.dtype} "
                f"on {self.device} in place",
                hint="choose dtype and device before fully_shard",
            )
        self._shape, self._stays = tuple(now.shape), stays
        self._out: Tensor | None = None
        self._lock = threading.Lock()
        self._left = now.numel()
        self.nbytes = self._left * self.dtype.itemsize
        """Bytes that this process holds."""

    @property
    def out(self) -> Tensor:
        """What this process holds of the tensor, to be written to."""
        with self._lock:
            if self._out is None:
                now = dtensor.local(self.entry.tensor)
                if self._stays:
                    self._out = now
                else:
                    self._out = torch.empty(self._shape, dtype=self.dtype, device=self.device)
            return self._out

    def wrote(self, n: int) -> None:
        """Count elements; the last ones put the tensor in its place."""
        with self._lock:
            self._left -= n
            is_whole = not self._left
        if is_whole:
            self.finish()

    def finish(self) -> None:
        """Put what was filled in its place, unless it was filled there."""
        out = self.out
        if self._stays:
            return
        self._stays = True
        sharded = dtensor.as_dtensor(self.entry.tensor)
        self.entry.replace(out if sharded is None else dtensor.replace_local(sharded, out))


def _device_of(tensor: Tensor) -> torch.device:
    """Where a meta tensor goes: to the device of its mesh, or the processor."""
    sharded = dtensor.as_dtensor(tensor)
    kind = "cpu" if sharded is None else sharded.device_mesh.device_type
    index = torch.cuda.current_device() if kind == "cuda" else None
    return torch.device(kind) if index is None else torch.device(kind, index)


def _is_same(a: torch.device, b: torch.device) -> bool:
    index: int | None = b.index
    return a.type == b.type and (index is None or a.index == index)


def refuse_lost(names: list[str]) -> None:
    """Refuse buffers that nothing could fill.

    Raises:
        PlanError: there are some.
    """
    if names:
        raise PlanError(
            f"{len(names)} buffers are on the meta device, and no checkpoint holds them: "
            f"{some(names)}",
            hint="make them on a real device first, or pass strict=False and fill them afterwards",
        )
