"""Sources: every form a checkpoint comes in, read like torch reads it, and what is refused."""

import argparse
import contextlib
import math
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import streammap
from streammap.errors import ArchitectureError, CheckpointError
from streammap.io.checkpoint import open_checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header
from streammap.output.forms import torch_files
from tests.support import tiny

STATE = tiny.random({"a": (3, 5), "b.weight": (7,), "c": ()})
"""Three tensors; keys that sort as they are stored."""


class Evil:
    """Runs a shell command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


class Stateful:
    """A class of the training script's own."""


def _torch_file(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def _many_kinds() -> tiny.State:
    base = torch.arange(24, dtype=torch.float32) + 1
    matrix = torch.randn(4, 6)
    return {
        "whole": base,
        "tied": base,
        "view": base[5:11],
        "rows": base.view(4, 6)[1:3],
        "column": base.view(4, 6)[:, 2],
        "every_other": base[1::2],
        "transposed": matrix.T,
        "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
        "expanded": torch.randn(3, 1).expand(3, 4),
        "one_wide": torch.randn(5, 1).T,
        "bf16": torch.randn(3, 3).bfloat16().T,
        "f16": torch.randn(3).half(),
        "f64": torch.randn(3).double(),
        "i64": torch.arange(5),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([[True, False], [True, True]]).T,
        "c64": torch.randn(2, dtype=torch.complex64),
        "f8": torch.randn(4).to(torch.float8_e5m2),
        "scalar": torch.tensor(2.5),
        "scalar_view": base[7],
        "empty": torch.empty(0),
        "empty_too": torch.empty(3, 0, 2, dtype=torch.int64),
        "empty_view": base[3:3],
    }


# Forms.


@pytest.mark.parametrize("name", ["model.safetensors", "lone.safetensors"])
def test_a_folder_with_one_safetensors_file_is_read(tmp_path: Path, name: str) -> None:
    save_file(STATE, tmp_path / name)
    tiny.assert_same(tiny.opened(tmp_path), STATE)
    tiny.assert_same(tiny.opened(tmp_path / name), STATE)


@pytest.mark.parametrize("n_shards", [2, 3])
def test_a_folder_of_shards_is_read(tmp_path: Path, n_shards: int) -> None:
    source = tiny.write(tmp_path, STATE, {"x": 1}, n_shards=n_shards)
    found = streammap.open(source)
    tiny.assert_same(dict(found.tensors()), STATE)
    assert found.config == {"x": 1}
    assert [file.name for file in found.plan.sources[0].files] == [
        f"model-{n + 1:05d}-of-{n_shards:05d}.safetensors" for n in range(n_shards)
    ]


def test_one_shard_alone_can_be_named(tmp_path: Path) -> None:
    source = tiny.write(tmp_path, STATE, None, n_shards=3)
    shard = source / "model-00002-of-00003.safetensors"
    tiny.assert_same(tiny.opened(shard), {"b.weight": STATE["b.weight"]})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth", "x.pt"])
def test_a_folder_with_one_torch_file_is_read(tmp_path: Path, name: str) -> None:
    _torch_file(tmp_path / name, STATE)
    _torch_file(tmp_path / "training_args.bin", argparse.Namespace(lr=0.1))
    tiny.assert_same(tiny.opened(tmp_path), STATE)
    tiny.assert_same(tiny.opened(tmp_path / name), STATE)


def test_a_folder_of_torch_shards_is_read(tmp_path: Path) -> None:
    names = [f"pytorch_model-0000{n}-of-00003.bin" for n in (1, 2, 3)]
    for name, (key, tensor) in zip(names, STATE.items(), strict=True):
        _torch_file(tmp_path / name, {key: tensor})
    tiny.write_index(tmp_path, dict(zip(STATE, names, strict=True)), "pytorch_model.bin.index.json")
    tiny.assert_same(tiny.opened(tmp_path), STATE)


def test_safetensors_come_before_torch_files(tmp_path: Path) -> None:
    _torch_file(tmp_path / "pytorch_model.bin", {"old": torch.zeros(2)})
    save_file(STATE, tmp_path / "model.safetensors")
    tiny.assert_same(tiny.opened(tmp_path), STATE)


@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
def test_a_training_checkpoint_is_read(tmp_path: Path, nest: str | None) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    state = module.state_dict()
    assert isinstance(state, OrderedDict)
    optimizer = torch.optim.AdamW(module.parameters())
    rest = {
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "args": argparse.Namespace(lr=0.1, opts=None, betas=(0.9, 0.99), drop=[1, 2]),
        "scaler": {"scale": 2.0},
    }
    file = _torch_file(tmp_path / "x.pth", state if nest is None else {nest: state, **rest})
    found = streammap.open(file)
    tiny.assert_same(dict(found.tensors()), dict(state))
    assert found.plan.sources[0].nest == nest


def test_parameters_are_tensors(tmp_path: Path) -> None:
    file = _torch_file(tmp_path / "x.pt", {"a": torch.nn.Parameter(STATE["a"])})
    tiny.assert_same(tiny.opened(file), {"a": STATE["a"]})


def test_torch_tensors_of_every_kind_are_read_as_torch_reads_them(tmp_path: Path) -> None:
    file = _torch_file(tmp_path / "x.pth", _many_kinds())
    expected = torch.load(file, weights_only=True)
    found = streammap.open(file)
    assert set(found.keys()) == set(expected)
    for key, tensor in expected.items():
        assert found.spec(key).shape == tuple(tensor.shape), key
    tiny.assert_same(dict(found.tensors()), expected)


def test_torch_tensors_of_every_kind_are_saved_right(tmp_path: Path) -> None:
    file = _torch_file(tmp_path / "x.pth", _many_kinds())
    expected = torch.load(file, weights_only=True)
    streammap.open(file).save(tmp_path / "out")
    tiny.assert_same(tiny.written(tmp_path / "out"), expected)


def test_a_torch_file_of_many_tensors_is_read(tmp_path: Path) -> None:
    """Storages 10, 11 ... come after 9 in the file, whatever their names sort like."""
    state = {f"t{i}": torch.full((i % 7,), float(i)) for i in range(120)}
    tiny.assert_same(tiny.opened(_torch_file(tmp_path / "x.bin", state)), state)


def test_misaligned_tensors_are_read(tmp_path: Path) -> None:
    state = {
        "a": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b": torch.randn(2, 3),
        "c": torch.randn(3).double(),
        "d": torch.randn(3).bfloat16(),
    }
    names = {"a": "U8", "b": "F32", "c": "F64", "d": "BF16"}
    head = safetensors_header.encode(
        [(k, TensorSpec(names[k], tuple(x.shape))) for k, x in state.items()], {}
    )
    content = head + b"".join(map(tiny.bits, state.values()))
    source = tiny.file(tmp_path / "x.safetensors", content)
    tiny.assert_same(tiny.opened(source), state)
    streammap.open(source).save(tmp_path / "out")
    tiny.assert_same(tiny.written(tmp_path / "out"), state)


def test_a_tensor_that_was_read_is_the_readers_own(tmp_path: Path) -> None:
    found = streammap.open(_file_of(tmp_path, STATE))
    found.read("a").zero_()
    tiny.assert_same(dict(found.tensors()), STATE)


def test_dtypes_that_torch_lacks_pass_through(tmp_path: Path) -> None:
    specs = [("f6", TensorSpec("F6_E2M3", (8,))), ("u8", TensorSpec("U8", (2,)))]
    source = tiny.file(
        tmp_path / "x.safetensors", safetensors_header.encode(specs, {}) + bytes(range(8))
    )
    streammap.open(source).save(tmp_path / "y.safetensors")
    slots, _ = safetensors_header.read(tmp_path / "y.safetensors")
    content = (tmp_path / "y.safetensors").read_bytes()
    assert {slot.key: content[slot.start : slot.end] for slot in slots} == {
        "f6": bytes(range(6)),
        "u8": bytes([6, 7]),
    }
    with pytest.raises(CheckpointError, match="torch has no dtype F6_E2M3"):
        streammap.open(source).read("f6")


def test_opening_does_not_read_the_tensors(tmp_path: Path) -> None:
    huge = 10_000_000_000
    specs = [("first", TensorSpec("F32", (2,))), ("huge", TensorSpec("U8", (huge,)))]
    head = safetensors_header.encode([*specs, ("last", TensorSpec("F32", (2,)))], {})
    file = tiny.file(tmp_path / "model.safetensors", head + tiny.bits(torch.tensor([1.0, 2.0])))
    os.truncate(file, len(head) + 8 + huge)
    with file.open("ab") as end:
        end.write(tiny.bits(torch.tensor([3.0, 4.0])))
    started = time.perf_counter()
    found = streammap.open(tmp_path)
    first, last = found.read("first"), found.read("last")
    assert time.perf_counter() - started < 1
    assert (first.tolist(), last.tolist()) == ([1.0, 2.0], [3.0, 4.0])
    assert file.stat().st_blocks * 512 < 10_000_000


def test_opening_a_torch_file_does_not_read_the_tensors(tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    specs = [("huge", TensorSpec("F32", (5_000_000_000,))), ("last", TensorSpec("F32", (2,)))]
    (shard,) = torch_files.arrange(dict(specs), max_shard_nbytes=0, single=file.name)
    slots = {slot.key: slot for slot in shard.slots}
    assert shard.around is not None
    with file.open("wb") as whole:
        for offset, piece in shard.around():
            whole.seek(offset)
            whole.write(piece)
        whole.seek(slots["last"].start)
        whole.write(tiny.bits(torch.tensor([3.0, 4.0])))
    started = time.perf_counter()
    last = streammap.open(file).read("last")
    assert time.perf_counter() - started < 1
    assert last.tolist() == [3.0, 4.0]
    assert file.stat().st_blocks * 512 < 10_000_000


def test_config_comes_from_the_folder_or_from_where_it_is_said(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "in", STATE, {"x": 1})
    other = tiny.file(tmp_path / "config.json", '{"x": 2}')
    assert streammap.open(source).config == {"x": 1}
    assert streammap.open(source / "model.safetensors").config == {"x": 1}
    assert streammap.open(source, config=other).config == {"x": 2}
    assert streammap.open(source, config=tmp_path).config == {"x": 2}
    assert streammap.open(source, config={"x": 3}).config == {"x": 3}
    (source / "config.json").unlink()
    assert streammap.open(source).config is None


def test_a_closed_checkpoint_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    found = open_checkpoint(tiny.write(tmp_path, STATE, None, n_shards=3))
    kept = {key: found.tensor(key) for key in found.slots}
    found.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 3
    tiny.assert_same(kept, STATE)
    kept.clear()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


# Refusals: paths and folders.


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing: no such folder or file"):
        streammap.open(tmp_path / "nothing")


def test_a_path_too_long_for_the_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder or file|too long"):
        streammap.open(tmp_path / ("n" * 300))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for name in ("x.txt", "model.safetensors.index.json", "x.gguf", "model"):
        with pytest.raises(CheckpointError, match="not a weight file"):
            streammap.open(tiny.file(tmp_path / name, b"{}"))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    tiny.file(tmp_path / "config.json", "{}")
    tiny.file(tmp_path / "training_args.bin", "")
    with pytest.raises(CheckpointError, match=r"no weights: expected one of model\.safetensors,"):
        streammap.open(tmp_path)


def test_several_loose_files_are_refused(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d", "e"):
        save_file(STATE, tmp_path / f"{name}.safetensors")
    expected = r"5 weight files and no index: a.safetensors, b.safetensors, c.* and 2 more"
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(tmp_path)


# Refusals: index and shards.


@pytest.mark.parametrize(
    "name",
    ["../x", "/abs", "a/b", "..", ".", "", "a\\b", "../in/model.safetensors", 3, None, ["a"], {}],
)
def test_an_index_can_only_name_files_of_its_folder(tmp_path: Path, name: object) -> None:
    source = tiny.write(tmp_path / "in", STATE, None, n_shards=2)
    tiny.write_index(source, {"a": name})
    with pytest.raises(
        CheckpointError, match=r"a is said to be in .*, expected a file of the same"
    ):
        streammap.open(source)


@pytest.mark.parametrize("name", ["x\0.safetensors", "\ud800.safetensors", "n" * 300])
def test_an_index_can_only_name_files_that_can_be(tmp_path: Path, name: str) -> None:
    source = tiny.write(tmp_path / "in", STATE, None, n_shards=2)
    tiny.write_index(source, {"a": name})
    with pytest.raises(CheckpointError, match=r"no such file|expected a file|too long"):
        streammap.open(source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "a JSON object is expected, found list"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
    ],
)
def test_a_broken_index_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    source = tiny.write(tmp_path, STATE, None, n_shards=2)
    tiny.file(source / tiny.INDEX, text)
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(source)


def test_a_key_in_two_shards_is_refused(tmp_path: Path) -> None:
    save_file({"a": STATE["a"], "b": STATE["a"].clone()}, tmp_path / "1.safetensors")
    save_file({"a": STATE["a"], "c": STATE["a"].clone()}, tmp_path / "2.safetensors")
    names = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    tiny.write_index(tmp_path, names)
    with pytest.raises(CheckpointError, match=r"2\.safetensors: a: it is in 1\.safetensors too"):
        streammap.open(tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path, STATE, None, n_shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: missing"):
        streammap.open(source)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path, STATE, None, n_shards=3)
    shard = source / "model-00002-of-00003.safetensors"
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003.safetensors: truncated"):
        streammap.open(source)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"{", "config.json: not JSON"),
        (b"\xff{}", "config.json: not JSON"),
        (b"[1]", "a JSON object is expected, found list"),
        (b"[" * 100_000, "config.json: not JSON"),
        (b'{"a":' * 100_000, "config.json: not JSON"),
        (b"9" * 5000, "config.json: not JSON"),
    ],
    ids=["cut", "bytes", "list", "deep list", "deep object", "long number"],
)
def test_a_broken_config_is_refused(tmp_path: Path, text: bytes, expected: str) -> None:
    source = tiny.write(tmp_path, STATE, None)
    tiny.file(source / "config.json", text)
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(source)


