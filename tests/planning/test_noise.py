"""Noise over copies: its rule, written down once more in plain torch; the function; training."""

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.common.ranks import Ranks
from streammap.errors import PlanError, StreammapError
from streammap.planning.copies import zero_sum
from streammap.testing import faults
from tests.support import optimized, tiny, truth
from tests.support.tiny import State, cut
from tests.support.truth import Bench
from tests.support.typed import Options, ok, run

transformers = pytest.importorskip("transformers")

SAME = 1e-12
N_MLP, N_HIDDEN = 92, 48
DOWN, UP = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def bench(scratch: Path) -> Bench:
    return Bench(scratch)


@pytest.fixture(scope="module")
def llama(bench: Bench) -> LazyCheckpoint:
    return streammap.open(bench.source(truth.named("llama", "llama")))


def level(signal: Tensor, noise: Tensor) -> float:
    """Signal to noise in dB."""
    return 10.0 * math.log10(float((signal**2).mean() / (noise**2).mean()))


def noise_of(lazy: LazyCheckpoint, key: str, **options: Any) -> tuple[Tensor, Tensor]:
    """A grown tensor without noise, and what noise adds to it, in float64."""
    plain = lazy.decoalesce(**options).read(key).double()
    return plain, lazy.decoalesce(**options, noise=10.0, seed=3).read(key).double() - plain


# The rule.


