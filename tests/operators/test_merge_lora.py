"""Merged adapters are W + scale * B A in dense float64, rounded once; what is none is refused."""

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import streammap
from streammap.errors import CheckpointError, PlanError, StreammapError
from streammap.planning.adapters import settings
from streammap.planning.derived.low_rank import LowRank
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=2, layers=2)
BERT = tiny.bert(SIZES)
QUERY, OUT = "encoder.layer.0.attention.self.query", "encoder.layer.1.output.dense"
WORDS = "embeddings.word_embeddings"
P = "base_model.model."
State = dict[str, Tensor]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "model", BERT, tiny.bert_config(SIZES))


def pair(module: str, out: int, reads: int, rank: int, *, seed: int = 1, end: str = "") -> State:
    """The two matrices for a linear layer."""
    sizes = {"lora_A": (rank, reads), "lora_B": (out, rank)}
    shapes = {f"{P}{module}.{name}{end}.weight": size for name, size in sizes.items()}
    return tiny.random(shapes, seed=seed)


def product(state: Mapping[str, Tensor], module: str, end: str = "") -> Tensor:
    a, b = (state[f"{P}{module}.{name}{end}.weight"].double() for name in ("lora_A", "lora_B"))
    return b @ a


def two(seed: int = 1) -> State:
    """An adapter for two layers, of ranks 3 and 2."""
    e, m = SIZES.embed, SIZES.mlp
    return pair(QUERY, e, e, 3, seed=seed) | pair(OUT, e, m, 2, seed=seed + 1)


CONFIG: dict[str, object] = {"r": 3, "lora_alpha": 7, "rank_pattern": {"output.dense": 2}}


def merged(state: State, adapter: State, scales: Mapping[str, float]) -> State:
    """The dense oracle: float64, rounded to float32 once."""
    found = dict(state)
    for module, scale in scales.items():
        key = f"{module}.weight"
        found[key] = (state[key].double() + scale * product(adapter, module)).float()
    return found


