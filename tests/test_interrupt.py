"""A stopped run leaves nothing behind; a killed one leaves nothing that looks whole."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_memory import write_gpt2


def stopped(source: Path, out: Path, how: signal.Signals) -> subprocess.Popen[str]:
    """A run that got a signal while it was writing."""
    command = [sys.executable, "-m", "streammap", "decoalesce", str(source), str(out), "--width=2"]
    process = subprocess.Popen([*command, "--no-fsync"], stderr=subprocess.PIPE, text=True)
    partial = out / ".model.safetensors.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size > 10**6):
        time.sleep(0.01)
    process.send_signal(how)
    return process


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_leaves_nothing(tmp_path: Path, how: signal.Signals) -> None:
    write_gpt2(tmp_path / "big", vocab=300_000)
    process = stopped(tmp_path / "big", tmp_path / "new" / "out", how)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == "interrupted: nothing was written\n"
    assert not (tmp_path / "new").exists()


def test_a_killed_run_may_be_started_again(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=300_000)
    out = tmp_path / "out"
    stopped(tmp_path / "big", out, signal.SIGKILL).communicate(timeout=60)
    assert [path.name for path in out.iterdir()] == [".model.safetensors.partial"]
    (out / ".model-00007-of-00009.safetensors.partial").touch()
    command = [sys.executable, "-m", "streammap", "coalesce", str(tmp_path / "big"), str(out)]
    subprocess.run([*command, "--width=2", "--quiet"], check=True)
    assert not [path for path in out.iterdir() if path.name.endswith(".partial")]
    assert (out / "config.json").exists()
