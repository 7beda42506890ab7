"""Results, records and unfinished runs of version 0.1 (tests/data/v0.1) are understood."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import streammap
from streammap.api import LazyCheckpoint
from streammap.operators import request_json
from streammap.output import transaction
from tests.support import tiny
from tests.support.typed import ok

DATA = Path(__file__).parents[1] / "data" / "v0.1"
WORK = ".streammap-run"
RESULTS = ("small", "grown", "blend", "grouped", "one.safetensors")
WRITTEN = 1_700_000_000
"""When the sources were, in seconds: journals and digests name it."""
MAKES: dict[str, Callable[[LazyCheckpoint], LazyCheckpoint]] = {
    "small": lambda big: big.coalesce(width=2, depth=2),
    "grown": lambda big: (
        streammap.open("small").decoalesce(target="big").interpolate(big, alpha=0.25)
    ),
    "blend": lambda big: big.interpolate("other", alpha=0.5),
    "grouped": lambda big: big.coalesce(
        scheme={"width_scheme": [[0, 1]], "depth_scheme": [[1, 0]]}
    ),
    "one.safetensors": lambda big: big.coalesce(width=2),
}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all, with the sources' times; relative paths lead there."""
    folder = shutil.copytree(DATA, tmp_path / "old")
    for path in (path for path in folder.rglob("*") if path.is_file()):
        os.utime(path, (WRITTEN, WRITTEN))
    monkeypatch.chdir(folder)
    return folder


def record_of(name: str) -> Path:
    path = Path(name)
    return path.with_suffix(".streammap.json") if path.suffix else path / "streammap.json"


def moved(folder: Path, record: Path) -> list[str]:
    """Where the record's sources are now."""
    text = record.read_text()
    names = [name for name in ("big", "other", "small") if f'"/models/{name}"' in text]
    assert names
    return [f"--source=/models/{name}={folder / name}" for name in names]


@pytest.mark.parametrize("name", RESULTS)
def test_verify_accepts_it(old: Path, name: str) -> None:
    said = ok("verify", old / name, *moved(old, record_of(name)), "--recompute", 5, "--json")
    found = json.loads(said)
    assert found["ok"]
    assert found["findings"] == []
    expected = ["structure", "record", "plan", "class", "crc32", "finite", "tiles"]
    if name.endswith(".safetensors"):  # a file alone has no config.json, and so no class
        expected.remove("class")
    assert found["checks"] == expected


@pytest.mark.parametrize("name", RESULTS)
def test_apply_makes_it_again(old: Path, name: str) -> None:
    again = f"again{Path(name).suffix}"
    ok("apply", record_of(name), again, *moved(old, record_of(name)))
    tiny.assert_same(tiny.opened(old / again), tiny.opened(old / name))


@pytest.mark.parametrize("name", RESULTS)
def test_the_record_of_the_same_call_has_the_same_form(old: Path, name: str) -> None:
    """But for the words in it that are for people."""
    result = f"new{Path(name).suffix}"
    MAKES[name](streammap.open("big")).save(result)
    before, now = (json.loads(record_of(path).read_text()) for path in (name, result))
    text = json.dumps(now["request"]).replace(str(old), "/models")
    assert unpacked(json.loads(text)) == unpacked(before["request"])
    assert now["digest"] == before["digest"] or name == "grown"  # small is another one by its time
    assert now.pop("crc32").keys() == now["files"].keys()
    assert list(now) == [*before, "own_crc32"]
    del now["own_crc32"]
    for form in (now, before):  # map files have checksums, and are of other sizes
        form["files"] = {n: None if ".map." in n else size for n, size in form["files"].items()}
    for words in ("streammap", "reason", "notes", "request", "digest"):
        before.pop(words)
        now.pop(words)
    if name == "one.safetensors":
        before["files"] = {path.replace("one.", "new."): n for path, n in before["files"].items()}
        for tensor in before["tensors"].values():
            tensor["file"] = "new.safetensors"
    assert now == before


def unpacked(request: object) -> object:
    """A request with the digests of its maps in the place of their packed files."""
    if not isinstance(request, dict):
        return request
    digests = {}
    if request.get("maps"):
        call = request_json.parse({"operator": "open", "path": "x", "maps": request["maps"]})
        levels = call.options["maps"]
        assert isinstance(levels, tuple)
        digests = {"maps": [level.digest for level in levels]}
    return {name: unpacked(value) for name, value in request.items()} | digests


@pytest.mark.parametrize("name", ["stopped", "marked"])
def test_an_unfinished_run_is_resumed(
    old: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same version: one that computes otherwise is refused."""
    monkeypatch.setattr(transaction, "VERSION", "0.1.0")
    lazy = streammap.open("big").coalesce(depth=2)
    with pytest.raises(streammap.OutputError, match="max_shard_size 300 is now 400"):
        lazy.save(name, max_shard_size=400)
    report = lazy.save(name, max_shard_size=300)
    assert report.n_resumed == {"stopped": 8, "marked": report.n_tensors}[name]
    lazy.save("whole", max_shard_size=300)
    found, expected = tiny.tree(old / name), tiny.tree(old / "whole")
    assert found.keys() == expected.keys()
    if name == "stopped":
        assert found == expected
    assert not (old / name / WORK).exists()


def test_a_commit_is_finished_without_the_sources(old: Path) -> None:
    shutil.rmtree(old / "big")
    assert transaction.finish("marked")
    assert streammap.open("marked").sizes["layer"] == 1
    assert not (old / "marked" / WORK).exists()


@pytest.mark.parametrize("name", ["stopped", "marked"])
def test_it_does_not_look_whole_before(old: Path, name: str) -> None:
    with pytest.raises(streammap.CheckpointError):
        streammap.open(old / name)