def close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Within one unit in the last place; what no adapter changes is equal."""
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        torch.testing.assert_close(found[key], x, rtol=2**-22, atol=1e-7)
    same = [key for key in wanted if key in BERT and torch.equal(wanted[key], BERT[key])]
    assert all(torch.equal(found[key], BERT[key]) for key in same)


def test_by_command_by_call_by_name_and_in_a_chain(model: Path, tmp_path: Path) -> None:
    state = two()
    adapter = tiny.adapter(tmp_path / "adapter", state, **CONFIG)
    wanted = merged(BERT, state, {QUERY: 7 / 3, OUT: 7 / 2})
    both = f"{model}+{adapter}"
    ok("merge-lora", model, adapter, "--output", tmp_path / "out", "--no-fsync")
    out = tiny.written(tmp_path / "out")
    close(out, wanted)
    tiny.assert_same(dict(streammap.open(model).merge_lora([adapter]).tensors()), out)
    tiny.assert_same(dict(streammap.open(both).tensors()), out)
    streammap.merge_lora(model, adapter, output=tmp_path / "call", threads=1)
    tiny.assert_same(tiny.written(tmp_path / "call"), out)
    # In one pass with what follows: as if the merged model had been resized.
    ok("coalesce", both, tmp_path / "small", "--width", 2, "--depth", 2)
    ok("coalesce", tmp_path / "out", tmp_path / "later", "--width", 2, "--depth", 2)
    tiny.assert_close(tiny.written(tmp_path / "small"), tiny.written(tmp_path / "later"))
    ok("interpolate", both, model, tmp_path / "half", "--alpha", 0.5)
    half = {key: (x.double() + BERT[key]) / 2 for key, x in wanted.items()}
    close(tiny.written(tmp_path / "half"), {key: x.float() for key, x in half.items()})
    for place in ("out", "small"):
        ok("verify", tmp_path / place, "--recompute", 50, "--no-class-check")
        ok("apply", tmp_path / place, tmp_path / f"{place}-again")
        assert tiny.tree(tmp_path / place) == tiny.tree(tmp_path / f"{place}-again")


def test_the_plan_says_what_is_merged(model: Path, tmp_path: Path) -> None:
    adapter = tiny.adapter(
        tmp_path / "adapter", two(), **CONFIG | {"base_model_name_or_path": "org/other"}
    )
    said = ok("plan", "merge-lora", model, adapter)
    assert "the adapter's function, but for rounding once: 2 tensors change" in said
    assert "the adapter adapter was trained for org/other, not for model" in said
    assert "B A" in said
    known = {**CONFIG, "base_model_name_or_path": "org/model"}
    quiet = tiny.adapter(tmp_path / "known", two(), **known)
    assert "was trained for" not in ok("plan", "coalesce", f"{model}+{quiet}", "--width", 2)


def test_a_record_by_hand_and_sources_that_moved(model: Path, tmp_path: Path) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", two(), **CONFIG)
    request = {
        "operator": "merge-lora",
        "scale": [0.5],
        "source": {"operator": "open", "path": str(model)},
        "adapters": [{"operator": "open", "path": "gone"}],
    }
    moved = streammap.open_request(request, sources={"gone": adapter})
    wanted = streammap.open(model).merge_lora([adapter], scale=0.5)
    tiny.assert_same(dict(moved.tensors()), dict(wanted.tensors()))
    record = tmp_path / "recipe.json"
    record.write_text(json.dumps({**request, "adapters": [{"operator": "open", "path": "gone"}]}))
    assert "gone: no such folder" in run("apply", record, tmp_path / "out").output


def test_a_run_that_was_interrupted_has_the_same_bits(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", two(), **CONFIG)
    lazy = streammap.open(f"{model}+{adapter}").coalesce(width=2)
    lazy.save(tmp_path / "whole", max_shard_size=500, threads=4)
    n_products, add = 0, LowRank._add

    def stop(self: LowRank, *args: object) -> None:
        nonlocal n_products
        n_products += 1
        if n_products > 1:
            raise OSError("the disk is gone")
        add(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(LowRank, "_add", stop)
    with pytest.raises((OSError, StreammapError), match="the disk is gone"):
        lazy.save(tmp_path / "out", max_shard_size=500, threads=1)
    monkeypatch.setattr(LowRank, "_add", add)
    report = lazy.save(tmp_path / "out", max_shard_size=500, threads=1)
    assert report.n_resumed
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "whole")


FIELDS = (
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "target_parameters",
    "init_lora_weights",
    "base_model_name_or_path",
)


@given(
    st.dictionaries(
        st.sampled_from(FIELDS),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.lists(st.text())
        | st.dictionaries(st.text(), st.integers() | st.floats() | st.text()),
    )
)
def test_any_config_is_read_or_refused(config: dict[str, object]) -> None:
    with contextlib.suppress(CheckpointError):
        read = settings.read(config, name="adapter")
        assert math.isfinite(read.scale_of("model.layers.0.q_proj"))


def test_several_adapters_each_with_its_scale(model: Path, tmp_path: Path) -> None:
    one, other = two(1), pair(QUERY, SIZES.embed, SIZES.embed, 4, seed=9)
    first = tiny.adapter(tmp_path / "one", one, **CONFIG)
    second = tiny.adapter(tmp_path / "other", other, r=4, lora_alpha=1)
    wanted = merged(BERT, one, {QUERY: 0.5 * 7 / 3, OUT: 0.5 * 7 / 2})
    wanted = merged(wanted, other, {QUERY: -2 / 4})
    ok("merge-lora", model, first, second, "--scale", 0.5, "--scale", -2, "-o", tmp_path / "out")
    close(tiny.written(tmp_path / "out"), wanted)
    plain = merged(merged(BERT, one, {QUERY: 7 / 3, OUT: 7 / 2}), other, {QUERY: 1 / 4})
    close(dict(streammap.open(f"{model}+{first}+{second}").tensors()), plain)
    said = run("merge-lora", model, first, second, *("--scale", 1) * 3, "-o", tmp_path / "no")
    assert "3 numbers for 2 adapters" in said.output
    with pytest.raises(PlanError, match="scale is 'much', expected a number"):
        streammap.open(model).merge_lora(first, scale="much")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("more", "scales"),
    [
        ({"use_rslora": True}, (7 / math.sqrt(3), 7 / math.sqrt(2))),
        ({"alpha_pattern": {"self.query": 4}}, (4 / 3, 7 / 2)),
        ({"alpha_pattern": {r"encoder\.layer\.(0|1)\..*": 1}}, (1 / 3, 1 / 2)),
        ({"alpha_pattern": {"^encoder.layer.1.output.dense": 1}}, (7 / 3, 1 / 2)),
        (
            {"alpha_pattern": {r"encoder\.layer\.(1|0)\.[a-z]+\.(self\.)?[)a-z.]*": 1}},
            (1 / 3, 1 / 2),
        ),
        ({"alpha_pattern": {"query.extra": 1, "uery": 2}, "fan_in_fan_out": True}, (7 / 3, 7 / 2)),
    ],
)
def test_scales(
    model: Path, tmp_path: Path, more: dict[str, object], scales: tuple[float, float]
) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", two(), **CONFIG | more)
    wanted = merged(BERT, two(), dict(zip((QUERY, OUT), scales, strict=True)))
    close(dict(streammap.open(f"{model}+{adapter}").tensors()), wanted)


def _plain(key: str) -> str:
    return key.removeprefix(P)


FORMS: dict[str, Callable[[str], str]] = {
    "the adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "no prefix": _plain,
    "a class around it": lambda key: f"{P}bert.{_plain(key)}",
    "another one": lambda key: f"{P}model.{_plain(key)}",
    "checkpointing": lambda key: key.replace(
        "layer.0.", "layer.0._checkpoint_wrapped_module."
    ).replace("layer.1.", "layer.1._checkpoint_wrapped_module."),
    "the prefix twice": lambda key: P + key,
}


@pytest.mark.parametrize("form", FORMS)
def test_keys_as_others_write_them(model: Path, tmp_path: Path, form: str) -> None:
    renamed = {FORMS[form](key): x for key, x in two().items()}
    adapter = tiny.adapter(tmp_path / "adapter", renamed, **CONFIG)
    wanted = merged(BERT, two(), {QUERY: 7 / 3, OUT: 7 / 2})
    close(dict(streammap.open(f"{model}+{adapter}").tensors()), wanted)


def test_a_pickle(model: Path, tmp_path: Path) -> None:
    adapter = tiny.adapter(tmp_path / "adapter", two(), **CONFIG)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(two(), adapter / "adapter_model.bin")
    wanted = merged(BERT, two(), {QUERY: 7 / 3, OUT: 7 / 2})
    close(dict(streammap.open(f"{model}+{adapter}").tensors()), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_one_rounding_in_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """The sum is rounded once: within one unit in the last place of the model's dtype."""
    w = tiny.random({"x.weight": (130, 70)})["x.weight"].to(dtype)
    state = pair("x", 130, 70, 8)
    tiny.write(tmp_path / "model", {"x.weight": w}, None)
    adapter = tiny.adapter(tmp_path / "adapter", state, r=8, lora_alpha=3)
    found = streammap.open(f"{tmp_path}/model+{adapter}").read("x.weight")
    want = w.double() + 3 / 8 * product(state, "x")
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    atol = 32 * eps if dtype == torch.float64 else 1e-6 * eps  # the product's own sums
    torch.testing.assert_close(found.double(), want, rtol=0.5001 * eps, atol=atol)


