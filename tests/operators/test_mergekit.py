"""Recipes of mergekit, beside mergekit itself where it is there; and recipes that are refused.

mergekit runs in a process of its own: by this Python where it is installed, or by the one that
STREAMMAP_MERGEKIT names.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammap
from streammap.errors import CheckpointError, PlanError
from streammap.operators.recipes import mergekit, yaml_file
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=4)
_RUN = """
import sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
for path in sys.argv[1:]:
    config = MergeConfiguration.model_validate(yaml.safe_load(open(path)))
    run_merge(config, path + ".out", MergeOptions(copy_tokenizer=False, write_model_card=False))
"""
FILTERS = "[{filter: mlp, value: [0.1, 0.9]}, {filter: q_proj, value: 0.3}, {value: 0.6}]"
RECIPES = {
    "linear": """
merge_method: linear
models:
- {model: A, parameters: {weight: 0.7}}
- {model: B, parameters: {weight: 0.4}}
""",
    "three": """
merge_method: linear
parameters: {normalize: false, int8_mask: true}
models:
- {model: A, parameters: {weight: 0.5}}
- {model: B, parameters: {weight: 0.3}}
- {model: C, parameters: {weight: 0.4}}
dtype: float32
""",
    "filters": f"""
merge_method: linear
models:
- {{model: A, parameters: {{weight: {FILTERS}}}}}
- {{model: B, parameters: {{weight: 1e-1}}}}
dtype: bfloat16
""",
    "gradients": """
merge_method: linear
models:
- {model: A, parameters: {weight: [0, 0.5, 1]}}
- {model: B, parameters: {weight: [1, 0.5, 0.25]}}
""",
    "passthrough": """
merge_method: passthrough
slices:
- sources: [{model: A, layer_range: [0, 3]}]
- sources:
  - model: A
    layer_range: [1, 4]
    parameters: {scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0}, {value: 1}]}
""",
    "stacked": """
merge_method: passthrough
slices:
- sources: [{model: A, layer_range: [0, 2]}]
- sources: [{model: B, layer_range: [1, 4]}]
- sources: [{model: A, layer_range: [3, 4]}]
dtype: bfloat16
""",
    "slices": """
