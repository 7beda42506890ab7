"""Progress goes where the caller says, and comes from one process only."""

import contextlib
import logging
from pathlib import Path

import pytest
from click.testing import CliRunner

import streammap
from streammap import progress
from streammap.cli.main import main
from streammap.common import ranks
from streammap.common.events import Finished, Listener, Started, Wrote
from tests.support import tiny

SIZES = tiny.Sizes()


def _run(listener: Listener) -> None:
    listener(Started(2, 3000))
    listener(Wrote("a", 1000))
    listener(Wrote("b", 2000))
    listener(Finished())


def test_a_logger_is_told(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("mine")
    with caplog.at_level(logging.INFO):
        _run(streammap.progress.to_logger(logger, seconds=0.0))
    told = [record.getMessage() for record in caplog.records]
    assert told[:3] == [
        "streammap: 2 tensors, 3.00 kB",
        "streammap: 33 %, 1.00 kB, a",
        "streammap: 100 %, 3.00 kB, b",
    ]
    assert told[3].startswith("streammap: done in ")
    assert {record.name for record in caplog.records} == {"mine"}


def test_a_logger_is_told_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        _run(progress.to_logger(logging.getLogger(), level=logging.DEBUG))
    assert [record.levelno for record in caplog.records] == [logging.DEBUG] * 2


def test_only_the_first_process_speaks(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for rank, speaks in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert ranks.rank() == int(rank)
        with caplog.at_level(logging.INFO):
            _run(progress.to_logger(logging.getLogger()))
        _run(progress.ProgressBar("title"))
        assert bool(caplog.records) == speaks
        assert ("title" in capsys.readouterr().err) == speaks
        caplog.clear()
    monkeypatch.setenv("RANK", "none")
    assert ranks.rank() == 0


@pytest.mark.parametrize(
    ("env", "rank"),
    [
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, 3),
        ({"SLURM_PROCID": "3"}, 0),  # a batch script
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "RANK": "1", "WORLD_SIZE": "2"}, 1),
        ({"SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "4"}, 0),  # makes no sense
    ],
)
def test_progress_and_runs_agree_on_the_rank_under_slurm(
    env: dict[str, str],
    rank: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.INFO):
        _run(progress.to_logger(logging.getLogger()))
    assert ranks.rank() == rank
    assert bool(caplog.records) == (rank == 0)
    assert ranks.is_relayed("rank 2: no space left") == (rank > 0)
    with contextlib.suppress(streammap.OutputError):
        assert ranks.Ranks.here().rank == rank


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_command_line_reports_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        words = ["coalesce", str(tmp_path / "big"), str(tmp_path / f"out{rank}"), "--width", "2"]
        found = CliRunner().invoke(main, [*words, *options])
        assert found.exit_code == 0
        assert bool(found.output) == (rank == 0)
