"""Flipped bits: found in every file of a result, and never believed by a run."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streammap
from streammap.errors import CheckpointError, OutputError, SchemeError, StreammapError
from streammap.io.storage import disk
from streammap.output import work_folder
from streammap.planning import map_file
from streammap.testing import faults
from tests.support import tiny

SIZES = tiny.Sizes()
SAVED: dict[str, Any] = {"max_shard_size": 400, "fsync": False}


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flips") / "big"
    tiny.write(folder, tiny.bert(SIZES), tiny.bert_config(SIZES))
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": {f"word{i}": i for i in range(9)}}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    return folder


@pytest.fixture(scope="module")
def small(big: Path) -> Path:
    out = big.with_name("small")
    streammap.coalesce(big, out, width=2, depth=2, max_shard_size=1500)
    return out


def flip(path: Path, bit: int) -> None:
    """Change one bit; again, it is as it was."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def flips(folder: Path, n: int, *, seed: int = 0) -> Iterator[tuple[Path, int]]:
    """Bits of a folder, each file as likely as any other."""
    chance = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for i in range(n):
        path = files[i % len(files)]
        yield path, chance.randrange(8 * path.stat().st_size)


def is_found(out: Path) -> bool:
    try:
        return not streammap.verify(out, class_check=False).ok
    except CheckpointError:  # a record that can't even be read
        return True


