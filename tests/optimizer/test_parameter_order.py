"""States without names: the order of a model's class, and that of transformers' Trainer."""

import json
from pathlib import Path

import pytest
import torch

import streammap
from streammap.common import optional
from streammap.errors import CheckpointError
from streammap.planning.optimizer import parameters
from tests.support import optimized

transformers = pytest.importorskip("transformers")
TINY = {
    "GPT2LMHeadModel": {"n_embd": 8, "n_layer": 2, "n_head": 2, "vocab_size": 11, "n_positions": 5},
    "BertForMaskedLM": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 12,
        "vocab_size": 11,
    },
    "Qwen3MoeForCausalLM": {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 4,
        "intermediate_size": 12,
        "moe_intermediate_size": 6,
        "num_experts": 4,
        "vocab_size": 11,
    },
}


def saved(folder: Path, kind: str, *, as_trainer: bool) -> list[str]:
    """A model and a state without names, each mean filled with its parameter's place."""
    cls = getattr(transformers, kind)
    with optional.quiet():
        model = cls(cls.config_class(**TINY[kind]))
        model.save_pretrained(folder)
    names = [name for name, _ in model.named_parameters()]
    groups = [names]
    if as_trainer:
        decays = set(transformers.Trainer.get_decay_parameter_names(None, model))
        groups = [[n for n in names if n in decays], [n for n in names if n not in decays]]
    order = [name for group in groups for name in group]
    state = {
        i: {
            "step": torch.tensor(1.0),
            "exp_avg": torch.full_like(model.get_parameter(name), float(i)),
            "exp_avg_sq": torch.zeros_like(model.get_parameter(name)),
        }
        for i, name in enumerate(order)
    }
    at = iter(range(len(order)))
    listed = [{"lr": 0.1, "params": [next(at) for _ in group]} for group in groups]
    torch.save({"state": state, "param_groups": listed}, folder / optimized.FILE)
    return order


@pytest.mark.parametrize("kind", TINY)
def test_numbers_are_the_class_s_parameters(kind: str, tmp_path: Path) -> None:
    for as_trainer in (False, True):
        folder = tmp_path / f"{kind}-{as_trainer}"
        order = saved(folder, kind, as_trainer=as_trainer)
        lazy = streammap.open(folder).carry_optimizer()
        assert lazy.plan.optimizer is not None
        assert list(lazy.plan.optimizer.names) == order
        for i, name in enumerate(order):
            assert bool((lazy.read(f"optim.state.{name}.exp_avg") == i).all()), name


def test_an_order_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "GPT2LMHeadModel", as_trainer=False)
    content = torch.load(tmp_path / optimized.FILE)
    state = content["state"]
    state[0], state[1] = state[1], state[0]
    torch.save(content, tmp_path / optimized.FILE)
    with pytest.raises(CheckpointError, match=r"wte\.weight of shape \[11, 8\] as number 0"):
        streammap.open(tmp_path).carry_optimizer()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["Own"]}))
    with pytest.raises(CheckpointError, match="transformers has no class Own"):
        streammap.open(tmp_path).carry_optimizer()


def test_other_layers_stand_in_the_class_s_order() -> None:
    before = ["a.weight", "layers.0.q.weight", "layers.0.b.weight", "layers.1.q.weight", "z"]
    made = {f"layers.{i}.q.weight": f"layers.{i % 2}.q.weight" for i in reversed(range(12))}
    made |= {f"layers.{i}.b.weight": "layers.0.b.weight" for i in range(0, 12, 2)}
    made |= {"z": "z", "a.weight": "a.weight"}
    wanted = [f"layers.{i}.{part}.weight" for i in range(12) for part in ("q", "b")[: 2 - i % 2]]
    assert parameters.in_order(before, made) == ["a.weight", *wanted, "z"]
