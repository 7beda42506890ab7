"""Runs: the same bytes whatever they may use, each byte read and written once, and no trace left
of one that fails.
"""

import errno
import hashlib
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import streammap
from streammap.api import LazyCheckpoint
from streammap.common.events import Event, Started, Wrote
from streammap.engine import kernels, memory, tile_reads, worker
from streammap.engine.memory import N_PLACES
from streammap.engine.schedule import Compute, Job
from streammap.engine.worker import Piece, Worker
from streammap.errors import CheckpointError, OutputError, TruncatedError
from streammap.io.buffers import Buffer
from streammap.io.checkpoint import Checkpoint
from streammap.io.codecs.coded import Coded
from streammap.io.storage.base import Reader
from streammap.output.run import Report
from streammap.planning import graph
from streammap.planning.requests import Grouping
from tests.support import quantised, tiny
from tests.support.tiny import Sizes, State
from tests.support.typed import Options, run

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
BIG = Sizes(heads=4, layers=2, head_dim=8, mlp_per_head=12, vocab=50, positions=9)
MIXED = Sizes(heads=4, layers=1, head_dim=4, mlp_per_head=48, vocab=20, positions=9)
"""With as many intermediate units as an irregular order of them takes."""
SHARD = "8kB"
Make = Callable[[Path], LazyCheckpoint]


def cast(state: State, dtype: torch.dtype) -> State:
    return {key: x.to(dtype) for key, x in state.items()}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of one dtype: two of one size, one shard or three; two others."""
    assert isinstance(request.param, torch.dtype)
    return write_sources(tmp_path_factory.mktemp("sources"), request.param)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float32."""
    return write_sources(tmp_path_factory.mktemp("plain"), torch.float32)


def write_sources(folder: Path, dtype: torch.dtype) -> Path:
    config = tiny.bert_config(BIG)
    tiny.write(folder / "big", cast(tiny.bert(BIG), dtype), config, n_shards=3)
    tiny.write(folder / "other", cast(tiny.bert(BIG, seed=1), dtype), config)
    tiny.write(folder / "mixed", cast(tiny.bert(MIXED), dtype), tiny.bert_config(MIXED))
    tiny.write(folder / "gpt2", cast(tiny.gpt2(BIG), dtype), tiny.gpt2_config(BIG))
    streammap.open(folder / "big").coalesce(width=2, depth=2).save(folder / "small", fsync=False)
    return folder


def opened(folder: Path, name: str) -> LazyCheckpoint:
    return streammap.open(folder / name)


def shuffled(folder: Path) -> LazyCheckpoint:
    """Units in no order at all."""
    n = MIXED.mlp
    order = Random(0).sample(range(n), n)
    return opened(folder, "mixed").coalesce(mlp=[[j] for j in order])


def by_two(folder: Path, grouping: Grouping) -> LazyCheckpoint:
    return opened(folder, "big").coalesce(width=2, depth=2, grouping=grouping)


MAKES: dict[str, Make] = {
    "copy": lambda f: opened(f, "big"),
    "coalesce": lambda f: by_two(f, "stacked"),
    "coalesce neighbours": lambda f: by_two(f, "adjacent"),
    "decoalesce": lambda f: opened(f, "big").decoalesce(width=2),
    "decoalesce neighbours": lambda f: opened(f, "big").decoalesce(width=2, grouping="adjacent"),
    "grow layers": lambda f: opened(f, "small").decoalesce(depth=4, width=2),
    "copy layers": lambda f: opened(f, "small").decoalesce(depth=4),
    "interpolate": lambda f: opened(f, "big").interpolate(f / "other", alpha=0.3),
    "decoalesce and blend": lambda f: (
        opened(f, "small").decoalesce().interpolate(f / "big", alpha=0.25)
    ),
    "uneven groups": lambda f: opened(f, "big").coalesce(heads=[[0], [3, 1, 2]]),
    "gpt2": lambda f: opened(f, "gpt2").coalesce(width=2).decoalesce(width=4),
    "shuffle": shuffled,
}
ONCE = tuple(name for name in MAKES if name not in ("gpt2", "uneven groups", "shuffle"))
"""What reads each byte of its sources once."""


