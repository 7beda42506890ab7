"""Sources that are not what they seem: Git LFS pointers, mistyped paths."""

import shutil
import socket
import time
from pathlib import Path

import pytest

import streammap
from streammap.errors import CheckpointError
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=2)
POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES), n_shards=2)


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
    ],
)
def test_a_git_lfs_pointer_is_told_as_one(big: Path, name: str) -> None:
    (big / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: a Git LFS pointer") as error:
        streammap.open(big)
    assert error.value.hint is not None
    assert "git lfs pull" in error.value.hint


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin", "x.pth"])
def test_a_file_that_is_a_pointer_is_told_as_one(name: str, tmp_path: Path) -> None:
    path = tiny.file(tmp_path / name, POINTER)
    with pytest.raises(CheckpointError, match=f"{name}: a Git LFS pointer"):
        streammap.open(path)


def test_verify_and_inspect_tell_it_too(big: Path) -> None:
    (big / "model-00002-of-00002.safetensors").write_text(POINTER)
    for command in ("verify", "inspect"):
        found = run(command, big)
        assert found.exit_code == 1
        assert "a Git LFS pointer" in found.output


def test_a_tokenizer_that_is_a_pointer_is_not_copied_as_one(big: Path, tmp_path: Path) -> None:
    (big / "tokenizer.json").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a Git LFS pointer"):
        streammap.coalesce(big, tmp_path / "out", width=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "version", POINTER + "x" * 2000])
def test_what_is_no_pointer_is_not_told_as_one(content: str, big: Path) -> None:
    (big / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match="not JSON"):
        streammap.open(big)


def test_a_mistyped_path_names_its_neighbour(big: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"did you mean {big}?"):
        streammap.open(tmp_path / "bgi")
    with pytest.raises(CheckpointError, match="check the path"):
        streammap.open(tmp_path / "quite" / "other")


@pytest.fixture
def without_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose resolver knows no host."""

    def unknown(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.usefixtures("without_names")
def test_a_mistyped_path_of_two_parts_is_first_a_path(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(big, "models/llama")
    start = time.monotonic()
    with pytest.raises(CheckpointError) as error:
        streammap.open("models/lama")
    assert time.monotonic() - start < 5
    told = str(error.value)
    assert told.startswith("models/lama: no such folder or file in models; as a model of the Hub: ")
    assert told.endswith("hint: did you mean models/llama?")
    with pytest.raises(CheckpointError, match=r"^nobody/lama: no folder of that name here; as a"):
        streammap.open("nobody/lama")
    assert time.monotonic() - start < 5
    assert "architecture  bert" in ok("inspect", "models/llama")
