"""mergekit's own methods on the same files: its numbers, or ones nearer to those in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammap
from tests.planning.merging import dense
from tests.support import tiny

pytestmark = pytest.mark.slow
pytest.importorskip("mergekit")

LAYERS, HIDDEN, MLP, VOCAB = 3, 64, 96, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def shapes() -> dict[str, tuple[int, ...]]:
    made: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCAB, HIDDEN),
    }
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        for name, n in (("q", HIDDEN), ("k", HIDDEN // 2), ("v", HIDDEN // 2), ("o", HIDDEN)):
            made[f"{at}self_attn.{name}_proj.weight"] = (n, HIDDEN)
        for name in ("gate", "up"):
            made[f"{at}mlp.{name}_proj.weight"] = (MLP, HIDDEN)
        made[f"{at}mlp.down_proj.weight"] = (HIDDEN, MLP)
        made[f"{at}input_layernorm.weight"] = made[f"{at}post_attention_layernorm.weight"] = (
            HIDDEN,
        )
    return made


def write(folder: Path, dtype: torch.dtype) -> None:
    base = tiny.random(shapes())
    for i, name in enumerate(("base", "a", "b", "c")):
        noise = tiny.random(shapes(), seed=i + 1)
        state = {k: (x + 0.2 * (i > 0) * noise[k]).to(dtype) for k, x in base.items()}
        tiny.write(folder / name, state, CONFIG)


SIMPLE = ["a", "b", "c"]
RECIPES: dict[str, dict[str, Any]] = {
    "slerp": {
        "merge_method": "slerp",
        "base_model": "a",
        "slices": [{"sources": [{"model": m, "layer_range": [0, LAYERS]} for m in ("a", "b")]}],
        "parameters": {
            "t": [
                {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
                {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
                {"value": 0.5},
            ]
        },
    },
    "nuslerp": {
        "merge_method": "nuslerp",
        "models": [
            {"model": "a", "parameters": {"weight": 1}},
            {"model": "b", "parameters": {"weight": 3}},
        ],
    },
    "nuslerp_base_rows": {
        "merge_method": "nuslerp",
        "base_model": "base",
        "models": [
            {"model": "a", "parameters": {"weight": 1}},
            {"model": "b", "parameters": {"weight": 3}},
        ],
        "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp_columns": {
        "merge_method": "nuslerp",
        "models": [
            {"model": "a", "parameters": {"weight": 1}},
            {"model": "b", "parameters": {"weight": 3}},
        ],
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "multislerp": {
        "merge_method": "multislerp",
        "base_model": "base",
        "models": [
            {"model": m, "parameters": {"weight": w}}
            for m, w in zip(SIMPLE, (1, 2, 4), strict=True)
        ],
    },
    "karcher": {"merge_method": "karcher", "models": [{"model": m} for m in SIMPLE]},
    "model_stock": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": m} for m in SIMPLE],
    },
    "model_stock_filter": {
        "merge_method": "model_stock",
        "base_model": "base",
        "models": [{"model": m} for m in SIMPLE],
        "parameters": {"filter_wise": True},
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 1.0, "density": 0.5}} for m in SIMPLE],
        "parameters": {"normalize": True, "int8_mask": True},
    },
    "ties_more": {
        "merge_method": "ties",
        "base_model": "base",
        "models": [
            {"model": m, "parameters": {"weight": w, "density": [0.2, 0.9]}}
            for m, w in zip(SIMPLE, (0.7, 0.5, -0.1), strict=True)
        ],
        "parameters": {"normalize": False, "lambda": 0.8, "rescale": True},
    },
    "breadcrumbs": {
        "merge_method": "breadcrumbs",
        "base_model": "base",
        "models": [
            {"model": m, "parameters": {"weight": 0.5, "density": 0.7, "gamma": 0.02}}
            for m in SIMPLE
        ],
    },
    "breadcrumbs_ties": {
        "merge_method": "breadcrumbs_ties",
        "base_model": "base",
        "models": [{"model": m, "parameters": {"weight": 0.5, "density": 0.7}} for m in SIMPLE],
    },
}


def in_float64(name: str, x: Tensor, key: str) -> Tensor:
    """What a recipe's tensor should be [base, a, b, c] -> [...]."""
    base, models = x[0], x[1:]
    layer = int(key.split(".")[2]) if "layers" in key else 0
    depth = layer / (LAYERS - 1)
    if name == "slerp":
        at = 0.5
        if "self_attn" in key:
            at = (0.0, 0.3, 1.0)[layer]
        elif "mlp" in key:
            at = (1.0, 0.7, 0.0)[layer]
        return dense.slerp(models[:2], at)
    if name.startswith("nuslerp"):
        origin = base if "base" in name else torch.zeros_like(base)
        dim = {"nuslerp_base_rows": -1, "nuslerp_columns": 0}.get(name)
        return origin + dense.nuslerp(models[:2] - origin, 0.75, dim)
    if name == "karcher":
        return dense.karcher(models, 10, 1e-5)
    if name == "multislerp":
        weights = torch.tensor([1, 2, 4], dtype=torch.float64)
        return base + dense.multislerp(models - base, weights)
    if name.startswith("model_stock"):
        return base + dense.model_stock(models - base, rows="filter" in name)
    return base + trimmed(name, models - base, depth)


