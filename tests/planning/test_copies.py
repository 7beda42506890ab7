"""Copies: how readers share them, whether training tells them apart, what 16 bits make of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

import streammap
from streammap.api import LazyCheckpoint
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from tests.support import optimized, tiny, truth
from tests.support.truth import Bench
from tests.support.typed import Options

transformers = pytest.importorskip("transformers")

SAME = 1e-9
N_MLP = 92


@pytest.fixture(scope="module")
def bench(scratch: Path) -> Bench:
    return Bench(scratch)


def shares(n: int, *weights: float) -> dict[str, Any]:
    """Groups of i, i + n, i + 2n ..., which all have these weights."""
    members = [[i + k * n for k in range(len(weights))] for i in range(n)]
    return {"groups": [{"members": group, "weights": list(weights)} for group in members]}


# Weights of groups.

KEPT = (
    ("llama", "llama", "mlp", (0.7, 0.3)),
    ("llama", "llama", "embed", (7, 2, 1)),
    ("llama", "llama_tied", "embed", (0.7, 0.3)),
    ("llama", "llama_mha", "heads", (0.7, 0.3)),
    ("llama", "qwen3", "embed", (0.7, 0.3)),
    ("llama", "phi3", "mlp", (1, 0)),
    ("gpt2", "gpt2", "heads", (0.7, 0.3)),
    ("gpt2", "gpt2", "embed", (0.9, 0.1)),
    ("bert", "bert", "embed", (0.7, 0.3)),
    ("gemma", "gemma2_tied", "embed", (0.7, 0.3)),
    ("t5", "t5", "embed", (0.7, 0.3)),
    ("mamba", "mamba", "inner", (0.7, 0.3)),
    ("gpt_oss", "gpt_oss", "mlp", (0.7, 0.3)),
    ("qwen3_next", "qwen3_next", "moe_mlp", (0.7, 0.3)),
    ("deepseek", "deepseek_v3", "kv_lora", (0.7, 0.3)),
    ("falcon", "falcon", "embed", (0.7, 0.3)),
)


@pytest.mark.parametrize(("arch", "name", "axis", "weights"), KEPT)
def test_unequal_shares_keep_the_function(
    bench: Bench, arch: str, name: str, axis: str, weights: tuple[float, ...]
) -> None:
    model = truth.named(arch, name)
    source = bench.source(model)
    lazy = streammap.open(source)
    asked = shares(lazy.sizes[axis], *weights)
    options: Options = {"axes": {axis: asked}}
    if name == "llama_mha":
        n = lazy.sizes["heads"]
        options = {"heads": asked, "kv_heads": [[i, i + n] for i in range(n)]}
    grown = lazy.decoalesce(**options)
    assert grown.promise[0] == "exact"
    assert bench.error(grown, source, model) < SAME
    # Only axes that follow may be copied with equal shares.
    followed = any("follows" in note for note in grown.plan.notes)
    assert followed or not any("equal gradients" in note for note in grown.plan.notes)


def test_copies_are_equal_and_readers_have_the_shares(bench: Bench) -> None:
    """The formula, by hand: rows copied, columns times weight / sum of the group's weights."""
    lazy = streammap.open(bench.source(truth.named("llama", "llama")))
    groups = [[i, i + N_MLP] for i in range(N_MLP)]
    weights = [[1 + i % 3, 1.0] for i in range(N_MLP)]
    asked = [{"members": members, "weights": w} for members, w in zip(groups, weights, strict=True)]
    grown = lazy.decoalesce(mlp={"groups": asked})
    first = torch.tensor([w[0] / sum(w) for w in weights], dtype=torch.float64)
    for i in range(lazy.sizes["layer"]):
        up, down = (f"model.layers.{i}.mlp.{name}_proj.weight" for name in ("up", "down"))
        assert torch.equal(grown.read(up), lazy.read(up).repeat(2, 1))
        old = lazy.read(down)
        torch.testing.assert_close(grown.read(down), torch.cat([old * first, old * (1 - first)], 1))


