"""Resized and blended checkpoints against the dense float64 formulas of `oracle`."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import streammap
from streammap.api import LazyCheckpoint
from streammap.engine import memory, tile_reads
from streammap.planning.requests import Grouping
from streammap.planning.tensor_maps.axis_change import Rule
from tests.support import oracle, tiny
from tests.support.oracle import Change, Direction, Widths
from tests.support.tiny import Config, Sizes, State

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS: tuple[Direction, ...] = ("coalesce", "decoalesce")
RULES: tuple[Rule, ...] = ("exact", "reference")
Groups = list[list[int]]


@dataclass(frozen=True)
class Kind:
    """A kind of checkpoint and the oracle that knows it."""

    make: Callable[[Sizes, int], tuple[State, Config | None]]
    of: Callable[[str, Tensor, Widths], Tensor]
    tied: bool = False

    def resized(self, state: State, sizes: Sizes, change: Change) -> State:
        return oracle.resized(
            state,
            change,
            of=self.of,
            head_dim=sizes.head_dim,
            mlp_per_head=sizes.mlp_per_head,
            tied=self.tied,
        )


def _bert(base: str, seed: int, sizes: Sizes) -> tuple[State, Config]:
    state = tiny.bert(sizes, seed=seed, base=base)
    state[f"{base}embeddings.position_ids"] = torch.arange(sizes.positions)[None]
    return state, tiny.bert_config(sizes)


def bert_plain(sizes: Sizes, seed: int) -> tuple[State, Config]:
    return _bert("", seed, sizes)


def bert_classifier(sizes: Sizes, seed: int) -> tuple[State, Config]:
    state, config = _bert("bert.", seed, sizes)
    head = {"classifier.weight": (3, sizes.embed), "classifier.bias": (3,)}
    return state | tiny.random(head, seed=seed + 1), config | {
        "architectures": ["BertForSequenceClassification"]
    }


def bert_tied(sizes: Sizes, seed: int) -> tuple[State, Config]:
    state, config = _bert("bert.", seed, sizes)
    e = sizes.embed
    head = {
        "cls.predictions.bias": (sizes.vocab,),
        "cls.predictions.transform.dense.weight": (e, e),
        "cls.predictions.transform.dense.bias": (e,),
        "cls.predictions.transform.LayerNorm.weight": (e,),
        "cls.predictions.transform.LayerNorm.bias": (e,),
        "cls.seq_relationship.weight": (2, e),
        "cls.seq_relationship.bias": (2,),
    }
    return state | tiny.random(head, seed=seed + 1), config | {
        "architectures": ["BertForPreTraining"]
    }


def bert_tied_with_a_copy(sizes: Sizes, seed: int) -> tuple[State, Config]:
    """Old files hold the decoder beside the embedding that it is."""
    state, config = bert_tied(sizes, seed)
    shared = state["bert.embeddings.word_embeddings.weight"]
    state["cls.predictions.decoder.weight"] = shared.clone()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    return state, config


def bert_untied(sizes: Sizes, seed: int) -> tuple[State, Config]:
    state, config = bert_tied(sizes, seed)
    head = {
        "cls.predictions.decoder.weight": (sizes.vocab, sizes.embed),
        "cls.predictions.decoder.bias": (sizes.vocab,),
    }
    return state | tiny.random(head, seed=seed + 2), config | {"tie_word_embeddings": False}


def gpt2_tied(sizes: Sizes, seed: int) -> tuple[State, Config]:
    state = tiny.gpt2(sizes, seed=seed, base="transformer.", masks=True)
    return state, tiny.gpt2_config(sizes)


def gpt2_with_a_second_reader(sizes: Sizes, seed: int) -> tuple[State, Config]:
    """The norm before the tied head feeds another head too."""
    state, config = gpt2_tied(sizes, seed)
    name = "multiple_choice_head.summary"
    head = {f"{name}.weight": (1, sizes.embed), f"{name}.bias": (1,)}
    return state | tiny.random(head, seed=seed + 1), config | {
        "architectures": ["GPT2DoubleHeadsModel"]
    }


def gpt2_untied(sizes: Sizes, seed: int) -> tuple[State, Config]:
    state, config = gpt2_tied(sizes, seed)
    head = tiny.random({"lm_head.weight": (sizes.vocab, sizes.embed)}, seed=seed + 1)
    return state | head, config | {"tie_word_embeddings": False}


def gpt2_classifier(sizes: Sizes, seed: int) -> tuple[State, Config]:
    state = tiny.gpt2(sizes, seed=seed, base="transformer.")
    head = tiny.random({"score.weight": (3, sizes.embed)}, seed=seed + 1)
    return state | head, tiny.gpt2_config(sizes) | {
        "architectures": ["GPT2ForSequenceClassification"]
    }


def gpt2_headless(sizes: Sizes, seed: int) -> tuple[State, Config]:
    return tiny.gpt2(sizes, seed=seed), tiny.gpt2_config(sizes) | {"architectures": ["GPT2Model"]}


def deit(sizes: Sizes, seed: int) -> tuple[State, Config]:
    return tiny.timm_deit(sizes, seed=seed), tiny.timm_config(sizes)


KINDS = {
    "bert": Kind(bert_plain, oracle.bert),
    "bert classifier": Kind(bert_classifier, oracle.bert),
    "bert tied": Kind(bert_tied, oracle.bert, tied=True),
    "bert tied, copied": Kind(bert_tied_with_a_copy, oracle.bert, tied=True),
    "bert untied": Kind(bert_untied, oracle.bert),
    "gpt2 tied": Kind(gpt2_tied, oracle.gpt2, tied=True),
    "gpt2 two heads": Kind(gpt2_with_a_second_reader, oracle.gpt2, tied=True),
    "gpt2 untied": Kind(gpt2_untied, oracle.gpt2),
    "gpt2 classifier": Kind(gpt2_classifier, oracle.gpt2),
    "gpt2": Kind(gpt2_headless, oracle.gpt2),
    "deit": Kind(deit, oracle.deit),
}


def cast(state: State, dtype: torch.dtype) -> State:
    """The floats of a state in `dtype`, with all bits of it used."""
    return {
        key: (x.double() * math.pi / 3).to(dtype) if x.is_floating_point() else x
        for key, x in state.items()
    }


def saved(place: Path, state: State, config: Config | None) -> LazyCheckpoint:
    return streammap.open(tiny.write(place, state, config))


def read(result: LazyCheckpoint, tile_nbytes: int | None = None) -> State:
    """All tensors, computed in tiles and chunks of a few hundred bytes where these are given."""
    with pytest.MonkeyPatch.context() as patch:
        if tile_nbytes is not None:
            patch.setattr(memory, "MAX_TILE_NBYTES", tile_nbytes)
            patch.setattr(memory, "MIN_TILE_NBYTES", tile_nbytes)
            patch.setattr(memory, "CHUNK_NBYTES", 320)
            patch.setattr(tile_reads, "STRIP", 4)
        return {key: result.read(key) for key in result.keys()}  # noqa: SIM118 a checkpoint's


def assert_rounded_once(got: State, wanted: State, size: State, dtype: torch.dtype) -> None:
    """Each tensor is the formula's value, but for rounding in sums and one to its dtype.

    Args:
        size: The formula with all terms positive: rounding moves no more than 8 units of it.
    """
    assert got.keys() == wanted.keys()
    unit = 8 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for key, x in wanted.items():
        if not x.is_floating_point():
            assert torch.equal(got[key], x), key
            continue
        assert got[key].dtype == dtype, key
        assert got[key].shape == x.shape, key
        slack = size[key] * unit
        low, high = (x - slack).to(dtype), (x + slack).to(dtype)
        assert bool(((low <= got[key]) & (got[key] <= high)).all()), key


def assert_same(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for key, x in wanted.items():
        assert got[key].dtype == x.dtype, key
        assert torch.equal(got[key], x), key


@st.composite
def groupings(draw: st.DrawFn, n_large: int) -> Groups:
    """Fewer groups than members: uniform, a partition, or any (overlapping, with some left out)."""
    members = list(range(n_large))
    which = draw(st.sampled_from(("uniform", "partition", "any")))
    if which == "uniform":
        factor = draw(st.sampled_from([k for k in range(2, n_large + 1) if n_large % k == 0]))
        if draw(st.booleans()):
            return [members[i : i + factor] for i in range(0, n_large, factor)]
        n_small = n_large // factor
        return [members[i::n_small] for i in range(n_small)]
    if which == "partition":
        mixed = draw(st.permutations(members))
        cuts = sorted(draw(st.sets(st.integers(1, n_large - 1), max_size=n_large - 2)))
        return [mixed[a:b] for a, b in zip([0, *cuts], [*cuts, n_large], strict=True)]
    group = st.lists(st.sampled_from(members), min_size=1, max_size=n_large, unique=True)
    return draw(st.lists(group, min_size=1, max_size=n_large - 1))


@st.composite
def changes(draw: st.DrawFn) -> Change:
    """Schemes over width, depth or both, in both directions, under both rules."""
    what = draw(st.sampled_from(("width", "depth", "both")))
    n_heads, n_layers = draw(st.integers(2, 6)), draw(st.integers(2, 5))
    return Change(
        draw(st.sampled_from(DIRECTIONS)),
        draw(st.sampled_from(RULES)),
        None if what == "depth" else draw(groupings(n_heads)),
        n_heads,
        None if what == "width" else draw(groupings(n_layers)),
        n_layers,
    )


def ends(change: Change, *, head_dim: int, mlp_per_head: int) -> tuple[Sizes, Sizes]:
    """Sizes of the source and of the result."""
    large = Sizes(change.n_heads, change.n_layers, head_dim, mlp_per_head)
    small = replace(
        large,
        heads=large.heads if change.width is None else len(change.width),
        layers=large.layers if change.depth is None else len(change.depth),
    )
    return (large, small) if change.direction == "coalesce" else (small, large)


def needs_target(change: Change) -> bool:
    """Whether the scheme does not tell the size of the large model."""
    return any(
        groups is not None and n_large > 1 + max(max(group) for group in groups)
        for groups, n_large in ((change.width, change.n_heads), (change.depth, change.n_layers))
    )


def scheme_of(change: Change) -> Mapping[str, object]:
    given = {"width_scheme": change.width, "depth_scheme": change.depth}
    return {name: groups for name, groups in given.items() if groups is not None}


def applied(
    source: LazyCheckpoint, change: Change, target: "Mapping[str, object] | LazyCheckpoint | None"
) -> LazyCheckpoint:
    act = source.coalesce if change.direction == "coalesce" else source.decoalesce
    return act(scheme=scheme_of(change), target=target, rule=change.rule)


@pytest.mark.parametrize("name", KINDS)
@given(data=st.data(), change=changes())
@settings(max_examples=settings().max_examples // 3)
def test_every_tensor_is_the_formula(name: str, data: st.DataObject, change: Change) -> None:
    kind, dtype = KINDS[name], data.draw(st.sampled_from(DTYPES))
    head_dim, mlp_per_head = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    before, after = ends(change, head_dim=head_dim, mlp_per_head=mlp_per_head)
    made, config = kind.make(before, data.draw(st.integers(0, 99)))
    state = cast(made, dtype)
    wanted = kind.resized(state, before, change)
    size = kind.resized({key: x.abs() for key, x in state.items()}, before, change)
    with TemporaryDirectory() as folder:
        source = saved(Path(folder) / "source", state, None)
        source = streammap.open(Path(folder) / "source", config=config)
        target = None
        if needs_target(change) or data.draw(st.booleans()):
            big, big_config = kind.make(after, 0)
            tiny.write(Path(folder) / "target", big, None)
            target = streammap.open(Path(folder) / "target", config=big_config)
        result = applied(source, change, target)
        tile_nbytes = data.draw(st.sampled_from((None, 256, 1000)))
        assert_rounded_once(read(result, tile_nbytes), wanted, size, dtype)
        expected, _ = kind.make(after, 0)
        assert {k: tuple(x.shape) for k, x in expected.items()} == {
            key: result.spec(key).shape for key in wanted
        }


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_without_a_config_timm_heads_are_64_wide(
    tmp_path: Path, direction: Direction, rule: Rule
) -> None:
    change = Change(direction, rule, [[0, 2], [1, 3]], 4, [[0, 1]], 2)
    before, _ = ends(change, head_dim=64, mlp_per_head=256)
    state = cast(tiny.timm_deit(before, distilled=False), torch.float32)
    kind = KINDS["deit"]
    wanted = kind.resized(state, before, change)
    size = kind.resized({key: x.abs() for key, x in state.items()}, before, change)
    source = saved(tmp_path, state, None)
    assert source.sizes["heads"] == before.heads
    assert_rounded_once(read(applied(source, change, None)), wanted, size, torch.float32)


@pytest.mark.parametrize("name", KINDS)
def test_a_head_in_no_group_is_zeros_on_the_way_up(tmp_path: Path, name: str) -> None:
    """The large size stands in a config, where the scheme does not tell it."""
    kind = KINDS[name]
    change = Change("decoalesce", "reference", [[0], [1]], 3, None, 2)
    before, after = ends(change, head_dim=2, mlp_per_head=3)
    made, config = kind.make(before, 1)
    state = cast(made, torch.float32)
    tiny.write(tmp_path, state, None)
    source = streammap.open(tmp_path, config=config)
    target = kind.make(after, 0)[1]
    got = read(applied(source, change, target))
    wanted = kind.resized(state, before, change)
    assert_same(got, {k: x.to(got[k].dtype) for k, x in wanted.items()})


@pytest.mark.parametrize("groups", [[[0], [1]], [[1], [2]], [[0, 3], [1, 4]]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_a_head_in_no_group_is_compensated_under_the_exact_rule(
    tmp_path: Path, name: str, dtype: torch.dtype, groups: Groups
) -> None:
    kind = KINDS[name]
    n_large = 3 if len(groups[0]) == 1 else 5
    change = Change("decoalesce", "exact", groups, n_large, None, 2)
    before, after = ends(change, head_dim=2, mlp_per_head=3)
    made, config = kind.make(before, 1)
    state = cast(made, dtype)
    size = kind.resized({key: x.abs() for key, x in state.items()}, before, change)
    tiny.write(tmp_path, state, None)
    has_eps = name.startswith("gpt2")
    if has_eps and config is not None:
        config["layer_norm_epsilon"] = 3e-5
    source = streammap.open(tmp_path, config=config)
    target = None if n_large == 1 + max(map(max, groups)) else kind.make(after, 0)[1]
    result = applied(source, change, target)
    assert_rounded_once(read(result), kind.resized(state, before, change), size, dtype)
    if has_eps:
        assert result.promise[0] == "exact"
        assert result.config is not None
        used = len(groups) * len(groups[0]) / n_large
        assert result.config["layer_norm_epsilon"] == pytest.approx(3e-5 * used, rel=1e-12)
    else:
        # timm's files tell no epsilon; BERT's norms stand after the addition.
        assert result.promise[0] == ("exact up to eps" if name == "deit" else "approximate")


@pytest.mark.parametrize("name", ["gpt2 tied", "gpt2 two heads", "gpt2 untied", "deit"])
def test_filled_heads_shrink_back_to_their_source(tmp_path: Path, name: str) -> None:
    change = Change("decoalesce", "exact", [[0, 3], [1, 4]], 5, None, 2)
    before, _ = ends(change, head_dim=2, mlp_per_head=3)
    made, config = KINDS[name].make(before, 1)
    tiny.write(tmp_path / "small", cast(made, torch.float64), None)
    if config is not None and "model_type" in config:
        config["layer_norm_epsilon"] = 3e-5
    small = streammap.open(tmp_path / "small", config=config)
    applied(small, change, None).save(tmp_path / "large", fsync=False)
    back = streammap.open(tmp_path / "large").coalesce()
    got, source = read(back), read(small)
    assert got.keys() == source.keys()
    for key, x in source.items():
        torch.testing.assert_close(got[key], x, rtol=1e-14, atol=1e-14)
    if config is not None and "model_type" in config:
        assert back.config is not None
        assert back.config["layer_norm_epsilon"] == pytest.approx(3e-5, rel=1e-12)


def test_a_permutation_moves_heads_and_layers(tmp_path: Path) -> None:
    kind, sizes = KINDS["gpt2 tied"], Sizes(heads=3, layers=3)
    change = Change("coalesce", "exact", [[2], [0], [1]], 3, [[1], [2], [0]], 3)
    made, config = kind.make(sizes, 1)
    source = saved(tmp_path, made, config)
    got = read(applied(source, change, None))
    assert_same(got, {k: x.to(got[k].dtype) for k, x in kind.resized(made, sizes, change).items()})


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("grouping", ["stacked", "adjacent"])
@pytest.mark.parametrize("name", ["bert tied", "gpt2 two heads", "deit"])
def test_factors_stand_for_schemes(
    tmp_path: Path, direction: Direction, grouping: Grouping, name: str
) -> None:
    large = Sizes(heads=6, layers=4)
    stacked = grouping == "stacked"
    width = [[0, 2, 4], [1, 3, 5]] if stacked else [[0, 1, 2], [3, 4, 5]]
    depth = [[0, 2], [1, 3]] if stacked else [[0, 1], [2, 3]]
    change = Change(direction, "exact", width, 6, depth, 4)
    before, _ = ends(change, head_dim=large.head_dim, mlp_per_head=large.mlp_per_head)
    state, config = KINDS[name].make(before, 3)
    tiny.write(tmp_path, state, None)
    source = streammap.open(tmp_path, config=config)
    act = source.coalesce if direction == "coalesce" else source.decoalesce
    assert_same(read(act(width=3, depth=2, grouping=grouping)), read(applied(source, change, None)))


@st.composite
def disjoint_groups(draw: st.DrawFn, *lengths: int) -> Groups:
    """Disjoint groups of these lengths that leave nothing out."""
    drawn = draw(st.lists(st.sampled_from(lengths), min_size=1, max_size=3))
    mixed = iter(draw(st.permutations(range(sum(drawn)))))
    return [[next(mixed) for _ in range(length)] for length in drawn]


def _is_identity(groups: Groups) -> bool:
    return groups == [[i] for i in range(len(groups))]


@given(
    name=st.sampled_from(sorted(KINDS)),
    rule=st.sampled_from(RULES),
    width=disjoint_groups(1, 2, 4),
    depth=disjoint_groups(1, 2, 4),
)
def test_growing_and_shrinking_back_is_no_change(
    name: str, rule: Rule, width: Groups, depth: Groups
) -> None:
    # Where all stays as it is, no map is saved.
    assume(not _is_identity(width) or not _is_identity(depth))
    made, config = KINDS[name].make(Sizes(heads=len(width), layers=len(depth)), 2)
    state = cast(made, torch.float32)
    groups = {"width_scheme": width, "depth_scheme": depth}
    with TemporaryDirectory() as folder:
        tiny.write(Path(folder), state, None)
        small = streammap.open(folder, config=config)
        back = small.decoalesce(scheme=groups, rule=rule).coalesce(rule=rule)
        assert_same(read(back), state)
        assert all(form.copied is not None for form in back.plan.targets.values())


@given(
    name=st.sampled_from(sorted(KINDS)),
    rule=st.sampled_from(RULES),
    width=disjoint_groups(1, 2),
    depth=disjoint_groups(1, 2),
    dtype=st.sampled_from(DTYPES),
)
def test_pairs_grown_on_disk_shrink_back_to_every_bit(
    name: str, rule: Rule, width: Groups, depth: Groups, dtype: torch.dtype
) -> None:
    """The map that is saved with the large model holds the groups of the way back."""
    assume(not _is_identity(width) or not _is_identity(depth))
    made, config = KINDS[name].make(Sizes(heads=len(width), layers=len(depth)), 2)
    state = cast(made, dtype)
    groups = {"width_scheme": width, "depth_scheme": depth}
    with TemporaryDirectory() as folder:
        tiny.write(Path(folder) / "small", state, None)
        small = streammap.open(Path(folder) / "small", config=config)
        small.decoalesce(scheme=groups, rule=rule).save(Path(folder) / "large", fsync=False)
        assert_same(read(streammap.open(Path(folder) / "large").coalesce(rule=rule)), state)


@pytest.mark.parametrize("alpha", [0.5, 0.3])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["bert tied", "gpt2 two heads", "gpt2 untied", "deit"])
@pytest.mark.parametrize("what", ["width", "depth", "both"])
def test_a_chain_in_one_pass_is_its_steps_through_files(
    tmp_path: Path, what: str, name: str, rule: Rule, alpha: float
) -> None:
    made, config = KINDS[name].make(Sizes(heads=4, layers=4), 4)
    state, other = cast(made, torch.float32), cast(KINDS[name].make(Sizes(), 5)[0], torch.float32)
    tiny.write(tmp_path / "big", state, None)
    tiny.write(tmp_path / "other", other, None)
    big = streammap.open(tmp_path / "big", config=config)
    target = streammap.open(tmp_path / "other", config=config)
    width, depth = None if what == "depth" else 2, None if what == "width" else 2
    chain = (
        big.coalesce(rule=rule, width=width, depth=depth)
        .decoalesce(rule=rule)
        .interpolate(target, alpha=alpha)
    )
    assert len(chain.plan.steps) == 3

    big.coalesce(rule=rule, width=width, depth=depth).save(tmp_path / "small", fsync=False)
    small = streammap.open(tmp_path / "small")
    small.decoalesce(rule=rule).save(tmp_path / "grown", fsync=False)
    grown = streammap.open(tmp_path / "grown")
    grown.interpolate(target, alpha=alpha).save(tmp_path / "mixed", fsync=False)

    wanted, got = tiny.written(tmp_path / "mixed"), read(chain)
    if alpha == 0.5 and what != "depth":
        # With width, the sums are the same sums; without it, the blends of all steps become one.
        assert_same(got, wanted)
        return
    assert got.keys() == wanted.keys()
    for key, x in wanted.items():
        if x.is_floating_point():
            torch.testing.assert_close(got[key], x, rtol=1e-6, atol=1e-6 * float(x.abs().max()))


@given(
    name=st.sampled_from(sorted(KINDS)),
    alpha=st.floats(0, 1),
    mine=st.sampled_from(DTYPES),
    theirs=st.sampled_from(DTYPES),
)
def test_a_blend_is_the_weighted_mean_in_the_dtype_of_the_target(
    name: str, alpha: float, mine: torch.dtype, theirs: torch.dtype
) -> None:
    sizes = Sizes(heads=2, layers=2)
    made, config = KINDS[name].make(sizes, 6)
    source, target = cast(made, mine), cast(KINDS[name].make(sizes, 7)[0], theirs)
    wanted = oracle.interpolated(source, target, alpha)
    size = oracle.interpolated(
        {k: x.abs() for k, x in source.items()}, {k: x.abs() for k, x in target.items()}, alpha
    )
    with TemporaryDirectory() as folder:
        tiny.write(Path(folder) / "source", source, None)
        tiny.write(Path(folder) / "target", target, None)
        blended = streammap.open(Path(folder) / "source", config=config).interpolate(
            streammap.open(Path(folder) / "target", config=config), alpha=alpha
        )
        assert_rounded_once(read(blended), wanted, size, theirs)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ends_of_a_blend_are_its_parts(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    sizes = Sizes(heads=2, layers=2)
    made, config = KINDS[name].make(sizes, 6)
    source, target = cast(made, dtype), cast(KINDS[name].make(sizes, 7)[0], dtype)
    tiny.write(tmp_path / "source", source, None)
    tiny.write(tmp_path / "target", target, None)
    one = streammap.open(tmp_path / "source", config=config)
    two = streammap.open(tmp_path / "target", config=config)
    assert_same(read(one.interpolate(two, alpha=0.0)), target)
    assert_same(read(one.interpolate(two, alpha=1.0)), source)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rule", RULES)
def test_masks_pass_byte_for_byte(
    tmp_path: Path, dtype: torch.dtype, direction: Direction, rule: Rule
) -> None:
    sizes = Sizes(heads=4, layers=4)
    mask = torch.ones(7, 7).tril().view(1, 1, 7, 7)
    state = tiny.gpt2(sizes)
    for layer in range(4):
        state[f"h.{layer}.attn.bias"] = mask.to(dtype).clone()
    source = saved(tmp_path, state, tiny.gpt2_config(sizes))
    act = source.coalesce if direction == "coalesce" else source.decoalesce
    resized = act(width=2, depth=2, rule=rule)
    blended = resized.interpolate(resized, alpha=0.3)
    for result in (resized, blended):
        for layer in range(result.sizes["layer"]):
            got = result.read(f"h.{layer}.attn.bias")
            assert got.dtype == dtype
            assert torch.equal(got, mask.to(dtype))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_position_ids_pass_byte_for_byte(tmp_path: Path, direction: Direction) -> None:
    state, config = bert_plain(Sizes(), 0)
    source = saved(tmp_path, state, config)
    act = source.coalesce if direction == "coalesce" else source.decoalesce
    resized = act(width=2, depth=2)
    for result in (resized, resized.interpolate(resized, alpha=0.3)):
        got = result.read("embeddings.position_ids")
        assert got.dtype == torch.int64
        assert torch.equal(got, torch.arange(7)[None])