@pytest.mark.parametrize("n", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_every_flip_in_a_result_is_found(n: int, small: Path) -> None:
    names = {path.relative_to(small).as_posix() for path, _ in flips(small, n)}
    assert names >= {
        "1_Pooling/config.json",
        "config.json",
        "model.safetensors.index.json",
        "streammap.json",
        "streammap.map.safetensors",
        "tokenizer.json",
    }
    missed = []
    for path, bit in flips(small, n, seed=n):
        flip(path, bit)
        if not is_found(small):
            missed.append((path.name, bit))
        flip(path, bit)
    assert missed == []
    assert streammap.verify(small, class_check=False).ok


@pytest.mark.parametrize("form", ["x.safetensors", "x.pth", "dcp"])
def test_every_flip_in_other_forms_of_a_result_is_found(
    form: str, big: Path, tmp_path: Path
) -> None:
    out = tmp_path / "made" / form
    options: dict[str, Any] = {"format": "dcp"} if form == "dcp" else {}
    streammap.open(big).coalesce(width=2).save(out, **options)
    folder = out if form == "dcp" else out.parent
    assert streammap.verify(out, class_check=False).findings == ()
    missed = []
    for path, bit in flips(folder, 40, seed=1):
        flip(path, bit)
        if not is_found(out):
            missed.append((path.name, bit))
        flip(path, bit)
    assert missed == []


@pytest.mark.parametrize("step", [37, pytest.param(1, marks=pytest.mark.slow)])
def test_no_flip_in_a_map_gives_another_one(step: int, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.map.safetensors"
    path.write_bytes((small / map_file.NAME).read_bytes())
    whole = [level.digest for level in map_file.load(path)]
    bits, n_refused = range(0, 8 * path.stat().st_size, step), 0
    for bit in bits:
        flip(path, bit)
        try:
            found = [level.digest for level in map_file.load(path)]
        except SchemeError:
            n_refused += 1
        else:
            assert found == whole, bit
        flip(path, bit)
    assert n_refused == len(bits)


def test_a_damaged_map_grows_nothing(small: Path, big: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    for name, content in tiny.tree(small).items():
        (damaged / name).parent.mkdir(parents=True, exist_ok=True)
        (damaged / name).write_bytes(content)
    flip(damaged / map_file.NAME, 8 * (damaged / map_file.NAME).stat().st_size - 5)
    given: list[dict[str, Any]] = [{}, {"map": damaged}]
    for options in given:
        with pytest.raises(SchemeError, match=r"damaged: crc32 .* was written"):
            streammap.decoalesce(damaged, tmp_path / "out", blend_with=big, **options)
    assert not (tmp_path / "out").exists()


def test_a_map_without_a_checksum_is_read(small: Path, tmp_path: Path) -> None:
    """Of version 0.1."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    with safe_open(small / map_file.NAME, framework="pt") as file:
        about = json.loads(file.metadata()["streammap"])
    del about["crc32"]
    path = tmp_path / "x.map.safetensors"
    save_file(load_file(small / map_file.NAME), path, {"streammap": json.dumps(about)})
    assert [x.digest for x in map_file.load(path)] == [
        x.digest for x in map_file.load(small / map_file.NAME)
    ]


def stopped(big: Path, out: Path) -> Path:
    """The work folder of a run that was stopped."""
    wrong = faults.fail_at(12, kinds=frozenset(("write",)))
    with disk.using(wrong), pytest.raises(OutputError):
        streammap.open(big).coalesce(width=2).save(out, threads=1, **SAVED)
    return out / ".streammap-run"


def test_no_flip_in_a_journal_gives_other_weights(big: Path, tmp_path: Path) -> None:
    expected = tiny.tree(_saved(big, tmp_path / "whole"))
    out = tmp_path / "out"
    work = tiny.tree(stopped(big, out))
    assert work["journal.jsonl"].count(b"\n") >= 2
    chance, n_refused = random.Random(0), 0
    head = work["journal.jsonl"].index(b"\n")
    for n in range(60):
        for name, content in work.items():
            (out / ".streammap-run" / name).parent.mkdir(parents=True, exist_ok=True)
            (out / ".streammap-run" / name).write_bytes(content)
        journal = out / ".streammap-run" / "journal.jsonl"
        first = 8 * head if n % 3 else 0  # the lines of tensors are a small part
        flip(journal, chance.randrange(first, 8 * len(work["journal.jsonl"])))
        try:
            streammap.open(big).coalesce(width=2).save(out, **SAVED)
        except StreammapError as error:
            n_refused += work_folder.RESTART in str(error.hint)
            streammap.open(big).coalesce(width=2).save(out, restart=True, **SAVED)
        assert tiny.tree(out) == expected
        shutil.rmtree(out)
    assert n_refused > 5


def test_no_flip_in_a_commit_gives_another_result(big: Path, tmp_path: Path) -> None:
    expected = tiny.tree(_saved(big, tmp_path / "whole"))
    out = tmp_path / "out"
    with (
        disk.using(faults.fail_at(3, kinds=frozenset(("rename",)))),
        pytest.raises(OutputError),
    ):
        streammap.open(big).coalesce(width=2).save(out, threads=1, **SAVED)
    work = tiny.tree(out)
    mark = work[".streammap-run/commit.json"]
    chance = random.Random(0)
    for _ in range(60):
        for name, content in work.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes(content)
        flip(out / ".streammap-run" / "commit.json", chance.randrange(8 * len(mark)))
        try:
            streammap.open(big).coalesce(width=2).save(out, **SAVED)
        except StreammapError as error:
            assert error.hint  # noqa: PT017
        else:
            assert tiny.tree(out) == expected
        shutil.rmtree(out)


def test_a_journal_without_checksums_is_resumed(big: Path, tmp_path: Path) -> None:
    """Of version 0.1."""
    work = stopped(big, tmp_path / "out")
    lines = [json.loads(line) for line in (work / "journal.jsonl").read_text().splitlines()]
    for line in lines:
        assert list(line)[-1] == "crc32"
        del line["crc32"]
    (work / "journal.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    report = streammap.open(big).coalesce(width=2).save(tmp_path / "out", **SAVED)
    assert report.n_resumed > 0
    assert tiny.tree(tmp_path / "out") == tiny.tree(_saved(big, tmp_path / "whole"))


def _saved(big: Path, out: Path) -> Path:
    streammap.open(big).coalesce(width=2).save(out, **SAVED)
    return out