merge_method: linear
base_model: B
slices:
- sources:
  - {model: A, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
  - {model: B, layer_range: [1, 3], parameters: {weight: 0.5}}
- sources:
  - {model: A, layer_range: [3, 4]}
  - {model: C, layer_range: [3, 4]}
  parameters: {weight: [{filter: layers.3, value: 2}, {value: 1}]}
""",
    "task": """
merge_method: task_arithmetic
base_model: C
parameters: {lambda: 0.8}
models:
- {model: A, parameters: {weight: 0.5}}
- {model: B, parameters: {weight: [0.2, 0.6]}}
- {model: C}
dtype: float32
out_dtype: bfloat16
""",
    "normalized": """
merge_method: task_arithmetic
base_model: C
parameters: {normalize: true, weight: 1.5}
models: [{model: A}, {model: B}]
""",
    "half": """
merge_method: linear
models:
- {model: A, parameters: {weight: 1.0}}
- {model: B, parameters: {weight: 1.0}}
dtype: float32
out_dtype: float16
""",
}
LEFT_OUT = {
    # mergekit sees experts under the names that transformers has for them: filters are others.
    "mixtral": ("filters", "passthrough"),
    # It leaves layer_types of config.json as they were, and then refuses them.
    "qwen2": ("passthrough", "stacked", "slices"),
}
"""What mergekit does otherwise, or not at all."""
ARITHMETIC = ("task", "normalized")
"""Recipes of which mergekit rounds differences from the base, too: it is not near where weights
cancel, so that errors are taken of the largest number."""


def models(folder: Path, kind: str, dtypes: Sequence[torch.dtype]) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes: dict[str, object] = {
        "vocab_size": 19,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }
    more: dict[str, dict[str, object]] = {
        "mixtral": {"num_local_experts": 2},
        "qwen2": {"tie_word_embeddings": True},
    }
    config = transformers.AutoConfig.for_model(kind, **sizes, **more.get(kind, {}))
    for seed, (name, dtype) in enumerate(zip("ABC", dtypes, strict=True)):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        model.to(dtype).save_pretrained(folder / name)


def python_of_mergekit() -> str:
    place = os.environ.get("STREAMMAP_MERGEKIT")
    if place is None and importlib.util.find_spec("mergekit") is None:
        pytest.skip("mergekit is not installed, and STREAMMAP_MERGEKIT names no Python that has it")
    return place or sys.executable


def unfused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Mixtral's experts one by one, as its checkpoints have them; mergekit writes them fused."""
    made = {}
    for key, x in state.items():
        before, _, name = key.partition("mlp.experts.")
        base = f"{before}block_sparse_moe.experts"
        for i, one in enumerate(x if name else ()):
            if name == "down_proj":
                made[f"{base}.{i}.w2.weight"] = one
            else:
                made[f"{base}.{i}.w1.weight"], made[f"{base}.{i}.w3.weight"] = one.chunk(2)
        if not name:
            made[key.replace("mlp.gate.", "block_sparse_moe.gate.")] = x
    return made


def assert_near(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], n_ulps: float, part: float
) -> None:
    """Equal, or a few units in the last place apart: of a number, or of a part of the largest."""
    assert found.keys() == expected.keys()
    for key, x in expected.items():
        y = found[key]
        assert (y.dtype, y.shape) == (x.dtype, x.shape), key
        step = torch.finfo(x.dtype).eps * x.double().abs().clamp(min=x.double().abs().max() * part)
        apart = (x.double() - y.double()).abs()
        assert bool((apart <= n_ulps * step).all()), (key, (apart / step).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtypes"),
    [
        ("llama", (torch.bfloat16,) * 3),
        ("llama", (torch.float32,) * 3),
        ("qwen2", (torch.bfloat16, torch.float32, torch.bfloat16)),
        ("mixtral", (torch.float16,) * 3),
    ],
)
def test_recipes_give_what_mergekit_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, dtypes: Sequence[torch.dtype]
) -> None:
    python = python_of_mergekit()
    monkeypatch.chdir(tmp_path)
    models(tmp_path, kind, dtypes)
    recipes = {k: v for k, v in RECIPES.items() if k not in LEFT_OUT.get(kind, ())}
    for name, text in recipes.items():
        (tmp_path / f"{name}.yml").write_text(text)
    paths = [f"{name}.yml" for name in recipes]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONHASHSEED": "0"}
    said = subprocess.run([python, "-c", _RUN, *paths], capture_output=True, env=clean, check=False)
    assert said.returncode == 0, said.stderr.decode(errors="replace")[-2000:]
    for name in recipes:
        ok("blend", f"{name}.yml", "-o", name, "--no-fsync")
        # mergekit adds in float32, rounds sources to the recipe's dtype, and differences to theirs.
        n_ulps = 1.0 if set(dtypes) <= {torch.bfloat16, torch.float16} and name != "three" else 4.0
        expected = unfused(tiny.written(tmp_path / f"{name}.yml.out"))
        part = 1.0 if name in ARITHMETIC else 1 / 8
        assert_near(
            tiny.written(tmp_path / name), expected, max(n_ulps, 4.0 if part == 1.0 else 0.0), part
        )
        mine, theirs = (
            streammap.open(tmp_path / one).config or {} for one in (name, f"{name}.yml.out")
        )
        assert mine["num_hidden_layers"] == theirs["num_hidden_layers"]


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for i, name in enumerate("ABC"):
        tiny.write(tmp_path / name, tiny.bert(SIZES, seed=i), tiny.bert_config(SIZES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_is_a_source_like_any_other(three: Path) -> None:
    (three / "mean.yml").write_text(RECIPES["half"])
    ok("blend", "mean.yml", "-o", "out", "--no-fsync")
    a, b = (tiny.bert(SIZES, seed=i) for i in range(2))
    expected = {k: ((a[k].double() + b[k].double()) / 2).half() for k in a}
    tiny.assert_same(tiny.written(three / "out"), expected)
    assert (streammap.open("out").config or {})["torch_dtype"] == "float16"
    ok("apply", "mean.yml", "applied", "--no-fsync")
    ok("apply", "out", "again", "--no-fsync")
    for name in ("applied", "again"):
        assert tiny.bits(streammap.open(name).read("pooler.dense.weight")) == tiny.bits(
            expected["pooler.dense.weight"]
        )
    assert "verdict" in ok("verify", "out", "--recompute", 10, "--no-class-check")
    assert "weights 1 (A) + 1 (B) = 2, divided by their sum" in ok("plan", "blend", "mean.yml")
    small = streammap.blend("mean.yml").coalesce(width=2)
    assert small.plan.request is not None
    assert small.sizes["heads"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "sce"}, "merge_method 'sce' is not done here"),
        ({"tokenizer": {"tokens": {"a": {}}}}, "tokenizer.tokens is not done here"),
        ({"tokenizer_source": 3}, "tokenizer_source is '3', expected a model"),
        ({"chat_template": "auto"}, "chat_template is not done here"),
        ({"modules": {"text": {}}}, "modules is not done here"),
        ({"mergemethod": 1}, "the recipe has mergemethod"),
        ({"parameters": {"wieght": 1}}, "parameters has wieght"),
        ({"models": [{"model": {"model": "A", "override_architecture": "x"}}]}, "override_arch"),
        ({"models": [{"model": "A"}, {"model": "A"}]}, "A is listed twice"),
        ({"models": []}, "no models"),
        ({"models": "A"}, "models is 'A', expected a list"),
        ({"slices": [{"sources": [{"model": "A"}]}]}, "models and slices"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        (
            {"models": [{"model": "A", "parameters": {"weight": "much"}}]},
            r"x.yml: models\[0\].parameters.weight: 'much', expected a number",
        ),
        (
            {"parameters": {"normalize": None}},
            "x.yml: parameters.normalize: 'None', expected",
        ),
        *(
            (
                {
                    "models": None,
                    "slices": [{"sources": [{"model": "A", "layer_range": given}]}],
                },
                r"x.yml: slices\[0\].sources\[0\].layer_range is .*, expected the first",
            )
            for given in ("0-3", None, [0, -1], [2, 2], [0, 10**30], [0, 1, 2], [0.0, 2.0])
        ),
    ],
)
def test_what_is_not_known_is_refused_by_name(change: dict[str, object], message: str) -> None:
    recipe: dict[str, object] = {"merge_method": "linear", "models": [{"model": "A"}]}
    with pytest.raises(PlanError, match=message):
        mergekit.parse(recipe | change, "x.yml").operator((), None)


