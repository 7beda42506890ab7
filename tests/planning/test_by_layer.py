"""Maps that differ from layer to layer, against matrices that are multiplied by hand in float64."""

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.errors import PlanError, SchemeError, StreammapError
from streammap.planning import map_file
from tests.support import tiny, truth
from tests.support.truth import Bench
from tests.support.typed import ok

transformers = pytest.importorskip("transformers")

Groups = list[Any]
F64 = torch.float64
SAME = 1e-9


@pytest.fixture(scope="module")
def bench(scratch: Path) -> Bench:
    return Bench(scratch)


def shuffled(n_small: int, n_each: int, seed: object) -> Groups:
    """Random groups of `n_each` that use each of n_small * n_each units once."""
    units = random.Random(str(seed)).sample(range(n_small * n_each), n_small * n_each)
    return [units[i * n_each : (i + 1) * n_each] for i in range(n_small)]


def chosen(n: int, n_kept: int, seed: object) -> Groups:
    """A random selection of units."""
    return [[i] for i in random.Random(str(seed)).sample(range(n), n_kept)]


def mean(groups: Groups, n: int) -> Tensor:
    """F: each unit of the small model is the mean of a group."""
    m = torch.zeros(len(groups), n, dtype=F64)
    for i, group in enumerate(groups):
        m[i, group] = 1 / len(group)
    return m


def stretched(m: Tensor, times: int, channels: int) -> Tensor:
    """The map of `times` parts that each have units of so many channels."""
    return _diagonal(*([torch.kron(m, torch.eye(channels, dtype=F64))] * times))


def _diagonal(*parts: Tensor) -> Tensor:
    whole: Tensor = torch.block_diag(*parts)  # type: ignore[no-untyped-call]
    return whole


def along(x: Tensor, dim: int, m: Tensor) -> Tensor:
    """M applied to one dimension."""
    made: Tensor = torch.tensordot(m, x, dims=([1], [dim]))
    return made.movedim(0, dim)


@dataclass(frozen=True)
class Side:
    """A dimension along an axis: of keys that fit a pattern, whose group 1 is the layer."""

    pattern: str
    dim: int
    reads: bool = False
    times: int = 1
    channels: int = 1
    rest: int = 0
    """Rows of something else that come after."""


@dataclass(frozen=True)
class Layout:
    """One axis of a tiny model, by hand."""

    arch: str
    name: str
    axis: str
    n: int
    layers: tuple[str, ...]
    sides: tuple[Side, ...]
    group: int = 1
    """Units that stay together: query heads of a kv head, experts of a group."""

    def __str__(self) -> str:
        return f"{self.name}-{self.axis}"


def numbered(first: int, last: int) -> tuple[str, ...]:
    return tuple(map(str, range(first, last)))


def sides(out: str, into: str, dim_out: int = 0, times: int = 1) -> tuple[Side, ...]:
    return Side(out, dim_out, times=times), Side(into, 1 - dim_out, reads=True)


