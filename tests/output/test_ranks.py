"""Several processes make one result: the same bytes, whatever dies, and no mixture of two."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streammap
from streammap.common.events import Event, Wrote
from streammap.common.ranks import ALONE, Ranks
from streammap.engine import devices, memory
from streammap.errors import OutputError, StreammapError
from streammap.output import work_folder
from streammap.output.ranks import assignment, coordination, heartbeat
from tests.engine.test_devices import made
from tests.support import tiny, typed
from tests.support.typed import ok

SIZES = tiny.Sizes(heads=4, layers=8)
SMALL = "500B"
Outcome = streammap.Report | StreammapError


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that give up on each other sooner."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(heartbeat, "GONE_SECONDS", 0.5)
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES), n_shards=3)


def saved(
    lazy: streammap.LazyCheckpoint,
    out: Path,
    n: int,
    *,
    size: str = SMALL,
    name: str = "a",
    progress: Mapping[int, Callable[[Event], None]] | None = None,
    overwrite: bool = False,
) -> list[Outcome]:
    """What `save` gave on each of n ranks, here threads: a report, or an error."""

    def save(rank: int) -> Outcome:
        here = Ranks(rank, n, launch=name)
        try:
            return lazy.save(
                out,
                max_shard_size=size,
                fsync=False,
                overwrite=overwrite,
                threads=1,
                progress=(progress or {}).get(rank, lambda event: None),
                ranks=here,
            )
        except StreammapError as error:
            return error

    with ThreadPoolExecutor(n) as pool:
        return list(pool.map(save, range(n)))


def reports(outcomes: list[Outcome]) -> list[streammap.Report]:
    for outcome in outcomes:
        if isinstance(outcome, StreammapError):
            raise outcome
    return [outcome for outcome in outcomes if not isinstance(outcome, StreammapError)]


def errors(outcomes: list[Outcome]) -> list[str]:
    assert all(isinstance(outcome, StreammapError) for outcome in outcomes), outcomes
    return [str(outcome) for outcome in outcomes]


def copy_of(work: Path, other: Path) -> None:
    """A copy of a work folder that is being written, as if all were killed at once."""
    other.mkdir(parents=True)
    for path in work.glob("journal*"):  # first: they say no more than what the files hold
        shutil.copy(path, other)
    ignored = shutil.ignore_patterns("*.partial", "journal*")
    shutil.copytree(work, other, ignore=ignored, dirs_exist_ok=True)


def copied(big: Path) -> streammap.LazyCheckpoint:
    """A result of copies only: torch is not needed."""
    return streammap.open(big).decoalesce(depth=2)


@pytest.fixture
def whole(tmp_path: Path, big: Path) -> dict[str, bytes]:
    """What one process makes of `copied`."""
    copied(big).save(tmp_path / "whole", max_shard_size=SMALL, fsync=False)
    return tiny.tree(tmp_path / "whole")


# Dealing.


@given(st.lists(st.integers(0, 10**12), max_size=60), st.integers(1, 20))
def test_shards_are_dealt_by_bytes(sizes: list[int], n: int) -> None:
    owners = assignment.assign_shards(sizes, n)
    assert owners == assignment.assign_shards(sizes, n)
    assert len(owners) == len(sizes)
    assert list(owners) == sorted(owners)  # neighbours go together
    for rank in range(n):
        mine = sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        assert mine * n <= sum(sizes) + max(sizes, default=0) * n
    assert set(owners) <= set(range(n))


@given(st.integers(1, 40), st.integers(1, 20))
def test_equal_shards_are_dealt_evenly(n_shards: int, n: int) -> None:
    owners = assignment.assign_shards([10] * n_shards, n)
    counts = [owners.count(rank) for rank in range(n)]
    assert max(counts) <= -(-n_shards // n)
    assert n_shards < n or min(counts) >= n_shards // n - 1


def test_what_is_one_shard_is_rank_0s() -> None:
    assert assignment.assign_shards([7], 4) == (0,)
    assert assignment.assign_shards([0, 0, 7, 0], 4) == (0, 0, 0, 0)
    assert assignment.assign_shards([], 4) == ()
    assert assignment.assign_shards([0, 0], 4) == (0, 0)
    assert assignment.assign_shards([5, 5, 5, 1], 3) == (0, 1, 2, 2)


# The environment.

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "x",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, ALONE),
        ({"WORLD_SIZE": "4"}, ALONE),
        (TORCHRUN, Ranks(5, 8, 1, 4, "torchrun x a 29500")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Ranks(launch="torchrun - - -")),
        (SRUN, Ranks(5, 7, 1, 2, "slurm 12 0")),
        (SRUN | {"SLURM_CPUS_PER_TASK": "4"}, Ranks(5, 7, 1, 1, "slurm 12 0")),
        (SRUN | TORCHRUN, Ranks(5, 8, 1, 4, "torchrun x a 29500")),
        # A batch script is one process, whatever the job asked for.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "12"}, ALONE),
    ],
)
def test_the_launcher_says_who_is_who(env: Mapping[str, str], expected: Ranks) -> None:
    assert Ranks.here(env) == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"RANK": "x"}, "RANK is 'x', expected a number"),
        ({"RANK": "8"}, "rank 8 of 8: expected 0 to 7"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
        ({"LOCAL_WORLD_SIZE": "0"}, "local rank 1 of 0"),
    ],
)
def test_a_launcher_that_makes_no_sense_is_refused(change: Mapping[str, str], said: str) -> None:
    with pytest.raises(OutputError, match=said):
        Ranks.here({**TORCHRUN, **change})


def test_in_python_ranks_share_only_when_asked(
    tmp_path: Path, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`if rank == 0: save(...)` in a training job must not wait for others."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    report = streammap.coalesce(big, tmp_path / "a", width=2)
    assert (report.rank, report.world_size) == (0, 1)
    ok("coalesce", big, tmp_path / "b", "--width=2", "--no-ranks")
    assert tiny.tree(tmp_path / "a") == tiny.tree(tmp_path / "b")
    monkeypatch.setattr(coordination, "START_SECONDS", 0.1)
    with pytest.raises(OutputError, match=r"rank 0 has not come in 0 s\n.*start all ranks"):
        streammap.coalesce(big, tmp_path / "c", width=2, ranks=True)
    assert not (tmp_path / "c").exists()


def test_one_rank_of_one_is_a_plain_run(tmp_path: Path, big: Path) -> None:
    report = copied(big).save(tmp_path / "out", fsync=False, ranks=Ranks(launch="x"))
    assert report.world_size == 1


def test_processes_of_a_machine_share_its_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "n_processors", lambda: 8)

    def threads(n_sharing: int) -> int:
        return memory.fit([], budget=None, n_workers=None, n_sharing=n_sharing).n_workers

    assert [threads(n) for n in (1, 2, 8)] == [8, 4, 2]


def test_processes_of_a_machine_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "_n_gpus", lambda: 2)
    taken = [devices.choose([], "cuda", local_rank=rank).device for rank in range(3)]
    assert taken == ["cuda:0", "cuda:1", "cuda:0"]
    assert devices.choose([], "cuda:1", local_rank=0).device == "cuda:1"


# Same bytes.


@pytest.mark.parametrize("what", ["coalesce", "decoalesce", "fill", "blend", "depth"])
@pytest.mark.parametrize("n", [2, 5])
def test_ranks_make_what_one_process_makes(tmp_path: Path, big: Path, what: str, n: int) -> None:
    opened = streammap.open(big)
    lazy = copied(big) if what == "depth" else made(opened, what)
    alone = lazy.save(tmp_path / "one", max_shard_size=SMALL, fsync=False)
    first, *others = reports(saved(lazy, tmp_path / "out", n))
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "one")
    assert (first.rank, first.world_size) == (0, n)
    assert first.n_shards == alone.n_shards >= n
    assert first.n_tensors == alone.n_tensors
    assert first.nbytes_written == alone.nbytes_written
    assert first.nbytes_read >= alone.nbytes_read
    assert all(0 < other.nbytes_written < alone.nbytes_written for other in others)
    assert sum(other.n_shards for other in others) < alone.n_shards
    assert f"with {n} ranks" in str(first)
    assert "as rank 1" in str(others[0])


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.pth"])
def test_what_is_one_file_is_made_by_rank_0(tmp_path: Path, big: Path, name: str) -> None:
    lazy = streammap.open(big).coalesce(width=2)
    lazy.save(tmp_path / "one" / name, fsync=False)
    first, second = reports(saved(lazy, tmp_path / "out" / name, 2, size="5GB"))
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "one")
    assert (first.n_shards, second.n_shards, second.n_tensors) == (1, 0, 0)


def test_more_ranks_than_shards(tmp_path: Path, big: Path) -> None:
    lazy = copied(big)
    lazy.save(tmp_path / "one", max_shard_size="20kB", fsync=False)
    found = reports(saved(lazy, tmp_path / "out", 8, size="20kB"))
    assert 1 < found[0].n_shards < 8
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "one")


def test_ranks_may_write_again_to_the_same_place(
    tmp_path: Path, big: Path, whole: dict[str, bytes]
) -> None:
    for overwrite in (False, True, True):
        reports(saved(copied(big), tmp_path / "out", 3, overwrite=overwrite))
        assert tiny.tree(tmp_path / "out") == whole
    assert "already exists" in errors(saved(copied(big), tmp_path / "out", 3))[2]


def test_rank_0_hears_how_far_the_others_are(tmp_path: Path, big: Path) -> None:
    heard: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, Wrote):
            heard.append(event.nbytes)

    lazy = copied(big)
    reports(saved(lazy, tmp_path / "out", 2, progress={0: listen}))
    assert sum(heard) == lazy.plan.nbytes


def test_what_rounding_loses_is_counted_over_all_ranks(tmp_path: Path, big: Path) -> None:
    state = {f"x{i}": torch.tensor([1e30] * i + [1.0] * 200) for i in range(8)}
    lossy = streammap.open(tiny.write(tmp_path / "lossy", state, None))
    lossy.convert(dtype="fp16").save(tmp_path / "one", max_shard_size=SMALL, fsync=False)
    refused = errors(saved(lossy.convert(dtype="fp16", strict=True), tmp_path / "out", 2))
    assert all("--strict: rounding loses" in error for error in refused), refused
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".streammap-run"]
    first, second = reports(saved(lossy.convert(dtype="fp16"), tmp_path / "out", 2, name="b"))
    assert first.n_overflowed == sum(range(8))
    assert 0 <= second.n_overflowed < first.n_overflowed
    assert first.n_resumed == 8
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "one")


# What fails.


def test_a_rank_that_fails_is_named_and_all_ends(
    tmp_path: Path, big: Path, whole: dict[str, bytes]
) -> None:
    def fail(event: Event) -> None:
        if isinstance(event, Wrote):
            raise OutputError("a disk is full", hint="free it")

    found = errors(saved(copied(big), tmp_path / "out", 3, progress={1: fail}))
    assert found == ["rank 1: a disk is full\n  hint: free it"] * 3 or (
        found[0] == found[2] == "rank 1: a disk is full\n  hint: free it"
        and found[1] == "a disk is full\n  hint: free it"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".streammap-run"]
    first, *_ = reports(saved(copied(big), tmp_path / "out", 2))
    assert first.n_resumed > 0
    assert tiny.tree(tmp_path / "out") == whole


@pytest.mark.parametrize("n", [1, 2, 4])
def test_another_number_of_ranks_goes_on(
    tmp_path: Path, big: Path, whole: dict[str, bytes], n: int
) -> None:
    """From what three ranks that were killed leave: here a copy of it, made while they work."""
    out, again = tmp_path / "out", tmp_path / "again"
    work = ".streammap-run"
    all_are_at_work = threading.Barrier(3, lambda: copy_of(out / work, again / work))

    def stop(event: Event) -> None:
        if isinstance(event, Wrote) and event.key and not again.exists():
            all_are_at_work.wait(10)

    reports(saved(copied(big), out, 3, progress=dict.fromkeys(range(3), stop)))
    left = {path.name for path in (again / work).iterdir()}
    assert {"journal-0.jsonl", "journal-1.jsonl", "journal-2.jsonl", "ranks"} <= left
    first, *_ = reports(saved(copied(big), again, n))
    assert first.n_resumed > 0
    assert tiny.tree(again) == whole


def test_ranks_that_want_something_else_are_refused(tmp_path: Path, big: Path) -> None:
    one, other = copied(big), streammap.open(big).decoalesce(depth=4)

    def save(rank: int) -> str:
        with pytest.raises(OutputError) as caught:
            (one, other)[rank].save(tmp_path / "out", ranks=Ranks(rank, 2))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(save, range(2))
    assert "rank 1 was asked for something else than rank 0: " in second
    assert " is now " in second
    assert first == f"rank 1: {second}"
    assert not (tmp_path / "out").exists()


def test_another_layout_is_refused_too(tmp_path: Path, big: Path) -> None:
    def save(rank: int) -> str:
        with pytest.raises(OutputError) as caught:
            copied(big).save(tmp_path / "out", max_shard_size=1000 + rank, ranks=Ranks(rank, 2))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        _, second = pool.map(save, range(2))
    assert "max_shard_size 1000 is now 1001" in second


def test_two_launches_at_once_refuse_each_other(
    tmp_path: Path, big: Path, whole: dict[str, bytes]
) -> None:
    refused: list[str] = []

    def begin_another(event: Event) -> None:
        if not refused:
            refused.extend(errors(saved(copied(big), tmp_path / "out", 2, name="b")))
            with pytest.raises(OutputError, match="is writing a result there"):
                copied(big).save(tmp_path / "out")

    reports(saved(copied(big), tmp_path / "out", 2, progress={0: begin_another}))
    assert f"process {os.getpid()} is writing a result there" in refused[0]
    assert "another launch is writing there" in refused[1]
    assert tiny.tree(tmp_path / "out") == whole


def test_ranks_that_do_not_come_are_named(
    tmp_path: Path, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(coordination, "START_SECONDS", 0.3)
    with pytest.raises(OutputError, match="of 3 ranks these have not come: 1, 2"):
        copied(big).save(tmp_path / "out", ranks=Ranks(0, 3))
    assert not (tmp_path / "out").exists()


# Processes that die.

SCRIPT = """
import os, signal, sys
from pathlib import Path
import streammap
from streammap.output import shard_writer
from streammap.output.ranks import heartbeat
from streammap.common.ranks import Ranks

