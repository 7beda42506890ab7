"""Which map a model grows by that was trained since, and saved without its map."""

import json
from pathlib import Path

import pytest

import streammap
from streammap.errors import PlanError
from streammap.planning.requests import Grouping
from tests.support import tiny
from tests.support.typed import Options, ok, run

SIZES = tiny.Sizes(heads=4, layers=4)
MAP = "streammap.map.safetensors"


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))


@pytest.fixture
def small(big: Path) -> Path:
    streammap.coalesce(big, big.parent / "small", width=2, depth=2, grouping="adjacent")
    return big.parent / "small"


def trained(small: Path, folder: Path, **more: object) -> Path:
    """What save_pretrained writes of a result: weights and config.json, no map."""
    config = json.loads((small / "config.json").read_text())
    return tiny.write(folder, tiny.written(small), {**config, **more})


def by_map(model: Path, small: Path, big: Path) -> tiny.State:
    lazy = streammap.open(model).decoalesce(map=small, blend_with=big, alpha=0.25)
    return dict(lazy.tensors())


def test_a_blend_without_a_map_is_refused_and_told_where_one_is(
    big: Path, small: Path, tmp_path: Path
) -> None:
    model = trained(small, tmp_path / "trained")
    found = run("decoalesce", model, tmp_path / "out", "--blend-with", big)
    assert found.exit_code == 1
    assert f"no map in {model}, the folder above\n" in found.stderr
    hint = found.stderr.splitlines()[1]
    assert hint.startswith(f"  hint: give --map {small} (it has a map of these sizes), or how it")
    assert hint.endswith("--scheme FILE, --grouping stacked or --grouping adjacent")
    assert not (tmp_path / "out").exists()
    with pytest.raises(PlanError, match="each unit stands for: no map in"):
        streammap.open(model).decoalesce(blend_with=streammap.open(big))


@pytest.mark.parametrize("sizes", [{"width": 2, "depth": 2}, {"heads": 2}, {"layers": "to:4"}])
def test_sizes_alone_do_not_say_which_units_are_blended(
    sizes: Options, big: Path, small: Path, tmp_path: Path
) -> None:
    model = trained(small, tmp_path / "trained")
    with pytest.raises(PlanError, match=f"hint: give --map {small}"):
        streammap.open(model).decoalesce(blend_with=big, **sizes)


@pytest.mark.parametrize("grouping", ["stacked", "adjacent"])
def test_an_explicit_grouping_is_taken_for_layers_too(
    grouping: Grouping, big: Path, tmp_path: Path
) -> None:
    small = tmp_path / grouping
    streammap.open(big).coalesce(width=2, depth=2, grouping=grouping).save(small)
    model = trained(small, tmp_path / "trained")
    ok("decoalesce", model, tmp_path / "out", "--blend-with", big, "--grouping", grouping)
    lazy = streammap.open(model).decoalesce(map=small, blend_with=big)
    tiny.assert_same(tiny.written(tmp_path / "out"), dict(lazy.tensors()))


def test_a_scheme_says_which_units_are_blended(big: Path, small: Path, tmp_path: Path) -> None:
    pairs = [[0, 1], [2, 3]]
    scheme = {"width_scheme": pairs, "depth_scheme": pairs}
    model = trained(small, tmp_path / "trained")
    lazy = streammap.open(model).decoalesce(scheme=scheme, blend_with=big, alpha=0.25)
    tiny.assert_same(dict(lazy.tensors()), by_map(model, small, big))


def test_where_only_one_map_is_possible_nothing_is_asked(big: Path, tmp_path: Path) -> None:
    one = tiny.Sizes(heads=1, layers=1)
    model = tiny.write(tmp_path / "one", tiny.bert(one), tiny.bert_config(one))
    two = tiny.Sizes(heads=1, layers=2)
    deeper = tiny.write(tmp_path / "two", tiny.bert(two), tiny.bert_config(two))
    lazy = streammap.open(model).decoalesce(blend_with=deeper)
    assert lazy.plan.notes == ()
    same = streammap.open(big).decoalesce(blend_with=big, untie=False, mlp=1)
    assert same.sizes == streammap.open(big).sizes


def test_growing_to_a_target_by_a_guess_is_told(big: Path, small: Path, tmp_path: Path) -> None:
    model = trained(small, tmp_path / "trained")
    notes = streammap.open(model).decoalesce(target=big / "config.json").plan.notes
    (note,) = [note for note in notes if "no map in" in note]
    assert f"give --map {small}" in note
    stacked = streammap.open(model).decoalesce(target=big / "config.json", grouping="stacked")
    assert not [note for note in stacked.plan.notes if "map" in note]


