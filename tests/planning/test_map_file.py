"""The map file: what is saved is loaded, the original's form too, and the way back up uses it."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammap
from streammap.errors import PlanError, SchemeError
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header
from streammap.io.storage.local import LocalStorage
from streammap.planning import map_file, maps
from streammap.planning.dense.matrix import Held
from streammap.planning.map_file import MapLevel
from streammap.planning.maps import AxisMap, BlockMap, DenseMap
from tests.support import tiny

BIG = tiny.Sizes(heads=8, layers=4)
SMALL = tiny.Sizes(heads=4, layers=2)
SCHEME = {"width_scheme": [[0, 4], [1, 5], [6, 2], [3, 7]], "depth_scheme": [[0, 2], [1, 3]]}


def _level(**merging: AxisMap) -> MapLevel:
    return MapLevel(merging)


LEVELS = (
    _level(
        heads=maps.merging([(0, 2), (1,), (3, 0)], 4),
        embed=maps.merging([(0, 2), (1,), (3, 0)], 4, block=3),
        layer=maps.merging([(0, 1), (3,)], 4),
    ),
    _level(layer=BlockMap((((0, 0.25), (1, 0.75)), ()), 2)),
)


class Evil:
    """Runs a shell command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


def _positive(n_out: int, n_in: int, seed: int) -> Tensor:
    """A random matrix whose rows sum to 1, as the original's maps."""
    source = torch.Generator().manual_seed(seed)
    matrix = torch.rand(n_out, n_in, generator=source) + 0.05
    return matrix / matrix.sum(1, keepdim=True)


# Save and load.


def test_block_maps_are_saved_and_loaded(tmp_path: Path) -> None:
    file = tiny.file(tmp_path / map_file.NAME, map_file.encode(LEVELS))
    assert map_file.load(file) == LEVELS == map_file.load(tmp_path)
    assert [level.digest for level in map_file.load(file)] == [level.digest for level in LEVELS]


def test_dense_maps_are_saved_and_loaded(tmp_path: Path) -> None:
    matrix = _positive(3, 20, 1)
    levels = (_level(embed=DenseMap(Held(matrix)), layer=maps.merging([(0, 1)], 2)),)
    (found,) = map_file.load(tiny.file(tmp_path / map_file.NAME, map_file.encode(levels)))
    dense = found.merging["embed"]
    assert isinstance(dense, DenseMap)
    assert torch.equal(maps.to_matrix(dense, like=matrix), matrix)
    assert found.merging["layer"] == levels[0].merging["layer"]
    assert found.sizes == {"embed": (20, 3), "layer": (2, 1)}
    assert found.digest == levels[0].digest


def test_no_levels_are_saved_and_loaded(tmp_path: Path) -> None:
    assert map_file.load(tiny.file(tmp_path / map_file.NAME, map_file.encode(()))) == ()


def test_a_map_file_is_a_safetensors_file(tmp_path: Path) -> None:
    file = tiny.file(tmp_path / map_file.NAME, map_file.encode(LEVELS))
    found = load_file(file)
    assert found["0.heads.places"].tolist() == [[0, 0], [0, 2], [1, 1], [2, 3], [2, 0]]
    assert found["0.heads.values"].tolist() == [0.5, 0.5, 1.0, 0.5, 0.5]


def test_equal_maps_have_equal_digests_and_others_do_not() -> None:
    level = _level(heads=maps.merging([(0, 1)], 2))
    assert level.digest == _level(heads=maps.merging([(0, 1)], 2)).digest
    others = [
        _level(heads=maps.merging([(1, 0)], 2)),
        _level(embed=maps.merging([(0, 1)], 2)),
        _level(heads=BlockMap((((0, 0.4), (1, 0.6)),), 2)),
        _level(heads=DenseMap(Held(torch.tensor([[0.5, 0.5]])))),
    ]
    assert len({level.digest, *(other.digest for other in others)}) == 5


@given(st.data())
def test_any_block_map_is_saved_and_loaded(scratch: Path, data: st.DataObject) -> None:
    n_in, block = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    pair = st.tuples(st.integers(0, n_in - 1), st.floats(allow_nan=False, allow_infinity=False))
    rows = data.draw(st.lists(st.lists(pair, max_size=3).map(tuple), min_size=1, max_size=4))
    levels = (_level(embed=BlockMap(tuple(rows), n_in, block)),)
    file = tiny.file(scratch / "x.safetensors", map_file.encode(levels))
    assert map_file.load(file) == levels


