"""Experts one by one and stacked, both ways, against what transformers itself writes."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import streammap
from streammap.architectures import parser, registry
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from tests.support import tiny
from tests.support.typed import ok

FAST = ("qwen3_moe", "mixtral")


def _models() -> Iterator[tuple[str, str]]:
    """(spec, tiny model) of each spec with a mixture of experts: one for each model type."""
    for name in registry.names():
        spec = registry.load(name, {})
        if not spec.experts or not spec.layout:
            continue
        seen: set[str] = set()
        for model in _tiny_models(name):
            kind = model.model_type or model.name
            has_experts = any("expert" in field for field in model.config)
            if kind not in seen and has_experts and model.class_name.endswith("ForCausalLM"):
                seen.add(kind)
                yield name, model.name


def _tiny_models(spec: str) -> tuple[TinyModel, ...]:
    path = Path(parser.__file__).parent / "specs" / f"{spec}.toml"
    return parser.tiny_models(spec, tomllib.loads(path.read_text()))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        pytest.param(spec, name, marks=[] if name in FAST else pytest.mark.slow)
        for spec, name in _models()
    ],
)
def test_layouts_are_those_of_transformers(spec: str, name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = next(one for one in _tiny_models(spec) if one.name == name)
    cls = getattr(transformers, model.class_name)
    square = {n: 48 for n in ("intermediate_size", "moe_intermediate_size") if n in model.config}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model.model_type or model.name, **{**model.config, **square}
    )
    net = cls(config).to(torch.bfloat16)
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
    net.save_pretrained(tmp_path / "hub")
    net.save_pretrained(tmp_path / "runtime", save_original_format=False)
    hub, runtime = (tiny.written(tmp_path / name) for name in ("hub", "runtime"))
    assert hub.keys() != runtime.keys()
    ok("convert", tmp_path / "hub", tmp_path / "fused", "--layout", "runtime")
    tiny.assert_same(tiny.written(tmp_path / "fused"), runtime)
    streammap.convert(tmp_path / "runtime", tmp_path / "split", layout="hub")
    tiny.assert_same(tiny.written(tmp_path / "split"), hub)
    ok("convert", tmp_path / "fused", tmp_path / "back", "--layout", "hub")
    names = ["model.safetensors", "config.json"]
    for name in names:
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hub" / name).read_bytes()
    loaded = cls.from_pretrained(tmp_path / "fused", dtype=torch.bfloat16)
    states = [{k: x.to(torch.bfloat16) for k, x in n.state_dict().items()} for n in (loaded, net)]
    tiny.assert_same(*states)


SQUARE = {"hidden_size": 8, "moe_intermediate_size": 8}


def _qwen3_moe(folder: Path) -> tuple[Path, tiny.State]:
    """Two layers, three square experts each, one by one."""
    shapes = {
        "model.embed_tokens.weight": (11, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (11, 8),
    }
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {
            f"{layer}{n}.weight": (8,) for n in ("input_layernorm", "post_attention_layernorm")
        }
        shapes |= {f"{layer}self_attn.{p}_proj.weight": (8, 8) for p in "qkvo"}
        shapes |= {f"{layer}self_attn.{n}_norm.weight": (4,) for n in "qk"}
        shapes[f"{layer}mlp.gate.weight"] = (3, 8)
        for e in range(3):
            parts = ("gate_proj", "up_proj", "down_proj")
            shapes |= {f"{layer}mlp.experts.{e}.{part}.weight": (8, 8) for part in parts}
    config = {
        "model_type": "qwen3_moe",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 8,
        "moe_intermediate_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_experts": 3,
        "tie_word_embeddings": False,
    }
    state = dict(sorted(tiny.random(shapes).items()))
    return tiny.write(folder, state, config), state


def test_square_experts_keep_their_sides(tmp_path: Path) -> None:
    source, state = _qwen3_moe(tmp_path / "hub")
    streammap.convert(source, tmp_path / "runtime", layout="runtime")
    fused = tiny.written(tmp_path / "runtime")
    for i in range(2):
        one = f"model.layers.{i}.mlp.experts."
        for e in range(3):
            parts = [state[f"{one}{e}.{part}.weight"] for part in ("gate_proj", "up_proj")]
            assert torch.equal(fused[f"{one}gate_up_proj"][e], torch.cat(parts))
            assert torch.equal(fused[f"{one}down_proj"][e], state[f"{one}{e}.down_proj.weight"])
    again = ok("convert", tmp_path / "runtime", tmp_path / "same", "--layout", "runtime")
    assert "the experts are in the runtime layout already" in again
    ok("convert", tmp_path / "runtime", tmp_path / "back", "--layout", "hub")
    same = (tmp_path / name / "model.safetensors" for name in ("back", "hub"))
    assert len({file.read_bytes() for file in same}) == 1


def test_a_computed_result_changes_its_layout_in_the_same_pass(tmp_path: Path) -> None:
    source, _ = _qwen3_moe(tmp_path / "hub")
    lazy = streammap.open(source).coalesce(mlp=2)
    lazy.save(tmp_path / "small")
    lazy.convert(layout="runtime", dtype="bfloat16").save(
        tmp_path / "once", memory="64MiB", threads=3
    )
    streammap.convert(tmp_path / "small", tmp_path / "twice", layout="runtime", dtype="bf16")
    tiny.assert_same(tiny.written(tmp_path / "once"), tiny.written(tmp_path / "twice"))
    assert ok("verify", tmp_path / "once", "--recompute", "100", "--no-class-check")
    small = streammap.open(tmp_path / "hub").convert(layout="runtime").coalesce(mlp=2)
    tiny.assert_same(dict(small.convert(layout="hub").tensors()), dict(lazy.tensors()))


def test_experts_that_lack_a_part_and_models_without_experts_are_refused(tmp_path: Path) -> None:
    source, state = _qwen3_moe(tmp_path / "hub")
    bert = tiny.write(tmp_path / "b", tiny.bert(tiny.Sizes()), tiny.bert_config(tiny.Sizes()))
    with pytest.raises(PlanError, match="bert has no experts"):
        streammap.open(bert).convert(layout="hub")
    key = "model.layers.0.mlp.experts.1.up_proj.weight"
    state[key] = state[key].bfloat16()
    tiny.write(source, state, None)
    with pytest.raises(PlanError, match=r"gate_up_proj: its experts are of several kinds: BF16 .*"):
        streammap.open(source).convert(layout="runtime")