def fill(folder: Path) -> LazyCheckpoint:
    """New units that are the mean of all: a dense map."""
    return opened(folder, "gpt2").decoalesce(hidden=f"={BIG.embed + BIG.head_dim}")


@dataclass(frozen=True)
class Cut:
    """Tiles that are smaller than tensors."""

    tile: int
    chunk: int


CUTS = (Cut(128, 128), Cut(1024, 300), Cut(3000, 1000))
"""Of a row of BIG's a part, a few rows, and many."""


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Cut], None]:
    return lambda found: _cut(monkeypatch, found)


def _cut(patch: pytest.MonkeyPatch, found: Cut) -> None:
    patch.setattr(memory, "MAX_TILE_NBYTES", found.tile)
    patch.setattr(memory, "MIN_TILE_NBYTES", found.tile)
    patch.setattr(memory, "CHUNK_NBYTES", found.chunk)
    patch.setattr(tile_reads, "STRIP", 8)


def save(lazy: LazyCheckpoint, out: Path, **options: Any) -> Report:
    return lazy.save(out, fsync=False, overwrite=True, max_shard_size=SHARD, **options)


def digests(folder: Path) -> dict[str, str]:
    found = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.glob("model*.safetensors")
    }
    assert found
    return found


def least(lazy: LazyCheckpoint, out: Path, threads: int | None = None) -> str:
    """The memory that a refusal says to give."""
    with pytest.raises(OutputError, match="this run takes at least") as caught:
        save(lazy, out, memory=1, threads=threads)
    found = re.fullmatch(r"pass --memory (\d+MiB), or more", caught.value.hint or "")
    assert found is not None
    return found[1]


def means(lazy: LazyCheckpoint, out: Path) -> Iterator[Options]:
    """What a run may use."""
    for threads in (1, 2, 3, 8):
        yield {"threads": threads}
    for given in (None, 1, 8):
        yield {"threads": given, "memory": least(lazy, out, given)}
    yield {"memory": "2GB", "reader": "mmap"}


# The same bytes.


@pytest.mark.parametrize("what", MAKES)
def test_the_bytes_do_not_depend_on_what_a_run_may_use(
    sources: Path, tmp_path: Path, what: str
) -> None:
    lazy = MAKES[what](sources)
    save(lazy, tmp_path / "first", threads=1)
    wanted = digests(tmp_path / "first")
    for options in means(lazy, tmp_path / "out"):
        save(lazy, tmp_path / "out", **options)
        assert digests(tmp_path / "out") == wanted, options
    for found in CUTS:
        with pytest.MonkeyPatch.context() as patch:
            _cut(patch, found)
            save(lazy, tmp_path / "out", threads=3)
            assert digests(tmp_path / "out") == wanted, found
            save(lazy, tmp_path / "out", reader="mmap", memory=least(lazy, tmp_path / "out"))
            assert digests(tmp_path / "out") == wanted, found


def test_more_sources_than_a_worker_has_places_for(plain: Path, tmp_path: Path) -> None:
    lazy = opened(plain, "big")
    for _ in range(4):
        lazy = lazy.interpolate(plain / "other", alpha=0.7)
    save(lazy, tmp_path / "first", threads=1)
    one, other = (tiny.written(plain / name) for name in ("big", "other"))
    made = tiny.written(tmp_path / "first")
    for key, weight in one.items():
        expected = 0.7**4 * weight.double() + (1 - 0.7**4) * other[key].double()
        torch.testing.assert_close(made[key].double(), expected, atol=1e-6, rtol=1e-5)
    with pytest.MonkeyPatch.context() as patch:
        _cut(patch, Cut(1024, 300))
        save(lazy, tmp_path / "out", threads=3)
    assert digests(tmp_path / "out") == digests(tmp_path / "first")


