"""The page on launchers: its Python runs from top to bottom, its commands are commands."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import transformers
from torch import distributed as dist

import streammap
from streammap import optional
from streammap.cli import main
from tests.test_readme import blocks

PAGE = "docs/launchers.md"


@pytest.fixture
def alone() -> Iterator[None]:
    """A launch of one process."""
    store = torch._C._distributed_c10d.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_the_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=4, n_head=4, vocab_size=53, n_positions=20, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    with optional.quiet():
        transformers.GPT2LMHeadModel(config).save_pretrained("big")
        streammap.open("big").coalesce(width=2, depth=2).save("small-map")
        names: dict[str, Any] = {}
        for block in blocks(PAGE, "python"):
            exec(compile(block, PAGE, "exec"), names)
    assert names["report"].n_tensors == names["small"].plan.model.n_layers * 12 + 4
    grown = names["grown"]
    resumed = dict(names["resumed"].named_parameters())
    assert all(torch.equal(resumed[key], x) for key, x in grown.tensors() if key in resumed)


def test_the_commands_are_commands() -> None:
    lines = [line for block in blocks(PAGE, "console") for line in block.splitlines()]
    assert lines
    for line in lines:
        _, _, name, *words = shlex.split(line)
        command = main.commands[name]
        assert isinstance(command, click.Command)
        command.make_context(name, words)
