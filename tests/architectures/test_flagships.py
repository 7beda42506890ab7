"""Flagships at full size: every key of their real classes, in both layouts of experts.

transformers makes the classes on the meta device, where they take no memory. Their state is the
layout in memory, with experts stacked; what `save_pretrained` makes of it is the layout of the
published files, with experts one by one.
"""

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streammap.api import LazyCheckpoint
from streammap.architectures import axis_facts, resolving
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot
from streammap.planning import plan
from tests.planning.test_planning import planned
from tests.support import tiny

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

MOST_NBYTES, MOST_SECONDS = 500e6, 30.0
"""Peak memory and CPU time of a whole process that plans the largest; half of both was measured."""


@dataclass(frozen=True, slots=True)
class Flagship:
    """A published model: its type, and what its config.json says other than the class's default."""

    model_type: str
    config: Mapping[str, object]
    n_layers: int
    n_experts: int
    n_published: int
    """Tensors of its published files, without the layers that predict further tokens."""


FLAGSHIPS = {
    "DeepSeek-V3.2": Flagship("deepseek_v32", {}, 61, 256, 45_700),
    "GLM-5": Flagship("glm_moe_dsa", {}, 78, 256, 59_079),
    "Kimi-K2": Flagship(
        "deepseek_v3",
        {
            "first_k_dense_replace": 1,
            "n_group": 1,
            "n_routed_experts": 384,
            "num_attention_heads": 64,
            "num_key_value_heads": 64,
            "topk_group": 1,
            "vocab_size": 163840,
        },
        61,
        384,
        69_975,
    ),
    "MiniMax-M2": Flagship("minimax_m2", {}, 62, 256, 48_239),
    "Qwen3-Next": Flagship("qwen3_next", {}, 48, 512, 74_391),
}
"""The sizes are those of the classes' defaults, which are the published ones."""
LARGEST = "Kimi-K2"


def both_layouts(of: Flagship) -> tuple[dict[str, object], dict[str, Any], dict[str, Any]]:
    """config.json, and the keys with their shapes: in memory, and as published."""
    loading = importlib.import_module("transformers.core_model_loading")
    config = transformers.AutoConfig.for_model(of.model_type, **of.config)
    with torch.device("meta"):
        net = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = net.state_dict()
    published = loading.revert_weight_conversion(net, state)
    raw = json.loads(config.to_json_string(use_diff=False))
    return raw, *({k: tuple(x.shape) for k, x in one.items()} for one in (state, published))


def specs_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, TensorSpec]:
    return {key: TensorSpec("BF16", shape) for key, shape in shapes.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLAGSHIPS)
def test_every_key_of_a_flagship_is_known_in_both_layouts(name: str) -> None:
    of = FLAGSHIPS[name]
    config, in_memory, published = both_layouts(of)
    assert len(published) == of.n_published
    for shapes, layout in ((in_memory, "stacked"), (published, "one by one")):
        specs = specs_of(shapes)
        found = resolving.resolve(specs, config)
        assert (found.n_layers, found.sizes["expert"]) == (of.n_layers, of.n_experts)
        assert axis_facts.expert_layout(found, "expert") == layout
        assert sum(len(family.members) for family in found.families) == len(shapes)
        slots = {key: Slot(key, spec, 0) for key, spec in specs.items()}
        source = Checkpoint(Path(name), (), slots, {}, config)
        lazy = LazyCheckpoint(plan.from_checkpoint(source, ()))
        assert lazy.decoalesce(experts=2).promise[0] in ("exact", "approximate")
        assert len(lazy.coalesce(width=2).keys()) == len(shapes)


@pytest.mark.slow
def test_the_largest_is_planned_in_seconds_and_little_memory(tmp_path: Path) -> None:
    config, _, published = both_layouts(FLAGSHIPS[LARGEST])
    folder = write(tmp_path / "flagship", specs_of(published), config)
    found, nbytes, seconds = planned(folder, "--width", "2")
    told = f"{found['n_tensors']} tensors: {nbytes / 1e6:.0f} MB, {seconds:.1f} s CPU"
    print(told)  # noqa: T201  figures, for pytest -s
    assert found["n_tensors"] == len(published)
    assert nbytes < MOST_NBYTES, told
    assert seconds < MOST_SECONDS, told


def write(folder: Path, specs: Mapping[str, TensorSpec], config: Mapping[str, object]) -> Path:
    """A checkpoint in one file whose bytes are holes: they take no disk."""
    folder.mkdir()
    name = "model-00001-of-00001.safetensors"
    head = safetensors_header.encode(list(specs.items()), {"format": "pt"})
    with (folder / name).open("wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(spec.nbytes for spec in specs.values()))
    tiny.write_index(folder, dict.fromkeys(specs, name))
    (folder / "config.json").write_text(json.dumps(config))
    return folder
