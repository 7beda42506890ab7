"""Many calls in one process, several at once, and calls that end in an error: nothing is left."""

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import streammap
from streammap.common.events import Event, Wrote
from streammap.errors import OutputError
from streammap.io.storage import disk
from streammap.testing import faults
from tests.support import tiny

SIZES = tiny.Sizes(layers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return tiny.write(folder / "big", tiny.bert(SIZES), tiny.bert_config(SIZES), n_shards=3)


def descriptors() -> set[str]:
    """What this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  names, not paths
        with contextlib.suppress(OSError):
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")  # noqa: PTH115
    return {one for one in found if "/proc/" not in one}


def n_mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


def resident() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


def call(source: Path, out: Path, i: int) -> None:
    """One of the things that a launcher does."""
    match i % 4:
        case 0:
            streammap.coalesce(source, out, width=2, overwrite=True)
        case 1:
            with streammap.open(source) as big:
                big.read("pooler.dense.weight")
                big.interpolate(big, alpha=0.5).save(
                    out, overwrite=True, reader="mmap", fsync=False
                )
        case 2:
            streammap.open(source).decoalesce(width=2).save(
                out.with_suffix(".pth"), overwrite=True, fsync=False
            )
        case _:
            wrong = faults.fail_at(20, kinds=frozenset(("write",)))
            with disk.using(wrong), pytest.raises(OutputError):
                streammap.coalesce(source, out, depth=2, max_shard_size=500, overwrite=True)
            streammap.coalesce(source, out, depth=2, max_shard_size=500, overwrite=True)


def many(source: Path, out: Path, n: int) -> None:
    for i in range(12):
        call(source, out, i)
    gc.collect()
    opened, mapped, threads, before = (
        descriptors(),
        n_mappings(),
        threading.active_count(),
        resident(),
    )
    for i in range(n):
        call(source, out, i)
    gc.collect()
    assert descriptors() == opened
    assert threading.active_count() == threads
    assert n_mappings() - mapped < 20
    assert resident() - before < 10 * 2**20 + 10_000 * n


def test_many_calls_leave_nothing(source: Path, tmp_path: Path) -> None:
    many(source, tmp_path / "out", 40)


@pytest.mark.slow
def test_a_thousand_calls_leave_nothing(source: Path, tmp_path: Path) -> None:
    many(source, tmp_path / "out", 1000)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """Afterwards no more is open than before, no thread goes on, torch has its threads."""
    gc.collect()
    opened, threads = descriptors(), threading.active_count()
    n = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    gc.collect()
    assert descriptors() <= opened
    assert threading.active_count() == threads
    assert torch.get_num_threads() == 3
    torch.set_num_threads(n)


@pytest.mark.usefixtures("nothing_left")
def test_calls_at_once_do_not_meet(source: Path, tmp_path: Path) -> None:
    """On one checkpoint too, which opens its files once for all of them."""
    shared = streammap.open(source)

    def one(i: int) -> dict[str, bytes]:
        lazy = shared if i % 2 else streammap.open(source)
        lazy.coalesce(width=2).save(tmp_path / str(i), threads=2, fsync=False)
        return tiny.tree(tmp_path / str(i))

    with ThreadPoolExecutor(6) as pool:
        first, *others = pool.map(one, range(12))
    assert all(found == first for found in others)
    shared.close()


@pytest.mark.usefixtures("nothing_left")
def test_runs_at_once_on_one_output_are_one_and_refusals(source: Path, tmp_path: Path) -> None:
    def one(_: int) -> str:
        try:
            streammap.coalesce(source, tmp_path / "out", width=2)
        except OutputError as error:
            return error.message
        return ""

    with ThreadPoolExecutor(6) as pool:
        said = sorted(pool.map(one, range(6)))
    assert said[0] == ""
    assert all("is writing a result there" in s or "already exists" in s for s in said[1:])
    assert not (tmp_path / "out" / ".streammap-run").exists()


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_a_listener_leaves_no_lock(
    source: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def listener(event: Event) -> None:
        if isinstance(event, Wrote):
            raise error

    with pytest.raises(error):
        streammap.coalesce(source, tmp_path / "out", width=2, progress=listener)
    gc.collect()
    assert streammap.coalesce(source, tmp_path / "out", width=2).n_resumed


@pytest.mark.usefixtures("nothing_left")
def test_a_checkpoint_that_is_forgotten_closes_its_files(source: Path) -> None:
    lazy = streammap.open(source)
    before = descriptors()
    weight = lazy.read("pooler.dense.weight")
    assert descriptors() != before
    del lazy
    gc.collect()
    assert descriptors() == before
    assert weight.isfinite().all()


@pytest.mark.usefixtures("nothing_left")
def test_a_closed_checkpoint_opens_its_files_again(source: Path) -> None:
    with streammap.open(source) as lazy:
        before = lazy.read("pooler.dense.weight")
    assert lazy.read("pooler.dense.weight").equal(before)
    lazy.close()
    lazy.close()
