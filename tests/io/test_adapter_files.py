"""model+adapter: what is split, and what a "+" is a part of; what is no adapter."""

from pathlib import Path

import pytest
import torch

import streammap
from streammap.errors import CheckpointError
from streammap.io import adapter_files
from tests.support import tiny
from tests.support.typed import run


def test_the_longest_name_that_is_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "a", "b", "a+b", "x+y", "x"):
        Path(name).mkdir()
    for text, expected in {
        "model+a": ("model", ("a",)),
        "model+a+b": ("model", ("a+b",)),
        "model+b+a": ("model", ("b", "a")),
        "x+y": ("x+y", ()),
        "x+y+a": ("x+y", ("a",)),
        "x+b": ("x", ("b",)),
        "model+nothing": ("model", ("nothing",)),
        "nothing+a": ("nothing+a", ()),
        "org/model+org/lora": ("org/model", ("org/lora",)),
        "org/model@v1+org/lora@v2+a": ("org/model@v1", ("org/lora@v2", "a")),
        "hf://org/model+hf://org/lora": ("hf://org/model", ("hf://org/lora",)),
        "s3://bucket/v1+fix": ("s3://bucket/v1+fix", ()),
        "s3://bucket/model+s3://bucket/lora": ("s3://bucket/model", ("s3://bucket/lora",)),
    }.items():
        assert adapter_files.split(text) == expected, text
    assert adapter_files.split(Path("model+a")) == (Path("model+a"), ())


def test_a_folder_with_a_plus_in_its_name_is_itself(tmp_path: Path) -> None:
    state = {"w": torch.ones(2, 3)}
    tiny.write(tmp_path / "one+two", state, None)
    with streammap.open(f"{tmp_path}/one+two") as opened:
        tiny.assert_same(dict(opened.tensors()), state)


def test_what_is_no_adapter_is_told(tmp_path: Path) -> None:
    tiny.write(tmp_path / "model", {"w": torch.ones(2, 3)}, None)
    (tmp_path / "empty").mkdir()
    tiny.adapter(tmp_path / "half", {"base_model.model.w.lora_A.weight": torch.ones(1, 3)})
    (tmp_path / "half" / "adapter_model.safetensors").unlink()
    file = tiny.write(tmp_path / "x", {"w": torch.ones(1)}, None) / "model.safetensors"
    for name, said in {
        "empty": "no adapter: it has neither adapter weights nor adapter_config.json",
        "half": "adapter_config.json, but neither adapter_model.safetensors nor adapter_model.bin",
        "model": "no adapter: it has neither",
        "gone": "no such folder or file",
        str(file): "a file, expected an adapter's folder",
    }.items():
        place = tmp_path / name
        with pytest.raises(CheckpointError, match=said):
            streammap.open(f"{tmp_path}/model+{place}")
        assert said in run("merge-lora", tmp_path / "model", place, "-o", tmp_path / "out").output
    assert not (tmp_path / "out").exists()