# The original's form.


def test_the_originals_map_is_read(tmp_path: Path) -> None:
    heads = maps.to_matrix(maps.merging([(0, 3), (1, 2)], 4, block=5), like=torch.zeros(1))
    qk, layers = _positive(10, 20, 2), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    content = {"embed_F": heads, "qk_F": qk, "v_F": heads.double(), "inter_F": heads, "R": layers}
    torch.save(content, tmp_path / map_file.ORIGINAL)
    (level,) = map_file.load(tmp_path)
    assert [level.digest] == [found.digest for found in map_file.find(LocalStorage(tmp_path))]
    assert level.merging["embed"] == maps.merging([(0, 3), (1, 2)], 4, block=5)
    assert level.merging["v"] == level.merging["mlp"] == level.merging["embed"]
    dense = level.merging["qk"]
    assert isinstance(dense, DenseMap)
    assert torch.equal(maps.to_matrix(dense, like=qk), qk)
    assert level.merging["layer"] == maps.merging([(0, 1), (2, 3)], 4)
    assert level.sizes == {
        "embed": (20, 10),
        "qk": (20, 10),
        "v": (20, 10),
        "mlp": (20, 10),
        "layer": (4, 2),
    }


@pytest.mark.parametrize("name", ["embed_F", "R"])
def test_the_originals_map_may_hold_one_matrix(tmp_path: Path, name: str) -> None:
    torch.save({name: torch.eye(2)}, tmp_path / map_file.ORIGINAL)
    (level,) = map_file.load(tmp_path / map_file.ORIGINAL)
    assert list(level.sizes.values()) == [(2, 2)]


def test_our_map_comes_before_the_originals(tmp_path: Path) -> None:
    torch.save({"R": torch.eye(2)}, tmp_path / map_file.ORIGINAL)
    assert len(map_file.find(LocalStorage(tmp_path))) == 1
    tiny.file(tmp_path / map_file.NAME, map_file.encode(LEVELS))
    assert map_file.find(LocalStorage(tmp_path)) == LEVELS
    tiny.file(tmp_path / "x.map.safetensors", map_file.encode(LEVELS[:1]))
    assert map_file.find(LocalStorage(tmp_path / "x.pth")) == LEVELS[:1]
    assert map_file.find(LocalStorage(tmp_path / "y.pth")) == LEVELS


@pytest.mark.parametrize(
    "content",
    [
        {},
        [torch.eye(2)],
        torch.eye(2),
        {"R": [[1.0, 0.0]]},
        {"R": torch.ones(3)},
        {"R": torch.tensor(1.0)},
        {"R": torch.ones(2, 2, 2)},
        {"F": torch.eye(2)},
    ],
)
def test_an_original_map_of_anything_but_matrices_is_refused(
    tmp_path: Path, content: object
) -> None:
    torch.save(content, tmp_path / map_file.ORIGINAL)
    with pytest.raises(
        SchemeError, match=r"MapMatrix\.bin: (expected a dict of|R is not a matrix)"
    ):
        map_file.load(tmp_path)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.tensor([[float("nan"), 1.0]]),
        torch.tensor([[float("inf"), 1.0]]),
        torch.eye(2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
    ],
    ids=["nan", "inf", "complex", "sparse"],
)
def test_an_original_map_of_anything_but_numbers_is_refused(tmp_path: Path, matrix: Tensor) -> None:
    torch.save({"R": matrix}, tmp_path / map_file.ORIGINAL)
    with pytest.raises(SchemeError, match=r"MapMatrix\.bin: "):
        map_file.load(tmp_path)