def test_conv1d_of_gpt2_is_stored_the_other_way_round(tmp_path: Path) -> None:
    """A square weight tells nothing by its shape; the spec does, and the flag where none serves."""
    sizes = tiny.Sizes(heads=2, layers=1)
    state, name = tiny.gpt2(sizes), "h.0.attn.c_proj"
    e = sizes.embed
    lora = pair(f"transformer.{name}", e, e, 2) | pair(f"transformer.{OUT}", e, e, 2)
    lora = {key: x for key, x in lora.items() if name in key}
    tiny.write(tmp_path / "known", state, tiny.gpt2_config(sizes))
    tiny.write(tmp_path / "bare", {f"{name}.weight": state[f"{name}.weight"]}, None)
    delta = product(lora, f"transformer.{name}")
    for flag in (True, False):
        adapter = tiny.adapter(tmp_path / str(flag), lora, r=2, lora_alpha=2, fan_in_fan_out=flag)
        for model in ("known", "bare"):
            found = streammap.open(f"{tmp_path / model}+{adapter}").read(f"{name}.weight")
            want = state[f"{name}.weight"] + (delta if model == "bare" and not flag else delta.T)
            torch.testing.assert_close(found, want.float())


def test_convolutions(tmp_path: Path) -> None:
    shapes = {"x.weight": (6, 4, 3, 3)}
    lora = {f"{P}x.lora_A.weight": (2, 4, 3, 3), f"{P}x.lora_B.weight": (6, 2, 1, 1)}
    state, matrices = tiny.random(shapes), tiny.random(lora, seed=2)
    tiny.write(tmp_path / "model", state, None)
    adapter = tiny.adapter(tmp_path / "adapter", matrices, r=2, lora_alpha=1)
    a, b = (matrices[key].double() for key in lora)
    want = state["x.weight"] + 0.5 * torch.einsum("orxy,rihw->oihw", b, a)
    found = streammap.open(f"{tmp_path}/model+{adapter}").read("x.weight")
    torch.testing.assert_close(found, want.float())