def hypercloned(w: Tensor, n_out: int, n_in: int, snr: float, drawn: Tensor) -> Tensor:
    """HyperCloning's clone of a linear weight, as the paper and its code describe it.

    The weight is repeated and divided by the number of columns' copies; in each block of rows,
    pairs of column blocks get +N and -N, with mean(N^2) = mean(block^2) / 10^(snr / 10).

    Args:
        drawn: Normal numbers for each block of rows and pair [n_out, n_in // 2, rows, columns].
    """
    made = w.repeat(n_out, n_in) / n_in
    rows, columns = w.shape
    for r, p in itertools.product(range(n_out), range(n_in // 2)):
        there = made[r * rows : (r + 1) * rows]
        block = there[:, 2 * p * columns : (2 * p + 1) * columns]
        n = drawn[r, p]
        n = n * ((block**2).mean() / 10.0 ** (snr / 10.0) / (n**2).mean()).sqrt()
        there[:, 2 * p * columns : (2 * p + 1) * columns] += n
        there[:, (2 * p + 1) * columns : (2 * p + 2) * columns] -= n
    return made


@pytest.mark.parametrize("times", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_pairs_get_what_hypercloning_gives_them(llama: LazyCheckpoint, times: int) -> None:
    grown = llama.decoalesce(width=times, noise=10.0, seed=1, grouping="stacked")
    seen: list[Tensor] = []
    for key in grown.plan.targets:
        if "layers" in key and "layers.1" not in key:
            continue
        old, new = llama.read(key), grown.read(key)
        if old.dim() < 2 or "embed" in key:
            assert torch.equal(new, torch.cat([old] * times, dim=-1))
            continue
        n_out = new.shape[0] // old.shape[0]
        blocks = cut(cut(new, 0, n_out), 2, times).transpose(1, 2)
        drawn = blocks[:, ::2] - old / times
        wanted = hypercloned(old, n_out, times, 10.0, drawn)
        torch.testing.assert_close(new, wanted, rtol=0, atol=1e-9)
        seen += drawn.flatten(0, 1).unbind()
    # Each block has numbers of its own.
    first = torch.stack([one.flatten()[:1000] for one in seen])
    assert float((torch.corrcoef(first) - torch.eye(len(first))).abs().max()) < 0.25


@pytest.mark.parametrize("n", range(1, 9))
def test_fields_add_up_to_nothing_and_are_equally_long(n: int) -> None:
    matrix = torch.zeros(n, max(1, zero_sum.n_fields(n)), dtype=torch.float64)
    for i, row in enumerate(zero_sum.rows(n)):
        for j, value in row:
            matrix[i, j] = value
    assert float(matrix.sum(0).abs().max()) < 1e-15
    if n > 1:
        torch.testing.assert_close(matrix.square().sum(1), torch.ones(n, dtype=torch.float64))
        assert len({tuple(row) for row in matrix.tolist()}) == n


GROUPS = (
    ("stacked", [[i + k * N_MLP for k in range(3)] for i in range(N_MLP)]),
    ("adjacent", [list(range(5 * i, 5 * i + 5)) for i in range(N_MLP)]),
    ("uneven", [[i, *range(N_MLP + 2 * i, N_MLP + 2 * i + i % 3)] for i in range(N_MLP)]),
)


@pytest.mark.parametrize(("name", "groups"), GROUPS, ids=[name for name, _ in GROUPS])
def test_each_block_has_its_level_and_copies_add_up_to_nothing(
    llama: LazyCheckpoint, name: str, groups: list[list[int]]
) -> None:
    used = sorted(i for group in groups for i in group)
    if name == "uneven":  # numbers without gaps
        place = {old: new for new, old in enumerate(used)}
        groups = [[place[i] for i in group] for group in groups]
    plain, noise = noise_of(llama, DOWN, mlp=groups)
    for group in groups:
        assert float(noise[:, group].sum(1).abs().max()) < 1e-14
        assert (float(noise[:, group].abs().max()) == 0.0) == (len(group) == 1)
    for size in {len(group) for group in groups} - {1}:
        for copy in range(size):
            block = [group[copy] for group in groups if len(group) == size]
            assert abs(level(plain[:, block], noise[:, block]) - 10.0) < 1e-6
    assert float(noise_of(llama, UP, mlp=groups)[1].abs().max()) == 0.0


def test_the_level_is_that_of_an_even_split_where_shares_differ(llama: LazyCheckpoint) -> None:
    groups = [{"members": [i, i + N_MLP], "weights": [0.7, 0.3]} for i in range(N_MLP)]
    plain, noise = noise_of(llama, DOWN, mlp={"groups": groups})
    torch.testing.assert_close(plain[:, :N_MLP], llama.read(DOWN) * 0.7)
    assert abs(level(llama.read(DOWN) / 2, noise[:, :N_MLP]) - 10.0) < 1e-6


def test_other_seeds_and_keys_give_other_numbers(llama: LazyCheckpoint) -> None:
    first, again, other = (
        llama.decoalesce(mlp=2, noise=10.0, seed=seed).read(DOWN) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(
        llama.decoalesce(mlp=2, noise=10.0).read(DOWN),
        llama.decoalesce(mlp=2, noise=10.0, seed=0).read(DOWN),
    )


@pytest.mark.slow
def test_large_blocks_have_their_level_too(tmp_path: Path) -> None:
    """Beyond a million numbers it is the expected one, not found out."""
    sizes = tiny.Sizes(heads=4, layers=1, head_dim=128, mlp_per_head=1024)
    torch.manual_seed(0)
    tiny.write(tmp_path / "big", tiny.bert(sizes), tiny.bert_config(sizes))
    lazy, key = streammap.open(tmp_path / "big"), "encoder.layer.0.output.dense.weight"
    for groups in (2, 3):
        plain, noise = noise_of(lazy, key, mlp=groups, grouping="stacked")
        for block in range(groups):
            at = slice(block * sizes.mlp, (block + 1) * sizes.mlp)
            assert abs(level(plain[:, at], noise[:, at]) - 10.0) < 0.05
        assert float(cut(noise, 1, groups).sum(1).abs().max()) < 1e-5


# The function.

N_FAST = 2
CASES: Sequence[tuple[str, str, Options]] = (
    ("llama", "llama", {"width": 3}),
    ("llama", "llama_tied", {"width": 2}),
    ("gemma", "gemma2_tied", {"width": 2}),
    ("llama", "llama_tied", {"width": 2, "untie": True}),
    ("gpt2", "gpt2", {"width": 2}),
    ("mixtral", "mixtral", {"experts": 3}),
    ("llama", "llama", {"hidden": "to:120"}),
    ("gpt2", "gpt2", {"layers": 2, "mlp": 2, "new_layers": "zero"}),
    ("llama", "llama_tied", {"hidden": 2, "split": 0.7}),
)


@pytest.mark.parametrize(
    ("arch", "name", "options"),
    [pytest.param(*one, marks=[pytest.mark.slow] * (i > N_FAST)) for i, one in enumerate(CASES)],
    ids=lambda one: str(one)[:40],
)
def test_the_function_is_kept(bench: Bench, arch: str, name: str, options: Options) -> None:
    model = truth.named(arch, name)
    source = bench.source(model)
    grown = streammap.open(source).decoalesce(**options, noise=10.0, seed=5)
    assert grown.promise[0].startswith("exact")
    assert bench.error(grown, source, model) < SAME
    assert not any("equal gradients" in note for note in grown.plan.notes)


def every_model() -> list[Any]:
    return [
        pytest.param(arch, model, id=model.name)
        for arch in registry.names()
        for model in registry.tiny_models(arch)
        if not model.shapes_only and not model.class_name.startswith("timm:")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "model"), every_model())
def test_every_type_keeps_its_function(bench: Bench, arch: str, model: TinyModel) -> None:
    """Whatever the promise, noise takes nothing of it."""
    source = bench.source(model)
    lazy, n = streammap.open(source), 0
    asked: tuple[Options, ...] = ({"width": 2}, {"width": 3}, {"experts": 2})
    for options in asked:
        try:
            plain = lazy.decoalesce(**options)
            grown = lazy.decoalesce(**options, noise=10.0, seed=7)
        except StreammapError:
            continue
        n += 1
        assert grown.promise == plain.promise
        if grown.promise[0] == "exact":
            error = bench.error(grown, source, model)
            # Outputs that are hidden units themselves have more of them.
            assert error < SAME or bench.error(plain, source, model) > 1.0, options
    assert n


def test_in_bfloat16_only_rounding_is_lost(bench: Bench, scratch: Path) -> None:
    model = truth.named("llama", "llama")
    source = bench.source(model)
    state = {key: x.to(torch.bfloat16) for key, x in truth.state_of(source).items()}
    lazy = streammap.open(truth.write(scratch / "bf16", state, truth.config_of(source)))
    grown = lazy.decoalesce(width=2, noise=10.0)
    (note,) = [note for note in grown.plan.notes if note.startswith("bfloat16")]
    assert "noise (10 dB)" in note
    exact = truth.write(
        scratch / "f64", {k: x.double() for k, x in state.items()}, truth.config_of(source)
    )
    wide = streammap.open(exact).decoalesce(width=2, noise=10.0)
    for key, x in grown.tensors():
        # What nearly cancels keeps the rounding of float32.
        bound = wide.read(key).abs() * 2.0**-8 + 1e-7
        assert bool(((x.double() - wide.read(key)).abs() <= bound).all()), key


@pytest.mark.slow
def test_a_shrink_by_the_saved_map_takes_the_noise_off(bench: Bench) -> None:
    lazy = streammap.open(bench.source(truth.named("llama", "llama_tied")))
    for grown in (
        lazy.decoalesce(width=2, noise=3.0),
        streammap.open(bench.saved(lazy.decoalesce(width=2, noise=3.0))),
    ):
        for key, x in grown.coalesce(width=2).tensors():
            torch.testing.assert_close(x, lazy.read(key), rtol=0, atol=1e-14)


def test_the_tied_embedding_stays_copies(bench: Bench) -> None:
    """It makes the copies that all others read: noise there would be in the stream."""
    lazy = streammap.open(bench.source(truth.named("llama", "llama_tied")))
    grown, key = lazy.decoalesce(width=2, noise=10.0), "model.embed_tokens.weight"
    assert torch.equal(grown.read(key), lazy.read(key).repeat(1, 2))
    gain = "model.norm.weight"
    old, new = lazy.read(gain), cut(grown.read(gain), 0, 2)
    torch.testing.assert_close(new.sum(0), old, rtol=0, atol=1e-15)
    assert abs(level(old / 2, new[0] - old / 2) - 10.0) < 1e-6
    assert any("its noise is in the norm before it" in note for note in grown.plan.notes)
    untied = lazy.decoalesce(width=2, noise=10.0, untie=True)
    head = cut(untied.read("lm_head.weight"), 1, 2)
    torch.testing.assert_close(head.sum(1), lazy.read(key))
    assert abs(level(lazy.read(key) / 2, head[:, 0] - lazy.read(key) / 2) - 10.0) < 1e-6


def test_maps_of_layers_take_noise_too(bench: Bench, llama: LazyCheckpoint) -> None:
    model = truth.named("llama", "llama")
    n = llama.sizes["layer"]
    by_layer = {str(i): [[j, N_MLP + (j + i) % N_MLP] for j in range(N_MLP)] for i in range(n)}
    grown = llama.decoalesce(mlp=by_layer, noise=10.0)
    assert bench.error(grown, bench.source(model), model) < SAME
    plain = llama.decoalesce(mlp=by_layer)
    for i in range(n):
        key = DOWN.replace("0", str(i))
        noise = grown.read(key) - plain.read(key)
        order = [N_MLP + (j + i) % N_MLP for j in range(N_MLP)]
        torch.testing.assert_close(noise[:, :N_MLP], -noise[:, order], rtol=0, atol=1e-15)
        assert abs(level(plain.read(key), noise) - 10.0) < 1e-6


# Experts.


@pytest.mark.parametrize("name", [pytest.param("one by one", marks=pytest.mark.slow), "stacked"])
def test_experts_differ_in_what_they_write(bench: Bench, scratch: Path, name: str) -> None:
    """What writes to the stream has noise, level by level; copies of the router have none."""
    model = truth.named("mixtral", "mixtral")
    lazy = streammap.open(bench.source(model))
    stacked = any("experts.down_proj" in key for key in lazy.plan.targets)
    if stacked != (name == "stacked"):
        lazy = streammap.open(bench.source(model)).convert(
            layout="runtime" if name == "stacked" else "hub"
        )
        lazy = streammap.open(shutil.copytree(bench.saved(lazy), scratch / name))
    grown, plain = lazy.decoalesce(experts=3, noise=10.0), lazy.decoalesce(experts=3)
    n = lazy.sizes["expert"]

    def down(of: LazyCheckpoint, count: int) -> Tensor:
        """Shapes: [experts, hidden, mlp]."""
        keys = [key for key in of.plan.targets if "layers.1" in key]
        whole = [key for key in keys if key.endswith("experts.down_proj")]
        if whole:
            return of.read(whole[0])
        return torch.stack([
            of.read(next(k for k in keys if f"experts.{i}." in k and ("w2" in k or "down" in k)))
            for i in range(count)
        ])  # fmt: skip

    old, new = down(plain, 3 * n), down(grown, 3 * n)
    noise = new - old
    copies = [[j for j in range(3 * n) if torch.equal(old[j], old[i])] for i in range(n)]
    for group in copies:
        assert len(group) == 3
        assert float(noise[group].sum(0).abs().max()) < 1e-14
        for i in group:
            assert abs(level(old[i], noise[i]) - 10.0) < 1e-6
    for key, x in plain.tensors():
        if "down" not in key and "w2" not in key:
            assert torch.equal(x, grown.read(key)), key
    source = bench.source(model)
    assert bench.error(grown, source, model) < SAME
    assert any("stay equal" not in note for note in grown.plan.notes)


def test_experts_of_which_one_is_taken_stay_twins(bench: Bench) -> None:
    lazy = streammap.open(bench.source(truth.named("mixtral", "mixtral")))
    with pytest.raises(PlanError, match="no weight reads copies"):
        lazy.decoalesce(experts=2, top_k="keep", noise=10.0)
    grown = lazy.decoalesce(experts=2, mlp=2, top_k="keep", noise=10.0)
    assert grown.promise[0] == "approximate"


def test_routers_have_no_noise_and_the_plan_says_so(bench: Bench) -> None:
    lazy = streammap.open(bench.source(truth.named("mixtral", "mixtral")))
    grown, plain = lazy.decoalesce(width=2, noise=10.0), lazy.decoalesce(width=2)
    router = next(key for key in grown.plan.targets if key.endswith("gate.weight"))
    assert torch.equal(grown.read(router), plain.read(router))
    assert any("no noise, rounding would choose" in note for note in grown.plan.notes)


# Training.

TWENTY = (
    *(("llama", "llama"), ("llama", "llama_tied"), ("llama", "qwen3"), ("llama", "phi3")),
    *(("gpt2", "gpt2"), ("gemma", "gemma2_tied"), ("gemma", "gemma"), ("mixtral", "mixtral")),
    *(("gpt_oss", "gpt_oss"), ("falcon", "falcon"), ("qwen3_next", "qwen3_next")),
    *(("deepseek", "deepseek_v3"), ("olmo", "olmo"), ("olmo2", "olmo2"), ("gpt_neox", "gpt_neox")),
    *(("opt", "opt"), ("mamba", "mamba"), ("cohere", "cohere")),
    *(("bert", "bert"), ("t5", "t5"), ("phi", "phi"), ("qwen_moe", "qwen3_moe")),
)


def trained(folder: Path, model: TinyModel, n_steps: int = 20) -> tuple[State, State]:
    """The model of a folder before and after some steps of AdamW in float64, without dropout."""
    cls = getattr(transformers, model.class_name)
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    net = cls.from_pretrained(folder, dtype=torch.float64, **eager)
    net.train(False)
    torch.set_num_threads(1)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.0)
    ids = torch.randint(5, 90, (8, 16), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids}
    if net.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    before = {key: x.detach().clone() for key, x in net.state_dict().items()}
    torch.manual_seed(0)
    wanted: list[Tensor] = []

    def loss() -> Tensor:
        out = net(**inputs)[0]
        if not wanted:
            wanted.append(torch.randn(out.shape[:-1], dtype=out.dtype))
        error: Tensor = (out.square().mean(-1) - wanted[0]).square().mean()
        return error

    optimized.train(optimizer, loss, n_steps)
    return before, {key: x.detach() for key, x in net.state_dict().items()}


def made_alike(lazy: LazyCheckpoint, before: State) -> dict[str, tuple[int, Tensor]]:
    """Matrix -> the dimension that makes units, and pairs of equal ones along it [pairs, 2]."""
    found: dict[str, tuple[int, Tensor]] = {}
    for family in lazy.plan.model.families:
        if family.rule.kind not in ("linear", "conv1d", "embedding") or "token_type" in family.name:
            continue
        makes = [d for d, dim in enumerate(family.dims) if dim.role == "out"]
        for key in family.members.values():
            if len(makes) == 1 and key in before and before[key].dim() == 2:
                first: dict[bytes, int] = {}
                pairs = []
                for i, x in enumerate(before[key].unbind(makes[0])):
                    j = first.setdefault(tiny.bits(x.contiguous()), i)
                    pairs += [[j, i]] * (i > j)
                if pairs:
                    found[key] = makes[0], torch.tensor(pairs)
    return found


def apart(
    steps: tuple[State, State], pairs: dict[str, tuple[int, Tensor]], quantile: float
) -> dict[str, float]:
    """Matrix -> how far what training added differs between copies, by its RMS.

    Noise, which is there from the beginning, does not count. Nor do units without gradients; and
    of the others a few may be seen by one token alone, whose gradient Adam makes a sign.
    """
    found = {}
    for key, (dim, places) in pairs.items():
        before, after = (state[key] for state in steps)
        rms = float(before.square().mean().sqrt())
        added = (after - before).movedim(dim, 0)[places]  # [pairs, 2, ...]
        moved = added.square().mean(-1).sqrt().amin(1) > 1e-3 * rms
        if bool(moved.any()):
            distance = (added[moved][:, 0] - added[moved][:, 1]).square().mean(-1).sqrt()
            found[key] = float(distance.quantile(quantile)) / rms
    return found


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        pytest.param(*one, id=one[1], marks=[pytest.mark.slow] * (i > 0))
        for i, one in enumerate(TWENTY)
    ],
)
def test_training_tells_copies_apart(bench: Bench, arch: str, name: str) -> None:
    """20 steps of AdamW: rows of twins differ by more than 1e-3 of their RMS; else they do not."""
    model = truth.named(arch, name)
    lazy = streammap.open(bench.source(model))
    plain, grown = lazy.decoalesce(width=2), lazy.decoalesce(width=2, noise=10.0)
    without = trained(bench.saved(plain), model)
    pairs = made_alike(plain, without[0])
    told = apart(trained(bench.saved(grown), model), pairs, 0.25)
    assert len(told) > 4
    assert {key: far for key, far in told.items() if far <= 1e-3} == {}
    stay = apart(without, pairs, 1.0)
    assert {key: far for key, far in stay.items() if far >= 1e-9} == {}