def test_a_saved_map_with_weights_grows_by_them_again(bench: Bench) -> None:
    source = bench.source(truth.named("llama", "llama"))
    groups = [{"members": [2 * i, 2 * i + 1], "weights": [3, 1]} for i in range(N_MLP // 2)]
    small = bench.saved(streammap.open(source).coalesce(mlp={"groups": groups}))
    down = "model.layers.0.mlp.down_proj.weight"
    lazy = streammap.open(small)
    old, new = lazy.read(down), lazy.decoalesce().read(down)
    assert torch.equal(new[:, ::2], old * 0.75)
    assert torch.equal(new[:, 1::2], old * 0.25)


@pytest.mark.parametrize(
    ("arch", "name", "axis"),
    [
        ("mixtral", "mixtral", "expert"),
        ("llama", "llama_mha", "kv_heads"),
        ("gpt2", "gpt2", "layer"),
    ],
)
def test_weights_that_no_reader_can_have_are_refused(
    bench: Bench, arch: str, name: str, axis: str
) -> None:
    lazy = streammap.open(bench.source(truth.named(arch, name)))
    with pytest.raises(PlanError, match="no weight reads") as refusal:
        lazy.decoalesce(axes={axis: shares(lazy.sizes[axis], 0.7, 0.3)})
    assert refusal.value.hint
    n = lazy.sizes[axis]
    for weights in ((0.5, 0.5), (3, 3)):  # They say nothing.
        asked: dict[str, Any] = {axis: shares(n, *weights)}
        if axis == "kv_heads":
            asked["heads"] = [[i, i + n] for i in range(n)]
        lazy.decoalesce(axes=asked)


# Training.


def trained(folder: Path, model: TinyModel, n_steps: int = 8) -> dict[str, torch.Tensor]:
    """The model of a folder after a few steps of AdamW."""
    net = getattr(transformers, model.class_name).from_pretrained(folder, dtype=torch.float64)
    net.train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    torch.manual_seed(0)
    ids = torch.randint(10, 90, (2, 12))
    optimized.train(optimizer, lambda: net(input_ids=ids, labels=ids).loss, n_steps)
    return dict(net.state_dict())


@pytest.mark.parametrize(("weights", "apart"), [((0.5, 0.5), False), ((0.7, 0.3), True)])
def test_training_tells_copies_apart_by_unequal_shares_only(
    bench: Bench, weights: tuple[float, float], apart: bool
) -> None:
    model = truth.named("llama", "llama")
    lazy = streammap.open(bench.source(model)).decoalesce(mlp=shares(N_MLP, *weights))
    state = trained(bench.saved(lazy), model)
    up = state["model.layers.0.mlp.up_proj.weight"]
    distance = float((up[:N_MLP] - up[N_MLP:]).abs().max())
    assert (distance > 1e-4) == apart
    assert apart or distance < 1e-12
    assert apart != any("equal gradients" in note for note in lazy.plan.notes)


def test_the_plan_says_which_copies_stay_equal(bench: Bench) -> None:
    source = bench.source(truth.named("llama", "llama"))
    lazy = streammap.open(source)

    def twins(grown: LazyCheckpoint) -> list[str]:
        return [note for note in grown.plan.notes if "equal gradients" in note]

    (note,) = twins(lazy.decoalesce(width=2))
    assert note.startswith("copies (heads, hidden units, MLP neurons) have equal gradients")
    assert "--blend-with" in note
    # Copies of a kv head are read by other query heads; new units are no copies; nor are layers.
    options: tuple[Options, ...] = (
        {"kv_heads": 2},
        {"hidden": "=72"},
        {"layers": 2},
        {
            "width": 2,
            "grouping": "stacked",
            "blend_with": bench.saved(lazy.decoalesce(width=2)),
            "alpha": 0.5,
        },
    )
    for one in options:
        assert not twins(lazy.decoalesce(**one)), one
    assert not twins(lazy.coalesce(width=2))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"hidden": "to:72"}, {"head_dim": 24}], ids=str)