def test_dense_maps_give_the_same_numbers(sources: Path, tmp_path: Path) -> None:
    """Products add in an order of their own, which tiles change."""
    lazy = fill(sources)
    save(lazy, tmp_path / "first", threads=1)
    wanted = tiny.written(tmp_path / "first")
    for options in means(lazy, tmp_path / "out"):
        save(lazy, tmp_path / "out", **options)
        assert_close(tiny.written(tmp_path / "out"), wanted)
    for found in CUTS:
        with pytest.MonkeyPatch.context() as patch:
            _cut(patch, found)
            save(lazy, tmp_path / "out", threads=2)
        assert_close(tiny.written(tmp_path / "out"), wanted)


def assert_close(found: State, wanted: State) -> None:
    """Equal, but for a rounding."""
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        assert found[key].dtype == x.dtype
        unit = torch.finfo(x.dtype).eps
        torch.testing.assert_close(found[key], x, rtol=4 * unit, atol=4 * unit)


# Each byte once.


@dataclass
class Traffic:
    """What is read, written and opened, by the files' names."""

    read: dict[Path, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    written: dict[Path, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))
    opened: Counter[Path] = field(default_factory=Counter)
    jobs: list[Job] = field(default_factory=list)

    def watch(self, patch: pytest.MonkeyPatch) -> None:
        names: dict[int, Path] = {}
        open_, close, preadv, pwrite = os.open, os.close, os.preadv, os.pwrite
        compute = Worker.compute

        def opening(path: str | Path, flags: int, mode: int = 0o777) -> int:
            descriptor = open_(path, flags, mode)
            names[descriptor] = Path(path)
            self.opened[Path(path)] += 1
            return descriptor

        def closing(descriptor: int) -> None:
            names.pop(descriptor, None)
            close(descriptor)

        def reading(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
            n = preadv(descriptor, views, offset)
            if descriptor in names:
                self.read[names[descriptor]].append((offset, offset + n))
            return n

        def writing(descriptor: int, view: memoryview, offset: int) -> int:
            n = pwrite(descriptor, view, offset)
            self.written[names[descriptor]].append((offset, offset + n))
            return n

        def computing(worker: Worker, job: Job) -> Iterator[Piece]:
            self.jobs.append(job)
            return compute(worker, job)

        patch.setattr(os, "open", opening)
        patch.setattr(os, "close", closing)
        patch.setattr(os, "preadv", reading)
        patch.setattr(os, "pwrite", writing)
        patch.setattr(Worker, "compute", computing)


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Traffic:
    found = Traffic()
    found.watch(monkeypatch)
    return found


def used(lazy: LazyCheckpoint) -> dict[Path, list[tuple[int, int]]]:
    """Where the tensors are that a plan reads."""
    slots: dict[Path, set[tuple[int, int]]] = defaultdict(set)
    for form in lazy.plan.targets.values():
        for load in form.loads():
            if not graph.is_constant(load):
                assert isinstance(load.source, Checkpoint)
                slot = load.source.slots[load.key]
                name = load.source.file_of[load.key]
                slots[load.source.folder / name].add((slot.start, slot.end))
    return {path: merged(list(found)) for path, found in slots.items()}


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges that follow on each other as one; no byte is in two."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if found:
            assert start >= found[-1][1], f"bytes {start} to {found[-1][1]} are there twice"
        if found and start == found[-1][1]:
            found[-1] = found[-1][0], end
        else:
            found.append((start, end))
    return found


def partial(path: Path) -> Path:
    return path.parent / ".streammap-run" / "files" / path.name


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("found", CUTS, ids=str)
@pytest.mark.parametrize("what", ONCE)
def test_each_byte_is_read_and_written_once(
    plain: Path,
    tmp_path: Path,
    what: str,
    found: Cut,
    threads: int,
    cut: Callable[[Cut], None],
    traffic: Traffic,
) -> None:
    lazy = MAKES[what](plain)
    traffic.opened.clear()  # headers were read
    cut(found)
    report = save(lazy, tmp_path / "out", threads=threads, reader="pread")
    wanted = used(lazy)
    assert {path: merged(ranges) for path, ranges in traffic.read.items()} == wanted
    assert report.nbytes_read == sum(end - start for r in wanted.values() for start, end in r)
    shards = list((tmp_path / "out").glob("model*.safetensors"))
    assert len(shards) == report.n_shards > 1
    for shard in shards:
        assert merged(traffic.written[partial(shard)]) == [(0, shard.stat().st_size)]
        assert traffic.opened[partial(shard)] == 2  # once more for the CRC of its header
    assert all(traffic.opened[path] == 1 for path in wanted)
    longest = max(end - start for ranges in traffic.read.values() for start, end in ranges)
    assert longest <= found.tile


def test_a_layer_is_computed_once_for_all_its_copies(
    plain: Path, tmp_path: Path, cut: Callable[[Cut], None], traffic: Traffic
) -> None:
    lazy = MAKES["grow layers"](plain)
    n_layers = opened(plain, "small").sizes["layer"]
    cut(Cut(1024, 1024))
    save(lazy, tmp_path / "out", threads=2)
    layers = [job for job in traffic.jobs if ".layer." in job.places[0].key]
    assert all(isinstance(job, Compute) for job in layers)
    assert {len(job.places) for job in layers} <= {4, 8, 16}  # where rows are copies too
    specs = lazy.plan.specs.items()
    one = sum(spec.nbytes for key, spec in specs if ".layer.0." in key)
    assert sum(job.nbytes * len(job.places) for job in layers) == 4 * n_layers * one
    distinct = {place for job in traffic.jobs for place in job.places}
    assert len(distinct) == sum(len(job.places) for job in traffic.jobs)


def test_a_copied_layer_is_read_once_and_written_four_times(
    plain: Path, tmp_path: Path, cut: Callable[[Cut], None], traffic: Traffic
) -> None:
    lazy = MAKES["copy layers"](plain)
    cut(Cut(1024, 1024))
    save(lazy, tmp_path / "out", threads=2)
    specs = opened(plain, "small").plan.specs.items()
    layers = [job for job in traffic.jobs if ".layer." in job.places[0].key]
    assert {len(job.places) for job in layers} == {4}
    once = sum(spec.nbytes for key, spec in specs if ".layer." in key)
    assert sum(job.nbytes for job in layers) == once


# Slow disks.


def test_a_slow_disk_changes_no_byte_and_takes_no_buffer(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: Callable[[Cut], None]
) -> None:
    made: list[int] = []

    def counted(nbytes: int) -> Buffer:
        made.append(nbytes)
        return Buffer(nbytes)

    monkeypatch.setattr(worker, "Buffer", counted)
    cut(Cut(4096, 4096))
    lazy = MAKES["decoalesce and blend"](plain)
    save(lazy, tmp_path / "quick", threads=3)
    quick, pwrite = sorted(made), os.pwrite
    made.clear()

    def slow(descriptor: int, view: memoryview, offset: int) -> int:
        time.sleep(0.001)
        return pwrite(descriptor, view, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    save(lazy, tmp_path / "slow", threads=3)
    assert digests(tmp_path / "slow") == digests(tmp_path / "quick")
    assert sorted(made) == quick
    assert len(made) == 3 * (N_PLACES + 2)


# Runs that fail.


class BrokenError(Exception):
    """What no code of the library's raises."""


def failing(call: Callable[..., int], error: BaseException, *, after: int) -> Callable[..., int]:
    """A call that fails once, after it was done some times."""
    times = iter(range(10**9))

    def failed(*args: object) -> int:
        if next(times) == after:
            raise error
        return call(*args)

    return failed


def outside(folder: Path) -> dict[str, bytes]:
    """What is not in the folder of a run that can be gone on with."""
    return {k: v for k, v in tiny.tree(folder).items() if ".streammap-run" not in k}


def threads_of_a_run() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("streammap-")]


@pytest.fixture(params=[1, 4])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Threads of a run; afterwards none of them is there, and torch has as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        yield request.param
        assert threads_of_a_run() == []
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_a_run_leaves_torch_and_no_thread(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    told: list[int] = []
    done: list[tuple[str, int]] = []
    compute = Worker.compute

    def computing(self: Worker, job: Job) -> Iterator[Piece]:
        done.append((threading.current_thread().name, torch.get_num_threads()))
        return compute(self, job)

    monkeypatch.setattr(Worker, "compute", computing)
    MAKES["decoalesce"](plain).save(
        tmp_path / "out",
        fsync=False,
        threads=n_threads,
        progress=lambda event: told.append(torch.get_num_threads()),
    )
    assert set(told) == {1, 3}  # while it runs, and before and afterwards
    assert {n for _, n in done} == {1}
    assert {name for name, _ in done} <= {f"streammap-{i}" for i in range(n_threads)}


def test_what_is_decoded_and_copied_takes_one_thread_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    """Kernels of several threads in each thread of a run take turns, and wait for each other."""
    made = quantised.fp8_blocks({"x.weight": torch.randn(300, 200)}, lambda key: True)
    source = tiny.write(tmp_path / "in", made.stored, {"quantization_config": {}})
    seen: list[int] = []
    fill = Coded.fill

    def filling(self: Coded, *args: Any) -> None:
        seen.append(torch.get_num_threads())
        fill(self, *args)

    monkeypatch.setattr(Coded, "fill", filling)
    streammap.open(source).save(tmp_path / "out", fsync=False, threads=n_threads)
    assert set(seen) == {1}
    tiny.assert_same(tiny.written(tmp_path / "out"), made.meant)


@pytest.mark.parametrize("after", [0, 7])
def test_an_error_in_a_read_ends_the_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int, after: int
) -> None:
    error = OSError(errno.EIO, "Input/output error")
    monkeypatch.setattr(os, "preadv", failing(os.preadv, error, after=after))
    lazy = MAKES["decoalesce and blend"](plain)
    with pytest.raises(CheckpointError, match=r"safetensors: Input/output error at byte \d+"):
        save(lazy, tmp_path / "new" / "out", threads=n_threads, reader="pread")
    assert outside(tmp_path) == {}


@pytest.mark.parametrize("after", [0, 7])
def test_an_error_in_a_write_ends_the_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int, after: int
) -> None:
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, error, after=after))
    with pytest.raises(OutputError, match=r"No space left on device.*: \d+ bytes of the result"):
        save(MAKES["decoalesce"](plain), tmp_path / "new" / "out", threads=n_threads)
    assert outside(tmp_path) == {}