AT = r"model\.layers\.(\d+)\."
LAYOUTS = (
    Layout("llama", "llama", "mlp", 92, numbered(0, 5), (
        *sides(AT + r"mlp\.(?:gate|up)_proj\..*", AT + r"mlp\.down_proj\.weight"),
    )),
    Layout("llama", "phi3", "mlp", 92, numbered(0, 5), (
        *sides(AT + r"mlp\.gate_up_proj\..*", AT + r"mlp\.down_proj\.weight", times=2),
    )),
    Layout("gpt2", "gpt2", "mlp", 92, numbered(0, 5), (
        Side(r"transformer\.h\.(\d+)\.mlp\.c_fc\.weight", 1),
        Side(r"transformer\.h\.(\d+)\.mlp\.c_fc\.bias", 0),
        Side(r"transformer\.h\.(\d+)\.mlp\.c_proj\.weight", 0, reads=True),
    )),
    Layout("mixtral", "mixtral", "mlp", 92, numbered(0, 5), (
        Side(AT + r"block_sparse_moe\.experts\.\d+\.w[13]\.weight", 0),
        Side(AT + r"block_sparse_moe\.experts\.\d+\.w2\.weight", 1, reads=True),
    )),
    Layout("deepseek", "deepseek_v3", "kv_lora", 18, numbered(0, 5), (
        Side(AT + r"self_attn\.kv_a_proj_with_mqa\.weight", 0, rest=4),
        Side(AT + r"self_attn\.kv_a_layernorm\.weight", 0),
        Side(AT + r"self_attn\.kv_b_proj\.weight", 1, reads=True),
    )),
    Layout("t5", "t5", "mlp", 92, (
        *(f"enc_layer.{i}" for i in range(5)), *(f"dec_layer.{i}" for i in range(4))
    ), (
        Side(r"((?:encoder|decoder)\.block\.\d+)\..*\.wi\.weight", 0),
        Side(r"((?:encoder|decoder)\.block\.\d+)\..*\.wo\.weight", 1, reads=True),
    )),
    Layout("bert", "bert", "mlp", 92, numbered(0, 5), (
        Side(r"bert\.encoder\.layer\.(\d+)\.intermediate\..*", 0),
        Side(r"bert\.encoder\.layer\.(\d+)\.output\.dense\.weight", 1, reads=True),
    )),
    Layout("qwen_moe", "qwen3_moe", "moe_mlp", 44, ("0", "2", "3", "4"), (
        *sides(AT + r"mlp\.experts\.\d+\.(?:gate|up)_proj\..*",
               AT + r"mlp\.experts\.\d+\.down_proj\.weight"),
    )),
    Layout("whisper", "whisper", "dec_mlp", 76, numbered(0, 4), (
        Side(r"model\.decoder\.layers\.(\d+)\.fc1\..*", 0),
        Side(r"model\.decoder\.layers\.(\d+)\.fc2\.weight", 1, reads=True),
    )),
)  # fmt: skip
HEADS = (
    Side(AT + r"self_attn\.q_proj\..*", 0, channels=10),
    Side(AT + r"self_attn\.o_proj\.weight", 1, reads=True, channels=10),
)
KV_HEADS = (Side(AT + r"self_attn\.[kv]_proj\..*", 0, channels=10),)


def doubles(bench: Bench, layout: Layout) -> Path:
    """The layout's model in float64."""
    source = bench.source(truth.named(layout.arch, layout.name))
    state = {key: x.double() for key, x in truth.state_of(source).items()}
    folder = source.with_name(f"{source.name}-f64")
    return truth.write(folder, state, truth.config_of(source))


def by_hand(
    state: Mapping[str, Tensor], sides: tuple[Side, ...], of_layer: Mapping[str, Groups], n: int
) -> dict[str, Tensor]:
    """Units merged as the groups of each layer say: what is read is added up."""
    made = dict(state)
    for side in sides:
        for key, x in state.items():
            match = re.fullmatch(side.pattern, key)
            if match is None or (side.reads and x.ndim == 1):
                continue
            f = mean(of_layer[match[1]], n)
            m = (f != 0).to(F64) if side.reads else f
            whole = stretched(m, side.times, side.channels)
            whole = _diagonal(whole, torch.eye(side.rest, dtype=F64))
            made[key] = along(made[key], side.dim, whole)
    return made


def key_of(layer: str) -> str:
    """What group 1 of a pattern is for a layer's name."""
    depth, _, number = layer.rpartition(".")
    coder = {"": "", "enc_layer": "encoder.block.", "dec_layer": "decoder.block."}[depth]
    return coder + number


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["selection", "groups"])
def test_each_layer_is_merged_by_its_own_groups(bench: Bench, layout: Layout, kind: str) -> None:
    source, half = doubles(bench, layout), layout.n // 2
    asked = {
        layer: chosen(layout.n, half, layer) if kind == "selection" else shuffled(half, 2, layer)
        for layer in layout.layers
    }
    result = bench.saved(streammap.open(source).coalesce(axes={layout.axis: asked}))
    groups = {key_of(layer): one for layer, one in asked.items()}
    wanted = by_hand(truth.state_of(source), layout.sides, groups, layout.n)
    found = truth.state_of(result)
    assert found.keys() == wanted.keys()
    for key, x in wanted.items():
        if kind == "selection":
            assert torch.equal(found[key], x), key
        else:
            torch.testing.assert_close(found[key], x, rtol=0, atol=1e-12)
    streammap.open(result)