def test_the_map_of_the_run_that_a_checkpoint_stands_in_is_found(
    big: Path, small: Path, tmp_path: Path
) -> None:
    model = trained(small, small / "checkpoint-500")
    said = ok("decoalesce", model, tmp_path / "out", "--blend-with", big, "--alpha", 0.25)
    assert f"note       the map of {small}/{MAP} is used" in said
    tiny.assert_same(tiny.written(tmp_path / "out"), by_map(model, small, big))
    report = streammap.verify(tmp_path / "out", recompute=10)
    assert report.ok, report
    assert "plan" in str(report).partition("checked")[2]
    (small / MAP).rename(tmp_path / "gone")
    ok("apply", tmp_path / "out", tmp_path / "again")
    tiny.assert_same(tiny.written(tmp_path / "out"), tiny.written(tmp_path / "again"))


def test_the_map_of_the_folder_that_config_json_names_is_found(
    big: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    model = trained(small, tmp_path / "elsewhere" / "run", _name_or_path="small")
    monkeypatch.chdir(tmp_path)
    lazy = streammap.open(model).decoalesce(blend_with=big, alpha=0.25)
    tiny.assert_same(dict(lazy.tensors()), by_map(model, small, big))
    assert lazy.plan.notes == (f"the map of small/{MAP} is used",)
    assert streammap.open(model).decoalesce().sizes == streammap.open(big).sizes


@pytest.mark.parametrize("name", ["no/such", "a\0b", "x" * 5000, "https://x.y/z", 7, None, ""])
def test_what_config_json_names_may_be_anything(
    name: object, big: Path, small: Path, tmp_path: Path
) -> None:
    model = trained(small, tmp_path / "trained", _name_or_path=name)
    with pytest.raises(PlanError, match="no map in"):
        streammap.open(model).decoalesce(blend_with=big)


def test_a_map_of_other_sizes_is_not_taken(big: Path, small: Path, tmp_path: Path) -> None:
    """It may be of the same small model and another large one, or of the depth alone."""
    deep = tiny.write(
        tmp_path / "deep",
        tiny.bert(tiny.Sizes(heads=4, layers=8)),
        tiny.bert_config(tiny.Sizes(heads=4, layers=8)),
    )
    streammap.coalesce(deep, tmp_path / "run", width=2, depth=4)
    model = trained(small, tmp_path / "run" / "checkpoint-1")
    with pytest.raises(PlanError, match="no map in"):
        streammap.open(model).decoalesce(blend_with=big)
    wide = streammap.open(big).coalesce(depth=2)
    wide.save(tmp_path / "wide")
    other = trained(small, tmp_path / "wide" / "checkpoint-1")
    with pytest.raises(PlanError, match="no map in"):
        streammap.open(other).decoalesce(blend_with=big)


def test_a_broken_map_that_nobody_named_is_passed_over(
    big: Path, small: Path, tmp_path: Path
) -> None:
    model = trained(small, tmp_path / "run" / "checkpoint-1")
    tiny.file(tmp_path / "run" / MAP, b"nonsense")
    with pytest.raises(PlanError, match="no map in"):
        streammap.open(model).decoalesce(blend_with=big)


def test_nothing_to_grow_by_names_the_map_first(big: Path, small: Path, tmp_path: Path) -> None:
    model = trained(small, tmp_path / "trained")
    with pytest.raises(PlanError) as error:
        streammap.open(model).decoalesce()
    told = str(error.value)
    assert "no target size given, and no map to grow by: looked in" in told
    assert f"hint: give --map {small} (it has a map of these sizes), or --width K" in told
    with pytest.raises(PlanError, match="no target size given\n  hint: give --width K"):
        streammap.open(big).coalesce()


def test_a_record_without_a_grouping_is_made_again_as_it_was(
    big: Path, small: Path, tmp_path: Path
) -> None:
    """Earlier versions guessed, and wrote no grouping down."""
    model = trained(small, tmp_path / "trained")
    streammap.open(model).decoalesce(target=big / "config.json").save(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "streammap.json").read_text())
    del content["crc32"], content["own_crc32"]  # those of version 0.1 have neither
    request = content["request"]
    assert "grouping" not in request
    blended = {**request, "source": request["source"]}
    target = {"operator": "open", "path": str(big), "id": 1, "maps": ""}
    content["request"] = {**blended, "blend_with": target}
    del content["request"]["sizes"]
    (tmp_path / "out" / "streammap.json").write_text(json.dumps(content))
    lazy = streammap.open_request(tmp_path / "out")
    expected = streammap.open(tmp_path / "out").interpolate(big, alpha=0.5)
    tiny.assert_close(dict(lazy.tensors()), dict(expected.tensors()))
    with pytest.raises(PlanError, match="no map in"):
        streammap.open_request(content["request"])