# The same bytes, whatever makes them.


def saved(lazy: LazyCheckpoint, out: Path, **options: Any) -> dict[str, bytes]:
    """The bytes of a result."""
    lazy.save(out, fsync=False, **options)
    return {name: content for name, content in tiny.tree(out).items() if "safetensors" in name}


def grown_bert(folder: Path) -> LazyCheckpoint:
    sizes = tiny.Sizes(heads=4, layers=2, head_dim=8)
    if not folder.exists():
        tiny.write(folder, tiny.bert(sizes), tiny.bert_config(sizes))
    return streammap.open(folder).decoalesce(width=3, noise=10.0, seed=9)


def test_the_same_bytes_for_threads_budgets_ranks_and_kills(tmp_path: Path) -> None:
    def make() -> LazyCheckpoint:
        return grown_bert(tmp_path / "big")

    whole = saved(make(), tmp_path / "whole", threads=1)
    means: tuple[Options, ...] = ({"threads": 3}, {"threads": 2, "memory": "24MiB"})
    for n, options in enumerate(means):
        assert saved(make(), tmp_path / f"other{n}", **options) == whole

    def rank(number: int) -> None:
        make().save(tmp_path / "ranks", fsync=False, threads=1, ranks=Ranks(number, 2, launch="a"))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    written = {n: c for n, c in tiny.tree(tmp_path / "ranks").items() if "safetensors" in n}
    assert written == whole
    for point in (20, 45):
        out = tmp_path / f"killed{point}"
        assert faults.killed(lambda out=out: make().save(out, threads=1, fsync=False), point)  # type: ignore[misc]
        assert saved(make(), out, threads=2) == whole


