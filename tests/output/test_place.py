"""Where a result may go: never over what it is made of, under whatever name."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

import streammap
from streammap.errors import OutputError
from tests.support import tiny, typed

SIZES = tiny.Sizes()
SCHEME = {"width_scheme": [[0, 2], [1, 3]]}


@pytest.fixture
def big(tmp_path: Path) -> Path:
    """A checkpoint with a folder inside of its own name, which has files of its own."""
    folder = tiny.write(tmp_path / "models" / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    for inside in ("big", "1_Pooling"):
        (folder / inside).mkdir()
        (folder / inside / "config.json").write_text(f'{{"of": "{inside}"}}')
    (folder / "big" / "model.safetensors").write_bytes(b"other weights")
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def small(big: Path, tmp_path: Path) -> Path:
    streammap.coalesce(big, tmp_path / "small", width=2, depth=2)
    return tmp_path / "small"


def refused(folder: Path, *arguments: object) -> str:
    """The message of a command that must change nothing in a folder."""
    before = tiny.tree(folder)
    result = typed.run(*arguments)
    assert tiny.tree(folder) == before
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1, result.output
    return result.stderr


def above(big: Path) -> Path:
    return big.parent


def around(big: Path) -> Path:
    return big / "1_Pooling" / ".." / ".."


def linked(big: Path) -> Path:
    link = big.parent.parent / "link"
    link.symlink_to(big.parent, target_is_directory=True)
    return link


def inside(big: Path) -> Path:
    return big / "out"


def pooling(big: Path) -> Path:
    return big / "1_Pooling"


def one_file(big: Path) -> Path:
    return big / "small.safetensors"


@pytest.mark.parametrize("place", [above, around, linked, inside, pooling, one_file])
def test_a_result_in_a_source_is_refused(
    place: Callable[[Path], Path], big: Path, tmp_path: Path
) -> None:
    told = refused(tmp_path, "coalesce", big, place(big), "--width", 2, "--overwrite")
    assert f"lies in {big}, which is read" in told
    assert "hint: write to another place" in told


def test_a_relative_place_in_a_source_is_refused(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(big)
    assert "lies in" in refused(tmp_path, "coalesce", ".", "..", "--width", 2, "--overwrite")
    assert "is the source itself" in refused(tmp_path, "coalesce", big, ".", "--width", 2)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_file_that_is_one_of_the_source_under_another_name(
    link: Callable[[Path, Path], None], big: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        out.mkdir()
        link(big / name, out / name)
        told = refused(tmp_path, "coalesce", big, out, "--width", 2, "--overwrite")
        assert f"{out / name}: is {big / name}, which is read" in told
        (out / name).unlink()
        out.rmdir()


def test_any_input_is_a_source(big: Path, small: Path, tmp_path: Path) -> None:
    told = refused(big, "decoalesce", small, above(big), "--blend-with", big, "--overwrite")
    assert "lies in" in told
    other = tmp_path / "other"
    streammap.open(big).save(other)
    words = ("interpolate", other, big, above(big), "--alpha", 0.5, "--overwrite")
    assert "lies in" in refused(big, *words)


def test_files_that_are_named_are_not_replaced(big: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    tiny.write(out, tiny.bert(SIZES), tiny.bert_config(SIZES))
    (out / "streammap.map.safetensors").write_bytes(
        (small / "streammap.map.safetensors").read_bytes()
    )
    (out / "vocab.txt").write_text(json.dumps(SCHEME))
    (big / "vocab.txt").write_text("a")
    for options in (
        ("coalesce", big, out, "--width", 2, "--config", out / "config.json"),
        ("coalesce", big, out, "--width", 2, "--config", out),
        ("coalesce", big, out, "--target", out / "config.json", "--width", 1),
        ("coalesce", big, out, "--scheme", out / "vocab.txt"),
        ("decoalesce", small, out, "--map", out),
        ("decoalesce", small, out, "--map", out / "streammap.map.safetensors"),
    ):
        assert "which is read" in refused(out, *options, "--overwrite"), options
    with pytest.raises(OutputError, match="which is read"):
        streammap.coalesce(big, out, scheme=out / "vocab.txt", overwrite=True)
    streammap.coalesce(big, out, scheme=SCHEME, overwrite=True)


def test_a_url_in_a_source_is_refused(big: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    fs: Any = fsspec.filesystem("memory")
    fs.put(str(big), f"{root}/big", recursive=True)
    before = {path: fs.cat_file(path) for path in fs.find(root)}
    for place in (f"{root}/big", f"{root}/big/out", f"{root}/big/x.safetensors", root):
        told = typed.run("coalesce", f"{root}/big", place, "--width", 2, "--overwrite")
        assert told.exit_code == 1
        assert "lies in" in told.stderr, place
    assert {path: fs.cat_file(path) for path in fs.find(root)} == before


def test_places_beside_a_source_are_free(big: Path, tmp_path: Path) -> None:
    streammap.coalesce(big, big.parent / "small", width=2)
    streammap.coalesce(big, big.parent / "small", width=2, overwrite=True)
    assert streammap.open(big.parent / "small").sizes["heads"] == 2
