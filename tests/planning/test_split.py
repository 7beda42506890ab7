"""Shares of copies: what is stored in each adds up to what was there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.errors import StreammapError
from streammap.planning.derived import shared_out
from tests.support import tiny, truth
from tests.support.tiny import cut
from tests.support.truth import Bench
from tests.support.typed import Options, ok, run

pytest.importorskip("transformers")

N_MLP = 92
DOWN = "model.layers.0.mlp.down_proj.weight"
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(scope="module")
def bench(scratch: Path) -> Bench:
    return Bench(scratch)


def rounded_to(bench: Bench, folder: Path, name: str, dtype: torch.dtype) -> LazyCheckpoint:
    """A tiny model in another dtype."""
    source = bench.source(truth.named("llama", name))
    state = {key: x.to(dtype) for key, x in truth.state_of(source).items()}
    return streammap.open(truth.write(folder, state, truth.config_of(source)))


@pytest.fixture(scope="module")
def lazy(bench: Bench, scratch: Path) -> LazyCheckpoint:
    """A Llama in bfloat16."""
    return rounded_to(bench, scratch / "bf16", "llama", torch.bfloat16)


def every_number(dtype: torch.dtype) -> Tensor:
    """All finite numbers of 16 bits, [2^16 or fewer, 1]."""
    found = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return found[found.isfinite()].view(-1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("split", "n"),
    [
        ("0.7", 2),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (("0.5,0.3,0.2", 3), ("remainder", 3), ("0.9", 4), ("0.3", 2))
        ),
    ],
)
def test_parts_of_every_number_add_up(tmp_path: Path, dtype: str, split: str, n: int) -> None:
    """All numbers of 16 bits as a weight, by every share: read by hand, summed in float64."""
    sizes = tiny.Sizes(heads=2, layers=1, head_dim=2, mlp_per_head=64)
    state = {k: x.to(DTYPES[dtype]) for k, x in tiny.bert(sizes).items()}
    key = "encoder.layer.0.output.dense.weight"
    numbers = every_number(DTYPES[dtype])
    most = state[key].numel()
    folder = tiny.write(tmp_path / "m", state, tiny.bert_config(sizes))
    for start in range(0, len(numbers), most * 32):
        part = numbers[start : start + most]
        state[key].view(-1)[: len(part)] = part.view(-1)
        tiny.write(folder, state, tiny.bert_config(sizes))
        opened = streammap.open(folder)
        grown = opened.decoalesce(mlp=n, split=split, grouping="stacked").read(key)
        parts = cut(grown.double(), 1, n)
        assert torch.equal(parts.sum(1), state[key].double()), (dtype, split)


def test_the_same_of_all_significands_by_the_rule_alone() -> None:
    """The test of shares against plain torch: every number of 16 bits, every part rounded."""
    for name, dtype in DTYPES.items():
        for shares in ((0.7, 0.3), (0.5, 0.3, 0.2), (0.34, 0.33, 0.33), (0.4, 0.3, 0.2, 0.1)):
            x = every_number(dtype).double().view(-1)
            x = x[(x.abs() < 1e4) & (x.abs() > 1e-3)]
            left, rest = x, 1.0
            for share in shares[:-1]:
                left = left - (left * (share / rest)).float().to(dtype).double()
                rest -= share
            fits = torch.equal(left, left.to(dtype).double())
            assert shared_out.adds_up(shares, name) == fits, (name, shares)
    assert shared_out.adds_up((0.7, 0.3), "F32")
    assert not shared_out.adds_up((0.4, 0.35, 0.25), "F32")
    assert not shared_out.adds_up((0.7, 0.3), "F64")


@pytest.mark.parametrize(
    ("options", "n"),
    [
        ({"width": 2, "split": 0.7}, 2),
        pytest.param({"width": 3, "split": "remainder"}, 3, marks=pytest.mark.slow),
        pytest.param({"width": 3, "split": [0.5, 0.3, 0.2]}, 3, marks=pytest.mark.slow),
    ],
)
def test_a_model_in_16_bits_loses_nothing(lazy: LazyCheckpoint, options: Options, n: int) -> None:
    grown = lazy.decoalesce(**options, grouping="stacked")
    assert grown.promise[0] == "exact"
    (note,) = [note for note in grown.plan.notes if note.startswith("bfloat16")]
    assert "no weight is rounded" in note
    assert "add up" in note
    for key, x in lazy.tensors():
        new = grown.read(key)
        rows = cut(new, 0, new.shape[0] // x.shape[0]).double()
        assert all(torch.equal(rows[0], other) for other in rows[1:])
        if x.dim() > 1 and new.shape[1] > x.shape[1] and "embed" not in key:
            parts = cut(rows[0], 1, n)
            assert torch.equal(parts.sum(1), x.double()), key
            if isinstance(options["split"], float):
                want = 0.7 * x.double()
                torch.testing.assert_close(parts[:, 0], want, rtol=2**-8, atol=0)
    plain = lazy.decoalesce(width=3)
    assert any("tensors are rounded" in note for note in plain.plan.notes)


def test_where_parts_are_not_known_to_add_up_they_are_shares(lazy: LazyCheckpoint) -> None:
    """Of float32 the theorem has to do; float64 is exact enough."""
    shares = (0.4, 0.35, 0.25)
    for dtype in ("float32", "float64"):
        wide = lazy.convert(dtype=dtype)
        grown = wide.decoalesce(mlp=3, split=shares, grouping="stacked").read(DOWN)
        for part, share in zip(cut(grown, 1, 3).unbind(1), shares, strict=True):
            assert torch.equal(part, wide.read(DOWN) * share)
    wide = lazy.convert(dtype="float32")
    grown = wide.decoalesce(mlp=2, split=0.7, grouping="stacked").read(DOWN)
    assert torch.equal(cut(grown.double(), 1, 2).sum(1), wide.read(DOWN).double())


def test_one_number_is_a_share_of_what_is_left(lazy: LazyCheckpoint) -> None:
    wide = lazy.convert(dtype="float64")
    parts = cut(wide.decoalesce(mlp=4, split=0.7, grouping="stacked").read(DOWN), 1, 4)
    old = wide.read(DOWN)
    for i, share in enumerate((0.7, 0.21, 0.063, 0.027)):
        torch.testing.assert_close(parts[:, i], old * share)


def test_groups_keep_their_weights(lazy: LazyCheckpoint) -> None:
    groups = [{"members": [i, i + N_MLP], "weights": [0.8, 0.2]} for i in range(N_MLP)]
    asked: dict[str, Any] = {"mlp": {"groups": groups}, "hidden": 2}
    grown = lazy.decoalesce(**asked, split=0.6, grouping="stacked")
    old = lazy.read(DOWN).double()
    new = grown.read(DOWN)[: len(old)].double()
    torch.testing.assert_close(new[:, :N_MLP], old * 0.8, rtol=2**-8, atol=0)
    assert torch.equal(new[:, :N_MLP] + new[:, N_MLP:], old)
    up = "model.layers.0.mlp.up_proj.weight"
    old, new = lazy.read(up).double(), grown.read(up)[:N_MLP].double()
    torch.testing.assert_close(new[:, : old.shape[1]], old * 0.6, rtol=2**-8, atol=0)


@pytest.mark.slow
def test_the_function_is_kept_and_training_tells_copies_apart(bench: Bench) -> None:
    for name in ("llama", "llama_tied"):
        model = truth.named("llama", name)
        source = bench.source(model)
        grown = streammap.open(source).decoalesce(width=2, split=0.7)
        assert bench.error(grown, source, model) < 1e-12
        assert not any("equal gradients" in note for note in grown.plan.notes)


def test_noise_goes_with_a_split(lazy: LazyCheckpoint) -> None:
    wide = lazy.convert(dtype="float64")
    grown = wide.decoalesce(mlp=2, split=0.7, noise=10.0, grouping="stacked").read(DOWN)
    old = wide.read(DOWN)
    torch.testing.assert_close(grown[:, :N_MLP] + grown[:, N_MLP:], old)
    assert float((grown[:, :N_MLP] - 0.7 * old).abs().min()) > 0


def test_the_command_the_scheme_and_the_record_agree(tmp_path: Path, lazy: LazyCheckpoint) -> None:
    source = lazy.plan.sources[0].name
    lazy.save(tmp_path / source, fsync=False)
    ok("decoalesce", tmp_path / source, tmp_path / "typed", "--mlp", 2, "--split", "0.7")
    scheme = tiny.file(tmp_path / "s.json", json.dumps({"mlp": "x2", "split": 0.7}))
    ok("decoalesce", tmp_path / source, tmp_path / "schemed", "--scheme", scheme)
    ok("apply", tmp_path / "typed", tmp_path / "applied")
    wanted = {key: tiny.bits(x) for key, x in lazy.decoalesce(mlp=2, split=0.7).tensors()}
    for name in ("typed", "schemed", "applied"):
        found = {key: tiny.bits(x) for key, x in streammap.open(tmp_path / name).tensors()}
        assert found == wanted, name
    assert (
        json.loads((tmp_path / "typed" / "streammap.json").read_text())["request"]["split"] == 0.7
    )
    ok("verify", tmp_path / "typed", "--recompute", 30)


@pytest.mark.parametrize(
    "split",
    [0.0, 1.0, -1, 2, "x", "", "0.5,0.6", [0.5], [], ["a", "b"], True, None, "nan", "1e999"],
)
def test_what_are_no_shares_is_refused(lazy: LazyCheckpoint, split: Any) -> None:
    if split is None or split == [0.5]:
        lazy.decoalesce(mlp=2, split=split)
        return
    with pytest.raises(StreammapError, match="split") as refusal:
        lazy.decoalesce(mlp=2, split=split)
    assert refusal.value.hint


def test_a_list_of_another_length_is_refused(lazy: LazyCheckpoint) -> None:
    with pytest.raises(StreammapError, match="2 shares, but some MLP neurons have 3 copies"):
        lazy.decoalesce(mlp=3, split="0.7,0.3")
    assert run("decoalesce", "a", "b", "--split", "much").exit_code == 2