def test_a_part_is_that_of_the_whole(llama: LazyCheckpoint) -> None:
    grown = llama.decoalesce(width=3, noise=10.0, seed=2)
    whole = grown.read(DOWN)
    for part in ((slice(5, 9),), (slice(0, 48), slice(90, 101)), (slice(47, 48), slice(275, 276))):
        assert torch.equal(grown.read(DOWN, region=part), whole[part])


# How it is asked for.


def test_the_command_the_call_the_scheme_and_the_record_agree(tmp_path: Path, bench: Bench) -> None:
    source = bench.source(truth.named("llama", "llama"))
    lazy = streammap.open(source)
    wanted = saved(lazy.decoalesce(mlp=2, noise=12.5, seed=4), tmp_path / "called")
    ok("decoalesce", source, tmp_path / "typed", "--mlp", 2, "--noise", 12.5, "--seed", 4)
    scheme = tiny.file(tmp_path / "s.json", json.dumps({"mlp": "x2", "noise": 12.5, "seed": 4}))
    ok("decoalesce", source, tmp_path / "schemed", "--scheme", scheme)
    ok("apply", tmp_path / "typed", tmp_path / "applied")
    for name in ("typed", "schemed", "applied"):
        written = {n: c for n, c in tiny.tree(tmp_path / name).items() if n.endswith("safetensors")}
        assert written == {n: c for n, c in wanted.items() if n in written}, name
    record = json.loads((tmp_path / "typed" / "streammap.json").read_text())
    assert record["request"]["noise"] == 12.5
    assert record["request"]["seed"] == 4
    assert "0 differ" in ok("diff", tmp_path / "typed", tmp_path / "schemed")
    ok("verify", tmp_path / "typed", "--recompute", 30)
    assert "noise 12.5 dB" in ok("plan", "decoalesce", source, "--mlp", 2, "--noise", 12.5)
    assert "mlp" in ok("inspect", tmp_path / "typed").lower()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"layers": 2, "noise": 10.0}, "no weight reads copies"),
        ({"width": 2, "seed": 1}, "--seed needs --noise"),
        ({"width": 2, "noise": math.nan}, "expected -20 to 120"),
        ({"width": 2, "noise": 1e9}, "expected -20 to 120"),
        ({"width": 2, "noise": "10"}, "expected -20 to 120"),
        ({"width": 2, "noise": 10.0, "seed": -1}, "expected 0 or more"),
        ({"width": 2, "noise": True}, "expected -20 to 120"),
        ({"scheme": {"mlp": "x2", "noise": "loud"}}, "expected -20 to 120"),
        ({"scheme": {"mlp": "x2", "seed": 1}}, "--seed needs --noise"),
    ],
)
def test_what_makes_no_sense_is_refused(llama: LazyCheckpoint, options: Options, told: str) -> None:
    with pytest.raises(StreammapError, match=told) as refusal:
        llama.decoalesce(**options)
    assert refusal.value.hint or "seed" in options


def test_a_shrink_ignores_what_a_scheme_says_of_copies(llama: LazyCheckpoint) -> None:
    scheme = {"mlp": "x2", "noise": 10, "seed": 1, "split": 0.7}
    told = llama.coalesce(scheme=scheme).plan.notes
    assert any("noise, seed, split of the scheme" in note for note in told)
    assert run("coalesce", "a", "b", "--noise", 10).exit_code != 0