def test_embeddings_biases_and_whole_modules(model: Path, tmp_path: Path) -> None:
    e = SIZES.embed
    state = tiny.random(
        {
            f"{P}{WORDS}.lora_embedding_A": (3, SIZES.vocab),
            f"{P}{WORDS}.lora_embedding_B": (e, 3),
            f"{P}{QUERY}.lora_A.weight": (3, e),
            f"{P}{QUERY}.lora_B.weight": (e, 3),
            f"{P}{QUERY}.lora_B.bias": (e,),
            f"{P}{OUT}.base_layer.bias": (e,),
            f"{P}pooler.dense.modules_to_save.default.weight": (e, e),
            f"{P}pooler.dense.bias": (e,),
        }
    )
    state[f"{P}pooler.dense.original_module.weight"] = torch.zeros(e, e)
    adapter = tiny.adapter(tmp_path / "adapter", state, r=3, lora_alpha=6, bias="all")
    x = {key.removeprefix(P): tensor.double() for key, tensor in state.items()}
    wanted = merged(BERT, state, {QUERY: 2.0})
    words = (x[f"{WORDS}.lora_embedding_B"] @ x[f"{WORDS}.lora_embedding_A"]).T
    wanted[f"{WORDS}.weight"] = (BERT[f"{WORDS}.weight"] + 2 * words).float()
    bias = BERT[f"{QUERY}.bias"] + 2 * x[f"{QUERY}.lora_B.bias"]
    wanted[f"{QUERY}.bias"] = bias.float()
    wanted[f"{OUT}.bias"] = state[f"{P}{OUT}.base_layer.bias"]
    wanted["pooler.dense.weight"] = state[f"{P}pooler.dense.modules_to_save.default.weight"]
    wanted["pooler.dense.bias"] = state[f"{P}pooler.dense.bias"]
    lazy = streammap.open(f"{model}+{adapter}")
    close(dict(lazy.tensors()), wanted)
    assert "whole in the adapter adapter, and taken as they are there" in "\n".join(lazy.plan.notes)