def test_units_that_are_new_and_zero_stay_so(bench: Bench, options: Options) -> None:
    model = truth.named("llama", "llama")
    lazy = streammap.open(bench.source(model)).decoalesce(**options)
    assert any("zero at first; training leaves them so" in note for note in lazy.plan.notes)
    state, n_zero = trained(bench.saved(lazy), model), 0
    for key, x in lazy.tensors():
        n_zero += int((x == 0).sum())
        assert bool((state[key][x == 0] == 0).all()), key
    assert n_zero > 1000


# 16 bits.


def in_16_bits(folder: Path, source: Path, dtype: torch.dtype) -> LazyCheckpoint:
    state = {key: x.to(dtype) for key, x in truth.state_of(source).items()}
    return streammap.open(truth.write(folder, state, truth.config_of(source)))


ROUNDED = (
    ("llama", "llama", {"width": 2}, "bfloat16: no weight is rounded"),
    ("llama", "llama", {"width": 3}, "factor 0.3333"),
    ("llama", "llama", {"hidden": "=72"}, "factor 0.8165"),
    ("llama", "llama", {"mlp": "=100"}, "bfloat16: no weight is rounded"),
    ("llama", "llama", {"mlp": shares(N_MLP, 0.7, 0.3)}, "factor 0.3, factor 0.7"),
    ("llama", "llama_tied", {"width": 2}, "bfloat16: no weight is rounded"),
    ("gemma", "gemma2_tied", {"width": 2}, "norms store their gain less a constant"),
    ("gemma", "gemma2", {"mlp": 2}, "bfloat16: no weight is rounded"),
)


@pytest.mark.parametrize(("arch", "name", "options", "told"), ROUNDED)
def test_the_plan_says_what_16_bits_lose(
    bench: Bench, scratch: Path, arch: str, name: str, options: Options, told: str
) -> None:
    """Against the same request in float64, which loses nothing that 16 bits could show."""
    source = bench.source(truth.named(arch, name))
    lazy = in_16_bits(scratch / "bf16", source, torch.bfloat16)
    grown = lazy.decoalesce(**options)
    (note,) = [note for note in grown.plan.notes if note.startswith("bfloat16")]
    assert told in note
    exact = {key: x.double() for key, x in lazy.tensors()}
    wide = streammap.open(truth.write(scratch / "f64", exact, lazy.config or {}))
    wide = wide.decoalesce(**options)
    rounded = {k for k, x in grown.tensors() if not torch.equal(x.double(), wide.read(k))}
    assert bool(rounded) == ("no weight" not in note)
    for key in rounded:
        x, y = grown.read(key).double(), wide.read(key)
        assert float(((x - y) / y.abs().clamp_min(1e-6)).abs().max()) <= 2**-8, key
    if rounded:
        assert len(rounded) <= int(note.split()[1])
    assert note in tiny_json_notes(grown)


def tiny_json_notes(lazy: LazyCheckpoint) -> tuple[str, ...]:
    """The notes that `plan --json` prints."""
    notes = lazy.summary().as_json()["notes"]
    assert isinstance(notes, tuple)
    return notes


def test_other_dtypes_and_approximate_changes_have_no_such_line(
    bench: Bench, scratch: Path
) -> None:
    source = bench.source(truth.named("llama", "llama"))
    half = in_16_bits(scratch / "f16", source, torch.float16)
    assert any("float16" in note for note in half.decoalesce(width=3).plan.notes)
    for lazy in (half.coalesce(width=2), streammap.open(source).decoalesce(width=3)):
        assert not [note for note in lazy.plan.notes if "float" in note]
    assert tiny.bits(half.read("lm_head.weight"))
