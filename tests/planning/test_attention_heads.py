"""Maps of query heads and kv heads: what is accepted computes the same, the rest would not."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.planning.axis_maps import KvMerge
from tests.support import tiny, truth
from tests.support.truth import Bench
from tests.support.typed import Options

pytest.importorskip("transformers")

N_MAPS = 70
HEAD_DIM = 4
EMBED = 48
"""Divides by all numbers of heads here: Llama asks for that, though its head size is its own."""
STACKED: list[object] = [[0, 4], [1, 5], [2, 6], [3, 7]]
UNEVEN: list[object] = [[0, 1], [4], [2, 3], [5, 6, 7]]
UNEVEN_KV: list[object] = [[0, 1, 4], [2, 3, 5, 6, 7]]
LARGER = (2, 3, 4, 6, 8, 12, 16)


@pytest.fixture(scope="module")
def bench(scratch: Path) -> Bench:
    return Bench(scratch)


def llama(heads: int, kv: int) -> TinyModel:
    config = {
        "vocab_size": 31,
        "hidden_size": EMBED,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 32,
        "attention_bias": True,
        "tie_word_embeddings": False,
    }
    return TinyModel(f"llama-{heads}-{kv}", "LlamaForCausalLM", config)


@dataclass(frozen=True, slots=True)
class Growth:
    """Heads of a small model, and for each head of a larger one the one that it copies."""

    heads: int
    kv: int
    from_heads: tuple[int, ...]
    from_kv: tuple[int, ...]

    @property
    def options(self) -> Options:
        return {
            "heads": groups(self.from_heads, self.heads),
            "kv_heads": groups(self.from_kv, self.kv),
        }


def tried(source: Path, maps: Growth) -> tuple[LazyCheckpoint | None, str]:
    """The growth, or why it is refused."""
    try:
        return streammap.open(source).decoalesce(**maps.options), ""
    except PlanError as refusal:
        return None, str(refusal)


def groups(copied: Sequence[int], n_small: int) -> list[object]:
    return [[i for i, j in enumerate(copied) if j == small] for small in range(n_small)]


def growth(seed: int) -> Growth:
    """Random counts and maps in which no head is lost; the even seeds respect the kv heads."""
    draw = random.Random(seed)
    while True:
        heads = draw.choice((2, 4, 6, 8))
        kv = draw.choice([n for n in range(1, heads + 1) if heads % n == 0])
        new_heads = draw.choice([n for n in LARGER if n >= heads])
        new_kv = draw.choice([n for n in range(kv, new_heads + 1) if new_heads % n == 0] or [0])
        if not new_kv or (new_heads, new_kv) == (heads, kv):
            continue
        if seed % 2:
            if kv == 1:
                continue  # Whatever a head copies, it reads the same.
            return Growth(heads, kv, onto(draw, heads, new_heads), onto(draw, kv, new_kv))
        from_kv, of_kv, of_new = onto(draw, kv, new_kv), heads // kv, new_heads // new_kv
        from_heads = tuple(
            from_kv[i // of_new] * of_kv + draw.randrange(of_kv) for i in range(new_heads)
        )
        if len(set(from_heads)) == heads:
            return Growth(heads, kv, from_heads, from_kv)


def onto(draw: random.Random, n_small: int, n_large: int) -> tuple[int, ...]:
    found = [*range(n_small), *(draw.randrange(n_small) for _ in range(n_large - n_small))]
    draw.shuffle(found)
    return tuple(found)


def grown_by_hand(state: Mapping[str, Tensor], maps: Growth) -> dict[str, Tensor]:
    """Heads copied and split with dense matrices."""
    produce = one_hot(maps.from_heads, maps.heads)
    read = produce / produce.sum(0)
    produce_kv = one_hot(maps.from_kv, maps.kv)
    return mapped(state, produce, read, produce_kv)


def mapped(
    state: Mapping[str, Tensor], produce: Tensor, read: Tensor, produce_kv: Tensor
) -> dict[str, Tensor]:
    """Query heads made by `produce` and read by `read`, kv heads made by `produce_kv`."""
    each = torch.eye(HEAD_DIM, dtype=torch.float64)
    found = dict(state)
    for key, x in state.items():
        if ".q_proj." in key:
            found[key] = torch.kron(produce, each) @ x
        elif ".k_proj." in key or ".v_proj." in key:
            found[key] = torch.kron(produce_kv, each) @ x
        elif key.endswith("o_proj.weight"):
            found[key] = x @ torch.kron(read, each).T
    return found


def one_hot(copied: Sequence[int], n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float64)[list(copied)]


def averaged(members: Sequence[Sequence[int]], n: int, *, first: bool = False) -> Tensor:
    found = torch.zeros(len(members), n, dtype=torch.float64)
    for i, group in enumerate(members):
        chosen = group[:1] if first else group
        found[i, list(chosen)] = 1.0 / len(chosen)
    return found


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    torch.testing.assert_close(dict(found), dict(expected), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("seed", range(N_MAPS))
def test_what_is_accepted_is_exact_and_what_is_refused_is_wrong(bench: Bench, seed: int) -> None:
    maps = growth(seed)
    model = llama(maps.heads, maps.kv)
    source = bench.source(model)
    counts = {"num_attention_heads": len(maps.from_heads), "num_key_value_heads": len(maps.from_kv)}
    by_hand = grown_by_hand(truth.state_of(source), maps)
    lazy, refusal = tried(source, maps)
    if lazy is None:
        folder = source.with_name("by-hand")
        truth.write(folder, by_hand, {**truth.config_of(source), **counts})
        error = truth.difference(truth.outputs(folder, model), bench.expected(source, model))
        assert error > 1e-6
        assert "would come from heads that read kv heads" in refusal
        assert "hint: group heads so that each keeps to its kv head" in refusal
        return
    assert lazy.promise[0] == "exact"
    assert bench.error(lazy, source, model) < 1e-10
    result = source.with_name("result")
    assert_close(truth.state_of(result), by_hand)
    assert truth.config_of(result).items() >= counts.items()
    assert_close(dict(streammap.open(result).coalesce().tensors()), truth.state_of(source))


def test_about_half_of_the_maps_are_refused(bench: Bench) -> None:
    refused = []
    for seed in range(N_MAPS):
        maps = growth(seed)
        if tried(bench.source(llama(maps.heads, maps.kv)), maps)[0] is None:
            refused.append(seed)
    assert not any(seed % 2 == 0 for seed in refused)
    assert 25 <= len(refused) <= 35
    assert len({growth(seed) for seed in range(N_MAPS)}) == N_MAPS


@pytest.mark.parametrize("kv", [2, 3, 6])
@pytest.mark.parametrize("size", [False, True])
def test_one_kv_head_becomes_several_exactly(bench: Bench, kv: int, size: bool) -> None:
    model = llama(6, 1)
    source = bench.source(model)
    lazy = streammap.open(source).decoalesce(kv_heads=f"={kv}" if size else kv)
    assert (lazy.promise[0], lazy.sizes["kv_heads"]) == ("exact", kv)
    assert bench.error(lazy, source, model) < 1e-10
    copies = Growth(6, 1, tuple(range(6)), (0,) * kv)
    by_hand = grown_by_hand(truth.state_of(source), copies)
    tiny.assert_same(truth.state_of(source.with_name("result")), by_hand)


def test_mha_becomes_gqa_mqa_and_each_again_through_files(bench: Bench) -> None:
    model = llama(6, 6)
    mha = bench.source(model)
    gqa, mqa, gqa_again, mha_again = (mha.with_name(n) for n in ("gqa", "mqa", "gqa2", "mha2"))
    streammap.open(mha).coalesce(kv_heads="=3").save(gqa, fsync=False)
    streammap.open(gqa).coalesce(kv_heads=3).save(mqa, fsync=False)
    streammap.open(mqa).decoalesce().save(gqa_again, fsync=False)
    streammap.open(gqa_again).decoalesce(kv_heads=2).save(mha_again, fsync=False)
    folders = (mha, gqa, mqa, gqa_again, mha_again)
    counts = [streammap.open(folder).sizes["kv_heads"] for folder in folders]
    assert counts == [6, 3, 1, 3, 6]
    found = [truth.outputs(folder, model) for folder in folders]
    assert truth.difference(found[1], found[0]) > 1e-3
    assert truth.difference(found[2], found[1]) > 1e-3
    assert truth.difference(found[3], found[2]) < 1e-10
    assert truth.difference(found[4], found[2]) < 1e-10
    # Both ways down are the same mean.
    direct = streammap.open(mha).coalesce(kv_heads="=1")
    assert_close(dict(direct.tensors()), truth.state_of(mqa))


@pytest.mark.parametrize("kv_merge", ["mean", "first"])
@pytest.mark.parametrize(
    ("requests", "of_heads", "of_kv"),
    [
        ({"kv_heads": "=4"}, None, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"kv_heads": 4}, None, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"kv_heads": "=1"}, None, [list(range(8))]),
        ({"heads": STACKED, "kv_heads": STACKED}, STACKED, STACKED),
        ({"heads": UNEVEN, "kv_heads": UNEVEN_KV}, UNEVEN, UNEVEN_KV),
    ],
)
def test_merged_heads_are_the_mean_or_the_first(
    bench: Bench,
    kv_merge: KvMerge,
    requests: Options,
    of_heads: Sequence[Sequence[int]] | None,
    of_kv: Sequence[Sequence[int]],
) -> None:
    model = llama(8, 8)
    source = bench.source(model)
    options: Options = {**requests, "kv_merge": kv_merge}
    lazy = streammap.open(source).coalesce(**options)
    assert lazy.promise[0] == "approximate"
    heads = of_heads or [[i] for i in range(8)]
    produce = averaged(heads, 8)
    read = (produce > 0).double()
    by_hand = mapped(
        truth.state_of(source), produce, read, averaged(of_kv, 8, first=kv_merge == "first")
    )
    assert_close(dict(lazy.tensors()), by_hand)
    assert bench.error(lazy, source, model) > 1e-3
    counts = {"num_attention_heads": len(heads), "num_key_value_heads": len(of_kv)}
    assert truth.config_of(source.with_name("result")).items() >= counts.items()


@pytest.mark.parametrize("kv_merge", ["mean", "first"])
@pytest.mark.parametrize(
    ("heads", "requests"),
    [
        ((8, 4), {"kv_heads": 2}),
        ((8, 1), {"kv_heads": 2}),
        ((6, 3), {"kv_heads": "=6"}),
        ((8, 4), {"heads": 2, "kv_heads": 2}),
        ((4, 4), {"heads": 2, "kv_heads": 2}),
        ((6, 2), {"heads": "=12", "kv_heads": 2}),
        ((8, 4), {"heads": 2, "kv_heads": 4}),
        ((8, 4), {"heads": 2}),
        ((8, 1), {"heads": 2}),
    ],
)
def test_grown_heads_merge_back_bit_for_bit(
    bench: Bench, heads: tuple[int, int], requests: Options, kv_merge: KvMerge
) -> None:
    source = streammap.open(bench.source(llama(*heads)))
    grown = streammap.open(bench.saved(source.decoalesce(**requests)))
    for merged in (
        grown.coalesce(kv_merge=kv_merge),
        grown.coalesce(heads=f"={heads[0]}", kv_heads=f"={heads[1]}", kv_merge=kv_merge),
    ):
        tiny.assert_same(dict(merged.tensors()), dict(source.tensors()))
        assert merged.sizes == source.sizes
