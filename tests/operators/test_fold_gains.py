"""Rotations of models whose norms have gains: these are folded into what reads the norms first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streammap
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.tools.spec_proof import tiny_models
from tests.support import tiny
from tests.support.typed import ok

F64 = torch.float64
N = 8
CONFIG: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": N,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
BEHIND = ("exaone4", "hyperclovax", "gemma2", "gemma2_tied", "gemma3_text", "gemma3_tied")
"""Models with norms that nothing but the residual stream reads."""
MODELS = [model for spec in ("llama", "gemma") for model in registry.tiny_models(spec)]


def build(folder: Path, model: TinyModel) -> None:
    """A tiny model whose gains differ."""
    tiny_models.build(model, folder)
    state, source = tiny.written(folder), torch.Generator().manual_seed(1)
    for key, x in state.items():
        if "norm" in key:
            state[key] = torch.randn(x.shape, generator=source, dtype=x.dtype)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def rotation(n: int) -> Tensor:
    source = torch.Generator().manual_seed(9)
    found: Tensor = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=source)).Q
    return found.contiguous()


ROTATION = rotation(N)


def maps(path: Path, matrix: Tensor = ROTATION) -> Path:
    save_file({"hidden.matrix": matrix.contiguous()}, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_a_rotation_with_folded_gains_keeps_the_function(model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    build(tmp_path / "source", model)
    big = streammap.open(tmp_path / "source")
    file = maps(tmp_path / "q.safetensors", rotation(big.sizes["embed"]))
    assert "--fold-gains" in big.remap(maps=file).promise[1]
    if model.name in BEHIND:
        with pytest.raises(PlanError, match=f"{model.model_type} names nothing that could take"):
            big.remap(maps=file, fold_gains=True)
        return
    if big.plan.model.tied:
        with pytest.raises(PlanError, match=r"norm\.weight: the head is the embedding") as refusal:
            big.remap(maps=file, fold_gains=True)
        assert "convert SRC OUT --untie" in str(refusal.value.hint)
        big = big.convert(untie=True)
    lazy = big.remap(maps=file, fold_gains=True)
    assert lazy.promise[0] == "exact", lazy.promise
    lazy.save(tmp_path / "out", fsync=False)
    found, expected = (tiny_models.outputs(tmp_path / name, model) for name in ("out", "source"))
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=1e-9, atol=1e-9)


def llama(folder: Path) -> Path:
    shapes = {
        "model.embed_tokens.weight": (7, N),
        "model.norm.weight": (N,),
        "lm_head.weight": (7, N),
    }
    at = "model.layers.0."
    shapes |= {f"{at}self_attn.{p}_proj.weight": (N, N) for p in "qkvo"}
    shapes |= {f"{at}mlp.{p}_proj.weight": (12, N) for p in ("gate", "up")}
    shapes |= {f"{at}mlp.down_proj.weight": (N, 12)}
    shapes |= {f"{at}{n}_layernorm.weight": (N,) for n in ("input", "post_attention")}
    state = {key: x.to(F64) for key, x in tiny.random(shapes, seed=3).items()}
    config = {**CONFIG, "model_type": "llama", "num_hidden_layers": 1, "num_key_value_heads": 2}
    return tiny.write(folder, state, {**config, "vocab_size": 7, "rms_norm_eps": 1e-6})


def test_gains_go_into_what_reads_their_norm(tmp_path: Path) -> None:
    source, file = llama(tmp_path / "llama"), maps(tmp_path / "q.safetensors")
    ok("remap", source, tmp_path / "out", "--maps", file, "--fold-gains", "--no-fsync")
    found, state = tiny.written(tmp_path / "out"), tiny.written(source)
    gains = {"q_proj": "input", "k_proj": "input", "v_proj": "input"}
    gains |= {"gate_proj": "post_attention", "up_proj": "post_attention"}
    for key, x in state.items():
        name = key.split(".")[-2]
        if x.dim() == 1:
            wanted = torch.ones_like(x)
        elif name in ("o_proj", "down_proj"):
            wanted = torch.einsum("ij,jk->ik", ROTATION, x)
        else:
            gain = torch.ones(N, dtype=F64)
            if name == "lm_head":
                gain = state["model.norm.weight"]
            if name in gains:
                gain = state[f"model.layers.0.{gains[name]}_layernorm.weight"]
            wanted = torch.einsum("ij,j,kj->ik", x, gain, ROTATION)
        torch.testing.assert_close(found[key], wanted, rtol=1e-12, atol=1e-12)
    ok("apply", tmp_path / "out", tmp_path / "again", "--no-fsync")
    assert tiny.written(tmp_path / "again").keys() == found.keys()
    for key, x in tiny.written(tmp_path / "again").items():
        assert torch.equal(x, found[key])


def test_gains_that_nothing_can_take_are_refused(tmp_path: Path) -> None:
    sizes = tiny.Sizes(heads=2, layers=1, head_dim=4, vocab=5)
    bert = streammap.open(tiny.write(tmp_path / "bert", tiny.bert(sizes), tiny.bert_config(sizes)))
    file = maps(tmp_path / "q.safetensors")
    with pytest.raises(PlanError, match="a LayerNorm takes the mean off"):
        bert.remap(maps=file, fold_gains=True)
    state = tiny.written(llama(tmp_path / "llama"))
    config = {**CONFIG, "model_type": "gemma2", "head_dim": 4, "num_hidden_layers": 1}
    config |= {"num_key_value_heads": 2, "vocab_size": 7}
    at = "model.layers.0."
    state |= {
        f"{at}{n}_feedforward_layernorm.weight": torch.ones(N, dtype=F64) for n in ("pre", "post")
    }
    gemma = streammap.open(tiny.write(tmp_path / "gemma", state, config))
    with pytest.raises(
        PlanError, match=r"post_attention_layernorm\.weight: the spec of gemma2 names nothing"
    ):
        gemma.remap(maps=file, fold_gains=True)
    half = maps(tmp_path / "half.safetensors", ROTATION[: N // 2])
    with pytest.raises(PlanError, match="no map is a rotation"):
        streammap.open(tmp_path / "llama").remap(maps=half, fold_gains=True)