big, out, dies, flag = sys.argv[1:]
heartbeat.BEAT_SECONDS, heartbeat.GONE_SECONDS = 0.05, 0.5
here, locate, n = Ranks.here(), shard_writer.ShardWriter.locate, [0]

def locate_or_die(self, places):  # called for each part
    n[0] += 1
    if here.rank == int(dies) and n[0] == 30 and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return locate(self, places)

shard_writer.ShardWriter.locate = locate_or_die
lazy = streammap.open(big).decoalesce(depth=2)
lazy.save(out, max_shard_size="500B", fsync=False, threads=1, ranks=True)
"""
"""One rank kills itself in the middle, where `flag` is not there."""


def rank_process(rank: int, n: int, *arguments: object) -> subprocess.Popen[str]:
    env = {**os.environ, "RANK": str(rank), "WORLD_SIZE": str(n)}
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_that_is_killed_is_noticed_and_the_next_run_goes_on(
    tmp_path: Path, big: Path, whole: dict[str, bytes], dies: int
) -> None:
    out = tmp_path / "out"
    arguments = ("-c", SCRIPT, big, out, dies, tmp_path / "flag")
    processes = [rank_process(rank, 2, *arguments) for rank in range(2)]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert processes[dies].returncode == -signal.SIGKILL
    assert processes[1 - dies].returncode == 1
    assert f"{out}: rank {dies} died" in said[1 - dies]
    assert [path.name for path in out.iterdir()] == [".streammap-run"]
    first, *_ = reports(saved(copied(big), out, 3))
    assert first.n_resumed > 0
    assert tiny.tree(out) == whole


def test_no_run_begins_while_a_rank_of_an_earlier_launch_writes(
    tmp_path: Path, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out" / ".streammap-run" / "ranks"
    folder.mkdir(parents=True)
    held = work_folder.take(folder / "2.lock")
    assert held is not None
    monkeypatch.setattr(coordination, "START_SECONDS", 0.1)
    for n in (1, 2):
        with pytest.raises(OutputError, match="rank 2 of an earlier launch is writing there"):
            copied(big).save(tmp_path / "out", ranks=Ranks(0, n))
    os.close(held)
    copied(big).save(tmp_path / "out", fsync=False)


def test_only_rank_0_prints(tmp_path: Path, big: Path, whole: dict[str, bytes]) -> None:
    arguments = ("-m", "streammap", "decoalesce", big, tmp_path / "out", "--depth=2", "--no-fsync")
    options = ("--max-shard-size=500B", "--json")
    processes = [rank_process(rank, 2, *arguments, *options) for rank in range(2)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert json.loads(said[0][0])["world_size"] == 2
    assert said[1] == ("", "")
    assert tiny.tree(tmp_path / "out") == whole


# What docs/clusters.md says.

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    return [block.replace("\\\n", " ") for block in found]


def test_the_page_has_commands_that_are_some() -> None:
    lines = [line for block in blocks("console") + blocks("bash") for line in block.splitlines()]
    commands = [line.partition(" -m streammap ")[2] for line in lines if " -m streammap " in line]
    assert len(commands) == 3
    for line in commands:
        command, rest = typed.command(*shlex.split(line))
        command.make_context(str(command.name), rest)


SRUN_OF_TESTS = """#!/bin/bash
# Starts two tasks, as srun does.
while [[ $1 == --* ]]; do shift; done
export SLURM_JOB_ID=17 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""


