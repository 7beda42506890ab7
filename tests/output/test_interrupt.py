"""A run that is stopped or killed leaves nothing that looks whole, and its command goes on."""

import filecmp
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import streammap
from streammap.errors import CheckpointError
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header
from tests.engine.test_memory import write_gpt2


def stopped(
    asked: list[str], out: Path, how: signal.Signals, *, whole: int = 0
) -> subprocess.Popen[str]:
    """A run that got a signal while it was writing, when so many shards were whole."""
    command = [sys.executable, "-m", "streammap", *asked]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    files = out / ".streammap-run" / "files"
    while process.poll() is None:
        sizes = [file.stat().st_size for file in files.glob("*.safetensors")]
        if len(sizes) > whole and max(sizes) > 10**6:
            break
        time.sleep(0.005)
    process.send_signal(how)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_at_once_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    """Of its one tensor only a part is there."""
    (tmp_path / "big").mkdir()
    head = safetensors_header.encode([("x", TensorSpec("F32", (300_000_000,)))], {})
    with (tmp_path / "big" / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 1_200_000_000)
    out = tmp_path / "new" / "out"
    asked = ["interpolate", tmp_path / "big", tmp_path / "big", out, "--alpha=0.5", "--no-fsync"]
    process = stopped(list(map(str, asked)), out, how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "interrupted: nothing was written\n"
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=5000)
    out = tmp_path / "out"
    asked = ["decoalesce", str(tmp_path / "big"), str(out), "--width=2", "--no-fsync"]
    asked += ["--max-shard-size=5MB", "--threads=1"]
    process = stopped(asked, out, signal.SIGTERM, whole=5)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    goes_on = "the same command resumes, --restart starts over"
    assert said.startswith("interrupted: kept: ")
    assert said.endswith(f"in {out}/.streammap-run; {goes_on}\n")
    assert [path.name for path in out.iterdir()] == [".streammap-run"]
    with pytest.raises(CheckpointError, match="no weights"):
        streammap.open(out)
    lazy = streammap.open(tmp_path / "big").decoalesce(width=2)
    done = lazy.save(out, fsync=False, max_shard_size="5MB")
    assert done.n_resumed > 0
    assert done.nbytes_resumed + done.nbytes_written > 10**8
    lazy.save(tmp_path / "whole", fsync=False, max_shard_size="5MB")
    for file in (tmp_path / "whole").iterdir():
        assert filecmp.cmp(file, out / file.name, shallow=False)
    assert len(list(out.iterdir())) == len(list((tmp_path / "whole").iterdir()))


def test_a_run_that_was_killed_before_anything_was_durable_is_no_obstacle(tmp_path: Path) -> None:
    """For whatever comes next: there is nothing to lose."""
    write_gpt2(tmp_path / "big", vocab=300_000)
    out = tmp_path / "out"
    asked = ["decoalesce", str(tmp_path / "big"), str(out), "--width=2", "--no-fsync"]
    stopped(asked, out, signal.SIGKILL).communicate(timeout=60)
    assert [path.name for path in out.iterdir()] == [".streammap-run"]
    write_gpt2(tmp_path / "little", vocab=100)
    streammap.open(tmp_path / "little").coalesce(width=2).save(out, fsync=False)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert (out / "config.json").exists()
