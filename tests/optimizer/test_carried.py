"""An optimizer's state through every kind of operator: files, forms, records, modules."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammap
from streammap.analysis.verification import verify
from streammap.errors import PlanError
from streammap.tools.spec_proof import tiny_models
from tests.support import optimized, oracle, tiny, truth, typed


def state(folder: Path, name: str, what: str = "exp_avg") -> Tensor:
    return optimized.written(folder)[name][what]


def plain(folder: Path, trained: Path) -> optimized.StateDict:
    """The state of the source, whose file has numbers: names in the order of the class."""
    content = torch.load(trained / optimized.FILE, weights_only=True)
    groups = torch.load(folder / optimized.FILE)["param_groups"]
    for group, like in zip(content["param_groups"], groups, strict=True):
        group["param_names"] = like["param_names"]
    return optimized.named(content)


def test_from_the_command_line_and_back(trained: Path, tmp_path: Path) -> None:
    told = typed.ok("decoalesce", trained, tmp_path / "wide", "--width", 2, "--optimizer")
    assert "the optimizer's state goes along: exp_avg, exp_avg_sq of 21 parameters" in told
    assert "learning rate x 0.5, eps x 0.5, weight decay x 2" in told
    typed.ok("coalesce", tmp_path / "wide", tmp_path / "back", "--optimizer")
    found, wanted = optimized.written(tmp_path / "back"), plain(tmp_path / "back", trained)
    assert list(found) == list(wanted)
    for name, kept in wanted.items():
        assert torch.equal(found[name]["exp_avg"], kept["exp_avg"]), name
        assert torch.equal(found[name]["step"], kept["step"])
    groups = torch.load(tmp_path / "wide" / optimized.FILE)["param_groups"]
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in groups] == [
        (1e-3, 0.1, 16),
        (1e-3, 0.0, 5),
    ]
    verified = verify(tmp_path / "wide", recompute=20)
    assert verified.ok, str(verified)
    assert not verified.skipped
    assert verified.n_tensors == 21 + 3 * 21
    typed.ok("apply", tmp_path / "wide", tmp_path / "again")
    for name in (optimized.FILE, "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "wide" / name).read_bytes()


def test_damage_of_the_state_is_found(trained: Path, tmp_path: Path) -> None:
    streammap.decoalesce(trained, tmp_path / "wide", width=2, optimizer=True)
    file = tmp_path / "wide" / optimized.FILE
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert {"crc32"} == {found.check for found in verify(tmp_path / "wide").findings}
    file.unlink()
    assert not verify(tmp_path / "wide").ok


def test_merged_units_add_up_their_gradients(trained: Path, tmp_path: Path) -> None:
    pairs = [[2 * i, 2 * i + 1] for i in range(8)]
    streammap.coalesce(trained, tmp_path / "small", hidden=[*pairs], optimizer=True)
    name = "model.layers.0.mlp.gate_proj.weight"
    source = plain(tmp_path / "small", trained)[name]
    mean = oracle.merging(pairs, 16)
    wanted = source["exp_avg"].double() @ mean.double().T
    assert torch.allclose(state(tmp_path / "small", name).double(), wanted, atol=1e-7)
    wanted = source["exp_avg_sq"].double() @ (mean.double() ** 2).T
    found = state(tmp_path / "small", name, "exp_avg_sq")
    assert torch.allclose(found.double(), wanted, rtol=1e-5, atol=0)
    name = "model.embed_tokens.weight"
    wanted = plain(tmp_path / "small", trained)[name]["exp_avg"] @ (2 * mean.float()).T
    assert torch.allclose(state(tmp_path / "small", name), wanted, atol=1e-7)


def test_new_units_may_begin_at_zero(trained: Path, tmp_path: Path) -> None:
    typed.ok(
        "decoalesce", trained, tmp_path / "wide", "--mlp", 2, "--optimizer", "--new-state", "zero"
    )
    streammap.decoalesce(trained, tmp_path / "copied", mlp=2, optimizer=True)
    name = "model.layers.1.mlp.down_proj.weight"
    copied, found = state(tmp_path / "copied", name), state(tmp_path / "wide", name)
    (first, second), (kept, new) = copied.chunk(2, dim=1), found.chunk(2, dim=1)
    assert torch.equal(first, second)
    assert torch.equal(kept, first)
    assert not new.any()
    assert first.any()


def test_moments_from_zero_tell_copies_apart(trained: Path, tmp_path: Path) -> None:
    """The plan says of equal moments that copies stay equal, of others it does not."""
    transformers = pytest.importorskip("transformers")
    name = "model.layers.0.mlp.up_proj.weight"
    for new_state in ("copy", "zero"):
        wide = streammap.open(trained).decoalesce(mlp=2).carry_optimizer(new_state=new_state)
        wide.save(tmp_path / new_state, fsync=False)
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / new_state)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        streammap.load_optimizer_into(optimizer, model, wide)
        optimized.train(optimizer, partial(_loss, model), 1)
        first, second = model.get_parameter(name).detach().chunk(2)
        assert torch.equal(first, second) == (new_state == "copy")
        stay = any("they stay equal in training" in note for note in wide.plan.notes)
        assert stay == (new_state == "copy")


def _loss(model: Any) -> Tensor:
    x = torch.arange(12).view(2, 6)
    loss: Tensor = model(input_ids=x, labels=x).loss
    return loss


def test_noise_leaves_the_rates_of_the_steps(trained: Path) -> None:
    plain, noisy = (
        streammap.open(trained).decoalesce(width=2, noise=noise).carry_optimizer().step_factors
        for noise in (None, 10.0)
    )
    assert noisy == plain
    assert len(plain) == 21
    shares = streammap.open(trained).decoalesce(width=3, split=0.7).carry_optimizer()
    assert not shares.step_factors
    assert "21 parameters have no one learning rate that keeps the steps" in shares.plan.notes


def test_layers_keep_their_own(trained: Path, tmp_path: Path) -> None:
    at = "model.layers.{}.mlp.up_proj.weight".format
    streammap.decoalesce(trained, tmp_path / "deep", layers=[[0, 1], [2, 3]], optimizer=True)
    for i in range(4):
        assert torch.equal(state(tmp_path / "deep", at(i)), state_of(trained, tmp_path, at(i // 2)))
    streammap.decoalesce(
        trained, tmp_path / "new", layers=[[0, 1], [2, 3]], new_layers="zero", optimizer=True
    )
    found = optimized.written(tmp_path / "new")
    new = [i for i in range(4) if not found[at(i)]["exp_avg"].any()]
    assert new == [1, 3]
    assert [float(found[at(i)]["step"]) for i in range(4)] == [2, 0, 2, 0]
    streammap.coalesce(trained, tmp_path / "shallow", depth=2, optimizer=True)
    wanted = (state_of(trained, tmp_path, at(0)) + state_of(trained, tmp_path, at(1))) / 2
    assert torch.allclose(state(tmp_path / "shallow", at(0)), wanted, atol=1e-9)


def state_of(trained: Path, folder: Path, name: str) -> Tensor:
    """A mean of the source."""
    if not (folder / "same").exists():
        streammap.convert(trained, folder / "same", optimizer=True)
    return state(folder / "same", name)


def test_blends_are_means_of_both(trained: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    content = torch.load(other / optimized.FILE)
    for kept in content["state"].values():
        kept["exp_avg"] *= 3
        kept["exp_avg_sq"] *= 9
    torch.save(content, other / optimized.FILE)
    typed.ok("blend", trained, other, "-o", tmp_path / "mean", "--optimizer")
    typed.ok("interpolate", trained, other, tmp_path / "between", "--alpha", 0.25, "--optimizer")
    name = "model.layers.0.self_attn.q_proj.weight"
    for what, times in (("exp_avg", (2.0, 2.5)), ("exp_avg_sq", (5.0, 7.0))):
        plain_state = plain(tmp_path / "mean", trained)[name][what]
        for folder, n in zip(("mean", "between"), times, strict=True):
            found = state(tmp_path / folder, name, what)
            assert torch.allclose(found, n * plain_state, rtol=1e-6, atol=0)
    with pytest.raises(PlanError, match="slerp is no weighted sum"):
        streammap.blend(trained, other, method="slerp", t=0.5).carry_optimizer()
    with pytest.raises(PlanError, match="squared gradients would be summed with a negative"):
        streammap.blend(trained, other, weights="2,-1").carry_optimizer()


@pytest.mark.slow
def test_dtypes_and_layouts_are_the_optimizer_s_own(trained: Path, tmp_path: Path) -> None:
    model = truth.named("mixtral", "mixtral")
    tiny_models.build(model, tmp_path / "moe")
    shapes = {
        n: x.shape for n, x in streammap.open(tmp_path / "moe").convert(layout="runtime").tensors()
    }
    means = {n: {"exp_avg": torch.randn(shape)} for n, shape in shapes.items()}
    optimized.write(tmp_path / "moe" / optimized.FILE, means)  # as the class has its experts
    for layout in ("hub", "runtime"):
        out = tmp_path / layout
        streammap.convert(tmp_path / "moe", out, layout=layout, optimizer=True)
        found = optimized.written(out)
        assert all(torch.equal(found[n]["exp_avg"], means[n]["exp_avg"]) for n in shapes)
    streammap.convert(trained, tmp_path / "half", dtype="bfloat16", optimizer=True)
    assert state(tmp_path / "half", "lm_head.weight").dtype is torch.float32
    assert streammap.open(tmp_path / "half").spec("lm_head.weight").dtype == "BF16"


def test_tied_heads_have_one_gradient(tmp_path: Path) -> None:
    sizes = tiny.Sizes(layers=1)
    weights = tiny.gpt2(sizes)
    weights["lm_head.weight"] = weights["wte.weight"].clone()
    config = {**tiny.gpt2_config(sizes), "architectures": ["GPT2LMHeadModel"]}
    tiny.write(tmp_path / "untied", weights, {**config, "tie_word_embeddings": False})
    means = {n: {"exp_avg": torch.randn_like(x)} for n, x in weights.items()}
    optimized.write(tmp_path / "untied" / optimized.FILE, means)
    streammap.convert(tmp_path / "untied", tmp_path / "tied", tie=True, optimizer=True)
    found = optimized.written(tmp_path / "tied")
    assert "lm_head.weight" not in found
    both = means["wte.weight"]["exp_avg"] + means["lm_head.weight"]["exp_avg"]
    assert torch.allclose(found["wte.weight"]["exp_avg"], both)
    streammap.convert(tmp_path / "tied", tmp_path / "again", untie=True, vocab=16, optimizer=True)
    found = optimized.written(tmp_path / "again")
    for name in ("wte.weight", "lm_head.weight"):
        assert torch.equal(found[name]["exp_avg"][:11], both.float())
        assert not found[name]["exp_avg"][11:].any()


@pytest.mark.slow
def test_dcp_and_torch_have_the_same_state(trained: Path, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    streammap.decoalesce(
        trained, tmp_path / "dcp", width=2, optimizer=True, format="dcp", nest="model"
    )
    streammap.decoalesce(trained, tmp_path / "plain", width=2, optimizer=True)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "all.pt")
    content = torch.load(tmp_path / "all.pt")["optim"]
    wanted = optimized.written(tmp_path / "plain")
    for name, kept in content["state"].items():
        assert all(torch.equal(kept[what], wanted[name][what]) for what in kept), name
    assert [g["params"] for g in content["param_groups"]] == [
        g["param_names"] for g in torch.load(tmp_path / "plain" / optimized.FILE)["param_groups"]
    ]
    assert verify(tmp_path / "dcp", recompute=5).ok
    typed.ok("coalesce", tmp_path / "dcp", tmp_path / "back", "--optimizer")
    assert list(optimized.written(tmp_path / "back")) == list(wanted)


def test_an_optimizer_is_filled_in_place(trained: Path) -> None:
    transformers = pytest.importorskip("transformers")
    lazy = streammap.open(trained).decoalesce(width=2).carry_optimizer()
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig.from_dict(dict(lazy.config or {}))
    )
    streammap.load_into(model, lazy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5.0)
    report = streammap.load_optimizer_into(optimizer, model, lazy)
    assert report.n_tensors == 42
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], lazy.read(f"optim.state.{name}.exp_avg"))
        assert optimizer.state[p]["step"] == 2
    assert optimizer.param_groups[0]["lr"] == 5.0  # of one group, the state has two
    with pytest.raises(PlanError, match="no optimizer's state in this plan"):
        streammap.load_optimizer_into(optimizer, model, streammap.open(trained))
    other = transformers.LlamaForCausalLM.from_pretrained(trained)
    with pytest.raises(PlanError, match=r"its state has \[31, 32\], the model \[31, 16\]"):
        streammap.load_optimizer_into(torch.optim.AdamW(other.parameters()), other, lazy)


def test_what_has_no_place_for_it_says_so(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(streammap.OutputError, match="no place for the optimizer's state"):
        streammap.convert(trained, tmp_path / "out.safetensors", optimizer=True)
    with pytest.raises(PlanError, match="--new-state needs --optimizer"):
        streammap.decoalesce(trained, tmp_path / "out", width=2, new_state="zero")
    carried = streammap.open(trained).carry_optimizer()
    with pytest.raises(PlanError, match="take the state along last"):
        carried.decoalesce(width=2)
    opened = {"operator": "open", "path": str(trained)}
    record = {"operator": "carry-optimizer", "source": opened}
    assert len(streammap.open_request(record).keys()) == 21 * 4
