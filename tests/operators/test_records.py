"""What a result records of its request, and the same result made from it again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import streammap
from streammap.errors import PlanError, SchemeError, StreammapError
from streammap.operators import calls, registry, request_json
from streammap.operators.ordering.permute import Permute
from streammap.planning.request import OperatorCall
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=4, layers=4)
Lazy = streammap.LazyCheckpoint


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "streammap.json").read_text())
    return found


CHAINS: dict[str, Callable[[Lazy], Lazy]] = {
    "nothing": lambda big: big,
    "factors": lambda big: big.coalesce(width=2, depth=2, grouping="adjacent"),
    "scheme": lambda big: big.coalesce(
        scheme={"width_scheme": [[0, 1], [2, 3]], "mlp": 2, "reserved_heads": []},
        rule="reference",
    ),
    "weights": lambda big: big.coalesce(
        layers={"groups": [{"members": [0, 1, 2], "weights": [0.1, 0.2, 0.3]}, [3]]},
        axes={"mlp": "=6"},
    ),
    "size": lambda big: big.decoalesce(hidden="=12", mlp={"factor": 2, "grouping": "adjacent"}),
    "target": lambda big: big.coalesce(target={**tiny.bert_config(tiny.Sizes(heads=2, layers=2))}),
    "and back": lambda big: big.coalesce(width=2, depth=2).decoalesce(),
    "blend with itself": lambda big: (
        big.coalesce(width=2).decoalesce().interpolate(big, alpha=0.25)
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_result_is_made_again_from_its_record(name: str, big: Path, tmp_path: Path) -> None:
    CHAINS[name](streammap.open(big)).save(tmp_path / "out")
    again = streammap.open_request(tmp_path / "out")
    again.save(tmp_path / "again")
    assert tiny.tree(tmp_path / "again") == tiny.tree(tmp_path / "out")


def test_a_number_alone_of_a_record_is_the_factor_that_it_was(big: Path, tmp_path: Path) -> None:
    """Earlier versions took any number for a factor, and wrote it down so."""
    source = streammap.open(big)
    source.decoalesce(mlp="x12", axes={"embed": 2}, layers="x9").save(tmp_path / "out")
    content = record(tmp_path / "out")
    del content["crc32"], content["own_crc32"]  # those of version 0.1 have neither
    text = json.dumps(content).replace('"x12"', "12").replace('"x9"', "9")
    (tmp_path / "out" / "streammap.json").write_text(text)
    assert text != json.dumps(content)
    again = streammap.open_request(tmp_path / "out")
    tiny.assert_same(dict(again.tensors()), tiny.written(tmp_path / "out"))
    with pytest.raises(SchemeError, match="two ways"):
        streammap.open_request(json.loads(text)["request"])


def test_the_record_is_text_to_read(big: Path, tmp_path: Path) -> None:
    scheme = tiny.file(tmp_path / "s.json", '{"width_scheme": [[0, 2], [1, 3]]}')
    ok("coalesce", big, tmp_path / "out", "--scheme", scheme, "--rule", "reference")
    assert record(tmp_path / "out")["request"] == {
        "operator": "coalesce",
        "scheme": {"width_scheme": [[0, 2], [1, 3]]},
        "rule": "reference",
        "source": {"operator": "open", "id": 0, "path": str(big), "maps": ""},
    }
    assert record(tmp_path / "out")["sizes"] == dict(streammap.open(tmp_path / "out").sizes)


def test_files_that_were_given_stand_in_the_record(big: Path, tmp_path: Path) -> None:
    """A scheme, a map and a config may change, or go, without a change of what is made again."""
    scheme = tiny.file(tmp_path / "s.json", '{"width_scheme": [[0, 2], [1, 3]]}')
    config = (big / "config.json").rename(tmp_path / "elsewhere.json")
    ok("coalesce", big, tmp_path / "small", "--scheme", scheme, "--config", config)
    ok(
        "decoalesce",
        tmp_path / "small",
        tmp_path / "up",
        "--map",
        tmp_path / "small" / "streammap.map.safetensors",
    )
    ok("decoalesce", tmp_path / "small", tmp_path / "saved")
    scheme.write_text("{}")
    config.unlink()
    (tmp_path / "small" / "streammap.map.safetensors").unlink()
    for name in ("small", "up", "saved"):
        streammap.open_request(tmp_path / name).save(tmp_path / f"{name}-again")
        tiny.assert_same(tiny.written(tmp_path / f"{name}-again"), tiny.written(tmp_path / name))


def test_large_maps_are_named_by_digest_and_found_with_the_result(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_json, "_MAX_INLINE", 10)
    streammap.coalesce(big, tmp_path / "small", width=2)
    map_file = tmp_path / "small" / "streammap.map.safetensors"
    streammap.decoalesce(tmp_path / "small", tmp_path / "up", map=map_file)
    assert "sha256" in json.dumps(record(tmp_path / "up")["request"])
    tiny.assert_same(
        dict(streammap.open_request(tmp_path / "up").tensors()), tiny.written(tmp_path / "up")
    )
    map_file.unlink()
    tiny.assert_same(
        dict(streammap.open_request(tmp_path / "up").tensors()), tiny.written(tmp_path / "up")
    )
    (tmp_path / "up" / "streammap.map.safetensors").unlink()
    with pytest.raises(SchemeError, match="neither saved with the source nor with the result"):
        streammap.open_request(tmp_path / "up")


def test_two_opens_of_one_folder_stay_two(big: Path) -> None:
    """Equal tensors of one opened source are added up in the plan; those of two are read twice."""
    once, other = streammap.open(big), streammap.open(big)
    for lazy in (once.interpolate(once, alpha=0.5), once.interpolate(other, alpha=0.5)):
        assert lazy.plan.request is not None
        tree = request_json.as_json(lazy.plan.request)
        assert tree is not None
        again = streammap.open_request(tree)
        assert len(again.plan.sources) == len(lazy.plan.sources)


@pytest.mark.parametrize("front", ["bert", "deit"])
def test_the_originals_front_records_too(front: str, big: Path, tmp_path: Path) -> None:
    if front == "bert":
        small = tiny.Sizes(heads=2, layers=2)
        tiny.write(tmp_path / "small", tiny.bert(small), {**tiny.bert_config(small), "a": "b"})
        mapper = streammap.BertMapper(big, tmp_path / "small", tmp_path / "out")
        mapper.coalesce().save()
        place = tmp_path / "out"
    else:
        torch.save(tiny.timm_deit(SIZES), tmp_path / "d.pth")
        deit = streammap.DeiTMapper("L4-H4", "L2-H2", tmp_path, "d.pth", save_dir=tmp_path)
        plan = deit.coalesce().result.plan
        assert plan.request is not None
        tree = request_json.as_json(plan.request)
        assert tree is not None
        deit.result.save(tmp_path / "out.safetensors")
        place = tiny.file(tmp_path / "request.json", json.dumps(tree))
    streammap.open_request(place).save(tmp_path / "again.safetensors")
    expected = streammap.open(tmp_path / ("out" if front == "bert" else "out.safetensors"))
    tiny.assert_same(tiny.opened(tmp_path / "again.safetensors"), dict(expected.tensors()))
    assert (
        streammap.open_request(place).config == streammap.open(place).config
        if front == "bert"
        else True
    )


def test_a_source_may_be_elsewhere_now(big: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "o", tiny.bert(SIZES, seed=1), tiny.bert_config(SIZES))
    ok("coalesce", big, tmp_path / "one", "--width", 2)
    ok("interpolate", other, big, tmp_path / "two", "--alpha", 0.5)
    moved = big.rename(tmp_path / "moved")
    with pytest.raises(StreammapError, match="big: no such folder or file"):
        streammap.open_request(tmp_path / "one")
    ok("apply", tmp_path / "one", tmp_path / "one-again", "--source", moved)
    ok("apply", tmp_path / "two", tmp_path / "two-again", "--source", f"{big}={moved}")
    for name in ("one", "two"):
        tiny.assert_same(tiny.written(tmp_path / f"{name}-again"), tiny.written(tmp_path / name))
    with pytest.raises(PlanError, match="which of 2 sources is it"):
        streammap.open_request(tmp_path / "two", sources=moved)
    with pytest.raises(PlanError, match="nowhere: no source of this result"):
        streammap.open_request(tmp_path / "two", sources={"nowhere": moved})
    assert run("apply", tmp_path / "two", "x", "--source", "a", "--source", "b").exit_code == 2


def test_a_request_by_hand_is_applied(big: Path, tmp_path: Path) -> None:
    tree = {
        "operator": "interpolate",
        "alpha": 0.5,
        "source": {
            "operator": "decoalesce",
            "source": {
                "operator": "coalesce",
                "width": 2,
                "source": {"operator": "open", "path": str(big)},
            },
        },
        "target": {"operator": "open", "path": str(big)},
    }
    file = tiny.file(tmp_path / "request.json", json.dumps(tree))
    ok("apply", file, tmp_path / "out")
    lazy = streammap.open(big)
    expected = lazy.coalesce(width=2).decoalesce().interpolate(big, alpha=0.5)
    tiny.assert_same(tiny.written(tmp_path / "out"), dict(expected.tensors()))


def test_what_other_means_made_has_no_request(big: Path, tmp_path: Path) -> None:
    permuted = Lazy(Permute(seed=1).plan(streammap.open(big).plan))
    assert permuted.plan.request is None
    assert permuted.coalesce(width=2).plan.request is None
    assert permuted.interpolate(big, alpha=0.5).plan.request is None
    permuted.save(tmp_path / "out")
    with pytest.raises(PlanError, match="does not say how to make it again"):
        streammap.open_request(tmp_path / "out")


def test_a_tree_without_end_is_not_written_down(big: Path) -> None:
    lazy = streammap.open(big)
    for _ in range(8):
        lazy = lazy.interpolate(lazy, alpha=1.0)
    assert lazy.plan.request is not None
    assert request_json.as_json(lazy.plan.request) is None


SOURCE = {"operator": "open", "path": "/nowhere"}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ([], "expected an object, found list"),
        ({"operator": "eat"}, "operator 'eat'"),
        ({"operator": "coalesce"}, "coalesce lacks source"),
        ({"operator": "open", "path": "x", "target": SOURCE}, "open has a target"),
        ({"operator": "open", "path": 1}, "path is 1, expected text"),
        ({"operator": "open", "path": "x", "arch": []}, "arch is"),
        ({"operator": "open", "path": "x", "more": 1}, "unknown option more"),
        ({"operator": "open", "path": "x", "config": 1}, "config is 1, expected an object"),
        ({"operator": "open", "path": "x", "maps": "%"}, "not packed as expected"),
        ({"operator": "open", "path": "x", "maps": 3}, "expected packed maps"),
        ({"operator": "open", "path": "/nowhere"}, "no such folder or file"),
        ({"operator": "coalesce", "width": "=2", "source": "BIG"}, "width is '=2'"),
        ({"operator": "coalesce", "widht": 2, "source": "BIG"}, "unknown option 'widht'"),
        ({"operator": "coalesce", "rule": "r", "source": "BIG"}, "rule is 'r'"),
        ({"operator": "coalesce", "untie": 1, "source": "BIG"}, "untie is 1"),
        ({"operator": "coalesce", "mlp": "x", "source": "BIG"}, "not a request"),
        ({"operator": "coalesce", "axes": [], "source": "BIG"}, "expected an object"),
        ({"operator": "configure", "source": "BIG"}, "configure: config is missing"),
        ({"operator": "interpolate", "alpha": "1", "source": "BIG", "target": "BIG"}, "alpha is"),
    ],
)
def test_refusals(tree: object, message: str, big: Path) -> None:
    text = json.dumps(tree).replace('"BIG"', json.dumps({"operator": "open", "path": str(big)}))
    with pytest.raises(StreammapError, match=message):
        calls.build(request_json.parse(json.loads(text)))


def test_ids_that_lie_and_trees_that_are_too_deep_are_refused() -> None:
    other = {"operator": "open", "path": "/else", "id": 1}
    tree = {"operator": "interpolate", "alpha": 1, "source": {**SOURCE, "id": 1}, "target": other}
    with pytest.raises(PlanError, match="id 1 is another source already"):
        request_json.parse(tree)
    deep: dict[str, object] = dict(SOURCE)
    for _ in range(300):
        deep = {"operator": "coalesce", "source": deep}
    with pytest.raises(PlanError, match="more than 200 calls"):
        request_json.parse(deep)


_LEAF: st.SearchStrategy[object] = st.sampled_from(
    [None, True, 1, 2, -1, 0.5, "=8", "x", "", [], [[0, 1], [2, 3]], {}]
)
_NAMES = st.sampled_from(
    ["operator", "path", "id", "maps", "width", "scheme", "mlp", "axes", "sizes", "alpha", "config"]
)
_OPERATORS = st.sampled_from(["open", *registry.names(), "none"])


def _calls(inner: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    extra = st.dictionaries(_NAMES, _LEAF, max_size=3)
    return st.builds(
        lambda operator, more, source, target: {
            "operator": operator,
            "source": source,
            "target": target,
            **more,
        },
        _OPERATORS,
        extra,
        inner,
        inner,
    )


@given(st.recursive(st.builds(dict, operator=st.just("open"), path=_LEAF), _calls, max_leaves=6))
def test_any_tree_is_a_request_or_the_projects_own_error(tree: object) -> None:
    try:
        found: OperatorCall = request_json.parse(tree)
        calls.build(found)
    except StreammapError:
        pass


def test_a_result_of_a_spec_of_ones_own_carries_it(tmp_path: Path) -> None:
    spec = tiny.file(
        tmp_path / "mine.toml", 'schema = 1\nextends = "bert"\nmodel_types = ["mine"]\n'
    )
    config = {**tiny.bert_config(SIZES), "model_type": "mine"}
    mine = tiny.write(tmp_path / "mine", tiny.bert(SIZES), config)
    ok("coalesce", mine, tmp_path / "small", "--width", 2, "--arch", spec)
    carried = tmp_path / "small" / "streammap.spec.toml"
    assert carried.read_bytes() == spec.read_bytes()
    ok("coalesce", tmp_path / "small", tmp_path / "smaller", "--depth", 2)
    assert (tmp_path / "smaller" / carried.name).read_bytes() == spec.read_bytes()
    assert streammap.open(tmp_path / "smaller").plan.model.name
    carried.unlink()
    found = run("plan", "coalesce", tmp_path / "small", "--depth", 2)
    assert found.exit_code == 1
    assert f"hint: its record says that it was made with --arch {spec}: give that" in found.stderr
    ok("plan", "coalesce", tmp_path / "small", "--depth", 2, "--arch", spec)
    spec.unlink()
    assert "spec infer" in run("plan", "coalesce", tmp_path / "small", "--depth", 2).stderr


def test_a_spec_beside_a_known_model_is_passed_by(big: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(big, tmp_path / "copy")
    (copy / "streammap.spec.toml").write_text("schema = 2")
    assert streammap.open(copy).plan.architecture is None


def test_names_that_are_near_are_told(big: Path) -> None:
    lazy = streammap.open(big)
    for read in (lazy.read, lazy.spec):
        with pytest.raises(
            PlanError, match=r"no tensor 'pooler.dense.weigth'\n.*pooler.dense.weight"
        ):
            read("pooler.dense.weigth")
    assert len(repr(lazy.plan)) < 200
    assert (
        "hint: did you mean bert? there are "
        in run("plan", "coalesce", big, "--arch", "brt").stderr
    )