def test_rows_of_some_tokens_are_replaced(model: Path, tmp_path: Path) -> None:
    rows = {f"{P}{WORDS}.token_adapter.trainable_tokens_delta": torch.rand(3, SIZES.embed)}
    tokens = [7, 0, 10]
    adapter = tiny.adapter(
        tmp_path / "adapter", two() | rows, **CONFIG, trainable_token_indices=tokens
    )
    wanted = merged(BERT, two(), {QUERY: 7 / 3, OUT: 7 / 2})
    wanted[f"{WORDS}.weight"] = wanted[f"{WORDS}.weight"].clone()
    wanted[f"{WORDS}.weight"][tokens] = next(iter(rows.values()))
    lazy = streammap.open(f"{model}+{adapter}")
    close(dict(lazy.tensors()), wanted)
    part = lazy.read(f"{WORDS}.weight", region=(slice(5, 9), slice(1, 3)))
    assert torch.equal(part, wanted[f"{WORDS}.weight"][5:9, 1:3])


def test_dora_scales_rows(model: Path, tmp_path: Path) -> None:
    e = SIZES.embed
    lengths = {f"{P}{QUERY}.lora_magnitude_vector": torch.rand(e) + 0.5}
    state = pair(QUERY, e, e, 3) | lengths
    adapter = tiny.adapter(tmp_path / "adapter", state, r=3, lora_alpha=3, use_dora=True)
    v = BERT[f"{QUERY}.weight"].double() + product(state, QUERY)
    m = lengths[f"{P}{QUERY}.lora_magnitude_vector"].double()
    want = v * (m / v.norm(dim=1))[:, None]
    found = streammap.open(f"{model}+{adapter}").read(f"{QUERY}.weight")
    torch.testing.assert_close(found, want.float(), rtol=2**-22, atol=1e-7)
    other = tiny.adapter(tmp_path / "other", two(), **CONFIG)
    with pytest.raises(PlanError, match="one of them by DoRA, which is not additive"):
        streammap.open(f"{model}+{adapter}+{other}")


def test_a_tied_head_gets_a_tensor_of_its_own(tmp_path: Path) -> None:
    sizes = tiny.Sizes(heads=2, layers=1)
    state = tiny.gpt2(sizes, base="transformer.")
    config = {**tiny.gpt2_config(sizes), "tie_word_embeddings": True}
    model = tiny.write(tmp_path / "model", state, config)
    lora = pair("lm_head", sizes.vocab, sizes.embed, 2)
    adapter = tiny.adapter(tmp_path / "adapter", lora, r=2, lora_alpha=2)
    lazy = streammap.open(f"{model}+{adapter}")
    wte = state["transformer.wte.weight"]
    torch.testing.assert_close(
        lazy.read("lm_head.weight"), (wte + product(lora, "lm_head")).float()
    )
    assert torch.equal(lazy.read("transformer.wte.weight"), wte)
    assert lazy.config is not None
    assert lazy.config["tie_word_embeddings"] is False
    assert "lm_head.weight is tied" in "\n".join(lazy.plan.notes)
    tied = tiny.adapter(tmp_path / "tied", lora, r=2, ensure_weight_tying=True)
    with pytest.raises(PlanError, match="ensure_weight_tying wants them to stay one"):
        streammap.open(f"{model}+{tied}")