def trimmed(name: str, made: Tensor, depth: float) -> Tensor:
    """Of differences."""
    low, n = made.float(), made[0].numel()
    weights = (
        [0.7, 0.5, -0.1] if name == "ties_more" else [1.0] * 3 if name == "ties" else [0.5] * 3
    )
    for i, each in enumerate(low):
        if name.startswith("breadcrumbs"):
            left, top = int(0.7 * n), int((0.01 if name.endswith("ties") else 0.02) * n)
            kept = dense.kept(each, left + top) & ~dense.kept(each, top)
        else:
            density = (1 - depth) * 0.2 + depth * 0.9 if name == "ties_more" else 0.5
            kept = dense.kept(each, int(density * n))
        made[i] *= kept.double()
        if name == "ties_more":
            made[i] *= float(each.double().abs().sum() / (each * kept).double().abs().sum())
    of = torch.tensor(weights, dtype=torch.float64)
    if name == "breadcrumbs":
        return (made * of.view(-1, *[1] * (made.dim() - 1))).sum(0)
    factor = 0.8 if name == "ties_more" else 1.0
    return factor * dense.agreed(made, of, normalize=name == "ties")


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """Steps between two tensors of one dtype."""
    eps = torch.finfo(a.dtype).eps
    size = torch.maximum(a.abs(), b.abs()).double()
    return (a.double() - b.double()).abs() / (
        torch.exp2(torch.floor(torch.log2(size + 1e-6))) * eps
    )


_MERGE = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for name in sys.argv[1:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(open(f"{name}.yml")))
    run_merge(config, f"theirs-{name}", MergeOptions(copy_tokenizer=False, quiet=True))
"""


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def merged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All recipes, merged by mergekit in one process: its import takes several seconds."""
    folder, dtype = tmp_path_factory.mktemp(request.param), request.param
    write(folder, getattr(torch, dtype))
    for name, content in RECIPES.items():
        # mergekit computes in `dtype`: in float32, to be compared.
        recipe = {**content, "dtype": "float32", "out_dtype": dtype}
        text = json.dumps(recipe)
        for model in ("base", *SIMPLE):
            text = text.replace(f': "{model}"', f': "./{model}"')
        (folder / f"{name}.yml").write_text(text)
    subprocess.run(
        [sys.executable, "-c", _MERGE, *RECIPES],
        check=True,
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipe_gives_its_numbers_or_nearer_ones(
    merged: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(merged)
    streammap.blend(f"{name}.yml", output=f"ours-{name}", fsync=False)
    ours, theirs = tiny.written(merged / f"ours-{name}"), tiny.written(merged / f"theirs-{name}")
    assert ours.keys() == theirs.keys()
    states = [tiny.written(merged / each) for each in ("base", *SIMPLE)]
    for key, mine in ours.items():
        other = theirs[key]
        assert mine.dtype == other.dtype
        truth = in_float64(name, torch.stack([state[key] for state in states]).double(), key)
        nearer = (mine.double() - truth).abs() <= (other.double() - truth).abs()
        far = (ulps(mine, other) > 1.0) & ~nearer
        assert not far.any(), (key, int(far.sum()), far.numel())
