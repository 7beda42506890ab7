"""A checkpoint that is wrong: strict opening raises the first of what tolerant opening lists."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streammap.errors import CheckpointError
from streammap.io import model_files
from streammap.io.checkpoint import Checkpoint, open_checkpoint, open_files
from streammap.io.problems import Collected
from streammap.io.storage.local import LocalStorage
from tests.support import tiny

STATE = {key: torch.arange(6.0).view(2, 3) for key in ("a", "b", "c")}
SECOND = "model-00002-of-00003.safetensors"


def _tolerant(source: Path) -> tuple[Checkpoint, list[str]]:
    """What is left, and the messages."""
    storage, problems = LocalStorage(source), Collected()
    names, weight_map = model_files.choose(storage, problems)
    opened = open_files(storage, source, names, weight_map, problems=problems)
    return opened, [finding.message for finding in problems.findings]


def _index(source: Path, **changes: object) -> None:
    weight_map = json.loads((source / tiny.INDEX).read_text())["weight_map"]
    tiny.write_index(source, {**weight_map, **changes})


@pytest.mark.parametrize(
    ("spoil", "left"),
    [
        (lambda source: (source / SECOND).unlink(), "ac"),
        (lambda source: (source / SECOND).write_bytes(b"x"), "ac"),
        (lambda source: (source / SECOND).write_bytes(bytes(100)), "ac"),
        (lambda source: save_file({"a": STATE["a"]}, source / SECOND), "ac"),
        (lambda source: _index(source, b="../x"), "abc"),
        (lambda source: _index(source, b=["x"]), "abc"),
        (lambda source: save_file({"a": STATE["c"], "b": STATE["b"]}, source / SECOND), "abc"),
        (lambda source: tiny.write_index(source, {"x\n": SECOND}), ""),
        (lambda source: tiny.write_index(source, {}), ""),
        (lambda source: tiny.file(source / tiny.INDEX, "{"), ""),
    ],
    ids=range(10),
)
def test_strict_opening_raises_the_first_problem_that_tolerant_opening_lists(
    tmp_path: Path, spoil: Callable[[Path], object], left: str
) -> None:
    source = tiny.write(tmp_path, STATE, None, n_shards=3)
    spoil(source)
    opened, messages = _tolerant(source)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(source)
    assert messages[0] in raised.value.message
    assert "".join(opened.slots) == left
    for key in opened.slots:
        assert torch.equal(opened.tensor(key), STATE[key])
    opened.close()


@pytest.mark.parametrize("change", [{"b": "model-00001-of-00003.safetensors"}, {"ghost": SECOND}])
def test_strict_opening_notes_what_loaders_cope_with(
    tmp_path: Path, change: dict[str, object]
) -> None:
    source = tiny.write(tmp_path, STATE, None, n_shards=3)
    _index(source, **change)
    opened, messages = _tolerant(source)
    strict = open_checkpoint(source)
    assert [any(message in note for note in strict.notes) for message in messages] == [
        True for _ in strict.notes
    ]
    assert messages
    assert opened.slots == strict.slots
    tiny.assert_same({key: strict.tensor(key) for key in strict.slots}, STATE)
    opened.close()


def test_tolerant_opening_lists_nothing_of_a_whole_checkpoint(tmp_path: Path) -> None:
    opened, messages = _tolerant(tiny.write(tmp_path, STATE, None, n_shards=3))
    assert messages == []
    assert opened.slots == open_checkpoint(tmp_path).slots
    opened.close()
