"""Two checkpoints of one model, as classes and generations of transformers name and save it."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import streammap
from streammap.errors import PlanError
from tests.support import oracle, tiny
from tests.support.tiny import State
from tests.support.typed import ok, run

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
LLAMA = {**TINY, "num_key_value_heads": 2}
GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 16}
IDS = torch.arange(3, 15).view(1, -1)


def build(name: str, config: Mapping[str, object], *, seed: int = 0) -> torch.nn.Module:
    """A random model of a class of transformers."""
    kind = getattr(transformers, name)
    torch.manual_seed(seed)
    model: torch.nn.Module = kind(kind.config_class(**config))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def save(folder: Path, model: torch.nn.Module) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    return folder


def load(name: str, folder: Path) -> torch.nn.Module:
    """A model, of whose tensors the folder has all, and no others."""
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()  # type: ignore[no-any-return]


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def renamed(folder: Path, **names: str) -> Path:
    """The folder with parts of its keys replaced."""
    path = folder / "model.safetensors"
    state = load_file(path)
    for old, new in names.items():
        state = {key.replace(old.replace("__", "."), new): x for key, x in state.items()}
    return tiny.write(folder, state, json.loads((folder / "config.json").read_text()))


def without_prefix(folder: Path, prefix: str) -> Path:
    state = {key.removeprefix(prefix): x for key, x in tiny.written(folder).items()}
    return tiny.write(folder, state, json.loads((folder / "config.json").read_text()))


def set_fields(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def notes(source: Path, target: Path, *more: object) -> str:
    plan = json.loads(ok("plan", "interpolate", source, target, "--alpha", 0.5, "--json", *more))
    return "\n".join(plan["notes"])


def tail(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): x for key, x in state.items()}


def test_the_v_cycle_of_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    """Published without `transformer.`, trained and saved by the class that writes it."""
    big = without_prefix(save(tmp_path / "big", build("GPT2LMHeadModel", GPT2)), "transformer.")
    state = tiny.written(big)
    assert "wte.weight" in state
    masks = {f"h.{i}.attn.bias": torch.ones(16, 16).tril().view(1, 1, 16, 16) for i in range(4)}
    tiny.write(big, {**state, **masks}, json.loads((big / "config.json").read_text()))
    ok("coalesce", big, tmp_path / "small", "--width", 2, "--depth", 2)
    model = load_ignoring_masks("GPT2LMHeadModel", tmp_path / "small")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    trained = save(tmp_path / "trained", model)
    assert all(key.startswith("transformer.") for key in tiny.written(trained))
    map_file = tmp_path / "small"
    ok("decoalesce", trained, tmp_path / "grown", "--map", map_file)
    blend = ("--blend-with", big, "--alpha", 0.25)
    ok("decoalesce", trained, tmp_path / "out", "--map", map_file, *blend)
    grown = tail(tiny.written(tmp_path / "grown"), "transformer.")
    expected = oracle.interpolated(grown, state, 0.25)
    result = tiny.written(tmp_path / "out")
    tiny.assert_close({key: x for key, x in result.items() if key not in masks}, expected)
    assert result.keys() == {*state, *masks}
    loaded = load_ignoring_masks("GPT2LMHeadModel", tmp_path / "out")
    dense = build("GPT2LMHeadModel", GPT2)
    dense.transformer.load_state_dict(expected)  # type: ignore[union-attr]
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-4, atol=1e-5)
    ok("verify", tmp_path / "out", "--recompute", 20)


def load_ignoring_masks(name: str, folder: Path) -> torch.nn.Module:
    return getattr(transformers, name).from_pretrained(folder).eval()  # type: ignore[no-any-return]


@pytest.mark.parametrize("tied", [False, True])
def test_a_base_model_and_one_with_a_head(tmp_path: Path, *, tied: bool) -> None:
    config = {**LLAMA, "tie_word_embeddings": tied}
    base = save(tmp_path / "base", build("LlamaModel", config, seed=1))
    whole = save(tmp_path / "whole", build("LlamaForCausalLM", config, seed=2))
    a, b = tiny.written(base), tiny.written(whole)
    inside = {key: x for key, x in b.items() if key.startswith("model.")}
    assert "norm.weight" in a

    said = notes(base, whole)
    assert "norm.weight is model.norm.weight" in said or "is model." in said
    ok("interpolate", base, whole, tmp_path / "to_whole", "--alpha", 0.25)
    expected = oracle.interpolated({f"model.{key}": x for key, x in a.items()}, inside, 0.25)
    head = {} if tied else {"lm_head.weight": b["lm_head.weight"]}
    tiny.assert_close(tiny.written(tmp_path / "to_whole"), {**expected, **head})
    load("LlamaForCausalLM", tmp_path / "to_whole")
    assert ("lm_head.weight (of 1): only the target has them" in said) is not tied

    ok("interpolate", whole, base, tmp_path / "to_base", "--alpha", 0.75)
    tiny.assert_close(tiny.written(tmp_path / "to_base"), {**tail(expected, "model."), **head})
    if not tied:
        assert "lm_head.weight (of 1): only the source has them" in notes(whole, base)
        one, other = (load("LlamaForCausalLM", tmp_path / name) for name in ("to_base", "to_whole"))
        torch.testing.assert_close(logits(one), logits(other))


def test_bert_with_and_without_its_heads_and_old_names(tmp_path: Path) -> None:
    base = save(tmp_path / "base", build("BertModel", TINY, seed=1))
    masked = save(tmp_path / "masked", build("BertForMaskedLM", TINY, seed=2))
    whole = save(tmp_path / "whole", build("BertForPreTraining", TINY, seed=3))
    renamed(whole, LayerNorm__weight="LayerNorm.gamma", LayerNorm__bias="LayerNorm.beta")
    a, b, c = (tiny.written(folder) for folder in (base, masked, whole))
    assert "bert.embeddings.LayerNorm.gamma" in c

    ok("interpolate", masked, whole, tmp_path / "out", "--alpha", 0.5)
    got = tiny.written(tmp_path / "out")
    assert got.keys() == c.keys()
    key = "bert.encoder.layer.3.output.LayerNorm."
    torch.testing.assert_close(got[f"{key}gamma"], (b[f"{key}weight"] + c[f"{key}gamma"]) / 2)
    torch.testing.assert_close(got[f"{key}beta"], (b[f"{key}bias"] + c[f"{key}beta"]) / 2)
    assert torch.equal(got["cls.seq_relationship.weight"], c["cls.seq_relationship.weight"])
    assert torch.equal(got["bert.pooler.dense.weight"], c["bert.pooler.dense.weight"])

    ok("interpolate", base, masked, tmp_path / "pooled", "--alpha", 0.5)
    got = tiny.written(tmp_path / "pooled")
    # The pooler is the source's, under the name that the target's class would give it.
    assert got.keys() == {*b, "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert torch.equal(got["bert.pooler.dense.bias"], a["pooler.dense.bias"])
    key = "embeddings.word_embeddings.weight"
    torch.testing.assert_close(got[f"bert.{key}"], (a[key] + b[f"bert.{key}"]) / 2)

    ok("interpolate", masked, base, tmp_path / "headed", "--alpha", 0.5)
    written = json.loads((tmp_path / "headed" / "config.json").read_text())
    assert written["architectures"] == ["BertModel"]  # it has a pooler, which the other lacks
    assert "cls.predictions.bias" in tiny.written(tmp_path / "headed")


def test_the_class_is_that_of_the_one_with_a_head(tmp_path: Path) -> None:
    base = save(tmp_path / "base", build("LlamaModel", LLAMA))
    whole = save(tmp_path / "whole", build("LlamaForCausalLM", LLAMA))
    ok("interpolate", whole, base, tmp_path / "out", "--alpha", 0.5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_a_tied_head_that_one_of_them_stores_twice(tmp_path: Path) -> None:
    once = save(tmp_path / "once", build("GPT2LMHeadModel", GPT2, seed=1))
    twice = save(tmp_path / "twice", build("GPT2LMHeadModel", GPT2, seed=2))
    state = tiny.written(twice)
    state["lm_head.weight"] = state["transformer.wte.weight"].clone()
    tiny.write(twice, state, json.loads((twice / "config.json").read_text()))

    assert "lm_head.weight" not in tiny.written(once)
    for source, target in ((once, twice), (twice, once)):
        out = tmp_path / f"to_{target.name}"
        ok("interpolate", source, target, out, "--alpha", 0.5)
        got = tiny.written(out)
        assert ("lm_head.weight" in got) == (target is twice)
        wte = (tiny.written(once)["transformer.wte.weight"] + state["transformer.wte.weight"]) / 2
        torch.testing.assert_close(got["transformer.wte.weight"], wte)
        assert target is once or torch.equal(got["lm_head.weight"], got["transformer.wte.weight"])
    assert "the source's copy of a tied tensor is not used" in notes(twice, once)


@pytest.mark.parametrize("tied_side", ["source", "target"])
def test_a_tied_and_an_untied_model_need_untie(tmp_path: Path, tied_side: str) -> None:
    tied = save(
        tmp_path / "tied", build("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True})
    )
    own = save(
        tmp_path / "own", build("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": False}, seed=1)
    )
    source, target = (tied, own) if tied_side == "source" else (own, tied)
    words = ("interpolate", source, target, tmp_path / "out", "--alpha", 0.25)
    said = run(*words).output
    assert f"the {tied_side}'s head is tied to its embedding" in said
    assert "--untie" in said
    ok(*words, "--untie")
    a = tiny.written(tied)
    a["lm_head.weight"] = a["model.embed_tokens.weight"]
    b = tiny.written(own)
    pair = (a, b) if tied_side == "source" else (b, a)
    tiny.assert_close(tiny.written(tmp_path / "out"), oracle.interpolated(*pair, 0.25))
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    load("LlamaForCausalLM", tmp_path / "out")
    assert f"the {tied_side}'s tied head gets a tensor of its own" in notes(
        source, target, "--untie"
    )
    ok("verify", tmp_path / "out", "--recompute", 10)
    ok("apply", tmp_path / "out", tmp_path / "again")

    ok("coalesce", source, tmp_path / "small", "--width", 2)
    grow = ("decoalesce", tmp_path / "small", tmp_path / "grown", "--blend-with", target)
    assert "--untie" in run(*grow).output
    ok(*grow, "--untie")
    assert "lm_head.weight" in tiny.written(tmp_path / "grown")
    load("LlamaForCausalLM", tmp_path / "grown")


def test_untie_without_a_tied_head_is_refused(tmp_path: Path) -> None:
    own = save(tmp_path / "own", build("LlamaForCausalLM", LLAMA))
    said = run("interpolate", own, own, tmp_path / "out", "--alpha", 0.5, "--untie").output
    assert "no head is tied" in said


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"hidden_act": "gelu"}, ["hidden_act silu in the source, gelu in the target"]),
        ({"rms_norm_eps": 1e-4}, ["rms_norm_eps 1e-06 in the source, 0.0001 in the target"]),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
            ["rope_theta 10000.0 in the source, 500000.0 in the target"],
        ),
        (
            {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": None},
            ["rope_theta 10000.0 in the source, 500000.0 in the target"],
        ),
        (
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            ["rope_scaling.rope_type not given in the source, linear in the target"],
        ),
        ({"model_type": "mistral"}, ["model_type llama in the source, mistral in the target"]),
    ],
)
def test_settings_that_differ_are_told(
    tmp_path: Path, fields: Mapping[str, object], told: Iterable[str]
) -> None:
    one = save(tmp_path / "one", build("LlamaForCausalLM", LLAMA))
    two = save(tmp_path / "two", build("LlamaForCausalLM", LLAMA))
    set_fields(two, **fields)
    said = notes(one, two)
    for text in told:
        assert text in said
    assert "config.json is the target's; it differs" in said
    words = ("interpolate", one, two, tmp_path / "out", "--alpha", 0.5)
    assert "config.json is the target's" in ok(*words)
    # All of the source's weights, but not all of its function.
    plan = json.loads(ok("plan", "interpolate", one, two, "--alpha", 1, "--json"))
    assert plan["promise"] == "approximate"


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": None, "rope_theta": 10000.0},
        {"rope_parameters": None, "rope_theta": None},
        {"torch_dtype": "bfloat16", "use_cache": False, "transformers_version": "4.30.0"},
        {"attention_dropout": 0.3, "eos_token_id": 7, "_name_or_path": "x"},
    ],
)
def test_settings_that_change_nothing_are_not_told(
    tmp_path: Path, fields: Mapping[str, object]
) -> None:
    one = save(tmp_path / "one", build("LlamaForCausalLM", LLAMA))
    two = save(tmp_path / "two", build("LlamaForCausalLM", LLAMA))
    set_fields(two, **fields)
    assert "differs" not in notes(one, two)


def test_two_architectures_are_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "one", build("BertModel", TINY))
    two = save(tmp_path / "two", build("RobertaModel", TINY))
    said = run("interpolate", one, two, tmp_path / "out", "--alpha", 0.5).output
    assert "the source is a model of type bert, the target of roberta" in said


def test_two_layouts_of_one_model_are_told_apart(tmp_path: Path) -> None:
    config = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = build("MixtralForCausalLM", config)
    one = save(tmp_path / "one", model)
    model.save_pretrained(tmp_path / "two", save_original_format=False)  # type: ignore[operator]
    said = run("interpolate", one, tmp_path / "two", tmp_path / "out", "--alpha", 0.5).output
    assert "the same numbers in two layouts: the source has" in said
    assert "experts.0.w1.weight" in said
    assert "experts.gate_up_proj" in said


def test_other_tensors_that_one_lacks_are_still_refused(tmp_path: Path) -> None:
    one = save(tmp_path / "one", build("LlamaModel", LLAMA))
    two = save(tmp_path / "two", build("LlamaForCausalLM", {**LLAMA, "attention_bias": True}))
    with pytest.raises(PlanError, match=r"lacks model\.layers\.0\.self_attn\.k_proj\.bias"):
        streammap.open(one).interpolate(two, alpha=0.5)


def test_diff_compares_what_is_one_tensor(tmp_path: Path) -> None:
    config = {**GPT2}
    model = build("GPT2LMHeadModel", config)
    one = save(tmp_path / "one", model)
    two = without_prefix(save(tmp_path / "two", model), "transformer.")
    found = streammap.diff(one, two)
    assert found.is_equal
    assert found.n_equal == len(tiny.written(one))
    assert found.renamed["transformer.wte.weight"] == "wte.weight"
    said = ok("diff", one, two)
    assert "names    52 differ: transformer.h.0" in said

    state = tiny.written(two)
    state["lm_head.weight"] = state["wte.weight"].clone()
    tiny.write(two, state, json.loads((two / "config.json").read_text()))
    for a, b in ((one, two), (two, one)):
        found = streammap.diff(a, b)
        assert found.is_equal
        assert found.n_equal == len(state)
    state["lm_head.weight"][0, 0] += 1.0
    tiny.write(two, state, json.loads((two / "config.json").read_text()))
    (worst, *_) = streammap.diff(one, two).tensors
    assert (worst.key, worst.n_different) == ("lm_head.weight", 1)


T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
BART = {
    "vocab_size": 32,
    "d_model": 16,
    "max_position_embeddings": 20,
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 24 for side in ("encoder", "decoder")},
}


@pytest.mark.parametrize(
    ("name", "config", "base"),
    [
        ("T5ForConditionalGeneration", T5, ""),
        ("BartForConditionalGeneration", BART, "model."),
    ],
)
def test_an_embedding_that_old_files_store_four_times(
    tmp_path: Path, name: str, config: Mapping[str, object], base: str
) -> None:
    once = save(tmp_path / "once", build(name, config, seed=1))
    often = save(tmp_path / "often", build(name, config, seed=2))
    state = tiny.written(often)
    shared = f"{base}shared.weight"
    ends = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    copies = ["lm_head.weight", *(f"{base}{end}" for end in ends)]
    state |= {key: state[shared].clone() for key in copies}
    tiny.write(often, state, json.loads((often / "config.json").read_text()))
    mean = (tiny.written(once)[shared] + state[shared]) / 2
    for source, target in ((once, often), (often, once)):
        ok("interpolate", source, target, tmp_path / f"to_{target.name}", "--alpha", 0.5)
        got = tiny.written(tmp_path / f"to_{target.name}")
        assert got.keys() == tiny.written(target).keys()
        for key in (shared, *copies) if target is often else (shared,):
            torch.testing.assert_close(got[key], mean)
    assert streammap.diff(often, often).is_equal
    assert {d.key for d in streammap.diff(once, often).tensors} == state.keys()
