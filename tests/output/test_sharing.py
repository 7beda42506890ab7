"""Checkpoints that threads, processes and other checkpoints use at the same time."""

import contextlib
import errno
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammap
from streammap import CheckpointError
from streammap.common.events import Event, Wrote
from streammap.output import work_folder
from tests.support import tiny

SIZES = tiny.Sizes(layers=2)
KEY = "pooler.dense.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))


def descriptors_of(folder: Path) -> list[str]:
    """The files of a folder that this process has open."""
    paths = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            paths.append(str(link.readlink()))
    return [path for path in paths if Path(path).is_relative_to(folder)]


def test_what_is_read_while_others_close_is_right(tmp_path: Path) -> None:
    """A descriptor that is closed under a reader may by then be another file's."""
    ones, twos = tmp_path / "ones.safetensors", tmp_path / "twos.safetensors"
    save_file({"x": torch.full((300_000,), 1.0)}, ones)
    save_file({"x": torch.full((300_000,), 2.0)}, twos)
    lazy, ends, wrong = streammap.open(ones), threading.Event(), []

    def close_and_open() -> None:
        while not ends.is_set():
            lazy.close()
            for _ in range(4):
                with streammap.open(twos) as other:
                    other.read("x", region=slice(0, 1))

    threads = [threading.Thread(target=close_and_open) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(400):
            got = lazy.read("x")
            if not bool((got == 1.0).all()):
                wrong.append(got)
    finally:
        ends.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_files_stay_open_for_those_who_share_them(source: Path) -> None:
    with streammap.open(source) as big:
        with big.coalesce(width=2) as small:
            small.read(KEY)
            assert descriptors_of(source)
        assert descriptors_of(source), "big is still open"
        kept = big.coalesce(depth=2)
    assert descriptors_of(source), "kept is still open"
    kept.read(KEY)
    kept.close()
    assert not descriptors_of(source)


def test_files_are_closed_with_their_last_user(source: Path) -> None:
    with streammap.open(source).coalesce(width=2) as small:
        small.read(KEY)
    assert not descriptors_of(source)


def in_a_child(work: Callable[[], bool]) -> int:
    """The exit status of a forked child that calls `work`; -1 if it hangs."""
    child = os.fork()
    if not child:
        os._exit(0 if work() else 1)
    for _ in range(100):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        threading.Event().wait(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def test_a_forked_child_reads_whatever_the_threads_of_its_parent_held(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streammap.io import safe_open

    lazy, opens, may_go = streammap.open(source), threading.Event(), threading.Event()
    expected = streammap.open(source).read(KEY)
    open_file = safe_open.open_file

    def slow(path: Path) -> int:
        opens.set()
        may_go.wait(30)
        return open_file(path)

    monkeypatch.setattr(safe_open, "open_file", slow)
    thread = threading.Thread(target=lazy.read, args=(KEY,))
    thread.start()
    opens.wait(10)
    monkeypatch.setattr(safe_open, "open_file", open_file)
    try:
        assert in_a_child(lambda: torch.equal(lazy.read(KEY), expected)) == 0
    finally:
        may_go.set()
        thread.join()


def test_a_forked_child_does_not_keep_the_lock_of_a_run(tmp_path: Path) -> None:
    """Data loaders that are forked meanwhile may live longer than the run."""
    path, reading, writing = tmp_path / "lock", *os.pipe()
    held = work_folder.take(path)
    assert held is not None
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(reading)
    try:
        work_folder.release(held)
        assert work_folder.is_free(path)
    finally:
        os.close(writing)
        os.waitpid(child, 0)


def test_a_forked_child_that_ends_leaves_the_run_alone(tmp_path: Path) -> None:
    with work_folder.WorkFolder(tmp_path / "work") as work:

        def leave() -> bool:
            work.__exit__(None, None, None)
            return True

        assert in_a_child(leave) == 0
        assert work.files.is_dir()
    assert not work.path.exists()


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_what_a_listener_raises_is_raised_as_it_is(
    source: Path, tmp_path: Path, number: int
) -> None:
    error = OSError(number, "the log's own trouble")

    def listener(event: Event) -> None:
        if isinstance(event, Wrote):
            raise error

    with pytest.raises(OSError, match="the log's own trouble") as caught:
        streammap.coalesce(source, tmp_path / "out", width=2, progress=listener, fsync=False)
    assert caught.value is error
    assert any(note.startswith("kept: ") for note in error.__notes__)
    assert streammap.coalesce(source, tmp_path / "out", width=2).n_resumed


def read(lazy: streammap.LazyCheckpoint, key: str) -> list[float]:
    return lazy.read(key).flatten().tolist()


def test_a_plan_goes_to_a_process_of_its_own(source: Path) -> None:
    big = streammap.open(source)
    grown = big.coalesce(width=2).decoalesce().interpolate(big, alpha=0.5)
    grown.read(KEY)  # its files are open
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(read, (grown, KEY)) == read(grown, KEY)


def test_a_copied_plan_is_the_same(source: Path, tmp_path: Path) -> None:
    small = streammap.open(source).coalesce(width=2)
    again = pickle.loads(pickle.dumps(small))
    assert (again.promise, again.sizes, again.config) == (small.promise, small.sizes, small.config)
    again.save(tmp_path / "again")
    small.save(tmp_path / "small")
    assert tiny.tree(tmp_path / "again") == tiny.tree(tmp_path / "small")
    file = source / "model.safetensors"
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="when it was opened"):
        pickle.loads(pickle.dumps(small)).read(KEY)