def test_query_heads_and_kv_heads_go_together_in_each_layer(bench: Bench) -> None:
    layout = next(one for one in LAYOUTS if one.name == "llama")
    source = doubles(bench, layout)
    kept = {str(i): random.Random(i).sample(range(3), 2) for i in range(5)}
    kv = {layer: [[k] for k in ks] for layer, ks in kept.items()}
    heads = {layer: [[2 * k + j] for k in ks for j in (1, 0)] for layer, ks in kept.items()}
    result = bench.saved(streammap.open(source).coalesce(heads=heads, kv_heads=kv))
    wanted = by_hand(truth.state_of(source), HEADS, heads, 6)
    wanted = by_hand(wanted, KV_HEADS, kv, 3)
    tiny.assert_same(truth.state_of(result), wanted)
    heads["3"] = [[4], [5], [0], [1]]
    kv["3"] = [[0], [2]]
    with pytest.raises(PlanError, match="would come from heads that read kv heads"):
        streammap.open(source).coalesce(heads=heads, kv_heads=kv)


@pytest.mark.parametrize("fused", [False, True])
def test_each_layer_keeps_its_own_experts(bench: Bench, tmp_path: Path, fused: bool) -> None:
    source = bench.source(truth.named("mixtral", "mixtral"))
    state, config = truth.state_of(source), truth.config_of(source)
    if fused:
        model = transformers.MixtralForCausalLM.from_pretrained(source)
        state = {key: x.clone() for key, x in model.state_dict().items()}
    source = truth.write(tmp_path / "source", state, config)
    kept = {i: random.Random(i).sample(range(7), 4) for i in range(5)}
    result = streammap.open(source).coalesce(experts={i: [[j] for j in kept[i]] for i in kept})
    assert result.config is not None
    assert result.config["num_local_experts"] == 4
    assert result.config["num_experts_per_tok"] == 2
    for i, experts in kept.items():
        at = f"model.layers.{i}."
        gate = f"{at}mlp.gate.weight" if fused else f"{at}block_sparse_moe.gate.weight"
        assert torch.equal(result.read(gate), state[gate][experts])
        for new, old in enumerate(experts):
            if fused:
                key = f"{at}mlp.experts.down_proj"
                assert torch.equal(result.read(key)[new], state[key][old])
            else:
                key = f"{at}block_sparse_moe.experts.{{}}.w2.weight"
                assert torch.equal(result.read(key.format(new)), state[key.format(old)])


def test_fused_experts_keep_neurons_of_their_own_in_each_layer(
    bench: Bench, tmp_path: Path
) -> None:
    source = bench.source(truth.named("qwen_moe", "qwen3_moe"))
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(source)
    state = {key: x.clone() for key, x in model.state_dict().items()}
    folder = truth.write(tmp_path / "source", state, truth.config_of(source))
    kept = {i: random.Random(i).sample(range(44), 22) for i in (0, 2, 3, 4)}
    lazy = streammap.open(folder)
    result = lazy.coalesce(axes={"moe_mlp": {i: [[j] for j in kept[i]] for i in kept}})
    for i, units in kept.items():
        key = f"model.layers.{i}.mlp.experts.gate_up_proj"
        rows = [*units, *(44 + unit for unit in units)]
        assert torch.equal(result.read(key), state[key][:, rows])
        key = f"model.layers.{i}.mlp.experts.down_proj"
        assert torch.equal(result.read(key), state[key][:, :, units])
    groups = {i: shuffled(44, 2, i) for i in kept}
    grown = lazy.decoalesce(axes={"moe_mlp": groups})
    assert grown.promise[0] == "exact"
    back = streammap.open(bench.saved(grown)).coalesce()
    for key, x in state.items():
        assert torch.equal(back.read(key), x), key


