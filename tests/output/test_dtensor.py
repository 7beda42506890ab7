"""Shards of DTensors: which ranges a process holds, and that it is filled with them."""

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import streammap
from streammap.errors import PlanError
from streammap.output.module import dtensor
from tests.support import tiny


@given(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 4)), max_size=3))
def test_cuts_are_those_of_torch(n: int, cuts: list[tuple[int, int]]) -> None:
    """For all processes of a mesh, one of whose dimensions may cut each of several parts."""
    numbers = torch.arange(n)

    def check(ranges: dtensor.Ranges, held: Tensor, left: Sequence[tuple[int, int]]) -> None:
        assert [i for start, end in ranges for i in range(start, end)] == held.tolist()
        if not left or not held.numel():
            return
        (n_ranks, factor), *later = left
        placement = Shard(0) if factor == 1 else _StridedShard(0, split_factor=factor)
        parts, _ = placement._split_tensor(held, n_ranks, with_padding=False)
        for rank, part in enumerate(parts):
            check(dtensor.cut(ranges, n_ranks, rank, factor=factor), part, later)

    check(((0, n),), numbers, cuts)


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    store = torch._C._distributed_c10d.HashStore()
    wait = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1, timeout=wait)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
    dist.destroy_process_group()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.second = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x))
        return found


def _whole(tensor: object) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()


def _saved(folder: Path) -> streammap.LazyCheckpoint:
    torch.manual_seed(3)
    tiny.write(folder, dict(Net().state_dict()), None)
    return streammap.open(folder)


@pytest.mark.parametrize("meta", [False, True])
def test_fsdp_is_filled_and_trains(tmp_path: Path, mesh: DeviceMesh, meta: bool) -> None:
    lazy = _saved(tmp_path)
    with torch.device("meta" if meta else "cpu"):
        model = Net()
    fully_shard(model.first)
    fully_shard(model)
    report = streammap.load_into(model, lazy)
    assert report.nbytes == lazy.plan.nbytes
    plain = Net()
    plain.load_state_dict(dict(lazy.tensors()))
    x = torch.randn(2, 4)
    assert torch.equal(model(x), plain(x))
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(_whole(parameter), plain.get_parameter(name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert isinstance(model, FSDPModule)
    model.unshard()
    streammap.load_into(model, lazy)
    assert torch.equal(model(x), plain(x))


def test_placements_of_a_mesh_are_filled(tmp_path: Path, mesh: DeviceMesh) -> None:
    lazy = _saved(tmp_path)
    for placements in ([Shard(1), Replicate()], [Shard(0), Shard(0)], [Shard(0), Shard(1)]):
        model = Net()
        whole = lazy.read("first.weight")
        empty = DTensor.from_local(torch.zeros_like(whole), mesh, placements)
        model.first.weight = nn.Parameter(empty)
        streammap.load_into(model, lazy)
        assert torch.equal(_whole(model.first.weight), whole)


def test_what_can_not_be_filled_in_place_is_refused(tmp_path: Path, mesh: DeviceMesh) -> None:
    lazy = _saved(tmp_path)
    model = Net()
    part = DTensor.from_local(torch.zeros(6, 4), mesh, [Replicate(), Partial()])
    model.first.weight = nn.Parameter(part)
    with pytest.raises(PlanError, match=r"first\.weight: a DTensor that is P\(sum\)"):
        streammap.load_into(model, lazy)
    model = Net()
    fully_shard(model)
    expected = r"a DTensor, torch\.float32 on cpu, can't become torch\.bfloat16 on cpu in place"
    with pytest.raises(PlanError, match=expected):
        streammap.load_into(model, lazy, dtype=torch.bfloat16)
