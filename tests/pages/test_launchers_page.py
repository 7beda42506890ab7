"""The page on launchers: its Python runs from top to bottom, its commands are commands."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import distributed as dist

import streammap
from streammap.common import optional
from tests.pages.test_readme import blocks
from tests.support import typed

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
        n_embd=16,
        n_layer=4,
        n_head=4,
        vocab_size=53,
        n_positions=20,
        bos_token_id=1,
        eos_token_id=2,
    )
    with optional.quiet():
        transformers.GPT2LMHeadModel(config).save_pretrained("big")
        streammap.open("big").coalesce(width=2, depth=2).save("small-map")
        names: dict[str, Any] = {}
        for block in blocks(PAGE, "python")[:-2]:
            exec(compile(block, PAGE, "exec"), names)
    assert names["report"].n_tensors == names["small"].plan.model.n_layers * 12 + 4
    grown = names["grown"]
    resumed = dict(names["resumed"].named_parameters())
    assert all(torch.equal(resumed[key], x) for key, x in grown.tensors() if key in resumed)


def test_the_v_cycle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=4,
        n_head=4,
        vocab_size=53,
        n_positions=20,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.GPT2LMHeadModel(config)
    rows = [{"input_ids": torch.arange(9) + i, "labels": torch.arange(9) + i} for i in range(8)]
    names: dict[str, Any] = {
        "streammap": streammap,
        "Path": Path,
        "model": model,
        "rows": rows,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "Trainer": transformers.Trainer,
        "arguments": transformers.TrainingArguments(
            output_dir="run",
            max_steps=9,
            per_device_train_batch_size=2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="no",
            dataloader_pin_memory=False,
        ),
    }
    before = {key: x.clone() for key, x in model.state_dict().items()}
    cycle, switch = (compile(block, PAGE, "exec") for block in blocks(PAGE, "python")[-2:])
    with optional.quiet():
        exec(cycle, names)
        blended = names["grown"].interpolate("stage/large", alpha=0.5)
        for key, x in blended.tensors():
            assert torch.equal(model.state_dict()[key], x)
        assert any(not torch.equal(x, before[key]) for key, x in model.state_dict().items())
        exec(switch, names)
    assert names["trainer"].state.global_step == 2
    assert names["tiny"].config.n_embd == 8
    assert names["tiny"].config.n_layer == 2


def test_a_switch_needs_a_step() -> None:
    from streammap.trainer import Switch

    with pytest.raises(ValueError, match="at=0: expected 1 step or more"):
        Switch(at=0, then=print)


def test_the_commands_are_commands() -> None:
    lines = [line for block in blocks(PAGE, "console") for line in block.splitlines()]
    assert lines
    for line in lines:
        _, _, *words = shlex.split(line)
        command, rest = typed.command(*words)
        command.make_context(str(command.name), rest)