@pytest.mark.parametrize("after", [0, 20])
def test_an_error_in_a_kernel_ends_the_run(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int, after: int
) -> None:
    bind, times = kernels.bind, iter(range(10**9))

    def bound(*args: object, **named: object) -> object:
        if next(times) == after:
            return failing(len, BrokenError("no such kernel"), after=0)
        return bind(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(kernels, "bind", bound)
    with pytest.raises(BrokenError, match="no such kernel"):
        save(MAKES["coalesce"](plain), tmp_path / "new" / "out", threads=n_threads)
    assert outside(tmp_path) == {}


@pytest.mark.parametrize("kind", [Started, Wrote])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), BrokenError("in a listener")])
def test_an_error_in_the_listener_ends_the_run(
    plain: Path, tmp_path: Path, n_threads: int, kind: type[Event], error: BaseException
) -> None:
    def listener(event: Event) -> None:
        if isinstance(event, kind):
            raise error

    with pytest.raises(type(error)):
        MAKES["decoalesce"](plain).save(
            tmp_path / "new" / "out", threads=n_threads, progress=listener
        )
    assert outside(tmp_path) == {}


def test_a_failed_run_leaves_what_was_there(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_threads: int
) -> None:
    save(MAKES["coalesce"](plain), tmp_path / "out")
    before = outside(tmp_path)
    monkeypatch.setattr(os, "pwrite", failing(os.pwrite, OSError(errno.EIO, "Bad"), after=9))
    with pytest.raises(OutputError, match="Bad"):
        save(MAKES["decoalesce"](plain), tmp_path / "out", threads=n_threads)
    assert outside(tmp_path) == before


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("reader", ["pread", "mmap", "auto"])
def test_a_source_that_is_cut_short_during_a_run_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: Callable[[Cut], None],
    reader: Reader,
    threads: int,
) -> None:
    source = tiny.write(tmp_path / "big", tiny.bert(BIG), tiny.bert_config(BIG))
    file, compute, times = source / "model.safetensors", Worker.compute, iter(range(10**9))

    def computing(self: Worker, job: Job) -> Iterator[Piece]:
        if next(times) == 5:
            os.truncate(file, file.stat().st_size // 8)
        return compute(self, job)

    monkeypatch.setattr(Worker, "compute", computing)
    cut(Cut(3000, 3000))
    lazy = streammap.open(source).decoalesce(width=2)
    told = re.escape(str(file)) + r": (ended at byte )?\d+( bytes)?, it had \d+ when it was opened"
    with pytest.raises(TruncatedError, match=told):
        save(lazy, tmp_path / "out", threads=threads, reader=reader)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".streammap-run"]


