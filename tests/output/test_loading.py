"""load_into: models filled in place have what from_pretrained of the written folder has."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import streammap
from streammap.common import optional
from streammap.common.events import Event, Finished, Started, Wrote
from streammap.engine import evaluate
from streammap.errors import OutputError, PlanError
from streammap.output.module import load, symbolic
from streammap.planning.plan import Plan
from tests.support import tiny

SIZES = tiny.Sizes()
_BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 101,
    "max_position_embeddings": 40,
}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "vocab_size": 101,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 101,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
_MOE = {
    **_LLAMA,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "eos_token_id": 2,
}
_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 101}
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", _BERT),
    "bert_head": ("BertForMaskedLM", _BERT),
    "bert_classes": ("BertForSequenceClassification", _BERT),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2_bare": ("GPT2Model", _GPT2),
    "llama_tied": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "llama": ("LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": False}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _MOE),
    "t5": ("T5ForConditionalGeneration", _T5),
}


def _class(name: str) -> Any:
    return getattr(transformers, CASES[name][0])


def _config(name: str, fields: Mapping[str, object] | None) -> Any:
    return _class(name).config_class(**(fields or CASES[name][1]))


def _made(name: str, fields: Mapping[str, object] | None = None, *, meta: bool = False) -> Any:
    with torch.device("meta" if meta else "cpu"):
        return _class(name)(_config(name, fields))


@pytest.fixture(autouse=True)
def _quietly() -> Iterator[None]:
    with optional.quiet():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with a random model of each case."""
    folder = tmp_path_factory.mktemp("models")

    def found(name: str) -> Path:
        if not (folder / name).exists():
            torch.manual_seed(0)
            model = _made(name)
            with torch.no_grad(), optional.quiet():
                for parameter in model.parameters():
                    parameter.normal_()
                model.save_pretrained(folder / name)
        return folder / name

    return found


def _all(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def assert_same(got: nn.Module, wanted: nn.Module) -> None:
    found, expected = _all(got), _all(wanted)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        y = expected[name]
        assert (x.dtype, x.device, x.requires_grad) == (y.dtype, y.device, y.requires_grad), name
        assert tiny.bits(x.detach()) == tiny.bits(y.detach()), name
    assert len(list(got.parameters())) == len(list(wanted.parameters()))


_MORE = ("bert_classes", "gpt2_bare")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in _MORE else []) for n in CASES]
)
def test_a_filled_model_is_the_loaded_one(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    lazy = streammap.open(saved(name)).coalesce(width=2, depth=2)
    lazy.save(tmp_path / "out")
    for dtype in (torch.float32, torch.bfloat16):
        wanted = _class(name).from_pretrained(tmp_path / "out", dtype=dtype)
        for meta in (False, True) if dtype is torch.float32 else (True,):
            model = _made(name, lazy.config, meta=meta)
            report = streammap.load_into(model, lazy, dtype=dtype)
            assert_same(model, wanted)
            assert report.n_tensors == len(model.state_dict()) - len(model.all_tied_weights_keys)
            assert (report.missing, report.unexpected, report.on_meta) == ((), (), ())
    model.save_pretrained(tmp_path / "again")
    assert set(streammap.open(tmp_path / "again").keys()) == set(lazy.keys())


def test_a_chain_is_loaded_without_a_file_between(
    saved: Callable[[str], Path], tmp_path: Path
) -> None:
    big = streammap.open(saved("gpt2"))
    lazy = big.coalesce(width=2, depth=2).decoalesce().interpolate(big, alpha=0.25)
    lazy.save(tmp_path / "out")
    model = _made("gpt2", lazy.config, meta=True)
    events: list[Event] = []
    report = streammap.load_into(model, lazy, progress=events.append, threads=1)
    assert_same(model, _class("gpt2").from_pretrained(tmp_path / "out"))
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Finished)
    assert (
        sum(e.nbytes for e in events if isinstance(e, Wrote)) == report.nbytes == lazy.plan.nbytes
    )
    assert (report.n_threads, report.promise) == (1, "approximate")
    assert str(report).startswith("filled 52 tensors, 222 kB in ")
    assert json.dumps(report.as_json())


def test_what_to_empty_has_parted_is_tied_again(saved: Callable[[str], Path]) -> None:
    model = _made("llama_tied", meta=True).to_empty(device="cpu")
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    streammap.load_into(model, saved("llama_tied"))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = _class("llama_tied").from_pretrained(saved("llama_tied"))
    assert torch.equal(model.lm_head.weight, wanted.lm_head.weight)


def test_what_is_to_stay_in_float32_does(saved: Callable[[str], Path]) -> None:
    wanted = _class("t5").from_pretrained(saved("t5"), dtype=torch.float16)
    model = _made("t5", meta=True)
    streammap.load_into(model, saved("t5"), dtype=torch.float16)
    assert_same(model, wanted)
    assert {x.dtype for x in model.parameters()} == {torch.float16, torch.float32}


