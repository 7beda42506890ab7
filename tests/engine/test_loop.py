"""The loop of a run, into a sink of fifteen lines: what comes, in which order, on which grid."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import final

import pytest
import torch
from torch import Tensor

import streammap
from streammap.common.events import nobody
from streammap.common.losses import Losses
from streammap.common.ranges import PIECE_NBYTES
from streammap.engine import loop, memory
from streammap.engine.loop import Resources
from streammap.engine.schedule import Job
from streammap.io.formats import safetensors_header
from streammap.planning import graph, maps
from streammap.planning.graph import LinearForm
from tests.engine.test_evaluate import Held
from tests.support import tiny

N = 3 * PIECE_NBYTES // 4 + 300
"""Numbers of float32: three pieces, and a part of one."""


@final
class Recorded:
    """Bytes of all targets; each thread's lane checks what comes to it."""

    def __init__(self, targets: Mapping[str, LinearForm], grid: int | None) -> None:
        self.bytes = {key: bytearray(form.spec.nbytes) for key, form in targets.items()}
        self.cuts: dict[str, set[int]] = {key: set() for key in targets}
        self.lanes: list[Lane] = []
        self._grid = grid

    def grid(self, key: str) -> int | None:
        return self._grid

    def lane(self) -> "Lane":
        self.lanes.append(Lane(self))
        return self.lanes[-1]


@final
class Lane:
    def __init__(self, sink: Recorded) -> None:
        self._sink, self._next = sink, 0
        self.thread = threading.get_ident()
        self.parts: list[Job] = []

    def write(self, part: Job, offset: int, piece: memoryview) -> None:
        assert threading.get_ident() == self.thread
        assert offset == self._next, "pieces come in order"
        self._next += len(piece)
        for place in part.places:
            start = place.offset + offset
            self._sink.cuts[place.key].add(start)
            self._sink.bytes[place.key][start : start + len(piece)] = piece

    def done(self, part: Job, lost: Losses) -> None:
        assert self._next == part.nbytes, "all pieces came"
        self._next = 0
        self.parts.append(part)


def _forms() -> tuple[dict[str, LinearForm], dict[str, Tensor]]:
    """A copy; a blend, computed piece by piece; means of rows, twice, in tiles."""
    source = Held()
    x, y = torch.randn(N), torch.randn(N)
    square = torch.randn(1024, 640)
    pairs = maps.merging([[i, i + 512] for i in range(512)], 1024)
    blend = graph.combine([(0.5, source.load(x)), (0.5, source.load(y))])
    rows = graph.map_dims(source.load(square), [pairs, None])
    forms = {"copy": source.load(x), "blend": blend, "rows": rows, "twin": rows}
    means = (square[:512] + square[512:]) / 2
    return forms, {"copy": x, "blend": x / 2 + y / 2, "rows": means, "twin": means}


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("grid", [None, 0, 8 + 4096])
def test_all_bytes_come_in_order_and_once(grid: int | None, n_threads: int) -> None:
    forms, expected = _forms()
    sink = Recorded(forms, grid)
    room = memory.fit(forms.values(), budget=2**28, n_workers=n_threads)
    loop.run(forms, sink, Resources(room), listener=nobody)
    for key, wanted in expected.items():
        got = torch.frombuffer(sink.bytes[key], dtype=torch.float32).view(wanted.shape)
        torch.testing.assert_close(got, wanted)
    assert len(sink.lanes) == n_threads
    parts = [part for lane in sink.lanes for part in lane.parts]
    nbytes = sum(part.nbytes * len(part.places) for part in parts)
    assert nbytes == sum(form.spec.nbytes for form in forms.values())
    twins = [part for part in parts if part.places[0].key == "rows"]
    assert all([p.key for p in part.places] == ["rows", "twin"] for part in twins)


@pytest.mark.parametrize("grid", [0, 8 + 4096])
def test_pieces_are_cut_on_the_sinks_grid(grid: int) -> None:
    forms, _ = _forms()
    sink = Recorded(forms, grid)
    room = memory.fit(forms.values(), budget=2**28, n_workers=1)
    loop.run(forms, sink, Resources(room), listener=nobody)
    for key in ("copy", "blend", "rows"):
        inner = {start for start in sink.cuts[key] if start}
        assert inner, key
        whole = {start for part in sink.lanes[0].parts for start in [part.places[0].offset]}
        assert all((grid + start) % PIECE_NBYTES == 0 for start in inner - whole), key
    assert len(sink.cuts["copy"]) == -(-(grid + 4 * N) // PIECE_NBYTES)


def test_without_a_grid_parts_come_whole() -> None:
    forms, _ = _forms()
    sink = Recorded(forms, None)
    room = memory.fit(forms.values(), budget=2**28, n_workers=1)
    loop.run(forms, sink, Resources(room), listener=nobody)
    (lane,) = sink.lanes
    starts = {(place.key, place.offset) for part in lane.parts for place in part.places}
    assert starts == {(key, start) for key, cuts in sink.cuts.items() for start in cuts}


class RefusedError(Exception):
    """What no code of the library's raises."""


def test_what_a_sink_raises_is_raised_once_no_thread_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forms, _ = _forms()

    def refuse(self: Lane, part: Job, lost: object) -> None:
        raise RefusedError

    monkeypatch.setattr(Lane, "done", refuse)
    room = memory.fit(forms.values(), budget=2**28, n_workers=3)
    with pytest.raises(RefusedError):
        loop.run(forms, Recorded(forms, 0), Resources(room), listener=nobody)
    assert not [t for t in threading.enumerate() if t.name.startswith("streammap-")]


def test_a_file_is_written_on_its_own_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No write shares a page with another: those do not run side by side."""
    state = {"a": torch.randn(N), "b": torch.randn(N + 1), "c": torch.randn(N)}
    other = {key: torch.randn(x.shape) for key, x in state.items()}
    for name, content in (("in", state), ("other", other)):
        tiny.write(tmp_path / name, content, None)
    lazy = streammap.open(tmp_path / "in")
    writes: list[int] = []
    pwrite = os.pwrite

    def noted(descriptor: int, view: memoryview, offset: int) -> int:
        if Path(f"/proc/self/fd/{descriptor}").readlink().suffix == ".safetensors":
            writes.append(offset)
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", noted)
    for made in (lazy, lazy.interpolate(tmp_path / "other", alpha=0.5)):
        writes.clear()
        made.save(tmp_path / "out", fsync=False, overwrite=True)
        slots, _ = safetensors_header.read(tmp_path / "out" / "model.safetensors")
        starts = {slot.start for slot in slots}
        inner = [offset for offset in writes if offset > min(starts) and offset not in starts]
        assert len(inner) == len(set(inner)) > 6
        assert all(offset % PIECE_NBYTES == 0 for offset in inner)