@pytest.mark.parametrize("source", ["base", "union", "B"])
def test_equal_tokenizers_need_no_union(three: Path, source: str) -> None:
    recipe = three / "x.yml"
    recipe.write_text(
        "{merge_method: linear, models: [{model: A, parameters: {weight: 1}}, {model: B, "
        f"parameters: {{weight: 1}}}}], tokenizer_source: {source}}}"
    )
    assert "A: no tokenizer that could be compared" in run("blend", recipe, "-o", "out").stderr
    table = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<s>"}]}
    listed: Any = {"model": {"vocab": [["a", -0.5], ["b", -1.5], ["<s>", 0.0]]}}
    (three / "A" / "tokenizer.json").write_text(json.dumps(table))
    (three / "B" / "tokenizer.json").write_text(json.dumps(listed))
    ok("plan", "blend", recipe)
    listed["model"]["vocab"][1:] = [["c", 0.0], ["b", 0.0]]
    (three / "B" / "tokenizer.json").write_text(json.dumps(listed))
    said = run("plan", "blend", recipe).stderr
    assert "A and B: token 'b' has the numbers 1 and 2, and vocabularies are not joined" in said
    ok("plan", "blend", "A", "B")
    (three / "B" / "tokenizer.json").write_text('{"model": {"vocab": 7}}')
    assert (
        "B/tokenizer.json: no vocabulary"
        in run("plan", "blend", "A", "B", "--same-tokenizer").stderr
    )


def test_a_weight_that_is_missing_is_told(three: Path) -> None:
    (three / "x.yml").write_text(
        "{merge_method: linear, models: [{model: A, parameters: {weight: {filter: mlp, value: 1}}},"
        " {model: B, parameters: {weight: 1}}]}"
    )
    with pytest.raises(PlanError, match="no weight for A"):
        streammap.open("x.yml")


def test_vocabularies_that_differ_are_told_with_a_way_out(three: Path) -> None:
    n = tiny.written(three / "A")["embeddings.word_embeddings.weight"].shape[0]
    ok("convert", "A", "padded", "--vocab", n + 3, "--no-fsync")
    with pytest.raises(PlanError, match=f"vocab: B {n}, padded {n + 3}") as refusal:
        streammap.open("padded").blend("B")
    assert f"streammap convert MODEL OUT --vocab {n + 3}" in str(refusal.value.hint)
    ok("convert", "B", "as-long", "--vocab", n + 3, "--no-fsync")
    streammap.open("padded").blend("as-long")


def test_options_beside_a_recipe_are_refused(three: Path) -> None:
    (three / "x.yml").write_text(
        "{merge_method: dare_linear, base_model: C, parameters: {seed: 1}, "
        "models: [{model: A, parameters: {weight: 1, density: 0.5}}]}"
    )
    said = run("blend", "x.yml", "-o", "out", "--seed", 2)
    assert said.exit_code == 1
    assert "options for its sources come too late" in said.output
    assert "parameters: {seed: 1}" in said.output
    with pytest.raises(PlanError, match="come too late"):
        streammap.blend("x.yml", normalize=True)
    one = streammap.blend("x.yml").read("pooler.dense.weight")
    (three / "x.yml").write_text((three / "x.yml").read_text().replace("seed: 1", "seed: 2"))
    other = streammap.blend("x.yml").read("pooler.dense.weight")
    assert not torch.equal(one, other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", r"x.yml:2: an alias \(\*x\)"),
        ("a: 1\na: 2", "'a' twice"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("[" * 3000, "x.yml"),
        ("a: 2024-13-45", "x.yml"),
        ("a: [1", "x.yml:1"),
        ("a: \x0b", "not YAML"),
        ("? [a]\n: 1", "x.yml"),
        ("--- 1\n--- 2", "but found another document"),
    ],
)
def test_yaml_that_is_more_than_plain_values_is_refused(text: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        yaml_file.parse(text.encode(), "x.yml")
