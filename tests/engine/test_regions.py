"""Regions of tensors against slices of the whole, bit for bit."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammap
from streammap.common import ranges
from streammap.common.ranges import Region
from streammap.engine import evaluate, memory, regions
from streammap.errors import PlanError
from streammap.planning import graph, maps
from tests.engine.test_evaluate import (
    BLOCKS,
    RANDOM,
    ROOMS,
    Drawn,
    Held,
    Room,
    _patched,
    drawn_forms,
    read_whole,
)
from tests.support import tiny


@st.composite
def ranges_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Region:
    """A region, empty ones among them."""
    found = []
    for n in shape:
        low, high = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
        found.append(draw(st.sampled_from([(0, n), (low, high)])))
    return tuple(found)


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in region)


@given(drawn_forms(BLOCKS), st.sampled_from(ROOMS), st.data())
@settings(max_examples=settings().max_examples // 2)
def test_a_region_is_the_slice_of_the_whole(drawn: Drawn, room: Room, data: st.DataObject) -> None:
    form = drawn.form
    region = data.draw(ranges_of(form.spec.shape))
    with pytest.MonkeyPatch.context() as patch:
        room_of = _patched(patch, form, room)
        wanted = read_whole(form, room_of)[_slices(region)]
        out = torch.full(wanted.shape, math.nan, dtype=wanted.dtype)
        evaluate.read_into(form, region, out, room_of)
        assert tiny.bits(out) == tiny.bits(wanted)


@given(drawn_forms(RANDOM), st.data())
@settings(max_examples=settings().max_examples // 2)
def test_a_region_goes_into_any_tensor(drawn: Drawn, data: st.DataObject) -> None:
    """Of any order of dimensions, with gaps, and of another dtype: rounded as a file is, then cast.

    Matrix products may round otherwise in other tiles.
    """
    form = drawn.form
    region = data.draw(ranges_of(form.spec.shape))
    order = data.draw(st.permutations(range(len(region))))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    with pytest.MonkeyPatch.context() as patch:
        room_of = _patched(patch, form, ROOMS[-3])
        whole = read_whole(form, room_of)
        wanted = whole[_slices(region)].to(dtype)
        gaps = torch.full([2 * wanted.shape[d] for d in order], 7.0, dtype=dtype)
        inverse = [order.index(d) for d in range(len(order))]
        out = gaps[tuple(slice(None, None, 2) for _ in order)].permute(inverse)
        assert out.shape == wanted.shape
        evaluate.read_into(form, region, out, room_of)
        n_sevens = gaps.numel() - wanted.numel()
        torch.testing.assert_close(out, wanted, rtol=1e-2, atol=1e-2)
        if not any(isinstance(m, maps.DenseMap) for t in form.terms for m in t.maps):
            assert torch.equal(out, wanted)
        assert int((gaps == 7.0).sum()) >= n_sevens


@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.data())
def test_any_range_of_elements_is_a_few_boxes(shape: tuple[int, ...], data: st.DataObject) -> None:
    n = math.prod(shape)
    start, end = sorted((data.draw(st.integers(0, n)), data.draw(st.integers(0, n))))
    numbers = torch.arange(n).view(shape)
    found: list[Tensor] = []
    boxes = list(ranges.boxes(shape, start, end))
    for box in boxes:
        part = numbers
        for i in box.prefix:
            part = part[i]
        part = part[box.start : box.end] if shape else part
        assert tuple(part.shape) == box.shape
        assert box.offset == int(part.flatten()[0])
        found.append(part.flatten())
    assert torch.cat([*found, torch.empty(0, dtype=torch.int64)]).tolist() == [*range(start, end)]
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


class _Counted(Held):
    """Counts the bytes that are read."""

    n_read = 0

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        self.n_read += len(view)
        super().read_into(key, start, view)


@pytest.mark.parametrize("dim", [0, 1])
def test_only_a_region_is_computed(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _Counted()
    pairs = maps.growing(maps.merging([[i, i + 32] for i in range(32)], 64))
    form = graph.map_dims(source.load(torch.randn(32, 32)), [pairs, pairs])
    region = tuple((16, 32) if d == dim else (0, 64) for d in range(2))
    copy_into, made = regions.copy_into, list[int]()

    def counted(read: regions.RegionRead, offset: int, elements: Tensor, out: Tensor) -> None:
        made.append(elements.numel())
        copy_into(read, offset, elements, out)

    monkeypatch.setattr(regions, "copy_into", counted)
    out = torch.empty([end - start for start, end in region])
    evaluate.read_into(form, region, out, memory.fit([form], budget=None, n_workers=1))
    assert sum(made) == out.numel()
    assert source.n_read <= 32 * 32 * 4


def test_only_a_region_of_a_copy_is_read() -> None:
    source = _Counted()
    form = source.load(torch.randn(32, 16))
    out = torch.empty(3, 16)
    room = memory.fit([form], budget=None, n_workers=1)
    evaluate.read_into(form, ((5, 8), (0, 16)), out, room)
    assert torch.equal(out, source.tensors["0"][5:8])
    assert source.n_read == out.nbytes


def test_columns_of_one_factor_are_rounded_as_among_others() -> None:
    """A factor that all members share is applied after their sum: the others decide that too."""
    pairs = maps.BlockMap((((0, 1 / 3), (1, 1 / 3)), ((2, 0.7), (3, 0.2))), 4, 64)
    form = graph.map_dims(Held().load(torch.randn(8, 256)), [None, pairs])
    room = memory.fit([form], budget=None, n_workers=1)
    whole = read_whole(form, room)
    out = torch.empty(8, 64)
    evaluate.read_into(form, ((0, 8), (0, 64)), out, room)
    assert torch.equal(out, whole[:, :64])


def _opened(tmp_path: Path) -> streammap.LazyCheckpoint:
    sizes = tiny.Sizes()
    tiny.write(tmp_path / "big", tiny.bert(sizes), tiny.bert_config(sizes))
    return streammap.open(tmp_path / "big").coalesce(width=2)


def test_regions_are_asked_for_with_slices(tmp_path: Path) -> None:
    lazy = _opened(tmp_path)
    key = "encoder.layer.0.output.dense.weight"
    whole = lazy.read(key)
    assert torch.equal(lazy.read(key, region=slice(1, 3)), whole[1:3])
    assert torch.equal(lazy.read(key, region=(slice(None), slice(-2, None))), whole[:, -2:])
    assert lazy.read(key, region=slice(3, 1)).shape == (0, whole.shape[1])
    assert torch.equal(lazy.read(key, dtype=torch.bfloat16), whole.bfloat16())
    assert lazy.read(key, device="meta").device.type == "meta"
    out = torch.empty(whole.shape[1], whole.shape[0]).T
    assert lazy.read(key, out=out) is out
    assert torch.equal(out, whole)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"region": (slice(0, 1),) * 3}, "3 slices, the tensor has 2 dimensions"),
        ({"region": slice(0, 4, 2)}, "a slice with step 2, expected 1"),
        ({"out": torch.empty(3)}, r"`out` is \[3\], the region \[4, 6\]"),
        ({"out": torch.empty(4, 6), "dtype": torch.float16}, "pass out alone"),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, options: dict[str, object], expected: str
) -> None:
    key = "encoder.layer.0.output.dense.weight"
    with pytest.raises(PlanError, match=expected):
        _opened(tmp_path).read(key, **options)  # type: ignore[arg-type]