REFUSED: dict[str, tuple[State, dict[str, object], str]] = {
    "kind": (two(), {"peft_type": "IA3"}, "peft_type IA3, expected LORA: it scales activations"),
    "unknown kind": (two(), {"peft_type": "NEW"}, "peft_type NEW, expected LORA"),
    "pissa": (two(), {"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4': it is for a model"),
    "alora": (two(), {"alora_invocation_tokens": [1]}, "it acts from some tokens on only"),
    "rank": (two(), {"r": 5}, "ranks 3 and 3, but adapter_config.json says 5"),
    "no rank": (two(), {"r": 0}, "r is 0, expected a rank, 1 or more"),
    "no alpha": (two(), {"lora_alpha": "x"}, "lora_alpha is x, expected a number"),
    "flag": (two(), {"use_rslora": 3}, "use_rslora is 3, expected true or false"),
    "slow pattern": (two(), {"alpha_pattern": {"(a*)*b": 1}}, "none of groups"),
    "slow alternatives": (two(), {"rank_pattern": {"(a|aa)" * 40 + "b": 1}}, "10,000,000 ways"),
    "slow options": (two(), {"rank_pattern": {"a?" * 60 + "a" * 60: 1}}, "10,000,000 ways"),
    "slow escapes": (two(), {"rank_pattern": {r"\\*" * 9 + "b": 1}}, "10,000,000 ways"),
    "bad pattern": (two(), {"alpha_pattern": {"(": 1}}, "no regular expression"),
    "no such layer": (
        pair("encoder.layer.7.attention.self.query", 4, 4, 3),
        {},
        r"no encoder.layer.7.attention.self.query.weight; nearest is",
    ),
    "another size": (
        pair(QUERY, 4, 6, 3),
        {},
        r"its product is \[4, 6\], encoder.layer.0.attention.self.query.weight is \[4, 4\]",
    ),
    "half": (
        {k: x for k, x in two().items() if "lora_A" in k or "query" in k},
        {},
        "output.dense.lora_A.weight has no lora_B beside it",
    ),
    "two in one": (
        pair(QUERY, 4, 4, 3, end=".one") | pair(OUT, 4, 6, 3, end=".two"),
        {},
        r"2 adapters in one file \(one, two\)",
    ),
    "whole, of another size": (
        two() | {f"{P}pooler.dense.bias": torch.ones(9)},
        {},
        r"pooler.dense.bias is \[9\], pooler.dense.bias is \[4\]",
    ),
    "whole, unknown": (two() | {f"{P}score.weight": torch.ones(2, 4)}, {}, "no score.weight"),
    "tokens": (
        two() | {f"{P}{WORDS}.token_adapter.trainable_tokens_delta": torch.ones(1, 4)},
        {"trainable_token_indices": [3, 4]},
        r"trainable_tokens_delta is \[1, 4\] for 2 tokens",
    ),
    "a token beyond": (
        two() | {f"{P}{WORDS}.token_adapter.trainable_tokens_delta": torch.ones(1, 4)},
        {"trainable_token_indices": {"word_embeddings": [11]}},
        "trainable_token_indices: 11: expected each once, below 11",
    ),
    "no matrix": (
        two() | {f"{P}{OUT}.lora_A.weight": torch.ones(4)},
        {},
        "expected two matrices",
    ),
    "dora of an embedding": (
        tiny.random(
            {
                f"{P}{WORDS}.lora_embedding_A": (3, SIZES.vocab),
                f"{P}{WORDS}.lora_embedding_B": (SIZES.embed, 3),
                f"{P}{WORDS}.lora_magnitude_vector": (SIZES.vocab,),
            }
        ),
        {},
        "DoRA of an embedding, which is not merged",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(model: Path, tmp_path: Path, what: str) -> None:
    state, config, said = REFUSED[what]
    adapter = tiny.adapter(tmp_path / "adapter", state, **CONFIG | config)
    with pytest.raises(StreammapError, match=said) as told:
        streammap.open(f"{model}+{adapter}")
    assert isinstance(told.value, CheckpointError | PlanError)
    assert run("merge-lora", model, adapter, "-o", tmp_path / "out").exit_code == 1
    assert not (tmp_path / "out").exists()


def test_nothing_to_merge(model: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no adapter"):
        streammap.open(model).merge_lora([])
    assert run("merge-lora", model, "-o", tmp_path / "out").exit_code == 2