def test_a_config_that_is_not_where_it_is_said_is_refused(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "in", STATE, {})
    with pytest.raises(CheckpointError, match="No such file"):
        streammap.open(source, config=tmp_path)


# Refusals: files that change.


def _file_of(folder: Path, state: tiny.State) -> Path:
    save_file(state, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize("change", [-1, 1])
def test_a_file_whose_size_changed_after_opening_is_refused(tmp_path: Path, change: int) -> None:
    file = _file_of(tmp_path, STATE)
    found = streammap.open(file)
    size = file.stat().st_size
    os.truncate(file, size + change)
    with pytest.raises(CheckpointError, match=f"{size + change} bytes, it had {size} when it was"):
        found.read("a")
    with pytest.raises(CheckpointError, match="when it was opened"):
        found.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_replaced_after_opening_is_refused(tmp_path: Path) -> None:
    state = {"a": torch.ones(4), "b": torch.zeros(4)}
    file = _file_of(tmp_path, state)
    found = streammap.open(file)
    save_file({"a": state["b"], "b": state["a"]}, file)
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="when it was opened"):
        found.read("a")


def test_a_file_removed_after_opening_is_refused(tmp_path: Path) -> None:
    file = _file_of(tmp_path, STATE)
    found = streammap.open(file)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"x.safetensors: No such file"):
        found.read("a")


