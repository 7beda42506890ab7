"""Killed at any point, the same command goes on, and the result is bit for bit the same."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import streammap
from streammap.api import LazyCheckpoint
from streammap.common.events import Finished
from streammap.errors import CheckpointError, OutputError, StreammapError
from streammap.io.storage import disk
from streammap.output import shard_writer
from streammap.testing import faults
from tests.support import tiny
from tests.support.tiny import Sizes
from tests.support.typed import ok, run

SIZES = Sizes(heads=4, layers=2)
SHARD = 600
WORK = ".streammap-run"
MAKES: dict[str, Callable[[Path], LazyCheckpoint]] = {
    "copy": lambda f: streammap.open(f / "big"),
    "coalesce": lambda f: streammap.open(f / "big").coalesce(width=2),
    "decoalesce": lambda f: streammap.open(f / "small").decoalesce(),
    "interpolate": lambda f: streammap.open(f / "big").interpolate(f / "other", alpha=0.3),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    config = tiny.bert_config(SIZES)
    tiny.write(folder / "big", tiny.bert(SIZES), config)
    (folder / "big" / "vocab.txt").write_text("[PAD]\n")
    (folder / "big" / "1_Pooling").mkdir()
    (folder / "big" / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    tiny.write(folder / "other", tiny.bert(SIZES, seed=1), config)
    streammap.open(folder / "big").coalesce(width=2, depth=2).save(folder / "small", fsync=False)
    return folder


def save(
    lazy: LazyCheckpoint, out: Path, *, overwrite: bool = False, restart: bool = False
) -> streammap.Report:
    return lazy.save(out, max_shard_size=SHARD, threads=1, overwrite=overwrite, restart=restart)


def outside(folder: Path) -> dict[str, bytes]:
    """Files that are not in a work folder."""
    return {k: v for k, v in tiny.tree(folder).items() if WORK not in k}


def looks_whole(out: Path) -> dict[str, bytes] | None:
    """What somebody finds who opens an output; None where it is refused."""
    try:
        with streammap.open(out) as found:
            return {key: tiny.bits(tensor) for key, tensor in found.tensors()}
    except CheckpointError:
        return None


# Kills.


def points(n: int, most: int) -> list[int]:
    """All points of a run, or some spread over it, the last ones among them."""
    if n <= most:
        return list(range(n))
    return sorted({i * n // most for i in range(most)} | {n - 2, n - 1})


def old_result(sources: Path, out: Path, name: str) -> None:
    """What another command left in a place."""
    other = MAKES["coalesce" if name != "coalesce" else "copy"](sources)
    other.save(out, max_shard_size=900, fsync=False)
    (out / "notes.txt").write_text("mine")


def killed_everywhere(
    sources: Path, tmp_path: Path, name: str, *, overwrite: bool, most: int
) -> int:
    make = MAKES[name]
    out = tmp_path / "out"

    def begin() -> None:
        shutil.rmtree(out, ignore_errors=True)
        if overwrite:
            old_result(sources, out, name)

    begin()
    before = looks_whole(out) if overwrite else None
    with faults.counted() as count:
        save(make(sources), out, overwrite=overwrite)
    whole, wanted = tiny.tree(out), looks_whole(out)
    n_resumed = 0
    chosen = points(count.count, most)
    for n in chosen:
        begin()
        assert faults.killed(lambda: save(make(sources), out, overwrite=overwrite), n), n
        found = looks_whole(out)
        assert found in (before, None, wanted), n
        if found == wanted:
            assert outside(out) == whole, n
        with faults.counted():
            report = save(make(sources), out, overwrite=overwrite)
        assert tiny.tree(out) == whole, n
        n_resumed += report.n_resumed > 0
    assert n_resumed > len(chosen) // 2
    return len(chosen)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("name", MAKES)
def test_a_killed_run_goes_on(sources: Path, tmp_path: Path, name: str, overwrite: bool) -> None:
    killed_everywhere(sources, tmp_path, name, overwrite=overwrite, most=5)


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("name", MAKES)
def test_a_run_killed_at_any_point_goes_on(
    sources: Path, tmp_path: Path, name: str, overwrite: bool
) -> None:
    n = killed_everywhere(sources, tmp_path, name, overwrite=overwrite, most=120)
    assert n >= 70  # twice, new and overwritten


@pytest.mark.parametrize("name", ["out.safetensors", "out.pth"])
def test_a_killed_run_of_one_file_goes_on(
    sources: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_writer, "JOURNAL_SECONDS", 0.0)
    out, make = tmp_path / name, MAKES["decoalesce"]
    for overwrite in (False, True):
        with faults.counted() as count:
            save(make(sources), out, overwrite=True)
        whole = tiny.tree(tmp_path)
        for n in points(count.count, 4):
            for path in tmp_path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            before = None
            if overwrite:
                save(MAKES["coalesce"](sources), out)
                before = looks_whole(out)
            if not faults.killed(lambda: save(make(sources), out, overwrite=True), n):
                continue  # the clock writes more or fewer lines
            assert outside(tmp_path) == whole or looks_whole(out) in (before, None)
            with faults.counted():
                save(make(sources), out, overwrite=overwrite)
            assert tiny.tree(tmp_path) == whole


def process(sources: Path, out: Path) -> subprocess.Popen[bytes]:
    command = ["decoalesce", str(sources / "small"), str(out), f"--max-shard-size={SHARD}B"]
    return subprocess.Popen([sys.executable, "-m", "streammap", *command, "--quiet"])


@pytest.mark.slow
def test_a_process_killed_at_any_time_goes_on(sources: Path, tmp_path: Path) -> None:
    save(MAKES["decoalesce"](sources), tmp_path / "whole")
    source, n_done, out = Random(0), 0, tmp_path / "out"
    while n_done < 10:
        started = process(sources, out)
        while not (out / WORK).exists() and started.poll() is None:
            time.sleep(0.002)
        time.sleep(source.random() * 0.1)
        started.kill()
        started.wait()
        if source.random() < 0.5:
            save(MAKES["decoalesce"](sources), out, overwrite=True)
            assert tiny.tree(out) == tiny.tree(tmp_path / "whole")
            shutil.rmtree(out)
            n_done += 1


# What is taken over.


def stop(lazy: LazyCheckpoint, out: Path, n: int = 30, code: int = errno.EIO) -> StreammapError:
    """Let a run fail at its n-th write."""
    wrong = faults.fail_at(n, code, kinds=frozenset(("write",)))
    with disk.using(wrong), pytest.raises(OutputError) as caught:
        save(lazy, out)
    assert (out / WORK / "journal.jsonl").exists()
    return caught.value


def journalled(out: Path) -> dict[str, str]:
    """What the journal says is durable."""
    lines = (out / WORK / "journal.jsonl").read_text().splitlines()
    found: dict[str, str] = {}
    for line in lines[1:]:
        found |= json.loads(line)["tensors"]
    return found


def test_what_is_durable_is_not_done_again(sources: Path, tmp_path: Path) -> None:
    lazy, out = MAKES["decoalesce"](sources), tmp_path / "out"
    whole = save(lazy, tmp_path / "whole")
    assert (whole.n_resumed, whole.nbytes_resumed) == (0, 0)
    stop(lazy, out)
    kept = journalled(out)
    assert len(kept) > 5
    written: list[Path] = []
    with disk.using(faults.CountingDisk(lambda *told: written.append(told[2]))):
        report = save(lazy, out)
    assert report.n_resumed == len(kept)
    assert report.nbytes_resumed == sum(lazy.spec(key).nbytes for key in kept)
    assert report.nbytes_resumed + report.nbytes_written == whole.nbytes_written
    record = json.loads((out / "streammap.json").read_text())
    assert {key: record["tensors"][key]["crc32"] for key in kept} == kept
    done = {record["tensors"][key]["file"] for key in kept}
    shards = [path for path in written if WORK in str(path) and path.name in done]
    by_file = {
        name: [k for k, t in record["tensors"].items() if t["file"] == name] for name in done
    }
    ended = {name for name, keys in by_file.items() if set(keys) <= kept.keys()}
    assert ended
    assert not {path.name for path in shards} & ended
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")


def test_a_run_is_told_what_was_taken_over(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stop(streammap.open(sources / "big").coalesce(width=2), out)
    n = len(journalled(out))
    command = ("coalesce", sources / "big", out, "--width=2", f"--max-shard-size={SHARD}B")
    said = ok(*command)
    assert re.search(rf"^resumed    {n} tensors, [\d.]+ kB, were written$", said, re.MULTILINE)
    assert "resumed" not in ok(*command, "--overwrite")


def test_means_may_change_between_runs(sources: Path, tmp_path: Path) -> None:
    lazy, out = MAKES["interpolate"](sources), tmp_path / "out"
    save(lazy, tmp_path / "whole")
    stop(lazy, out)
    lazy.save(out, max_shard_size=SHARD, threads=3, memory="64MiB", reader="mmap", fsync=False)
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")


def test_another_request_is_refused_and_told_what_differs(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    big = streammap.open(sources / "big")
    stop(big.interpolate(sources / "other", alpha=0.25), out)
    before = tiny.tree(out)
    others: list[tuple[LazyCheckpoint, str]] = [
        (big.interpolate(sources / "other", alpha=0.5), "steps 0 alpha 0.25 is now 0.5"),
        (big, r"sources 1 {\"name\": \"other\".* is now nothing; steps 0 {.*} is now nothing"),
    ]
    for lazy, told in others:
        with pytest.raises(
            OutputError, match=rf"streammap-run: an unfinished run .*: .*{told}"
        ) as caught:
            save(lazy, out)
        assert caught.value.hint == "run the earlier command again, or pass --restart to start over"
        assert tiny.tree(out) == before
    with pytest.raises(OutputError, match=r"max_shard_size 600 is now 700"):
        big.interpolate(sources / "other", alpha=0.25).save(out, max_shard_size=700)
    save(big, out, restart=True)
    tiny.assert_same(tiny.written(out), tiny.written(sources / "big"))
    assert not (out / WORK).exists()


def test_a_changed_source_is_refused(sources: Path, tmp_path: Path) -> None:
    source = shutil.copytree(sources / "big", tmp_path / "big")
    out, file = tmp_path / "out", source / "model.safetensors"
    stop(streammap.open(source), out)
    os.utime(file, ns=(1, 1))
    with pytest.raises(
        OutputError, match=r"files model\.safetensors mtime_ns \d+ is now 1\n.*--restart"
    ):
        save(streammap.open(source), out)
    said = run("interpolate", source, source, out, "--alpha=0", "--restart")
    assert (said.exit_code, said.stderr) == (0, "")


def test_a_source_that_changed_meanwhile_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    """What is written may be of both."""
    source = shutil.copytree(sources / "big", tmp_path / "big")
    file, times = source / "model.safetensors", iter(range(10**6))

    def before(*_: object) -> None:
        if next(times) == 30:
            os.utime(file, ns=(1, 1))

    with (
        disk.using(faults.CountingDisk(before)),
        pytest.raises(CheckpointError, match="written to at 1"),
    ):
        save(streammap.open(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Two runs.


def test_a_second_run_is_refused(sources: Path, tmp_path: Path) -> None:
    lazy, out = MAKES["decoalesce"](sources), tmp_path / "out"
    refused: list[str] = []

    def second(event: object) -> None:
        if not isinstance(event, Finished):
            with pytest.raises(OutputError) as caught:
                save(MAKES["copy"](sources), out, overwrite=True, restart=True)
            refused.append(str(caught.value))

    lazy.save(out, progress=second)
    told = f"{out}: process {os.getpid()} is writing a result there"
    assert set(refused) == {f"{told}\n  hint: wait until it is done, or stop it"}
    assert looks_whole(out) is not None


def test_a_result_that_another_run_finished_meanwhile_is_kept(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The place was free when it was looked at first."""
    from streammap.output import transaction
    from streammap.output.work_folder import WorkFolder

    lazy, out = MAKES["decoalesce"](sources), tmp_path / "out"

    def late(path: Path) -> WorkFolder:
        monkeypatch.undo()
        save(lazy, out)
        return WorkFolder(path)

    monkeypatch.setattr(transaction, "WorkFolder", late)
    with pytest.raises(OutputError, match="already exists"):
        save(MAKES["copy"](sources), out)
    assert looks_whole(out) is not None
    assert not (out / WORK).exists()