def test_code_in_an_original_map_does_not_run(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    torch.save({"R": torch.eye(2), "x": Evil(f"touch {ran}")}, tmp_path / map_file.ORIGINAL)
    with pytest.raises(SchemeError, match="not a MapMatrix of tensors"):
        map_file.load(tmp_path)
    assert not ran.exists()


@pytest.mark.parametrize("n", [0, 1, 50, 200, 600, -1])
def test_a_truncated_original_map_is_refused(tmp_path: Path, n: int) -> None:
    torch.save({"R": torch.eye(2)}, tmp_path / map_file.ORIGINAL)
    content = (tmp_path / map_file.ORIGINAL).read_bytes()
    tiny.file(tmp_path / map_file.ORIGINAL, content[:n])
    with pytest.raises(SchemeError, match=r"MapMatrix\.bin: not a MapMatrix of tensors"):
        map_file.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", b"\x80\x02", bytes(99)])
def test_an_original_map_of_other_bytes_is_refused(tmp_path: Path, content: bytes) -> None:
    tiny.file(tmp_path / map_file.ORIGINAL, content)
    with pytest.raises(SchemeError, match=r"MapMatrix\.bin: "):
        map_file.load(tmp_path)


# Refusals of our form.


def _write(folder: Path, about: object, tensors: tiny.State) -> Path:
    """A map file with this "streammap" metadata."""
    text = about if isinstance(about, str) else json.dumps(about)
    save_file(tensors, folder / map_file.NAME, metadata={"format": "pt", "streammap": text})
    return folder / map_file.NAME


def _about(**change: object) -> dict[str, object]:
    axis = {"small": 2, "large": 4, "block": 1, **change}
    return {"version": 1, "levels": [{"axes": {"heads": axis}, "sizes": {"heads": [4, 2]}}]}


def _tensors() -> tiny.State:
    places = torch.tensor([[0, 0], [0, 2], [1, 1], [1, 3]], dtype=torch.int32)
    return {"0.heads.places": places, "0.heads.values": torch.full((4,), 0.5).double()}


def test_what_the_refusals_change_is_a_map(tmp_path: Path) -> None:
    (level,) = map_file.load(_write(tmp_path, _about(), _tensors()))
    assert level == _level(heads=maps.merging([(0, 2), (1, 3)], 4))


def test_a_map_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert map_file.find(LocalStorage(tmp_path)) == ()
    with pytest.raises(SchemeError, match=r"no streammap.map.safetensors and no MapMatrix.bin"):
        map_file.load(tmp_path)
    with pytest.raises(SchemeError, match=r"x.safetensors: no such map file"):
        map_file.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_refused(tmp_path: Path, version: object) -> None:
    file = _write(tmp_path, {"version": version, "levels": []}, _tensors())
    with pytest.raises(SchemeError, match=f"version {version}, expected 1"):
        map_file.load(file)


@pytest.mark.parametrize(
    "about",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        {},
        {"version": 1},
        {"version": 1, "levels": 3},
        {"version": 1, "levels": [3]},
        {"version": 1, "levels": ["axes"]},
        {"version": 1, "levels": [{"axes": {}}]},
        {"version": 1, "levels": [{"sizes": {}}]},
        {"version": 1, "levels": [{"axes": [], "sizes": {}}]},
        {"version": 1, "levels": [{"axes": {"heads": 3}, "sizes": {}}]},
        {"version": 1, "levels": [{"axes": {"mlp": {}}, "sizes": {}}]},
        {"version": 1, "levels": [{"axes": {}, "sizes": {"heads": 3}}]},
        {"version": 1, "levels": [{"axes": {}, "sizes": {"heads": [4]}}]},
        {"version": 1, "levels": [{"axes": {}, "sizes": {"heads": ["a", "b"]}}]},
        {"version": 1, "levels": [{"axes": {}, "sizes": {"heads": [float("inf"), 2]}}]},
        {"version": 1, "levels": [{"axes": {}, "sizes": {"heads": [float("nan"), 2]}}]},
        '{"version": 1, "levels": ' + "[" * 100_000,
    ],
    ids=itertools.count(),
)
def test_wrong_metadata_is_refused(tmp_path: Path, about: object) -> None:
    file = _write(tmp_path, about, _tensors())
    with pytest.raises(SchemeError, match="not a map file of streammap"):
        map_file.load(file)