# Refusals: torch files.


def test_a_torch_file_of_the_old_form_is_refused(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not a torch file in the zip form"):
        streammap.open(tmp_path / "x.bin")


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1})])
def test_a_file_that_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x.pth: not a torch file in the zip form"):
        streammap.open(tiny.file(tmp_path / "x.pth", content))


def test_a_truncated_torch_file_is_refused(tmp_path: Path) -> None:
    content = _torch_file(tmp_path / "x.bin", STATE).read_bytes()
    for n in range(0, len(content), 97):
        with pytest.raises(CheckpointError, match=r"x.bin: "):
            streammap.open(tiny.file(tmp_path / "x.bin", content[:n]))


@pytest.mark.parametrize("nest", [None, "model", "optimizer"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path: Path, nest: str | None) -> None:
    ran = tmp_path / "ran"
    content = {"a": STATE["a"], "evil": Evil(f"touch {ran}")}
    file = _torch_file(tmp_path / "x.pth", content if nest is None else {nest: content, **STATE})
    with pytest.raises(CheckpointError, match=r"asks for more than tensors: .*(posix|os)\.system"):
        streammap.open(file)
    assert not ran.exists()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (b"cos\nsystem\n", "os.system"),
        (b"cbuiltins\neval\n", "eval"),
        (b"csubprocess\nPopen\n", "subprocess.Popen"),
        (b"cnumpy\nload\n", "numpy.load"),
    ],
)
def test_what_a_pickle_asks_for_is_named(tmp_path: Path, call: bytes, name: str) -> None:
    file = _with_pickle(tmp_path / "x.pth", b"\x80\x02" + call + b"X\x01\0\0\0x\x85R.")
    with pytest.raises(CheckpointError, match=f"asks for more than tensors: .*{name}"):
        streammap.open(file)