# What is refused.


@pytest.mark.parametrize("threads", [None, 1, 2, 8])
@pytest.mark.parametrize("what", ["copy", "coalesce", "fill"])
def test_too_little_memory_is_refused_with_a_size_that_is_enough(
    plain: Path, tmp_path: Path, what: str, threads: int | None
) -> None:
    lazy = fill(plain) if what == "fill" else MAKES[what](plain)
    enough = least(lazy, tmp_path / "out", threads)
    assert not (tmp_path / "out").exists()
    report = save(lazy, tmp_path / "out", memory=enough, threads=threads)
    assert report.planned_nbytes <= int(enough.removesuffix("MiB")) * 2**20
    less = f"{int(enough.removesuffix('MiB')) - 1}MiB"
    with pytest.raises(OutputError, match=rf"memory {less[:-3]} MiB: .* {enough[:-3]} MiB"):
        save(lazy, tmp_path / "out", memory=less, threads=threads)


def test_too_little_memory_is_refused_on_the_command_line(plain: Path, tmp_path: Path) -> None:
    command = ("coalesce", plain / "big", tmp_path / "out", "--width", 2)
    said = run(*command, "--memory", "1MiB")
    assert said.exit_code == 1
    assert said.stderr.startswith("error: memory 1 MiB: this run takes at least ")
    enough = said.stderr.split()[-3].removesuffix(",")
    assert f"hint: pass --memory {enough}, or more" in said.stderr
    assert not (tmp_path / "out").exists()
    assert run(*command, "--memory", enough).exit_code == 0