@pytest.mark.slow
def test_the_pages_batch_script_runs(tmp_path: Path, big: Path) -> None:
    (script,) = [block for block in blocks("bash") if "#SBATCH" in block]
    script = script.replace("/shared", str(tmp_path)).replace("1GB", "500B")
    for name, content in (("srun", SRUN_OF_TESTS), ("python", f'exec {sys.executable} "$@"')):
        tiny.file(tmp_path / name, f"#!/bin/bash\n{content}").chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
    done = subprocess.run(
        ["bash", "-eu", "-c", script], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "with 2 ranks" in done.stdout
    streammap.open(big).coalesce(width=2).save(tmp_path / "one", max_shard_size=500)
    assert tiny.tree(tmp_path / "small") == tiny.tree(tmp_path / "one")


# With torchrun itself.

DEPTH = ("--depth=2", "--max-shard-size=500B", "--no-fsync")


def torchrun(n: int, *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    options = ["--standalone", f"--nproc-per-node={n}", f"--max-restarts={restarts}"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *map(str, arguments)]
    env = {**os.environ, "PYTHONPATH": str(PAGE.parent.parent)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 8])
def test_torchrun_makes_what_one_process_makes(tmp_path: Path, big: Path, n: int) -> None:
    done = torchrun(n, "-m", "streammap", "decoalesce", big, tmp_path / "out", *DEPTH, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == n
    ok("decoalesce", big, tmp_path / "one", *DEPTH)
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "one")


@pytest.mark.slow
def test_four_processes_do_each_operation_as_one_does(tmp_path: Path, big: Path) -> None:
    small, grown, blend = (tmp_path / name for name in ("small", "grown", "blend"))
    options = ("--max-shard-size=500B", "--no-fsync")
    for out, words in (
        (small, ("coalesce", big, small, "--width=2", "--depth=2")),
        (grown, ("decoalesce", small, grown, "--blend-with", big, "--alpha=0.25")),
        (blend, ("interpolate", grown, big, blend, "--alpha=0.75")),
    ):
        done = torchrun(4, "-m", "streammap", *words, *options)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("with 4 ranks") == done.stdout.count("wrote") == 1
        one = tmp_path / "one" / out.name
        ok(*(one if word == out else word for word in words), *options)
        assert tiny.tree(out) == tiny.tree(one)


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 3])
def test_a_rank_dies_under_torchrun_and_two_ranks_go_on(
    tmp_path: Path, big: Path, whole: dict[str, bytes], dies: int
) -> None:
    script = tiny.file(tmp_path / "script.py", SCRIPT)
    arguments = (script, big, tmp_path / "out", dies, tmp_path / "flag")
    assert torchrun(4, *arguments).returncode != 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".streammap-run"]
    words = ("decoalesce", big, tmp_path / "out", *DEPTH, "--json")
    done = torchrun(2, "-m", "streammap", *words)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n_resumed"] > 0
    assert tiny.tree(tmp_path / "out") == whole


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_an_elastic_restart_goes_on(
    tmp_path: Path, big: Path, whole: dict[str, bytes], dies: int
) -> None:
    script = tiny.file(tmp_path / "script.py", SCRIPT)
    arguments = (script, big, tmp_path / "out", dies, tmp_path / "flag")
    done = torchrun(2, *arguments, restarts=1)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "flag").exists()
    assert tiny.tree(tmp_path / "out") == whole