def test_a_class_of_the_training_script_is_refused(tmp_path: Path) -> None:
    file = _torch_file(tmp_path / "x.pth", {"model": STATE, "args": Stateful()})
    with pytest.raises(CheckpointError, match=r"asks for more than tensors: .*Stateful"):
        streammap.open(file)


def test_a_namespace_is_allowed_only_while_the_file_is_read(tmp_path: Path) -> None:
    file = _torch_file(tmp_path / "x.pth", {"model": STATE, "args": argparse.Namespace(a=1)})
    streammap.open(file)
    with pytest.raises(pickle.UnpicklingError, match=r"Namespace"):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"epoch": 3, "lr": 0.1}, "no state dict in it .*, found epoch, lr"),
        ({}, "no state dict"),
        ({"model": {}}, "no state dict"),
        ({"model": {"a": 3}}, "no state dict"),
        ({"a": STATE["a"], "epoch": 3}, "no state dict"),
        ({3: STATE["a"]}, "no state dict"),
        ([STATE["a"]], "found .*list"),
        (STATE["a"], "found .*Tensor"),
        (None, "found .*NoneType"),
    ],
)
def test_a_torch_file_without_a_state_dict_is_refused(
    tmp_path: Path, content: object, expected: str
) -> None:
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(_torch_file(tmp_path / "x.pth", content))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch.ones(3, dtype=torch.complex64).conj().imag,
        torch.ones(3, dtype=torch.complex128),
    ],
    ids=["sparse", "conjugate", "negative", "complex128"],
)
def test_a_tensor_that_is_not_its_bytes_is_refused(tmp_path: Path, tensor: torch.Tensor) -> None:
    file = _torch_file(tmp_path / "x.pth", {"odd": tensor})
    with pytest.raises(CheckpointError, match="odd"):
        streammap.open(file)