def test_a_safetensors_file_of_others_is_refused(tmp_path: Path) -> None:
    save_file(_tensors(), tmp_path / map_file.NAME)
    with pytest.raises(SchemeError, match="not a map file of streammap"):
        map_file.load(tmp_path)
    save_file(_tensors(), tmp_path / map_file.NAME, metadata={"format": "pt"})
    with pytest.raises(SchemeError, match="not a map file of streammap"):
        map_file.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"block": 0},
        {"block": -1},
        {"block": 3},
        {"block": None},
        {"block": "x"},
        {"block": float("inf")},
        {"block": 2},
        {"small": 1},
        {"small": 3},
        {"small": -2},
        {"small": 2.5},
        {"small": None},
        {"large": 3},
        {"large": -4},
        {"large": 5},
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(SchemeError, match=r"streammap.map.safetensors"):
        map_file.load(_write(tmp_path, _about(**change), _tensors()))


def test_level_sizes_other_than_the_maps_are_refused(tmp_path: Path) -> None:
    about = _about()
    about["levels"][0]["sizes"] = {"heads": [8, 2]}  # type: ignore[index]  # a dict by hand
    with pytest.raises(SchemeError, match=r"streammap.map.safetensors"):
        map_file.load(_write(tmp_path, about, _tensors()))


@pytest.mark.parametrize("sizes", [{}, {"head": [4, 2]}, {"heads": [4, 2], "mlp": [4, 2]}], ids=str)
def test_level_sizes_of_other_axes_are_refused(tmp_path: Path, sizes: dict[str, object]) -> None:
    about = _about()
    about["levels"][0]["sizes"] = sizes  # type: ignore[index]  # a dict by hand
    with pytest.raises(SchemeError, match="not a map file of streammap"):
        map_file.load(_write(tmp_path, about, _tensors()))


@pytest.mark.parametrize(
    "places",
    [
        torch.tensor([[0, 0], [0, 4], [1, 1], [1, 3]]),
        torch.tensor([[0, 0], [0, -1], [1, 1], [1, 3]]),
        torch.tensor([[0, 0], [2, 2], [1, 1], [1, 3]]),
        torch.tensor([[0, 0], [-1, 2], [1, 1], [1, 3]]),
        torch.tensor([[0, 0], [0, 2], [1, 1]]),
        torch.tensor([[0, 0, 0]] * 4),
        torch.tensor([0, 2, 1, 3]),
        torch.tensor(0),
        torch.zeros(4, 2),
        torch.zeros(0, 2, dtype=torch.int32),
    ],
    ids=itertools.count(),
)
def test_indices_out_of_range_are_refused(tmp_path: Path, places: Tensor) -> None:
    tensors = {**_tensors(), "0.heads.places": places}
    with pytest.raises(SchemeError, match="not a map file of streammap"):
        map_file.load(_write(tmp_path, _about(), tensors))


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor(0.5),
        torch.ones(4, 1),
        torch.ones(3),
        torch.tensor([0.5, float("nan"), 0.5, 0.5]),
        torch.tensor([0.5, float("inf"), 0.5, 0.5]),
        torch.ones(4, dtype=torch.complex64),
    ],
    ids=itertools.count(),
)
def test_values_of_anything_but_numbers_are_refused(tmp_path: Path, values: Tensor) -> None:
    tensors = {**_tensors(), "0.heads.values": values}
    with pytest.raises(SchemeError, match="not a map file of streammap"):
        map_file.load(_write(tmp_path, _about(), tensors))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(4),
        torch.tensor(1.0),
        torch.ones(4, 2),
        torch.ones(2, 4, 1),
        torch.full((2, 4), float("nan")),
        torch.ones(2, 4, dtype=torch.int64),
    ],
    ids=itertools.count(),
)
def test_a_matrix_of_another_shape_or_kind_is_refused(tmp_path: Path, matrix: Tensor) -> None:
    with pytest.raises(SchemeError, match=r"streammap.map.safetensors"):
        map_file.load(_write(tmp_path, _about(), {"0.heads.matrix": matrix}))


def test_tensors_that_are_missing_are_refused(tmp_path: Path) -> None:
    for key in _tensors():
        tensors = _tensors()
        del tensors[key]
        with pytest.raises(SchemeError, match="not a map file of streammap"):
            map_file.load(_write(tmp_path, _about(), tensors))