@pytest.mark.parametrize(
    ("source", "into"), [("gpt2", "gpt2_bare"), ("gpt2_bare", "gpt2"), ("bert", "bert_head")]
)
def test_a_model_takes_names_with_and_without_its_prefix(
    source: str, into: str, saved: Callable[[str], Path]
) -> None:
    torch.manual_seed(0)
    wanted, told = _class(into).from_pretrained(saved(source), output_loading_info=True)
    for meta in (False, True):
        model = _made(into, meta=meta)
        report = streammap.load_into(model, saved(source), strict=False)
        assert set(report.missing) == set(told["missing_keys"])
        filled = set(_all(model)) - set(report.missing) - {"cls.predictions.decoder.bias"}
        for name in filled:
            assert tiny.bits(_all(model)[name].detach()) == tiny.bits(_all(wanted)[name].detach())
        assert report.on_meta == ()


def test_a_head_that_no_checkpoint_has_begins_as_one_does(saved: Callable[[str], Path]) -> None:
    model = _made("bert_classes", meta=True)
    report = streammap.load_into(model, saved("bert"), strict=False)
    assert report.missing == ("classifier.weight", "classifier.bias")
    assert torch.equal(model.classifier.bias, torch.zeros(2))
    assert 0.01 < float(model.classifier.weight.detach().std()) < 0.04
    before = _made("bert_classes")
    kept = before.classifier.weight.clone()
    streammap.load_into(before, saved("bert"), strict=False)
    assert torch.equal(before.classifier.weight, kept)


def test_what_a_class_does_without_is_made(tmp_path: Path) -> None:
    """Marian's positions are computed, and in no file."""
    kind = transformers.MarianMTModel
    config = transformers.MarianConfig(
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        vocab_size=31,
        max_position_embeddings=12,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        bos_token_id=2,
        forced_eos_token_id=1,
    )
    kind(config).save_pretrained(tmp_path)
    with torch.device("meta"):
        model = kind(config)
    report = streammap.load_into(model, tmp_path)
    assert (report.missing, report.on_meta) == ((), ())
    wanted = _all(kind.from_pretrained(tmp_path))
    assert {n: tiny.bits(x.detach()) for n, x in _all(model).items()} == {
        n: tiny.bits(x.detach()) for n, x in wanted.items()
    }


def test_gamma_and_beta_are_known(saved: Callable[[str], Path], tmp_path: Path) -> None:
    state = {
        key.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): x
        for key, x in streammap.open(saved("bert")).tensors()
    }
    tiny.write(tmp_path, state, json.loads((saved("bert") / "config.json").read_text()))
    model = _made("bert", meta=True)
    streammap.load_into(model, tmp_path)
    assert_same(model, _class("bert").from_pretrained(saved("bert")))


