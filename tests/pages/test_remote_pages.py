"""The pages on the Hub and on object stores: their blocks, run in their order."""

import re
import shlex
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest
from huggingface_hub import constants

import streammap
from streammap.testing.hubserver import HubServer
from tests.io.test_hub import SIZES, bert, hub
from tests.support import tiny
from tests.support.typed import ok

__all__ = ["hub"]
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def run_page(name: str) -> int:
    """Run a page's blocks in this folder; gives how many there are."""
    text = (ROOT / "docs" / name).read_text()
    blocks = re.findall(r"```(python|console)\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, name, "exec"), names)
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ streammap "):
                ok(*shlex.split(line, comments=True)[2:])
    return len(blocks)


def test_the_page_on_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("STREAMMAP_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    streammap.coalesce(tmp_path / "bert", tmp_path / "small", width=2)
    hub.add("org/small", tmp_path / "small")
    assert run_page("hub.md") == 6
    assert {"tester/bert-half", "tester/bert-flat"} <= hub.repos.keys()
    assert tiny.opened(tmp_path / "copy").keys() == tiny.bert(SIZES).keys()


def test_the_page_on_object_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STREAMMAP_SPOOL", str(tmp_path / "spool"))
    fs: Any = fsspec.filesystem("memory")
    fs.put(str(bert(tmp_path / uuid.uuid4().hex)), "memory://models/bert", recursive=True)
    try:
        assert run_page("object-stores.md") == 2
    finally:
        fs.rm("memory://models", recursive=True)
    assert (tmp_path / "blended" / "config.json").exists()