# DeepSeek's routers choose groups of experts first: 2 groups of 4, one of them chosen.


def ordered(seed: object) -> list[int]:
    """The 8 experts in another order, with each group's together."""
    rng = random.Random(str(seed))
    groups = [rng.sample(range(4), 4), rng.sample(range(4, 8), 4)]
    rng.shuffle(groups)
    return [*groups[0], *groups[1]]


def with_experts(lazy: LazyCheckpoint) -> list[int]:
    """The layers that have a router."""
    router = re.compile(r"model\.layers\.(\d+)\.mlp\.gate\.weight")
    found = map(router.fullmatch, lazy.keys())
    return sorted(int(match[1]) for match in found if match)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_groups"])
def test_groups_of_experts_are_kept_in_each_layer(bench: Bench, name: str) -> None:
    model = truth.named("deepseek", name)
    source = bench.source(model)
    lazy = streammap.open(source)
    layers = with_experts(lazy)
    moved = lazy.coalesce(experts={i: [[j] for j in ordered(i)] for i in layers})
    assert moved.promise[0] in ("bit-exact", "exact"), moved.promise
    assert moved.config is not None
    assert (moved.config["n_group"], moved.config["topk_group"]) == (2, 1)
    assert bench.error(moved, source, model) < SAME
    torn = {i: ordered(i) for i in layers}
    torn[layers[-1]] = [0, 4, 1, 5, 2, 6, 3, 7]
    broken = lazy.coalesce(experts={i: [[j] for j in torn[i]] for i in layers})
    assert broken.promise[0] == "approximate", broken.promise
    assert f"layer {layers[-1]}" in broken.promise[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2_groups"])
def test_copies_of_groups_of_experts_have_an_order_in_each_layer(bench: Bench, name: str) -> None:
    model = truth.named("deepseek", name)
    source = bench.source(model)
    lazy = streammap.open(source)
    layers = with_experts(lazy)
    asked: dict[int, Groups] = {}
    for i in layers:  # experts of the result in the order of their sources, twice
        of = [*ordered(i), *ordered(f"{i} again")]
        asked[i] = [[k for k, j in enumerate(of) if j == old] for old in range(8)]
    grown = lazy.decoalesce(experts=asked)
    assert grown.config is not None
    assert (grown.config["n_group"], grown.config["topk_group"]) == (4, 2)
    if grown.promise[0] == "exact":
        assert bench.error(grown, source, model) < SAME
    back = streammap.open(bench.saved(grown)).coalesce()
    assert back.config is not None
    assert (back.config["n_group"], back.config["topk_group"]) == (2, 1)
    for key, x in truth.state_of(source).items():
        assert torch.equal(back.read(key), x), key


def test_an_axis_of_some_layers_asks_for_these_alone(bench: Bench) -> None:
    lazy = streammap.open(bench.source(truth.named("deepseek", "deepseek_v3")))
    sparse = {str(i): chosen(8, 4, i) for i in range(2, 5)}
    pairs = {i: [[2 * j] for j in range(4)] for i in sparse}
    result = lazy.coalesce(experts=pairs)
    key = "model.layers.3.mlp.gate.e_score_correction_bias"
    assert torch.equal(result.read(key), lazy.read(key)[::2])
    with pytest.raises(SchemeError, match="layer 0 has no experts"):
        lazy.coalesce(experts={"0": pairs["2"], **pairs})
    with pytest.raises(SchemeError, match="nothing is said of layer 4, expected"):
        lazy.coalesce(experts={i: pairs[i] for i in ("2", "3")})


@pytest.mark.slow
def test_channels_that_are_divided_by_their_mean_are_copied_evenly(bench: Bench) -> None:
    model = truth.named("convnext", "convnextv2")
    source = bench.source(model)
    lazy = streammap.open(source)
    n = lazy.sizes["m1"]
    uneven: Groups = [[i, *(range(n, n + 16) if i == 0 else ())] for i in range(n)]
    assert lazy.decoalesce(axes={"m1": uneven}).promise[0] == "approximate"
    even = lazy.decoalesce(axes={"m1": 2})
    assert even.promise[0] == "exact"
    assert bench.error(even, source, model) < SAME


# Growing, and the way back.

GROWN: tuple[tuple[str, str, str, int], ...] = (
    ("llama", "llama", "mlp", 92),
    ("llama", "phi3", "mlp", 92),
    ("gpt2", "gpt2", "mlp", 92),
    ("t5", "t5", "mlp", 92),
    ("whisper", "whisper", "enc_mlp", 92),
    ("umt5", "umt5", "heads", 6),
    ("deepseek", "deepseek_v3", "kv_lora", 18),
    ("gpt_oss", "gpt_oss", "mlp", 92),
)


@pytest.mark.parametrize(("arch", "name", "axis", "n"), GROWN)
def test_copies_of_each_layer_keep_the_function_and_merge_back(
    bench: Bench, arch: str, name: str, axis: str, n: int
) -> None:
    model = truth.named(arch, name)
    source = bench.source(model)
    depths = (
        [f"{d}_layer" for d in ("enc", "dec")]
        if (axis == "mlp" and name == "t5") or name == "umt5"
        else [""]
    )
    first = {f"{d}.0".removeprefix("."): shuffled(n, 2, d) for d in depths}
    second = {f"{d}.1".removeprefix("."): shuffled(n, 2, f"{d}1") for d in depths}
    grown = streammap.open(source).decoalesce(axes={axis: {**first, **second, "*": "x2"}})
    assert grown.promise[0] == "exact"
    assert any("3 different maps" in note or "5 different" in note for note in grown.plan.notes)
    assert bench.error(grown, source, model) < SAME
    back = streammap.open(bench.saved(grown)).coalesce()
    for key, x in truth.state_of(source).items():
        assert torch.equal(back.read(key), x), key


def test_the_worst_layer_is_named(bench: Bench) -> None:
    lazy = streammap.open(bench.source(truth.named("llama", "llama")))
    twice = [[0, 92], [0, 93], *([i, i + 92] for i in range(2, 92))]
    grown = lazy.decoalesce(mlp={"3": twice, "*": shuffled(92, 2, 0)})
    promise, reason = grown.promise
    assert promise == "approximate"
    assert "some MLP neurons are in several groups" in reason
    assert reason.endswith("(layer 3)")


@pytest.mark.parametrize("each", [False, True])
def test_an_order_for_each_layer_keeps_the_function(bench: Bench, each: bool) -> None:
    model = truth.named("qwen_moe", "qwen3_moe")
    source = bench.source(model)
    shuffled = streammap.open(source).permute(seed=5, each_layer=each)
    assert bench.error(shuffled, source, model) < SAME
    sums = []
    for i in (3, 4):  # of a head's first query channel, whatever the order of the hidden units
        key = f"model.layers.{i}.self_attn.q_proj.weight"
        sums += [
            read(key).double().abs().sum(-1)[::10]
            for read in (streammap.open(source).read, shuffled.read)
        ]
    orders = [
        [int((old - new).abs().argmin()) for new in news] for old, news in (sums[:2], sums[2:])
    ]
    assert sorted(orders[0]) == list(range(6))
    assert (orders[0] != orders[1]) == each


# Layers that are merged, copied and dropped at once.


def test_layers_that_become_one_need_one_map(bench: Bench) -> None:
    layout = next(one for one in LAYOUTS if one.name == "llama")
    source = doubles(bench, layout)
    lazy, state = streammap.open(source), truth.state_of(source)
    a, b = chosen(92, 46, "a"), chosen(92, 46, "b")
    depth: list[Any] = [[0, 1], [2], [4]]
    result = lazy.coalesce(
        layers=depth, mlp={"0": a, "1": a, "2": b, "3": chosen(92, 46, "c"), "4": a}
    )
    key = "model.layers.{}.mlp.up_proj.weight"
    rows = [unit for (unit,) in a]
    mixed = 0.5 * state[key.format(0)][rows] + 0.5 * state[key.format(1)][rows]
    torch.testing.assert_close(result.read(key.format(0)), mixed, rtol=0, atol=1e-12)
    assert torch.equal(result.read(key.format(1)), state[key.format(2)][[unit for (unit,) in b]])
    assert torch.equal(result.read(key.format(2)), state[key.format(4)][rows])
    with pytest.raises(PlanError, match="layer 0, layer 1 are merged into one, but have different"):
        lazy.coalesce(layers=depth, mlp={"0": a, "*": b})
    big = streammap.open(bench.saved(result)).decoalesce()
    for i, groups in ((0, a), (1, a), (2, b), (4, a)):
        grown, small = big.read(key.format(i)), result.read(key.format((0, 0, 1, None, 2)[i] or 0))
        assert torch.equal(grown[[unit for (unit,) in groups]], small)


def test_a_copied_layer_has_the_map_of_its_source(bench: Bench) -> None:
    model = truth.named("llama", "llama")
    source = bench.source(model)
    asked: Mapping[str, Any] = {str(i): shuffled(92, 2, i) for i in range(5)}
    lazy = streammap.open(source)
    deep = lazy.decoalesce(mlp=asked, layers=2, new_layers="zero", grouping="adjacent")
    assert bench.error(deep, source, model) < SAME
    once, twice = lazy.decoalesce(mlp=asked), lazy.decoalesce(layers=2, grouping="adjacent")
    twice = twice.decoalesce(mlp={str(i): asked[str(i // 2)] for i in range(10)})
    both = lazy.decoalesce(mlp=asked, layers=2, grouping="adjacent")
    for i in range(10):
        key = f"model.layers.{i}.mlp.down_proj.weight"
        assert torch.equal(both.read(key), twice.read(key))
        assert torch.equal(both.read(key), once.read(f"model.layers.{i // 2}.mlp.down_proj.weight"))


def test_chains_compose_in_each_layer(bench: Bench) -> None:
    layout = next(one for one in LAYOUTS if one.name == "gpt2")
    lazy = streammap.open(doubles(bench, layout))
    first = {str(i): chosen(92, 46, i) for i in range(5)}
    second = {str(i): chosen(46, 20, i) for i in range(5)}
    both = {layer: [first[layer][unit] for (unit,) in groups] for layer, groups in second.items()}
    chain, at_once = lazy.coalesce(mlp=first).coalesce(mlp=second), lazy.coalesce(mlp=both)
    for key in at_once.keys():  # noqa: SIM118 (it is no dict)
        assert torch.equal(chain.read(key), at_once.read(key)), key
    assert [level.sizes for level in chain.plan.levels] == [{"mlp": (92, 46)}, {"mlp": (46, 20)}]


# Files, records, commands.


def test_schemes_commands_and_python_say_the_same(bench: Bench, tmp_path: Path) -> None:
    source = bench.source(truth.named("llama", "llama"))
    groups: list[Any] = [shuffled(46, 2, i) for i in range(5)]
    table: dict[str, Any] = {str(i): one for i, one in enumerate(groups)}
    scheme = tiny.file(tmp_path / "scheme.json", json.dumps({"axes": {"mlp": table}}))
    ok("coalesce", source, tmp_path / "a", "--scheme", scheme)
    ok("coalesce", source, tmp_path / "b", "--mlp", json.dumps(groups))
    streammap.coalesce(
        source, tmp_path / "c", axes={"mlp": {int(i): one for i, one in table.items()}}
    )
    for other in ("b", "c"):
        tiny.assert_same(tiny.written(tmp_path / other), tiny.written(tmp_path / "a"))
    ok("verify", tmp_path / "b", "--recompute", 20)
    ok("apply", tmp_path / "c", tmp_path / "again")
    tiny.assert_same(tiny.written(tmp_path / "again"), tiny.written(tmp_path / "a"))
    assert "1, another mlp in each layer:" in ok("inspect", tmp_path / "a")
    assert "mlp 92 -> 46: another map in each of 5 layers" in ok(
        "plan", "coalesce", source, "--scheme", scheme
    )


def test_weights_of_groups_differ_from_layer_to_layer(bench: Bench, tmp_path: Path) -> None:
    model = truth.named("llama", "llama")
    source = bench.source(model)
    table: dict[str, Any] = {"*": "x2"}
    for layer, weights in (("1", [0.7, 0.3]), ("4", [0.9, 0.1])):
        groups = [{"members": pair, "weights": weights} for pair in shuffled(92, 2, layer)]
        table[layer] = {"groups": groups}
    grown = streammap.open(source).decoalesce(mlp=table)
    assert grown.promise[0] == "exact"
    assert bench.error(grown, source, model) < SAME
    grown.save(tmp_path / "grown")
    ok("verify", tmp_path / "grown", "--recompute", 20)


def test_a_map_file_keeps_the_maps_of_layers(bench: Bench, tmp_path: Path) -> None:
    lazy = streammap.open(bench.source(truth.named("llama", "llama")))
    levels = lazy.coalesce(
        mlp={"1": shuffled(46, 2, 1), "*": 2}, layers=[[0], [1], [3]]
    ).plan.levels
    path = tmp_path / map_file.NAME
    path.write_bytes(map_file.encode(levels))
    (read,) = map_file.load(path)
    assert read.by_layer == levels[0].by_layer
    assert list(read.by_layer["mlp"]) == [("layer", i) for i in range(3)]
    assert read.digest == levels[0].digest
    assert read.by_layer["mlp"]["layer", 0] is read.by_layer["mlp"]["layer", 2]
    damaged = path.read_bytes().replace(b"mlp@layer.2", b"mlp@layer.7")
    path.write_bytes(damaged)
    with pytest.raises(SchemeError, match="damaged"):
        map_file.load(path)


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"hidden": {"*": 2}}, "hidden units: one map for all layers is needed"),
    ({"layers": {"0": [[0]], "*": 2}}, "layers: one map for all layers is needed"),
    ({"mlp": {"0": 2}}, "nothing is said of layer 1, layer 2, layer 3, layer 4, expected a req"),
    ({"mlp": {"9": 2, "*": 2}}, "layer 9 has no MLP neurons"),
    ({"mlp": {"0": [[0], [1]], "*": [[0]]}}, "layer 0 maps 92 to 2, layer 1 92 to 1"),
    ({"mlp": {"0": [[92]], "*": [[0]]}}, "92 is out of range, the large model has 92"),
    ({"mlp": {"0": {"0": 2}, "*": 2}}, "layers inside of a layer"),
    ({"mlp": {"dec_layer.0": 2, "*": 2}}, "lie in layer, not in dec_layer"),
    ({"mlp": {"0": 12, "*": 2}}, "can be read in two ways"),
    ({"mlp": [[[0], [1]]] * 4}, "nothing is said of layer 4"),
    ({"width": {"0": 2, "*": 2}}, "expected a factor"),
)


@pytest.mark.parametrize(("request_", "message"), REFUSED)
def test_what_does_not_fit_is_refused(bench: Bench, request_: dict[str, Any], message: str) -> None:
    lazy = streammap.open(bench.source(truth.named("llama", "llama")))
    with pytest.raises(StreammapError) as caught:
        lazy.coalesce(**request_)
    assert message in caught.value.message
    assert caught.value.hint


def test_what_all_layers_share_is_refused(bench: Bench) -> None:
    t5 = streammap.open(bench.source(truth.named("t5", "t5")))
    with pytest.raises(SchemeError, match=r"all layers read .*relative_attention_bias"):
        t5.coalesce(heads={"enc_layer.0": [[1], [0], [2]], "*": [[0], [1], [2]]})
    with pytest.raises(SchemeError, match=r"name one: dec_layer\.0 or enc_layer\.0"):
        t5.coalesce(mlp={"0": 2, "*": 2})
    gpt2 = streammap.open(bench.source(truth.named("gpt2", "gpt2")))
    kept = {str(i): chosen(6, 3, i) for i in range(5)}
    with pytest.raises(PlanError, match=r"hidden \(embed\) would follow layer by layer"):
        gpt2.coalesce(heads=kept)
    assert gpt2.coalesce(heads=kept, hidden="to:24").sizes["embed"] == 24
