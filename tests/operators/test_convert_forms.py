"""Kinds of files there and back, tied and untied heads, and other vocabularies."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.errors import PlanError
from streammap.testing import faults
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=2)
INDEX = "pytorch_model.bin.index.json"


def mixed() -> tiny.State:
    """A GPT-2 with tensors of all kinds beside it, in the order of a safetensors file."""
    drawn = tiny.random({"a.bf16": (3, 5)})
    state = tiny.gpt2(SIZES) | {
        "a.bf16": drawn["a.bf16"].bfloat16(),
        "a.empty": torch.zeros(0, 4),
        "a.flags": torch.tensor([True, False]),
        "a.ids": torch.arange(7),
        "a.scalar": torch.tensor(3.0),
    }
    return dict(sorted(state.items()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "in", mixed(), {"model_type": "of_no_spec"})


def loaded(folder: Path) -> tiny.State:
    """All tensors of torch files, read by torch."""
    found: tiny.State = {}
    for file in sorted(folder.glob("*.bin")):
        found |= torch.load(file, weights_only=True, mmap=True)
    return found


@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_torch_files_there_and_back(source: Path, tmp_path: Path, size: str) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    ok("convert", source, out, "--format", "torch", "--max-shard-size", size)
    tiny.assert_same(loaded(out), mixed())
    names = sorted(file.name for file in out.glob("pytorch_model*"))
    if size == "5GB":
        assert names == ["pytorch_model.bin"]
    else:
        assert names[0].startswith("pytorch_model-00001-of-")
        index = json.loads((out / INDEX).read_text())["weight_map"]
        assert index.keys() == mixed().keys()
        assert set(index.values()) | {INDEX} == set(names)
    ok("convert", out, back)
    assert (back / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    ok("verify", out, "--recompute", "100", "--no-class-check")
    ok("convert", back, out, "--overwrite")
    assert not list(out.glob("pytorch_model*"))


def test_one_torch_file_and_dcp_there_and_back(source: Path, tmp_path: Path) -> None:
    streammap.convert(source, tmp_path / "one.bin", format="torch")
    for mmap in (False, True):
        found = torch.load(tmp_path / "one.bin", weights_only=True, mmap=mmap)
        tiny.assert_same(found, mixed())
    streammap.convert(source, tmp_path / "dcp", format="dcp")
    original = (source / "model.safetensors").read_bytes()
    for name in ("one.bin", "dcp"):
        streammap.convert(tmp_path / name, tmp_path / "back", overwrite=True)
        assert (tmp_path / "back" / "model.safetensors").read_bytes() == original, name


@pytest.mark.slow
def test_transformers_loads_torch_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny.gpt2_config(SIZES)
    source = tiny.write(tmp_path / "in", tiny.gpt2(SIZES, base="transformer."), config)
    streammap.convert(source, tmp_path / "out", format="torch", max_shard_size="1KB")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(f) for f in (source, tmp_path / "out")
    ]
    tiny.assert_same(*(dict(model.state_dict()) for model in models))


@pytest.mark.parametrize("n", [4, 9, 15])
def test_a_killed_torch_result_goes_on(source: Path, tmp_path: Path, n: int) -> None:
    out = tmp_path / "out"

    def act() -> object:
        return streammap.convert(
            source, out, format="torch", dtype="bf16", max_shard_size="1KB", threads=1
        )

    assert faults.killed(act, n)
    act()
    expected = {k: x.bfloat16() if x.is_floating_point() else x for k, x in mixed().items()}
    tiny.assert_same(loaded(out), expected)


def test_an_untied_head_is_tied_again(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "in", tiny.gpt2(SIZES), tiny.gpt2_config(SIZES))
    ok("convert", source, tmp_path / "own", "--untie")
    own = tiny.written(tmp_path / "own")
    assert torch.equal(own["lm_head.weight"], own["wte.weight"])
    assert not json.loads((tmp_path / "own" / "config.json").read_text())["tie_word_embeddings"]
    told = ok("convert", tmp_path / "own", tmp_path / "back", "--tie")
    assert "lm_head.weight is wte.weight, bit for bit: the head is tied to it" in told
    tiny.assert_same(tiny.written(tmp_path / "back"), tiny.gpt2(SIZES))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["tie_word_embeddings"]


def test_a_head_that_differs_is_not_tied(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "in", tiny.gpt2(SIZES), tiny.gpt2_config(SIZES))
    with pytest.raises(PlanError, match="--tie, but no head has a tensor of its own: it is tied"):
        streammap.open(source).convert(tie=True)
    with pytest.raises(PlanError, match="--tie and --untie"):
        streammap.open(source).convert(tie=True, untie=True)
    streammap.convert(source, tmp_path / "own", untie=True)
    state = tiny.written(tmp_path / "own")
    state["lm_head.weight"][5, 2] += 1
    tiny.write(tmp_path / "own", state, None)
    result = run("convert", tmp_path / "own", tmp_path / "new", "--tie")
    assert result.exit_code == 1
    assert "lm_head.weight differs from wte.weight at [5, 2]" in result.stderr
    assert not (tmp_path / "new").exists()
    lazy = streammap.open(tmp_path / "own").coalesce(width=2)
    with pytest.raises(PlanError, match=r"are computed in two ways|differs from"):
        lazy.convert(tie=True)


def _of_mean(rows: Tensor) -> Tensor:
    return rows.double().mean(0)


FILLS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": _of_mean,
    "zero": lambda rows: torch.zeros_like(_of_mean(rows)),
}


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_new_tokens(tmp_path: Path, fill: str, dtype: torch.dtype) -> None:
    state = {key: x.to(dtype) for key, x in tiny.gpt2(SIZES).items()}
    state["lm_head.weight"] = torch.randn(11, SIZES.embed).to(dtype)
    state["wte.weight"][0, 0] = -0.0
    config = tiny.gpt2_config(SIZES) | {"tie_word_embeddings": False}
    source = tiny.write(tmp_path / "in", state, config)
    ok("convert", source, tmp_path / "out", "--vocab-multiple", "8", "--vocab-rows", fill)
    expected = dict(state)
    for key in ("wte.weight", "lm_head.weight"):
        row = FILLS[fill](state[key]).to(torch.float32 if dtype != torch.float64 else dtype)
        expected[key] = torch.cat([state[key], row.to(dtype).expand(5, -1)])
    tiny.assert_same(tiny.written(tmp_path / "out"), expected)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16
    report = streammap.convert(tmp_path / "out", tmp_path / "back", vocab=11)
    assert (report.promise, report.notes[0]) == (
        "approximate",
        "the last 5 of 16 tokens are gone: lm_head.weight, wte.weight",
    )
    tiny.assert_same(tiny.written(tmp_path / "back"), state)


def test_biases_of_a_head_get_the_mean_too(tmp_path: Path) -> None:
    state = tiny.bert(SIZES)
    width = SIZES.embed
    state |= {
        "cls.predictions.bias": torch.randn(11),
        "cls.predictions.transform.dense.weight": torch.randn(width, width),
        "cls.predictions.transform.dense.bias": torch.randn(width),
        "cls.predictions.transform.LayerNorm.weight": torch.randn(width),
        "cls.predictions.transform.LayerNorm.bias": torch.randn(width),
    }
    state = {("" if key.startswith("cls") else "bert.") + key: x for key, x in state.items()}
    source = tiny.write(tmp_path / "in", state, tiny.bert_config(SIZES))
    found = dict(streammap.open(source).convert(vocab=13).tensors())
    for key in ("cls.predictions.bias", "bert.embeddings.word_embeddings.weight"):
        assert torch.equal(found[key][:11], state[key])
        mean = state[key].double().mean(0).float()
        assert torch.equal(found[key][11:], torch.stack([mean, mean]))


def test_drawn_tokens_are_the_same_for_any_tiles_and_threads(tmp_path: Path) -> None:
    sizes = tiny.Sizes(heads=16, layers=1, head_dim=8, vocab=3000)
    source = tiny.write(tmp_path / "in", tiny.gpt2(sizes), tiny.gpt2_config(sizes))
    made = {}
    for name, how in (
        ("a", {"threads": 1}),
        ("b", {"threads": 3, "memory": "52MiB"}),
    ):
        streammap.convert(source, tmp_path / name, vocab=3200, vocab_rows="normal", seed=4, **how)
        made[name] = tiny.written(tmp_path / name)["wte.weight"]
    tiny.assert_same({"": made["a"]}, {"": made["b"]})
    lazy = streammap.open(source).convert(vocab=3200, vocab_rows="normal", seed=4)
    assert torch.equal(lazy.read("wte.weight", region=slice(3100, 3103)), made["a"][3100:3103])
    old, new = made["a"][:3000].double(), made["a"][3000:].double()
    spread = (new - old.mean(0)) / 1e-9**0.5
    # 200 draws of 128 numbers: means within 5 standard errors, and the variance of all.
    assert (spread.mean(0).abs() / (old.std(0) / 200**0.5)).max() < 5
    assert abs(float((spread / old.std(0)).var()) - 1) < 0.05
    other = streammap.open(source).convert(vocab=3200, vocab_rows="normal", seed=5)
    assert not torch.equal(other.read("wte.weight")[3000:], made["a"][3000:])


def test_tokens_that_config_names_stay(tmp_path: Path) -> None:
    config = tiny.gpt2_config(SIZES) | {"eos_token_id": [3, 9], "bos_token_id": 1}
    source = tiny.write(tmp_path / "in", tiny.gpt2(SIZES), config)
    result = run("convert", source, tmp_path / "out", "--vocab", "9")
    assert result.exit_code == 1
    assert "--vocab 9: config.json names tokens behind it: eos_token_id 9" in result.stderr
    assert "keep 10 tokens or more" in result.stderr
    assert streammap.open(source).convert(vocab=10).spec("wte.weight").shape == (10, SIZES.embed)
    same = streammap.open(source).convert(vocab_multiple=11)
    assert same.promise == ("bit-exact", "convert: there are 11 tokens already")
    assert run("convert", source, tmp_path / "out", "--vocab", "0").exit_code == 2


@pytest.mark.slow
def test_new_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    net = transformers.LlamaForCausalLM(config)
    net.save_pretrained(tmp_path / "in")
    net.resize_token_embeddings(70)
    net.save_pretrained(tmp_path / "shrunk")
    streammap.convert(tmp_path / "in", tmp_path / "out", vocab=70)
    tiny.assert_same(tiny.written(tmp_path / "out"), tiny.written(tmp_path / "shrunk"))
    net = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "in")
    net.resize_token_embeddings(None, pad_to_multiple_of=64, mean_resizing=True)
    found = streammap.open(tmp_path / "in").convert(vocab_multiple=64, vocab_rows="normal")
    for key, x in net.state_dict().items():
        # Both draw with a spread of 3e-5 of the rows' own.
        torch.testing.assert_close(found.read(key), x, rtol=0, atol=2e-5)
