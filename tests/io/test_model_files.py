"""Which files of a folder are the model: what transformers loads; the rest has a way out."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

import streammap
from streammap.errors import CheckpointError
from streammap.io import shard_sets
from tests.support import tiny
from tests.support.typed import ok, run

STATE = tiny.random({"a": (3, 5), "b": (7,), "c": (2,)})
SIZES = tiny.Sizes()


def _name(n: int, of: int = 3, *, stem: str = "model", end: str = "safetensors") -> str:
    return f"{stem}-{n:05d}-of-{of:05d}.{end}"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three shards and their index."""
    return tiny.write(tmp_path / "src", STATE, {"x": 1}, n_shards=3)


def _notes(source: Path) -> tuple[str, ...]:
    return streammap.open(source).plan.notes


def _index(source: Path) -> dict[str, object]:
    weight_map: dict[str, object] = json.loads((source / tiny.INDEX).read_text())["weight_map"]
    return weight_map


def _elsewhere(source: Path) -> str:
    """A copy at a URL."""
    url = f"memory://{uuid.uuid4().hex}/src"
    fs: Any = fsspec.filesystem("memory")
    fs.put(f"{source}/", f"{url}/", recursive=True)
    return url


# Shards without an index.


def _renamed(source: Path, name: Callable[[int], str]) -> None:
    for n in (1, 2, 3):
        (source / _name(n)).rename(source / name(n))
    (source / tiny.INDEX).unlink()


@pytest.mark.parametrize(
    "name",
    [
        _name,
        lambda n: _name(n, stem="consolidated"),
        lambda n: f"model-{n}-of-3.safetensors",
        lambda n: f"{n:05d}-of-00003.safetensors",
        lambda n: _name(n - 1),
        lambda n: _name(n, stem="diffusion_pytorch_model"),
    ],
    ids=range(6),
)
def test_a_whole_set_of_shards_needs_no_index(source: Path, name: Callable[[int], str]) -> None:
    _renamed(source, name)
    for place in (source, _elsewhere(source)):
        found = streammap.open(place)
        tiny.assert_same(dict(found.tensors()), STATE)
        (note,) = found.plan.notes
        assert note == "src: no index: the 3 shards are a whole set, and are read"


def test_a_whole_set_of_torch_files_needs_no_index(tmp_path: Path) -> None:
    for n, key in enumerate(STATE, 1):
        torch.save({key: STATE[key]}, tmp_path / _name(n, stem="pytorch_model", end="bin"))
    tiny.assert_same(tiny.opened(tmp_path), STATE)


def test_the_note_stands_in_inspect_plan_and_record(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "src", tiny.bert(SIZES), tiny.bert_config(SIZES), n_shards=2)
    (source / tiny.INDEX).unlink()
    out = tmp_path / "out"
    note = "src: no index: the 2 shards are a whole set, and are read"
    assert note.removeprefix("src: ") in ok("inspect", source)
    assert note in ok("plan", "coalesce", source, "--width", 2)
    assert note in ok("coalesce", source, out, "--width", 2)
    assert json.loads((out / "streammap.json").read_text())["notes"] == [note]


def test_the_shards_that_a_set_lacks_are_named(source: Path) -> None:
    (source / tiny.INDEX).unlink()
    (source / _name(2)).unlink()
    with pytest.raises(CheckpointError) as raised:
        streammap.open(source)
    assert raised.value.message.endswith(f"2 of 3 shards, missing: {_name(2)}")
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("download the missing ones")
    shard = Path(raised.value.hint.rpartition(": ")[2])
    tiny.assert_same(tiny.opened(shard), {"a": STATE["a"]})
    (source / _name(3)).unlink()
    with pytest.raises(CheckpointError, match=f"1 of 3 shards, missing: {_name(2)}, {_name(3)}"):
        streammap.open(source)  # never one shard for the whole model


def test_of_two_whole_sets_the_one_with_the_usual_name_is_read(source: Path) -> None:
    (source / tiny.INDEX).unlink()
    for n in (1, 2):
        save_file({f"x{n}": torch.zeros(1)}, source / _name(n, 2, stem="consolidated"))
    tiny.assert_same(tiny.opened(source), STATE)


def test_two_whole_sets_are_refused_until_one_is_moved(source: Path) -> None:
    (source / tiny.INDEX).unlink()
    for n in (1, 2):
        save_file({f"x{n}": torch.zeros(1)}, source / _name(n, 2))
    expected = (
        rf"2 whole sets of shards and no index: {_name(1, 2)}, {_name(1)}\n.*move all but one"
    )
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(source)
    for n in (1, 2):
        (source / _name(n, 2)).unlink()
    tiny.assert_same(tiny.opened(source), STATE)


def test_numbered_files_with_one_key_twice_are_no_set(source: Path) -> None:
    (source / tiny.INDEX).unlink()
    save_file({"a": STATE["a"]}, source / _name(2))
    with pytest.raises(CheckpointError, match=f"a: it is in {_name(1)} too"):
        streammap.open(source)


@pytest.mark.parametrize("name", ["model-00001-of-99999.safetensors", "a-of-b.safetensors"])
def test_a_name_can_not_claim_any_number_of_shards(name: str) -> None:
    assert shard_sets.find([name]) == ()