def test_a_dtype_that_torch_lacks_is_refused(tmp_path: Path) -> None:
    about = {"format": "pt", "streammap": json.dumps(_about())}
    specs = [
        ("0.heads.places", TensorSpec("I32", (4, 2))),
        ("0.heads.values", TensorSpec("F6_E2M3", (4,))),
    ]
    tiny.file(tmp_path / map_file.NAME, safetensors_header.encode(specs, about) + bytes(35))
    with pytest.raises(SchemeError, match="F6_E2M3"):
        map_file.load(tmp_path)


def test_a_small_file_can_not_ask_for_all_memory(tmp_path: Path) -> None:
    """In a process of its own, which may have 2 GB."""
    places, values = torch.zeros(0, 2, dtype=torch.int32), torch.zeros(0).double()
    tensors = {"0.heads.places": places, "0.heads.values": values}
    file = _write(tmp_path, _about(small=2**40, large=2**41), tensors)
    script = (
        "import pathlib, resource, torch\n"
        "from streammap.planning import map_file\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9, 2 * 10**9))\n"
        f"map_file.load(pathlib.Path({str(file)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "SchemeError: " in done.stderr


@pytest.mark.parametrize("n", [0, 7, 8, 100, -1])
def test_a_truncated_map_is_refused(tmp_path: Path, n: int) -> None:
    tiny.file(tmp_path / map_file.NAME, map_file.encode(LEVELS)[:n])
    with pytest.raises(SchemeError, match=r"map file streammap\.map\.safetensors: "):
        map_file.load(tmp_path)
    with pytest.raises(SchemeError, match=r"map file "):
        map_file.find(LocalStorage(tmp_path))


@given(st.binary(max_size=200), st.sampled_from(["x.map.safetensors", "MapMatrix.bin"]))
def test_any_bytes_are_read_or_refused(scratch: Path, content: bytes, name: str) -> None:
    with contextlib.suppress(SchemeError):
        map_file.load(tiny.file(scratch / name, content))


@given(st.data())
def test_a_mutated_map_is_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(map_file.encode(LEVELS))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tiny.file(scratch / "mutated.map.safetensors", bytes(content))
    try:
        levels = map_file.load(file)
    except SchemeError:
        return
    for level in levels:
        assert level.sizes == {name: (m.n_in, m.n_out) for name, m in level.merging.items()}


# The way back up.


def _bert(folder: Path, sizes: tiny.Sizes, *, seed: int = 0, base: str = "") -> Path:
    return tiny.write(folder, tiny.bert(sizes, seed=seed, base=base), tiny.bert_config(sizes))


def test_the_saved_map_leads_back_up_like_the_scheme(tmp_path: Path) -> None:
    streammap.coalesce(_bert(tmp_path / "big", BIG), tmp_path / "small", scheme=SCHEME)
    small = streammap.open(tmp_path / "small")
    saved, given = small.decoalesce(), small.decoalesce(scheme=SCHEME)
    tiny.assert_same(dict(saved.tensors()), dict(given.tensors()))
    assert saved.config == given.config == tiny.bert_config(BIG)
    assert "the map saved with the source is used" in saved.plan.notes
    saved.save(tmp_path / "back")
    tiny.assert_same(tiny.written(tmp_path / "back"), dict(given.tensors()))


def test_the_map_of_another_folder_can_be_named(tmp_path: Path) -> None:
    streammap.coalesce(_bert(tmp_path / "big", BIG), tmp_path / "small", scheme=SCHEME)
    trained = streammap.open(_bert(tmp_path / "trained", SMALL, seed=7))
    with pytest.raises(PlanError, match="no target size given, and no map to grow by"):
        trained.decoalesce()
    expected = dict(trained.decoalesce(scheme=SCHEME).tensors())
    for place in (tmp_path / "small", tmp_path / "small" / map_file.NAME):
        tiny.assert_same(dict(trained.decoalesce(map=place).tensors()), expected)
    with pytest.raises(PlanError, match="the map file has 1 maps, none from this size"):
        trained.coalesce(map=tmp_path / "small")


def test_the_map_of_one_file_is_beside_it(tmp_path: Path) -> None:
    big = streammap.open(_bert(tmp_path / "big", BIG))
    config = tiny.bert_config(SMALL)
    for name in ("small.safetensors", "small.pth"):
        big.coalesce(scheme=SCHEME).save(tmp_path / name, overwrite=True)
        small = streammap.open(tmp_path / name, config=config)
        expected = small.decoalesce(scheme=SCHEME)
        tiny.assert_same(dict(small.decoalesce().tensors()), dict(expected.tensors()))
        (tmp_path / "small.map.safetensors").unlink()


def test_overwriting_one_file_removes_the_map_of_what_was_there(tmp_path: Path) -> None:
    big = streammap.open(_bert(tmp_path / "big", BIG))
    big.coalesce(scheme=SCHEME).save(tmp_path / "x.safetensors")
    assert len(streammap.open(tmp_path / "x.safetensors").plan.levels) == 1
    streammap.open(_bert(tmp_path / "other", SMALL)).save(
        tmp_path / "x.safetensors", overwrite=True
    )
    assert streammap.open(tmp_path / "x.safetensors").plan.levels == ()


def test_two_levels_down_and_up_again(tmp_path: Path) -> None:
    deep = {"depth_scheme": [[0, 1]]}
    source = _bert(tmp_path / "0", BIG, base="bert.")
    streammap.coalesce(source, tmp_path / "1", scheme=SCHEME)
    streammap.coalesce(tmp_path / "1", tmp_path / "2", scheme={**deep, "width_scheme": [[0, 3]]})
    assert len(streammap.open(tmp_path / "2").plan.levels) == 2
    streammap.decoalesce(tmp_path / "2", tmp_path / "3")
    streammap.decoalesce(tmp_path / "3", tmp_path / "4")
    one, three = streammap.open(tmp_path / "1"), streammap.open(tmp_path / "3")
    zero, four = streammap.open(tmp_path / "0"), streammap.open(tmp_path / "4")
    assert three.sizes == one.sizes
    assert four.sizes == zero.sizes
    assert four.config == zero.config
    assert four.plan.specs == zero.plan.specs
    expected = three.decoalesce(scheme=SCHEME)
    tiny.assert_same(dict(four.tensors()), dict(expected.tensors()))


def test_two_levels_in_one_pass_are_the_two_passes(tmp_path: Path) -> None:
    source = _bert(tmp_path / "0", BIG)
    once = streammap.open(source).coalesce(width=2).coalesce(depth=2).decoalesce().decoalesce()
    assert once.sizes == streammap.open(source).sizes
    down = streammap.open(source).coalesce(width=2).coalesce(depth=2)
    down.save(tmp_path / "down")
    back = streammap.open(tmp_path / "down").decoalesce().decoalesce()
    tiny.assert_close(dict(back.tensors()), dict(once.tensors()))


def test_a_saved_map_of_another_model_is_not_used(tmp_path: Path) -> None:
    source = _bert(tmp_path / "0", tiny.Sizes(heads=3, layers=3))
    tiny.file(source / map_file.NAME, map_file.encode(LEVELS))
    with pytest.raises(PlanError, match="no target size given, and no map to grow by"):
        streammap.open(source).decoalesce()


def test_a_broken_map_beside_the_weights_is_refused(tmp_path: Path) -> None:
    source = _bert(tmp_path / "0", SMALL)
    tiny.file(source / map_file.NAME, b"broken")
    with pytest.raises(SchemeError, match=r"map file streammap\.map\.safetensors: 6 bytes"):
        streammap.open(source)


# The original's dense maps, against a dense computation in float64.


def _into(m: Tensor) -> Tensor:
    """in(M) = rownorm(M^T)."""
    return _rownorm(m.T)


def _rownorm(m: Tensor) -> Tensor:
    sums = m.sum(1, keepdim=True)
    return m / sums.masked_fill(sums == 0, 1)


def _dense_bert(
    state: tiny.State, width: dict[str, Tensor], layers: Tensor, factor: float
) -> tiny.State:
    """A BERT with every width mapped by a matrix (M_out W in(M_in)), then the layers by one."""
    e, qk, v, mlp = (width[name].double() for name in ("embed", "qk", "v", "mlp"))
    # Suffix -> (what makes it, what it reads).
    linear = {
        "attention.self.query": (qk, e),
        "attention.self.key": (qk, e),
        "attention.self.value": (v, e),
        "attention.output.dense": (e, v),
        "intermediate.dense": (mlp, e),
        "layer.output.dense": (e, mlp),
        "pooler.dense": (e, e),
    }
    found: tiny.State = {}
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        x = tensor.double()
        if "embeddings.weight" in key:
            found[key] = factor * x @ e.T
        elif "LayerNorm" in module:
            found[key] = e @ x
        else:
            name = ".".join(part for part in module.split(".") if not part.isdigit())
            makes, reads = next(pair for end, pair in linear.items() if name.endswith(end))
            found[key] = makes @ x @ _into(reads) if kind == "weight" else makes @ x
    return _dense_layers(found, layers.double())


def _dense_layers(state: tiny.State, layers: Tensor) -> tiny.State:
    found = {key: x for key, x in state.items() if "encoder.layer" not in key}
    n_out, n_in = layers.shape
    for key in [key for key in state if "encoder.layer.0." in key]:
        stack = torch.stack([state[key.replace("layer.0.", f"layer.{j}.")] for j in range(n_in)])
        for i in range(n_out):
            mixed = torch.tensordot(layers[i], stack, dims=1)
            found[key.replace("layer.0.", f"layer.{i}.")] = mixed
    return found


@pytest.mark.parametrize("same", [True, False], ids=["one map", "a map for each axis"])
@pytest.mark.parametrize("direction", ["coalesce", "decoalesce"])
@pytest.mark.parametrize("base", ["", "bert."])
def test_the_originals_dense_map_is_used_instead_of_the_scheme(
    tmp_path: Path, direction: str, base: str, same: bool
) -> None:
    shrinks = direction == "coalesce"
    own, other = (BIG, SMALL) if shrinks else (SMALL, BIG)
    source = _bert(tmp_path / "source", own, base=base)
    target = _bert(tmp_path / "target", other, base=base)
    f = {name: _positive(SMALL.embed, BIG.embed, 1 if same else n) for n, name in _numbered()}
    f["mlp"] = _positive(SMALL.mlp, BIG.mlp, 9)
    r = _positive(SMALL.layers, BIG.layers, 10)
    names = {"embed": "embed_F", "qk": "qk_F", "v": "v_F", "mlp": "inter_F"}
    torch.save({**{names[name]: m for name, m in f.items()}, "R": r}, source / map_file.ORIGINAL)
    mapper = streammap.BertMapper(
        source, target, tmp_path / "out", SCHEME["width_scheme"], SCHEME["depth_scheme"]
    )
    (mapper.coalesce() if shrinks else mapper.decoalesce()).save()
    width = f if shrinks else {name: _into(m) for name, m in f.items()}
    layers = r if shrinks else _into(r)
    state = tiny.bert(own, base=base)
    expected = _dense_bert(state, width, layers, 2.0 if shrinks else 0.5)
    tiny.assert_close(tiny.written(tmp_path / "out"), expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == tiny.bert_config(other)
    assert not (tmp_path / "out" / map_file.ORIGINAL).exists()
    assert len(map_file.find(LocalStorage(tmp_path / "out"))) == 1


def _numbered() -> list[tuple[int, str]]:
    return list(enumerate(("embed", "qk", "v"), start=1))


def test_the_scheme_is_the_dense_computation(tmp_path: Path) -> None:
    source = _bert(tmp_path / "source", BIG)
    target = _bert(tmp_path / "target", SMALL)
    mapper = streammap.BertMapper(
        source, target, tmp_path / "out", SCHEME["width_scheme"], SCHEME["depth_scheme"]
    )
    mapper.coalesce().save()
    like = torch.zeros(1, dtype=torch.float64)
    groups = SCHEME["width_scheme"]
    e = maps.to_matrix(maps.merging(groups, BIG.heads, block=BIG.head_dim), like=like)
    mlp = maps.to_matrix(maps.merging(groups, BIG.heads, block=BIG.mlp_per_head), like=like)
    r = maps.to_matrix(maps.merging(SCHEME["depth_scheme"], BIG.layers), like=like)
    expected = _dense_bert(tiny.bert(BIG), {"embed": e, "qk": e, "v": e, "mlp": mlp}, r, 2.0)
    tiny.assert_close(tiny.written(tmp_path / "out"), expected)
