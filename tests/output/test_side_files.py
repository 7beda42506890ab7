"""One walk finds the files beside the weights, on this machine and elsewhere."""

import json
import os
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
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
from tests.support.typed import ok, run

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
    "3_Dense/.hidden": "x",
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


def test_the_weights_of_a_module_are_copied_with_it(source: Path, url: str) -> None:
    """sentence-transformers' modules have a configuration beside their weights."""
    module = {"2_Dense/model.safetensors": "weights", "2_Dense/config.json": "{}"}
    _put(source, url, module)
    for place in (source, url):
        taken = {f.name for f in side_files.of_source(open_checkpoint(place))}
        assert taken == {*TAKEN, *module}


def _put(source: Path, url: str, files: Mapping[str, str]) -> None:
    fs, root = fsspec.core.url_to_fs(url)
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
        fs.pipe_file(f"{root}/{name}", text.encode())


FORMS = {
    "original/consolidated.00.pth": "weights",
    "original/params.json": "{}",
    "original/config.json": "{}",
    "metal/model.bin": "weights",
    "fp16/model.safetensors": "weights",
    "fp16/model.safetensors.index.json": "{}",
    "openvino/openvino_model.xml": "x",
    "gguf/model-q4.gguf": "x",
    "pytorch_model.bin": "weights",
    "model.fp16.safetensors": "weights",
    "tf_model.h5": "weights",
    "flax_model.msgpack": "weights",
    "consolidated.safetensors": "weights",
}


def test_further_weights_are_left_out_with_one_note(source: Path, url: str, tmp_path: Path) -> None:
    """They hold the source's weights, and no loader of the result would read them."""
    _put(source, url, FORMS)
    out = tmp_path / "out"
    places: tuple[PathLike, ...] = (source, url)
    for n, place in enumerate(places):
        lazy = streammap.open(place).coalesce(width=2)
        assert {f.name for f in side_files.of_source(lazy.plan.side)} == set(TAKEN)
        (note,) = lazy.save(out / str(n)).notes
        assert note.endswith(" more: further weights, not copied: the model is read from others")
        assert note.startswith("source: consolidated.safetensors, flax_model.msgpack, ")
        tree = tiny.tree(out / str(n))
        assert not FORMS.keys() & tree.keys()


def test_an_adapter_is_left_out_with_a_note(source: Path, url: str, tmp_path: Path) -> None:
    """With its config alone, from_pretrained would look for its weights."""
    adapter = {"adapter_config.json": "{}", "adapter_model.safetensors": "weights"}
    _put(source, url, {**adapter, **{f"second/{name}": text for name, text in adapter.items()}})
    places: tuple[PathLike, ...] = (source, url)
    for n, place in enumerate(places):
        big = streammap.open(place)
        for m, result in enumerate((big.coalesce(width=2), big, big.interpolate(big, alpha=0.5))):
            note = (
                "source: adapter_config.json, adapter_model.safetensors, second/: an adapter "
                "(LoRA), not copied: it fits the weights of the source only"
            )
            assert note in result.summary().notes
            out = tmp_path / f"{n}-{m}"
            assert note in result.save(out).notes
            assert not [name for name in tiny.tree(out) if "adapter" in name]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda source: (source / "x.json").symlink_to("/etc/hostname"), "a link out of the"),
        (lambda source: (source / "x.json").symlink_to("nothing"), "No such file"),
        (lambda source: os.mkfifo(source / "x.json"), "not a regular file"),
        (lambda source: (source / "a\nb.json").touch(), "a file name with letters that can't"),
        (lambda source: (source / "other" / "config.json").write_text("{"), "not JSON"),
    ],
    ids=range(5),
)
def test_plan_refuses_the_side_files_that_the_run_refuses(
    source: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(source)
    planned = run("plan", "coalesce", source, "--width", 2)
    done = run("coalesce", source, tmp_path / "out", "--width", 2)
    assert planned.exit_code == done.exit_code == 1
    assert message in planned.stderr
    assert planned.stderr == done.stderr
    assert not (tmp_path / "out").exists()
    ok("plan", "coalesce", source, tmp_path / "out.safetensors", "--width", 2)  # has none beside it


def test_plan_refuses_a_module_that_can_not_follow(source: Path, tmp_path: Path) -> None:
    module = source / "2_Dense"
    module.mkdir()
    (module / "config.json").write_text('{"in_features": 8, "out_features": 5}')
    expected = "2_Dense/config.json: a dense module that reads 8 features; the model will have 4"
    assert expected in run("plan", "coalesce", source, "--width", 2).stderr
    ok("plan", "coalesce", source, "--mlp", 2)


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


def test_a_file_that_is_too_large_is_noted_on_this_machine_too(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "_MAX_NBYTES", 5)
    lazy = streammap.open(source)
    assert lazy.summary().notes == ("source: 1_Pooling/config.json, vocab.txt: large, not copied",)
    assert [f.name for f in side_files.of_source(lazy.plan.side)] == ["a/b/c/deep.txt"]


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