# Indexes.


def test_an_index_of_another_split_is_not_read(source: Path) -> None:
    tiny.write_index(source, dict.fromkeys(STATE, _name(1, 5)))
    for place in (source, _elsewhere(source)):
        found = streammap.open(place)
        tiny.assert_same(dict(found.tensors()), STATE)
        (note,) = found.plan.notes
        assert f"{tiny.INDEX}: not read: it is of another split, {_name(1, 5)} is not" in note


def test_an_index_may_say_that_its_files_are_here(source: Path) -> None:
    tiny.write_index(source, {key: f"./{name}" for key, name in _index(source).items()})
    tiny.assert_same(tiny.opened(source), STATE)
    assert _notes(source) == ()


@pytest.mark.parametrize("name", ["../x.safetensors", "./../x.safetensors", "sub/x.safetensors"])
def test_an_index_that_names_other_folders_is_refused_with_a_way_out(
    source: Path, name: str
) -> None:
    shard = source / _name(1)
    (source / name).parent.mkdir(exist_ok=True)
    shard.rename(source / name)
    tiny.write_index(source, {**_index(source), "a": name})
    with pytest.raises(CheckpointError, match="put the shards beside the index") as raised:
        streammap.open(source)
    assert name in raised.value.message
    (source / name).rename(source / "x.safetensors")
    tiny.write_index(source, {**_index(source), "a": "x.safetensors"})
    tiny.assert_same(tiny.opened(source), STATE)


@pytest.mark.parametrize("torch_file", [False, True])
def test_a_single_file_wins_over_an_index_as_in_transformers(
    source: Path, *, torch_file: bool
) -> None:
    state, single, index = {"a": torch.zeros(1)}, "model.safetensors", tiny.INDEX
    if torch_file:
        single, index = "pytorch_model.bin", "pytorch_model.bin.index.json"
        (source / tiny.INDEX).rename(source / index)
        torch.save(state, source / single)
    else:
        save_file(state, source / single)
    tiny.assert_same(tiny.opened(source), state)
    assert f"src: {index}: not read: loaders prefer {single}, which is there too" in _notes(source)


def test_an_entry_that_no_shard_has_is_noted(source: Path) -> None:
    tiny.write_index(source, {**_index(source), "ghost": _name(1), "spook": _name(1)})
    tiny.assert_same(tiny.opened(source), STATE)
    note = f"src: ghost: the index says {_name(1)}, no shard has it (2 such)"
    assert _notes(source) == (note,)


def test_an_entry_that_no_shard_has_and_the_model_needs_is_named_with_its_file(
    tmp_path: Path,
) -> None:
    state = tiny.bert(SIZES)
    source = tiny.write(tmp_path / "src", state, tiny.bert_config(SIZES), n_shards=2)
    key = "encoder.layer.1.output.dense.weight"
    name = str(_index(source)[key])
    save_file({k: t for k, t in load_file(source / name).items() if k != key}, source / name)
    result = run("plan", "coalesce", source, "--width", 2)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {key}: missing")
    assert f"src: {key}: the index says {name}, no shard has it" in result.stderr


def test_tensors_that_the_index_lacks_or_misplaces_are_read_as_transformers_does(
    source: Path,
) -> None:
    index = _index(source)
    del index["a"]
    tiny.write_index(source, {**index, "b": _name(3), "x": _name(1), "c": _name(2)})
    tiny.assert_same(tiny.opened(source), STATE)
    said = "\n".join(_notes(source))
    assert f"the index says {_name(3)}, it is in {_name(2)} (2 such)" in said
    assert "the index lacks 1 tensors that the files have: a" in said


def test_a_shard_that_the_index_does_not_name_is_read_if_it_is_of_the_set(tmp_path: Path) -> None:
    """Without it, the only head would be missing, and the model taken for a tied one."""
    state = tiny.random({"model.embed": (4, 2), "model.norm": (2,), "lm_head.weight": (4, 2)})
    source = tiny.write(tmp_path / "src", state, None, n_shards=3)
    index = {key: name for key, name in _index(source).items() if key != "lm_head.weight"}
    tiny.write_index(source, index)
    for place in (source, _elsewhere(source)):
        found = streammap.open(place)
        tiny.assert_same(dict(found.tensors()), state)
        assert f"it does not name {_name(3)}, of the same 3 shards: read too" in found.plan.notes[0]


# Adapters.


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_an_adapter_alone_is_told_as_one(tmp_path: Path, end: str) -> None:
    state = {"base_model.model.model.layers.0.q_proj.lora_A.weight": torch.zeros(2, 4)}
    if end == "bin":
        torch.save(state, tmp_path / "adapter_model.bin")
    else:
        save_file(state, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "task_type": "CAUSAL_LM"}
    tiny.file(tmp_path / "adapter_config.json", json.dumps(config))
    for place in (tmp_path, _elsewhere(tmp_path)):
        with pytest.raises(
            CheckpointError, match=r"a LoRA adapter to 'org/base', expected"
        ) as told:
            streammap.open(place)
        assert told.value.hint is not None
        assert f"name both, org/base+{place}" in told.value.hint
        assert f"streammap merge-lora org/base {place} --output merged" in told.value.hint