def _unchanged(name: str, content: bytes) -> bytes:
    del name
    return content


def test_a_torch_file_that_was_zipped_anew_is_read_right_or_refused(tmp_path: Path) -> None:
    """torch reckons where tensors are from how it writes zip files; others write otherwise."""
    state = {"a": torch.randn(64, 64), "b": torch.arange(10), "c": torch.randn(3)}
    file = _torch_file(tmp_path / "x.pth", state)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        other = tiny.rezipped(file, tmp_path / "y.pth", _unchanged, compression)
        with contextlib.suppress(CheckpointError):
            tiny.assert_same(tiny.opened(other), state)


def test_a_torch_file_with_a_storage_cut_short_is_refused(tmp_path: Path) -> None:
    state = {"a": torch.randn(64), "b": torch.randn(1000)}

    def cut(name: str, content: bytes) -> bytes:
        return content[:-8] if name.endswith("data/0") else content

    file = tiny.rezipped(_torch_file(tmp_path / "x.pth", state), tmp_path / "y.pth", cut)
    with pytest.raises(CheckpointError, match=r"y\.pth"):
        streammap.open(file)


def test_a_torch_file_without_one_of_its_storages_is_refused(tmp_path: Path) -> None:
    state = {"a": torch.randn(64), "b": torch.randn(10), "c": torch.randn(1000)}

    def drop(name: str, content: bytes) -> bytes | None:
        return None if name.endswith("data/1") else content

    file = tiny.rezipped(_torch_file(tmp_path / "x.pth", state), tmp_path / "y.pth", drop)
    with pytest.raises(CheckpointError, match=r"y\.pth"):
        streammap.open(file)