REFUSED: tuple[tuple[Options, str, int], ...] = (
    ({"threads": 0}, "threads is 0, expected 1 or more", 2),
    ({"threads": -1}, "threads is -1, expected 1 or more", 2),
    ({"device": "tpu"}, "device 'tpu': expected auto, cpu, cuda or cuda:N", 1),
    ({"device": "cuda:"}, "device 'cuda:': expected auto, cpu, cuda or cuda:N", 1),
    ({"reader": "x"}, "reader is 'x', expected auto or pread or mmap", 2),
    ({"memory": "much"}, "size 'much'", 1),
)


@pytest.mark.parametrize(("options", "message", "code"), REFUSED)
def test_options_that_make_no_sense_are_refused(
    plain: Path, tmp_path: Path, options: Options, message: str, code: int
) -> None:
    """On the command line too: by click where it knows the values, by the library where not."""
    lazy = MAKES["coalesce"](plain)
    for act in (lambda: lazy.save(tmp_path / "out", **options), lambda: lazy.summary(**options)):
        with pytest.raises(OutputError, match=re.escape(message)):
            act()
    ((name, value),) = options.items()
    for command in (
        ("coalesce", plain / "big", tmp_path / "out"),
        ("plan", "coalesce", plain / "big"),
    ):
        said = run(*command, "--width", 2, f"--{name}", value)
        assert said.exit_code == code
        assert f"--{name}" in said.stderr if code == 2 else message in said.stderr
    assert list(tmp_path.iterdir()) == []


# Torch.


@pytest.mark.parametrize("reader", ["pread", "mmap"])
def test_copies_do_without_torch(plain: Path, tmp_path: Path, reader: str) -> None:
    code = (
        "import sys, streammap;"
        f"lazy = streammap.open({str(plain / 'big')!r});"
        f"lazy.save({str(tmp_path / 'out')!r}, reader={reader!r}, max_shard_size={SHARD!r});"
        "print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "False"
    tiny.assert_same(tiny.written(tmp_path / "out"), tiny.written(plain / "big"))
