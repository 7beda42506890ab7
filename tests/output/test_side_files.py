"""One walk finds the files beside the weights, on this machine and elsewhere."""

import json
import uuid
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

import streammap
from streammap.errors import CheckpointError
from streammap.io.checkpoint import open_checkpoint
from streammap.io.storage.remote import RemoteStorage
from streammap.io.storage.resolve import PathLike
from streammap.output import side_files
from tests.support import tiny

SIZES = tiny.Sizes()
TAKEN = {
    "vocab.txt": "[PAD]\n",
    "1_Pooling/config.json": '{"word_embedding_dimension": 8}',
    "a/b/c/deep.txt": "x",
}
LEFT_OUT = {
    "trainer_state.json": "{}",
    "a/b/c/d/too_deep.txt": "x",
    "runs/log.txt": "x",
    "a/.hidden": "x",
    ".git/config": "x",
    "checkpoint-500/vocab.txt": "x",
    "other/config.json": '{"model_type": "bert"}',
    "other/vocab.txt": "x",
    "other/inside/vocab.txt": "x",
    "result/streammap.json": "{}",
    "result/vocab.txt": "x",
    "onnx/model.json": "x",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tiny.write(tmp_path / "source", tiny.bert(SIZES), tiny.bert_config(SIZES))
    for name, text in (TAKEN | LEFT_OUT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def url(source: Path) -> Iterator[str]:
    """A copy of the source elsewhere."""
    root = f"memory://{uuid.uuid4().hex}"
    fs: Any = fsspec.filesystem("memory")
    fs.put(str(source), f"{root}/source", recursive=True)
    yield f"{root}/source"
    fs.rm(root, recursive=True)


def test_the_rules_are_the_same_everywhere(source: Path, url: str) -> None:
    for place in (source, url):
        found = {f.name: f.read() for f in side_files.of_source(open_checkpoint(place))}
        assert found == {name: text.encode() for name, text in TAKEN.items()}, place


def test_weights_inside_are_copied_from_this_machine_only(source: Path, url: str) -> None:
    """The weights of a dense module, which are small; elsewhere nobody knows how large they are."""
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    fs, root = fsspec.core.url_to_fs(url)
    fs.pipe_file(f"{root}/2_Dense/model.safetensors", b"weights")
    here, there = (
        {f.name for f in side_files.of_source(open_checkpoint(place))} for place in (source, url)
    )
    assert here - there == {"2_Dense/model.safetensors"}


def test_a_result_has_the_same_side_files_from_everywhere(
    source: Path, url: str, tmp_path: Path
) -> None:
    trees = []
    places: tuple[PathLike, ...] = (source, url)
    for n, place in enumerate(places):
        out = tmp_path / str(n)
        streammap.open(place).coalesce(width=2).save(out)
        trees.append({k: v for k, v in tiny.tree(out).items() if k != "streammap.json"})
    assert trees[0] == trees[1]
    assert json.loads(trees[0]["1_Pooling/config.json"]) == {"word_embedding_dimension": 4}


def test_a_file_that_is_too_large_to_fetch_is_noted(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "MAX_FETCHED_NBYTES", 5)
    lazy = streammap.open(url)
    note = "source: 1_Pooling/config.json, vocab.txt: large, not copied"
    assert side_files.notes(lazy.plan) == (note,)
    assert lazy.summary().notes == lazy.save(tmp_path / "out").notes == (note,)
    record = json.loads((tmp_path / "out" / "streammap.json").read_text())
    assert record["notes"] == [note]
    assert {f for f in tiny.tree(tmp_path / "out") if "/" in f} == {"a/b/c/deep.txt"}


@pytest.mark.parametrize("name", ["/etc/x.txt", "a\x1b[2J.txt"])
def test_no_name_leads_out_of_the_result_or_into_the_terminal(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_checkpoint(url)

    def names(self: RemoteStorage) -> Collection[str]:
        return (name,)

    monkeypatch.setattr(RemoteStorage, "names", names)
    with pytest.raises(CheckpointError, match="a file name with letters that can't be shown, or"):
        list(side_files.of_source(opened))