@pytest.mark.parametrize(
    ("at", "value"),
    [(10, b"\x08\0"), (10, b"\x63\0"), (20, b"\xff\xff\xff\0" * 2), (42, b"\xff\xff\xff\0")],
    ids=["compressed", "compressed oddly", "too long", "too far"],
)
def test_a_zip_file_that_lies_about_an_entry_is_refused(
    tmp_path: Path, at: int, value: bytes
) -> None:
    content = bytearray(_torch_file(tmp_path / "x.pth", STATE).read_bytes())
    entry = content.index(b"PK\x01\x02", content.rindex(b"little"))
    while not content[entry + 46 :].startswith(b"x/byteorder"):
        entry = content.index(b"PK\x01\x02", entry + 4)
    content[entry + at : entry + at + len(value)] = value
    with pytest.raises(CheckpointError, match=r"x\.pth: "):
        streammap.open(tiny.file(tmp_path / "x.pth", bytes(content)))


def test_a_zip_file_on_several_disks_is_refused(tmp_path: Path) -> None:
    content = bytearray(_torch_file(tmp_path / "x.pth", STATE).read_bytes())
    content[content.rindex(b"PK\x06\x07") + 16] = 2
    with pytest.raises(CheckpointError, match=r"x\.pth: "):
        streammap.open(tiny.file(tmp_path / "x.pth", bytes(content)))


def test_a_big_endian_torch_file_is_refused(tmp_path: Path) -> None:
    """In a process of its own: torch swaps the bytes of storages that have none, and crashes."""

    def swapped(name: str, content: bytes) -> bytes:
        return b"big" if name.endswith("byteorder") else content

    source = _torch_file(tmp_path / "x.pth", STATE)
    file = tiny.rezipped(source, tmp_path / "y.pth", swapped)
    script = f"import streammap; streammap.open({str(file)!r})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "CheckpointError: y.pth: " in done.stderr


def _with_pickle(path: Path, content: bytes) -> Path:
    """A torch file with this pickle and one storage of 64 bytes."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", bytes(64))
    return path


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b".",
        b"\xff",
        b"\x80\x02.",
        b"\x80\x02}",
        b"\x80\x02}s.",
        b"\x80\x02Nb.",
        b"\x80\x02h\5.",
        b"\x80\x02NQ.",
        b"\x80\x09N.",
        b"\x80\x02X\xff\xff\xff\xff.",
        b"\x80\x02\x8a\xff\xff",
    ],
)
def test_a_broken_pickle_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.pth: "):
        streammap.open(_with_pickle(tmp_path / "x.pth", content))


@given(st.data())
def test_a_mutated_pickle_is_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    whole = _torch_file(scratch / "whole.pth", {"model": {"a": torch.zeros(4, 4).T}})
    with zipfile.ZipFile(whole) as file:
        content = bytearray(file.read("whole/data.pkl"))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] = data.draw(st.integers(0, 255))
        else:
            del content[at : at + data.draw(st.integers(1, 5))]
    mutated = _with_pickle(scratch / "mutated.pth", bytes(content))
    with contextlib.suppress(CheckpointError):
        tiny.opened(mutated)


@given(st.data())
def test_a_mutated_torch_file_is_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    content = bytearray(_torch_file(scratch / "whole.pth", {"a": torch.zeros(4, 4)}).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    mutated = tiny.file(scratch / "mutated.pth", bytes(content))
    with contextlib.suppress(CheckpointError):
        tiny.opened(mutated)


def test_an_unknown_architecture_is_no_hindrance_until_it_is_asked_for(tmp_path: Path) -> None:
    found = streammap.open(_file_of(tmp_path, STATE))
    tiny.assert_same(dict(found.tensors()), STATE)
    with pytest.raises(ArchitectureError, match="do not tell the architecture"):
        _ = found.sizes


@given(st.permutations(range(3)), st.lists(st.integers(1, 40), min_size=3, max_size=3), st.data())
def test_any_bytes_of_a_strided_tensor_are_read_row_by_row(
    scratch: Path, order: list[int], shape: list[int], data: st.DataObject
) -> None:
    x = torch.arange(float(math.prod(shape))).view(shape).permute(order)
    torch.save({"x": x}, scratch / "x.pth")
    opened = open_checkpoint(scratch / "x.pth")
    start, end = sorted(data.draw(st.integers(0, x.numel())) for _ in range(2))
    room = memoryview(bytearray((end - start) * 4))
    if room:
        opened.read_into("x", start * 4, room)
    assert bytes(room) == tiny.bits(x.contiguous())[start * 4 : end * 4]
    opened.close()
