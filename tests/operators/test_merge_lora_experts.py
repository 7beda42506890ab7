"""Adapters of experts, fused or one by one, on models whose experts are fused or one by one."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.errors import PlanError
from tests.support import tiny

N, MLP, EMBED, RANK = 3, 4, 6, 2
AT = "model.layers.0.mlp.experts"
P = "base_model.model."
State = dict[str, Tensor]
PUBLISHED = {
    f"{AT}.{e}.{name}.weight": shape
    for e in range(N)
    for name, shape in {
        "gate_proj": (MLP, EMBED),
        "up_proj": (MLP, EMBED),
        "down_proj": (EMBED, MLP),
    }.items()
}


def fused(state: Mapping[str, Tensor], at: str = AT) -> State:
    """Modules of experts as two tensors."""

    def each(name: str) -> Tensor:
        return torch.stack([state[f"{AT}.{e}.{name}.weight"] for e in range(N)])

    gate_up = torch.cat([each("gate_proj"), each("up_proj")], dim=1)
    return {f"{at}.gate_up_proj": gate_up, f"{at}.down_proj": each("down_proj")}


def for_each() -> tuple[State, State]:
    """An adapter of the modules, and what it adds to each."""
    shapes: dict[str, tuple[int, ...]] = {}
    for key, (out, reads) in PUBLISHED.items():
        module = P + key.removesuffix(".weight")
        shapes |= {f"{module}.lora_A.weight": (RANK, reads), f"{module}.lora_B.weight": (out, RANK)}
    state = tiny.random(shapes, seed=4)
    delta = {}
    for key in PUBLISHED:
        module = P + key.removesuffix(".weight")
        a, b = (state[f"{module}.lora_{x}.weight"].double() for x in "AB")
        delta[key] = b @ a
    return state, delta


def for_all(*, turned: bool = False) -> tuple[State, State]:
    """An adapter of the two tensors, as peft has it (ParamWrapper), and what it adds."""
    sizes = {".base_layer": (2 * MLP, EMBED), "": (EMBED, MLP)}
    if turned:  # peft's first versions took the first dimension for the input
        sizes = {name: (n_in, out) for name, (out, n_in) in sizes.items()}
    shapes: dict[str, tuple[int, ...]] = {}
    for inside, (out, reads) in sizes.items():
        shapes[f"{P}{AT}{inside}.lora_A.weight"] = (N * RANK, reads)
        shapes[f"{P}{AT}{inside}.lora_B.weight"] = (out, N * RANK)
    state = tiny.random(shapes, seed=6)
    delta = {}
    for inside, name in {".base_layer": "gate_up_proj", "": "down_proj"}.items():
        a, b = (state[f"{P}{AT}{inside}.lora_{x}.weight"].double() for x in "AB")
        a, b = a.reshape(N, RANK, -1), b.reshape(len(b), RANK, N)
        order = "ore,eri->eio" if turned else "ore,eri->eoi"
        delta[f"{AT}.{name}"] = torch.einsum(order, b, a)
    return state, delta


def parts(whole: Mapping[str, Tensor]) -> State:
    """Two tensors as modules of experts."""
    found: State = {}
    for e in range(N):
        gate, up = whole[f"{AT}.gate_up_proj"][e].chunk(2)
        halves = {"gate_proj": gate, "up_proj": up, "down_proj": whole[f"{AT}.down_proj"][e]}
        found |= {f"{AT}.{e}.{name}.weight": x for name, x in halves.items()}
    return found


def added(state: State, delta: Mapping[str, Tensor], scale: float) -> State:
    return {key: (x.double() + scale * delta[key]).float() for key, x in state.items()}


def merged(model: State, adapter: State, folder: Path, **config: object) -> State:
    tiny.write(folder / "model", model, None)
    tiny.adapter(folder / "adapter", adapter, r=RANK, lora_alpha=3, **config)
    return dict(streammap.open(f"{folder}/model+{folder}/adapter").tensors())


@pytest.mark.parametrize("order", ["as it is", "turned"])
def test_an_adapter_of_all_experts(tmp_path: Path, order: str) -> None:
    state = tiny.random(PUBLISHED)
    adapter, delta = for_all(turned=order == "turned")
    wanted = added(fused(state), delta, 3 / RANK)
    tiny.assert_close(merged(fused(state), adapter, tmp_path / "fused"), wanted)
    if order == "as it is":
        tiny.assert_close(merged(state, adapter, tmp_path / "published"), parts(wanted))


def test_an_adapter_of_each_expert(tmp_path: Path) -> None:
    state = tiny.random(PUBLISHED)
    adapter, delta = for_each()
    wanted = added(state, delta, 3 / RANK)
    tiny.assert_close(merged(state, adapter, tmp_path / "published"), wanted)
    tiny.assert_close(merged(fused(state), adapter, tmp_path / "fused"), fused(wanted))


def test_mixtrals_two_names_for_its_block(tmp_path: Path) -> None:
    """An adapter that was trained before the experts were fused, and the model after."""
    names = {"mlp.": "block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

    def old(key: str) -> str:
        for new, name in names.items():
            key = key.replace(new, name)
        return key

    state = tiny.random(PUBLISHED)
    adapter, delta = for_each()
    renamed = {old(key): x for key, x in adapter.items()}
    wanted = fused(added(state, delta, 3 / RANK))
    tiny.assert_close(merged(fused(state), renamed, tmp_path / "fused"), wanted)
    whole, of_whole = for_all()
    published = {old(key): x for key, x in state.items()}
    parted = parts(added(fused(state), of_whole, 3 / RANK))
    found = merged(published, whole, tmp_path / "published")
    tiny.assert_close(found, {old(key): x for key, x in parted.items()})


def test_patterns_name_the_parameter(tmp_path: Path) -> None:
    state = fused(tiny.random(PUBLISHED))
    adapter, delta = for_all()
    found = merged(state, adapter, tmp_path, alpha_pattern={"experts.down_proj": 1})
    wanted = added(state, delta, 3 / RANK)
    down = f"{AT}.down_proj"
    wanted[down] = (state[down].double() + delta[down] / RANK).float()
    tiny.assert_close(found, wanted)


def test_what_does_not_tell_is_refused(tmp_path: Path) -> None:
    """Square matrices without a spec; an expert that is not there; a parameter of other sizes."""
    square = {f"{AT}.gate_up_proj": torch.ones(N, 6, 6)}
    shapes = {f"{P}{AT}.lora_A.weight": (N * RANK, 6), f"{P}{AT}.lora_B.weight": (6, N * RANK)}
    with pytest.raises(PlanError, match="is square, and no spec says which"):
        merged(square, tiny.random(shapes), tmp_path / "square")
    state, _ = for_each()
    beyond = {key.replace(".2.", ".7."): x for key, x in state.items()}
    with pytest.raises(PlanError, match=r"the model has no model.layers.0.mlp.experts.7"):
        merged(fused(tiny.random(PUBLISHED)), beyond, tmp_path / "beyond")
    other = {f"{P}{AT}.lora_A.weight": (N * RANK, 5), f"{P}{AT}.lora_B.weight": (6, N * RANK)}
    with pytest.raises(PlanError, match=r"fits none of .*gate_up_proj \[3, 8, 6\]"):
        merged(fused(tiny.random(PUBLISHED)), tiny.random(other), tmp_path / "other")
