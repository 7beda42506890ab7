"""A run that is stopped or killed leaves nothing that looks whole, and its command goes on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import streammap
from streammap.errors import CheckpointError
from tests import tiny
from tests.test_memory import write_gpt2


def command(source: Path, out: Path, *options: str) -> list[str]:
    what = ["decoalesce", str(source), str(out), "--width=2", "--no-fsync", *options]
    return [sys.executable, "-m", "streammap", *what]


def stopped(
    source: Path, out: Path, how: signal.Signals, *, whole: int, options: tuple[str, ...] = ()
) -> subprocess.Popen[str]:
    """A run that got a signal while it was writing, when so many shards were whole."""
    process = subprocess.Popen(command(source, out, *options), stderr=subprocess.PIPE, text=True)
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
    """One tensor of 1.2 GB comes first."""
    write_gpt2(tmp_path / "big", vocab=300_000)
    process = stopped(tmp_path / "big", tmp_path / "new" / "out", how, whole=0)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "interrupted: nothing was written\n"
    assert not (tmp_path / "new").exists()


def test_a_run_that_is_stopped_says_how_to_go_on(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=20_000, layers=12)
    out, options = tmp_path / "out", ("--max-shard-size=20MB", "--threads=1")
    process = stopped(tmp_path / "big", out, signal.SIGTERM, whole=5, options=options)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.startswith("interrupted: kept: ")
    assert said.endswith(
        f"in {out}/.streammap-run; the same command goes on, --restart begins anew\n"
    )
    assert [path.name for path in out.iterdir()] == [".streammap-run"]
    asked = command(tmp_path / "big", out, *options, "--json")
    done = json.loads(subprocess.run(asked, check=True, capture_output=True, text=True).stdout)
    assert done["n_resumed"] > 0
    assert done["nbytes_resumed"] + done["nbytes_written"] > 2 * 10**8
    streammap.open(tmp_path / "big").decoalesce(width=2).save(
        tmp_path / "whole", fsync=False, max_shard_size="20MB"
    )
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")


def test_a_killed_run_may_be_started_again(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=300_000)
    out = tmp_path / "out"
    stopped(tmp_path / "big", out, signal.SIGKILL, whole=0).communicate(timeout=60)
    assert [path.name for path in out.iterdir()] == [".streammap-run"]
    with pytest.raises(CheckpointError, match="no weights"):
        streammap.open(out)
    streammap.open(tmp_path / "big").coalesce(width=2).save(out, fsync=False)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert (out / "config.json").exists()
