"""What config.json says of single layers, and how it follows when layers change."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.architectures import layer_kinds
from streammap.architectures.schema import Depth, LayerRule, Numbers
from streammap.errors import PlanError

Config = dict[str, object]


def followed(depth: Depth, config: Config, sources: Sequence[int]) -> Config:
    """config.json after a change of layers."""
    found = copy.deepcopy(config)
    layer_kinds.follow(depth, found, sources, what="layer", n_before=max(sources) + 1)
    return found


def test_a_period_that_follows_from_counts_is_written_before_they_change() -> None:
    depth = Depth(periods=((("step", "=n_layers/n_sparse", "n_layers"), (1,)),))
    config: Config = {"n_layers": 5, "n_sparse": 2}
    assert len(set(layer_kinds.kinds(depth, config, 5))) == 2
    assert followed(depth, config, [0, 1, 2, 3, 4, 3, 4]) == {**config, "step": 2}
    with pytest.raises(PlanError, match=r"3 would come from 2, but config.json's step \(2\)"):
        followed(depth, config, [0, 1, 2, 2, 3, 4])
    told: Config = {**config, "step": 1}
    assert followed(depth, told, [0, 1, 1, 2, 3, 4]) == told
    none: Config = {"n_layers": 4, "n_sparse": 0}
    assert followed(depth, none, [0, 1, 2, 3, 0]) == {**none, "step": 4}


# Lists.


def test_a_list_takes_the_entries_of_the_source_layers() -> None:
    depth = Depth(lists=("types", "text.windows"))
    config: Config = {"types": ["a", "b", "c"], "text": {"windows": [1, 2, 3]}, "other": [7, 8, 9]}
    assert followed(depth, config, [2, 0, 0, 1]) == {
        "types": ["c", "a", "a", "b"],
        "text": {"windows": [3, 1, 1, 2]},
        "other": [7, 8, 9],
    }
    assert layer_kinds.kinds(depth, config, 3) == (
        ("types a", "text.windows 1"),
        ("types b", "text.windows 2"),
        ("types c", "text.windows 3"),
    )


@pytest.mark.parametrize("value", [None, "abc", 3, {}])
def test_a_list_that_is_none_is_left_alone(value: object) -> None:
    config: Config = {"types": value}
    assert followed(Depth(lists=("types",)), config, [0, 0]) == config
    assert followed(Depth(lists=("types",)), {}, [0, 0]) == {}


# Lists that are derived.


SLIDING = LayerRule("types", every=("pattern", 3), offset=(-1,), yes="f", no="s")
OFF_AT = ("off", "off", "at", "off")
WINDOWS = LayerRule("types", before=("full", 2), yes="f", no="s")


@pytest.mark.parametrize("missing", [{}, {"types": None}, {"types": []}])
def test_a_missing_list_is_derived_and_written_out(missing: Config) -> None:
    depth = Depth(lists=("types",), derived=(SLIDING,))
    assert layer_kinds.kinds(depth, missing, 4) == tuple((f"types {t}",) for t in "ssfs")
    # The loader would make "ssfss" of five layers: other layers need the list itself.
    assert followed(depth, missing, [0, 1, 2, 2, 3]) == {"types": ["s", "s", "f", "f", "s"]}
    assert followed(depth, {"types": ["a", "b"]}, [1, 1]) == {"types": ["b", "b"]}


def test_a_period_is_removed_where_its_list_says_something_else_now() -> None:
    depth, config = Depth(lists=("types",), derived=(SLIDING,)), {"pattern": 2}
    kept: Config = {"types": list("sfsf"), "pattern": 2}
    assert followed(depth, dict(config), [0, 1, 2, 3]) == kept
    found: Config = dict(config)
    notes = layer_kinds.follow(depth, found, [0, 0, 1, 1], what="layer", n_before=2)
    assert found == {"types": list("ssff")}
    assert notes == ("config.json: pattern is removed, types lists the layers now",)
    # It said nothing before.
    found = {"types": list("ffff"), "pattern": 2}
    assert not layer_kinds.follow(depth, found, [0, 0], what="layer", n_before=4)
    assert found == {"types": ["f", "f"], "pattern": 2}


@pytest.mark.parametrize(
    ("config", "sources", "after"),
    [
        ({"full": 1}, [0, 0, 1, 2], {"full": 2, "types": list("ffss")}),
        ({}, [0, 1, 1, 2], {"full": 3, "types": list("fffs")}),
        ({"full": 9}, [0, 1, 2, 2], {"full": 9, "types": list("ffff")}),
        ({"full": 3}, [0, 0, 1, 1, 2, 2], {"full": 6, "types": list("ffffff")}),
        ({"full": 1}, [2, 1, 0], {"types": list("ssf")}),
    ],
)
def test_a_count_agrees_with_the_list_derived_from_it_or_goes(
    config: Config, sources: list[int], after: Config
) -> None:
    assert followed(Depth(lists=("types",), derived=(WINDOWS,)), config, sources) == after


def test_a_count_that_makes_no_difference_stays() -> None:
    rule = LayerRule("types", before=("full",), yes="f", no="f")
    depth = Depth(lists=("types",), derived=(rule,))
    assert followed(depth, {"full": 1}, [1, 0]) == {"full": 1, "types": ["f", "f"]}


def test_a_list_may_be_derived_from_another_one() -> None:
    rope = LayerRule("rope", every=(2,), offset=(-1,), yes=0, no=1)
    depth = Depth(
        lists=("types", "rope"),
        derived=(LayerRule("types", where="rope", yes="chunked", no="full"), rope),
    )
    assert layer_kinds.kinds(depth, {}, 2) == (
        ("types chunked", "rope 1"),
        ("types full", "rope 0"),
    )
    assert followed(depth, {}, [0, 0, 1]) == {
        "types": ["chunked", "chunked", "full"],
        "rope": [1, 1, 0],
    }
    assert followed(depth, {"rope": [0, 0]}, [0, 1]) == {"types": ["full"] * 2, "rope": [0, 0]}
    by_number = Depth(
        lists=("types",),
        index_lists=("full",),
        derived=(LayerRule("types", where="full", yes="f", no="c"),),
    )
    assert followed(by_number, {"full": [1]}, [0, 1, 1]) == {"full": [1, 2], "types": list("cff")}
    assert followed(by_number, {}, [0, 1]) == {"types": ["f", "f"]}


def test_numbers_of_layers_are_derived_too_but_an_empty_list_of_them_stands() -> None:
    rule = LayerRule("moe", every=("step", 1), offset=(-1,))
    depth = Depth(index_lists=("moe",), derived=(rule,))
    assert followed(depth, {"step": 2}, [0, 1, 1]) == {"moe": [1, 2]}
    assert followed(depth, {"moe": [], "step": 2}, [0, 1]) == {"moe": [], "step": 2}
    literal = Depth(index_lists=("moe",), derived=(LayerRule("moe", layers=(1, 3)),))
    assert followed(literal, {}, [0, 1, 1, 2, 3]) == {"moe": [1, 2, 4]}


def test_the_last_layer_may_be_of_a_kind_that_its_entry_does_not_say() -> None:
    rule = LayerRule("types", every=(2,), offset=(-1,), last=True, yes="f", no="s")
    depth = Depth(lists=("types",), last=True, derived=(rule,))
    assert followed(depth, {}, [0, 1, 2]) == {"types": ["s", "f", "f"]}
    assert followed(depth, {"types": ["s", "s", "s"]}, [0, 1, 2]) == {"types": ["s", "s", "f"]}


@pytest.mark.parametrize("value", ["LLLG", 0, -1, 1.5])
def test_a_list_that_cannot_be_derived_is_refused_when_layers_change(value: object) -> None:
    depth = Depth(lists=("types",), derived=(SLIDING,))
    assert layer_kinds.kinds(depth, {"pattern": value}, 2) == ((), ())
    with pytest.raises(
        PlanError, match=r"no types, and pattern \(.*\) can't say it.*\n.*types into"
    ):
        followed(depth, {"pattern": value}, [0, 1])


def test_a_rule_for_another_config_does_not_count() -> None:
    depth = Depth(lists=("types",), derived=(replace(SLIDING, when=False), WINDOWS))
    assert followed(depth, {}, [0, 1, 2]) == {"types": ["f", "f", "s"]}


# Layers whose outputs are read.


@pytest.mark.parametrize(
    ("sources", "given", "states"),
    [
        ([0, 1, 2, 3], [-2, 0, 4], [-2, 0, 4]),
        ([0, 0, 1, 1, 2, 2, 3, 3], [-2, 1, -1, 0], [-3, 2, -1, 0]),
        ([0, 1, 2, 3, 0, 1, 2, 3], [-2, -1], [-6, -1]),
        ([0, 3], [-2, 3, -1], [-2, 1, -1]),
        ([0, 0, 1, 1, 2, 2, 3, 3], -2, -3),
        ([0, 0, 1, 1, 2, 2, 3, 3], None, -3),
        ([0, 0, 1, 1, 2, 2, 3, 3], "x", "x"),
    ],
)
def test_the_same_hidden_states_are_read(sources: list[int], given: object, states: object) -> None:
    depth = Depth(states=(("states", -2),))
    config = {} if given is None else {"states": given}
    assert followed(depth, config, sources) == {"states": states}


@pytest.mark.parametrize(
    ("sources", "marks"),
    [
        ([0, 1, 2, 3], [0, 2]),
        ([0, 0, 1, 1, 2, 2, 3], [1, 5]),
        ([0, 1, 3], [0, 1]),
        ([0, 1, 2, 3, 0, 1, 2, 3], [0, 2]),
    ],
)
def test_a_mark_follows_to_the_last_layer_in_a_row_made_of_its_own(
    sources: list[int], marks: list[int]
) -> None:
    assert followed(Depth(marks=("marks",)), {"marks": [0, 2]}, sources) == {"marks": marks}


def test_a_mark_follows_a_layer_that_is_merged_into_another() -> None:
    config: Config = {"marks": [3, 4]}
    layer_kinds.follow(
        Depth(marks=("marks",)),
        config,
        [0, 1, 2],
        what="layer",
        n_before=6,
        members=[[0, 3], [1, 4], [2, 5]],
    )
    assert config == {"marks": [0, 1]}


def test_marks_must_stay_apart() -> None:
    with pytest.raises(PlanError, match=r"marks \(\[0, 1\]\).*would be layers \[0, 0\]\n  hint: "):
        followed(Depth(marks=("marks",)), {"marks": [0, 1]}, [0, 2])
    with pytest.raises(PlanError, match=r"would be layers \[-1\]"):
        followed(Depth(marks=("marks",)), {"marks": [0]}, [1, 2])
    assert followed(Depth(marks=("marks",)), {"marks": [5]}, [0, 1, 1]) == {"marks": [6]}


# Layers that are run several times.


def test_layers_are_run_as_often_as_before() -> None:
    depth = Depth(runs=("runs", 12))
    assert followed(depth, {"runs": 6}, [0, 0, 1, 1]) == {"runs": 12}
    assert followed(depth, {"runs": 6}, [1]) == {"runs": 3}
    assert followed(depth, {}, [0, 0]) == {"runs": 24}
    for n_runs in (5, 1):
        with pytest.raises(PlanError, match=rf"runs is {n_runs}, no multiple of the 2 of layer"):
            followed(depth, {"runs": n_runs}, [0, 1, 1])


# Numbers of layers.


def test_an_index_list_names_the_layers_that_come_from_named_ones() -> None:
    depth = Depth(index_lists=("dense",))
    config: Config = {"dense": [0, 2]}
    assert layer_kinds.kinds(depth, config, 3) == (("in dense",), ("not in dense",), ("in dense",))
    assert followed(depth, config, [0, 0, 1, 1, 2, 2]) == {"dense": [0, 1, 4, 5]}
    assert followed(depth, config, [1]) == {"dense": []}
    assert followed(depth, {"dense": []}, [0, 0]) == {"dense": []}
    assert followed(depth, {}, [0, 0]) == {}


def test_numbers_of_layers_may_begin_with_one() -> None:
    depth = Depth(index_lists=("full", "wide"), from_one=("full",))
    config: Config = {"full": [1, 3], "wide": [0]}
    assert layer_kinds.kinds(depth, config, 3) == layer_kinds.kinds(
        Depth(index_lists=("full", "wide")), {"full": [0, 2], "wide": [0]}, 3
    )
    assert followed(depth, config, [0, 0, 1, 2]) == {"full": [1, 2, 4], "wide": [0, 1]}


def test_the_first_layer_may_be_as_a_rule_says_though_its_number_does_not() -> None:
    depth = Depth(lists=("types",), derived=(replace(SLIDING, first=True),))
    assert layer_kinds.kinds(depth, {}, 4) == tuple((f"types {t}",) for t in "fsfs")


def test_a_period_may_be_a_number_that_no_field_has() -> None:
    depth = Depth(periods=(((3,), (2,)),))
    assert layer_kinds.kinds(depth, {}, 4) == tuple((f"{w} every 3",) for w in OFF_AT)
    with pytest.raises(PlanError, match="model_type"):
        followed(depth, {}, [0, 2, 1])


def test_a_prefix_count_counts_the_leading_layers_of_its_kind() -> None:
    depth = Depth(prefix_counts=(("first",),))
    config: Config = {"first": 2}
    assert layer_kinds.kinds(depth, config, 3) == (("before first 2",),) * 2 + (("after first 2",),)
    assert followed(depth, config, [0, 0, 1, 1, 2, 2]) == {"first": 4}
    assert followed(depth, config, [1, 2]) == {"first": 1}
    assert followed(depth, config, [2, 2]) == {"first": 0}
    assert followed(depth, {"first": 0}, [2, 0]) == {"first": 0}
    assert followed(depth, {}, [2, 0]) == {}


def test_a_suffix_count_counts_the_trailing_layers_of_its_kind() -> None:
    depth = Depth(suffix_counts=(("last",),))
    config: Config = {"last": 1}
    kinds = (("before last 1",),) * 2 + (("after last 1",),)
    assert layer_kinds.kinds(depth, config, 3) == kinds
    assert followed(depth, config, [0, 0, 1, 1, 2, 2]) == {"last": 2}
    assert followed(depth, {"last": 2}, [0, 2]) == {"last": 1}
    assert followed(depth, {"last": 0}, [2, 0]) == {"last": 0}
    with pytest.raises(PlanError, match="last counts trailing layers"):
        followed(depth, config, [0, 2, 1])


def test_a_last_index_is_that_of_the_last_layer_of_its_kind() -> None:
    depth = Depth(last_index=("end",))
    config: Config = {"end": 1}
    assert layer_kinds.kinds(depth, config, 3) == (("before end 1",),) * 2 + (("after end 1",),)
    assert followed(depth, config, [0, 0, 1, 1, 2, 2]) == {"end": 3}
    assert followed(depth, config, [0, 2]) == {"end": 0}
    assert followed(depth, {"end": -1}, [1, 0]) == {"end": -1}


@pytest.mark.parametrize(
    "depth",
    [Depth(prefix_counts=(("first",),)), Depth(last_index=("first",))],
    ids=["count", "last"],
)
def test_layers_of_the_leading_kind_must_lead(depth: Depth) -> None:
    expected = r"first counts leading layers, and they would stand elsewhere\n  hint: "
    with pytest.raises(PlanError, match=expected):
        followed(depth, {"first": 1}, [0, 2, 0, 2])


# Periods.


@pytest.mark.parametrize(
    ("period", "config", "at"),
    [
        ((("every",),), {"every": 2}, [0, 2, 4]),
        ((("every",), ("start",)), {"every": 2, "start": 1}, [1, 3, 5]),
        ((("every",), (-1,)), {"every": 3}, [2, 5]),
        ((("every",), (1,)), {"every": 3}, [1, 4]),
        ((("text.every",), (-1,)), {"text": {"every": 2}}, [1, 3, 5]),
        ((("every",), ("start",)), {"every": 4}, [0, 4]),
        ((("every", 3), ("start", 2)), {}, [2, 5]),
        ((("every",),), {"every": 1}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_a_period_says_every_nth_layer(
    period: tuple[Numbers, ...], config: Config, at: list[int]
) -> None:
    kinds = layer_kinds.kinds(Depth(periods=(period,)), config, 6)
    assert [i for i, kind in enumerate(kinds) if kind[0].startswith("at ")] == at
    assert set(kinds) <= {(f"at {period[0][0]}",), (f"off {period[0][0]}",)}


def test_layers_must_keep_their_place_in_a_period() -> None:
    depth = Depth(periods=((("every",), (-1,)),))
    config: Config = {"every": 2}
    assert followed(depth, config, [0, 1, 0, 1]) == config
    assert followed(depth, config, [2, 3]) == config
    expected = (
        r"layer 1 would come from 0, but config\.json's every \(2\) makes them two kinds"
        r"\n  hint: .*period of every"
    )
    with pytest.raises(PlanError, match=expected):
        followed(depth, config, [0, 0, 1, 1])


def test_without_a_period_there_is_nothing_to_keep() -> None:
    depth = Depth(periods=((("every",),),))
    for config in ({}, {"every": None}, {"every": 0}, {"every": 1}):
        assert followed(depth, dict(config), [3, 0, 0]) == config


# Tables and patterns.


def test_a_table_follows_the_numbers_of_its_layers() -> None:
    depth = Depth(tables=("per_layer",))
    config: Config = {"per_layer": {"0": {"a": 1}, "2": {"a": 3}}}
    assert followed(depth, config, [0, 0, 1, 2]) == {
        "per_layer": {"0": {"a": 1}, "1": {"a": 1}, "3": {"a": 3}}
    }
    assert followed(depth, {}, [0, 0]) == {}
    padded: Config = {"per_layer": {"02": {"a": 3}, "10": {"a": 1}}}
    assert followed(depth, padded, [2, 3, *range(11)]) == {
        "per_layer": {"00": {"a": 3}, "04": {"a": 3}, "12": {"a": 1}}
    }


def test_a_pattern_is_unrolled() -> None:
    depth = Depth(patterns=("types",))
    config: Config = {"types": [[["global", "local"], 2], [["local"], 1]]}
    assert followed(depth, config, [0, 1, 4, 4]) == {
        "types": [[["global", "local", "local", "local"], 1]]
    }


@pytest.mark.parametrize("value", [None, [], ["global"], [[["global"], -1]], [[["a"], 10**9]]])
def test_a_pattern_that_is_none_is_left_alone(value: object) -> None:
    assert followed(Depth(patterns=("types",)), {"types": value}, [0, 0]) == {"types": value}


# What goes, and what stays.


def test_fields_that_name_layers_by_number_are_removed_with_a_note() -> None:
    depth = Depth(delete=("out_indices", "text.stages", "absent"))
    config: Config = {"out_indices": [1], "text": {"stages": [2], "kept": 1}}
    notes = layer_kinds.follow(depth, config, [0], what="layer", n_before=1)
    assert config == {"text": {"kept": 1}}
    assert notes == (
        "config.json: out_indices is removed, it names layers by number",
        "config.json: text.stages is removed, it names layers by number",
    )


def test_the_first_layer_may_be_of_a_kind_of_its_own() -> None:
    assert layer_kinds.kinds(Depth(first=True), {}, 3) == (("first",), ("later",), ("later",))


def test_without_a_table_all_layers_are_of_one_kind() -> None:
    assert layer_kinds.kinds(Depth(), {"layer_types": ["a", "b"]}, 2) == ((), ())


@st.composite
def depths(draw: st.DrawFn) -> tuple[Config, int]:
    """Any config.json with per-layer facts."""
    n = draw(st.integers(1, 5))
    return {
        "types": draw(st.lists(st.sampled_from("ab"), min_size=n, max_size=n)),
        "dense": sorted(draw(st.sets(st.integers(0, n - 1)))),
        "first": draw(st.integers(0, n)),
        "last": draw(st.integers(-1, n - 1)),
        "per_layer": {str(i): i for i in draw(st.sets(st.integers(0, n - 1)))},
    }, n


@given(depths(), st.data())
def test_a_layer_is_of_the_kind_of_its_source(
    given_: tuple[Config, int], data: st.DataObject
) -> None:
    config, n = given_
    depth = Depth(
        lists=("types",),
        index_lists=("dense",),
        prefix_counts=(("first",),),
        last_index=("last",),
        tables=("per_layer",),
    )
    sources = sorted(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8)))
    after = followed(depth, config, sources)

    def facts(config: Config, n_layers: int) -> list[tuple[str, ...]]:
        # The counts themselves change; on which side of them a layer is does not.
        kinds = layer_kinds.kinds(depth, config, n_layers)
        return [tuple(word.rstrip("-0123456789") for word in kind) for kind in kinds]

    before = facts(config, n)
    found = facts(after, len(sources))
    n_facts = {len(kind) for kind in found}
    assert n_facts <= {3, 4}
    for i, j in enumerate(sources):
        if len(found[i]) == len(before[j]):
            assert found[i] == before[j]


def test_kinds_after_a_change_of_layers_in_order_are_kinds_before() -> None:
    depth = Depth(lists=("types",), index_lists=("dense",), periods=((("every",),),))
    config: Config = {"types": ["a", "b", "a", "b"], "dense": [1], "every": 2}
    before = layer_kinds.kinds(depth, config, 4)
    sources = [0, 1, 2, 1, 0, 3]
    after = followed(depth, config, sources)
    assert layer_kinds.kinds(depth, after, 6) == tuple(before[j] for j in sources)


# A last layer of a kind of its own.


def test_the_last_layer_stays_the_last_where_loaders_take_it_for_another_kind() -> None:
    depth = Depth(last=True, lists=("types",))
    config: Config = {"types": ["a", "a", "full"]}
    layer_kinds.follow(depth, config, [0, 2], what="layer", n_before=3)
    assert config == {"types": ["a", "full"]}
    with pytest.raises(PlanError, match=r"the last layer would come from 1.*kind of 2"):
        layer_kinds.follow(depth, {"types": ["a", "a", "full"]}, [0, 1], what="layer", n_before=3)