def test_a_conversion_that_computes_is_refused(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {k: v for k, v in symbolic._FUNCTIONS.items() if k != "stack"}
    monkeypatch.setattr(symbolic, "_FUNCTIONS", without)
    expected = (
        r"model\.layers\.0\.mlp\.experts\.\w+: transformers makes it of "
        r"model\.layers\.0\.mlp\.experts\.0\.\w+\.weight by more than moving numbers: torch\.stack"
    )
    with pytest.raises(PlanError, match=expected):
        streammap.load_into(_made("qwen3_moe", meta=True), saved("qwen3_moe"))


# Plain modules.


class Tied(nn.Module):
    """A head that shares the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)


def _write(folder: Path, state: Mapping[str, Tensor]) -> streammap.LazyCheckpoint:
    tiny.write(folder, {key: x.clone() for key, x in state.items()}, None)
    return streammap.open(folder)


def _state(*, seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = Tied().state_dict()
    state["norm.num_batches_tracked"] = torch.tensor(3)
    return state


@pytest.mark.parametrize("meta", [False, True])
def test_tied_parameters_are_filled_once_and_stay_tied(tmp_path: Path, meta: bool) -> None:
    state = _state()
    both = _write(tmp_path / "both", state)
    del state["head.weight"]
    for lazy in (both, _write(tmp_path / "one", state)):
        with torch.device("meta" if meta else "cpu"):
            model = Tied()
        report = streammap.load_into(model, lazy)
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.embed.weight, state["embed.weight"])
        assert int(model.norm.num_batches_tracked or 0) == 3
        assert report.n_tensors == 6


def test_tied_parameters_of_two_values_are_refused(tmp_path: Path) -> None:
    state = _state()
    state["head.weight"] = state["embed.weight"] + 1
    expected = r"embed\.weight, head\.weight are one tensor in the module, and differ in the checkp"
    with pytest.raises(PlanError, match=expected):
        streammap.load_into(Tied(), _write(tmp_path, state))


def test_names_that_do_not_fit_are_told_and_nothing_is_touched(tmp_path: Path) -> None:
    state = _state(seed=1)
    del state["norm.weight"]
    lazy = _write(tmp_path, {**state, "more": torch.ones(2)})
    model = Tied()
    before = {key: x.clone() for key, x in model.state_dict().items()}
    expected = (
        "the module's names are not the checkpoint's: 1 missing: norm.weight; 1 unexpected: more"
    )
    with pytest.raises(PlanError, match=expected):
        streammap.load_into(model, lazy)
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())
    report = streammap.load_into(model, lazy, strict=False)
    assert (report.missing, report.unexpected) == (("norm.weight",), ("more",))
    assert torch.equal(model.embed.weight, state["embed.weight"])
    assert torch.equal(model.norm.weight, before["norm.weight"])


def test_shapes_and_kinds_that_do_not_fit_are_told(tmp_path: Path) -> None:
    state = {**_state(), "norm.weight": torch.ones(3)}
    with pytest.raises(PlanError, match=r"norm.weight: the checkpoint has \[3\], the module \[4\]"):
        streammap.load_into(Tied(), _write(tmp_path / "a", state), strict=False)
    state = {**_state(), "norm.num_batches_tracked": torch.tensor(1.5)}
    expected = r"num_batches_tracked: F32 of the checkpoint would become torch\.int64"
    with pytest.raises(PlanError, match=expected):
        streammap.load_into(Tied(), _write(tmp_path / "b", state))


def test_dtypes_are_the_modules_or_as_asked_for(tmp_path: Path) -> None:
    state = _state()
    lazy = _write(tmp_path, state)
    half = Tied().to(torch.bfloat16)
    parameters = list(half.parameters())
    streammap.load_into(half, lazy)
    assert all(a is b for a, b in zip(half.parameters(), parameters, strict=True))
    assert torch.equal(half.embed.weight, state["embed.weight"].bfloat16())
    streammap.load_into(half, lazy, dtype=torch.float64)
    assert torch.equal(half.embed.weight, state["embed.weight"].double())
    assert half.head.weight is half.embed.weight
    assert half.norm.num_batches_tracked is not None
    assert half.norm.num_batches_tracked.dtype == torch.int64
    whole = Tied()
    parameters = list(whole.parameters())
    whole.embed.weight.requires_grad_(False)
    streammap.load_into(whole, lazy)
    assert all(a is b for a, b in zip(whole.parameters(), parameters, strict=True))
    assert not whole.embed.weight.requires_grad


class Rotary(nn.Module):
    """With a buffer that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("inv_freq", torch.ones(3), persistent=False)


def test_buffers_that_nobody_can_fill_are_refused(tmp_path: Path) -> None:
    lazy = _write(tmp_path, {"weight": torch.ones(2)})
    with torch.device("meta"):
        model = Rotary()
    expected = "1 buffers are on the meta device, and no checkpoint holds them: inv_freq"
    with pytest.raises(PlanError, match=expected):
        streammap.load_into(model, lazy)
    assert model.weight.is_meta
    assert streammap.load_into(model, lazy, strict=False).on_meta == ("inv_freq",)
    assert torch.equal(model.weight, torch.ones(2))
    assert streammap.load_into(Rotary(), lazy).on_meta == ()


def test_a_module_that_is_wrapped_is_found(tmp_path: Path) -> None:
    class Compiled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    lazy, model = _write(tmp_path, _state()), Tied()
    streammap.load_into(Compiled(model), lazy)
    assert torch.equal(model.embed.weight, _state()["embed.weight"])


def test_the_memory_is_asked_for(tmp_path: Path) -> None:
    lazy = _write(tmp_path, _state())
    with pytest.raises(OutputError, match=r"memory 1 MiB: this run takes at least \d+ MiB"):
        streammap.load_into(Tied(), lazy, memory="1MiB")
    report = streammap.load_into(Tied(), lazy, memory="24MiB", reader="mmap")
    assert report.planned_nbytes <= 24 * 2**20
    assert isinstance(report, load.LoadReport)


# The lazy state dict.


def test_a_lazy_state_dict_computes_what_is_asked_for(tmp_path: Path) -> None:
    state = _state()
    lazy = _write(tmp_path, state)
    found = lazy.state_dict()
    reads: list[str] = []
    read = evaluate.read_tensor

    def counted(plan: Plan, key: str) -> Tensor:
        reads.append(key)
        return read(plan, key)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(evaluate, "read_tensor", counted)
        assert len(found) == len(state)
        assert set(found) == set(state)
        assert "embed.weight" in found
        assert "nothing" not in found
        assert repr(found) == "<lazy state dict of 7 tensors>"
        assert reads == []
        assert torch.equal(found["embed.weight"], state["embed.weight"])
        assert reads == ["embed.weight"]
    with pytest.raises(KeyError):
        found["nothing"]
    with torch.device("meta"):
        model = Tied()
    model.load_state_dict(found, assign=True)
    assert torch.equal(model.embed.weight, state["embed.weight"])
