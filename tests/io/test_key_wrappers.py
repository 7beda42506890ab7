"""Keys as wrappers of modules write them: taken off, in each format; what is an adapter is told."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammap
from streammap.errors import CheckpointError
from streammap.io.key_wrappers import unwrap
from tests.support import tiny
from tests.support.tiny import State
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=4, layers=4)
PLAIN = tiny.gpt2(SIZES, base="transformer.")
CONFIG = tiny.gpt2_config(SIZES)
BLOCK = "transformer.h."


def per_block(wrapper: str) -> Callable[[str], str]:
    """Only what is in a block has the wrapper, behind the block's number."""

    def name(key: str) -> str:
        if not key.startswith(BLOCK):
            return key
        number, _, rest = key.removeprefix(BLOCK).partition(".")
        return f"{BLOCK}{number}.{wrapper}{rest}"

    return name


WRAPPERS: dict[str, Callable[[str], str]] = {
    "compile": lambda key: f"_orig_mod.{key}",
    "ddp": lambda key: f"module.{key}",
    "ddp of compile": lambda key: f"module._orig_mod.{key}",
    "compile of ddp": lambda key: f"_orig_mod.module.{key}",
    "fsdp": lambda key: per_block("_fsdp_wrapped_module.")(f"_fsdp_wrapped_module.{key}"),
    "compiled blocks": per_block("_orig_mod."),
    "fsdp and checkpointing in blocks": per_block(
        "_fsdp_wrapped_module._checkpoint_wrapped_module."
    ),
    "merged peft": lambda key: f"base_model.model.{key}",
    "fabric": lambda key: f"_forward_module.{key}",
}


def wrapped(name: str, state: State = PLAIN) -> State:
    return {WRAPPERS[name](key): tensor for key, tensor in state.items()}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_result_has_the_keys_of_the_model_inside(tmp_path: Path, name: str) -> None:
    plain = tiny.write(tmp_path / "plain", PLAIN, CONFIG)
    source = tiny.write(tmp_path / "wrapped", wrapped(name), CONFIG, n_shards=3)
    assert "left out of its keys" in ok("plan", "coalesce", source, "--width", 2)
    ok("coalesce", source, tmp_path / "out", "--width", 2)
    ok("coalesce", plain, tmp_path / "expected", "--width", 2)
    tiny.assert_same(tiny.written(tmp_path / "out"), tiny.written(tmp_path / "expected"))
    ok("diff", source, plain)
    ok("verify", tmp_path / "out", "--recompute", 20)
    ok("apply", tmp_path / "out", tmp_path / "again")
    tiny.assert_same(tiny.written(tmp_path / "again"), tiny.written(tmp_path / "expected"))


def in_bin(folder: Path, state: State) -> None:
    torch.save(state, folder / "pytorch_model.bin")


def under(nest: str) -> Callable[[Path, State], None]:
    def write(folder: Path, state: State) -> None:
        torch.save({nest: state, "epoch": 3}, folder / "checkpoint.pth")

    return write


def in_dcp(folder: Path, state: State) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    save({"model": state}, checkpoint_id=folder, no_dist=True)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(in_bin, id="bin"),
        pytest.param(under("model"), id="model"),
        pytest.param(under("state_dict"), id="state_dict"),
        pytest.param(in_dcp, id="dcp"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_each_format_gives_the_same(tmp_path: Path, write: Callable[[Path, State], None]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    write(tmp_path, wrapped("ddp of compile"))
    opened = streammap.open(tmp_path)
    tiny.assert_same(dict(opened.tensors()), PLAIN)
    assert opened.plan.model.n_layers == SIZES.layers
    assert any("module. (DataParallel)" in note for note in opened.plan.notes)


def test_lightning_has_model_before_a_name_that_begins_with_it() -> None:
    keys = {
        "model.model.norm.weight": "model.norm.weight",
        "model.lm_head.weight": "lm_head.weight",
    }
    assert unwrap(list(keys)).plain == keys
    assert unwrap(["model.norm.weight", "model.layers.0.mlp.weight"]).plain == {}


def test_without_a_model_type_the_keys_tell_the_architecture(tmp_path: Path) -> None:
    state = tiny.timm_deit(SIZES)
    save_file({f"module.{key}": x for key, x in state.items()}, tmp_path / "a.safetensors")
    opened = streammap.open(tmp_path / "a.safetensors", config=tiny.timm_config(SIZES))
    assert opened.plan.model.name == "timm_vit"


def test_a_beginning_that_only_some_keys_have_stays() -> None:
    assert unwrap(["module.a.weight", "b.weight"]).plain == {}


def test_inspect_tells_what_is_left_out(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "wrapped", wrapped("compile"), CONFIG)
    assert "_orig_mod. (torch.compile): left out of the keys" in ok("inspect", source)
    assert json.loads(ok("inspect", source, "--json"))["wrappers"] == ["_orig_mod. (torch.compile)"]


@pytest.mark.parametrize("form", ["safetensors", "dcp"])
@pytest.mark.filterwarnings("ignore")
def test_two_keys_of_one_tensor_are_refused_and_named(tmp_path: Path, form: str) -> None:
    state = {"a.weight": torch.zeros(2), "_orig_mod.a.weight": torch.ones(2)}
    if form == "dcp":
        in_dcp(tmp_path, state)
    else:
        save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"are both a\.weight, without _orig_mod") as error:
        streammap.open(tmp_path)
    assert "_orig_mod.a.weight" in error.value.message.partition("are both")[0]


def lora(state: State, *, alone: bool) -> State:
    found: State = {}
    for key, tensor in state.items():
        module, _, end = key.rpartition(".")
        if not module.endswith("attn.c_attn"):
            found[f"base_model.model.{key}"] = tensor
            continue
        found[f"base_model.model.{module}.base_layer.{end}"] = tensor
        if end == "weight":
            found[f"base_model.model.{module}.lora_A.weight"] = torch.zeros(2, tensor.shape[0])
            found[f"base_model.model.{module}.lora_B.weight"] = torch.zeros(tensor.shape[1], 2)
    return {k: x for k, x in found.items() if not alone or ".lora_" in k}


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_is_told_as_that(tmp_path: Path, *, alone: bool) -> None:
    source = tiny.write(tmp_path / "lora", lora(PLAIN, alone=alone), CONFIG)
    said = run("coalesce", source, tmp_path / "out", "--width", 2).output
    assert ("a LoRA adapter without its model" if alone else "a LoRA that is not merged") in said
    assert ("MODEL+ADAPTER" if alone else "merge_and_unload()") in said
    assert "LoRA" in ok("inspect", source)


def test_a_wrapper_that_nobody_knows_is_named(tmp_path: Path) -> None:
    state = {f"net.inner.{key}": tensor for key, tensor in PLAIN.items()}
    source = tiny.write(tmp_path / "source", state, CONFIG)
    said = run("coalesce", source, tmp_path / "out", "--width", 2).output
    assert "every key begins with net.inner.: save the state dict of the module inside" in said