# Full disks.


def test_a_full_disk_says_what_is_missing_and_how_to_go_on(sources: Path, tmp_path: Path) -> None:
    lazy, out = MAKES["decoalesce"](sources), tmp_path / "out"
    save(lazy, tmp_path / "whole")
    with disk.using(faults.FullDisk(9000)), pytest.raises(OutputError) as caught:
        save(lazy, out)
    assert re.search(
        r"out/model-\d+-of-\d+\.safetensors: No space left on device at byte \d+: "
        rf"\d+ bytes of the result are not written\n  hint: free disk space and run the same "
        rf"command again; or remove {re.escape(str(out / WORK))} to get the space back",
        str(caught.value),
    )
    (note,) = caught.value.__notes__
    assert note.startswith(f"kept: {len(journalled(out))} of ")
    assert outside(out) == {}
    save(lazy, out)
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")


def test_what_is_written_is_taken_off_what_is_needed(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lazy, out = MAKES["copy"](sources), tmp_path / "out"
    stop(lazy, out)
    there = sum(file.stat().st_size for file in (out / WORK / "files").iterdir())
    needed = sum(spec.nbytes for spec in lazy.plan.specs.values())
    real = shutil.disk_usage(tmp_path)
    for free in (100, needed - there + 10_000):
        usage = real._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
        if free == 100:
            with pytest.raises(
                OutputError, match=r"\([\d.]+ kB of it are written\), 100 B are free"
            ):
                save(lazy, out)
        else:
            assert save(lazy, out).n_resumed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 kB."""
    place = tmp_path / "small"
    place.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    try:
        done = subprocess.run(asked, check=False, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"no mount: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_file_system_that_fills_up(sources: Path, small_disk: Path, tmp_path: Path) -> None:
    big = Sizes(heads=4, layers=8, vocab=400)
    source = tiny.write(tmp_path / "big", tiny.bert(big), tiny.bert_config(big))
    lazy, out = streammap.open(source).decoalesce(width=2), small_disk / "out"
    lazy.save(tmp_path / "whole", max_shard_size="8kB", fsync=False)
    ballast = small_disk / "ballast"

    def fill(event: object) -> None:
        if type(event).__name__ == "Started" and not ballast.exists():
            ballast.write_bytes(bytes(240_000))

    with pytest.raises(OutputError, match=r"No space left on device.*bytes of the result are not"):
        lazy.save(out, max_shard_size="8kB", progress=fill)
    assert outside(out) == {}
    assert looks_whole(out) is None
    with pytest.raises(OutputError, match="B are free"):
        lazy.save(out, max_shard_size="8kB")
    ballast.unlink()
    assert lazy.save(out, max_shard_size="8kB").n_resumed
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")


# Power.


@pytest.mark.parametrize("seconds", [0.0, 1e9])
def test_what_is_journalled_survives_a_power_cut(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """The disk loses all that was not synced, at any point; with fsync nothing of it is missed."""
    monkeypatch.setattr(shard_writer, "JOURNAL_SECONDS", seconds)
    lazy, n_resumed = MAKES["decoalesce"](sources), 0
    save(lazy, tmp_path / "whole")
    for n in range(3, 90, 12):
        out, power = tmp_path / f"out{n}", faults.PowerCut()
        wrong = faults.fail_at(n, kinds=frozenset(("write", "rename")), around=power)
        with disk.using(wrong), pytest.raises(OutputError):
            save(lazy, out)
        if out.exists():
            power.cut(out)
        n_resumed += save(lazy, out).n_resumed
        assert tiny.tree(out) == tiny.tree(tmp_path / "whole"), n
    assert n_resumed


# Determinism.


def test_the_same_bytes_whatever_the_seed_of_hashes(sources: Path, tmp_path: Path) -> None:
    save(MAKES["decoalesce"](sources), tmp_path / "whole")
    code = (
        "import sys, streammap;"
        f"lazy = streammap.open({str(sources / 'small')!r}).decoalesce();"
        f"lazy.save(sys.argv[1], max_shard_size={SHARD}, threads=3)"
    )
    asked = [sys.executable, "-c", code, str(tmp_path / "out")]
    subprocess.run(asked, check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "whole")
