"""What is written: shards, index, what goes along, and nothing at all when it fails."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import streammap
from streammap.common import ranges, units
from streammap.common.ranges import PIECE_NBYTES
from streammap.common.units import parse_size
from streammap.errors import CheckpointError, OutputError, PlanError
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header
from streammap.output import fingerprint, layout
from tests.support import tiny
from tests.support.typed import run

SIZES = tiny.Sizes()
SPECS = {
    "a": TensorSpec("F32", (4,)),
    "b": TensorSpec("BF16", (3,)),
    "c": TensorSpec("F32", (8,)),
    "d": TensorSpec("I64", (1,)),
    "e": TensorSpec("BOOL", (5,)),
    "f": TensorSpec("F32", ()),
}
"""Of 16, 6, 32, 8, 5 and 4 bytes."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BERT folder with a tokenizer and the like."""
    folder = tiny.write(tmp_path / "in", tiny.bert(SIZES), tiny.bert_config(SIZES))
    (folder / "tokenizer.json").write_bytes(b'{"version": "1.0"}\r\n\xff')
    (folder / "vocab.txt").write_text("[PAD]\n")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    return folder


def _half(source: Path) -> streammap.LazyCheckpoint:
    return streammap.open(source).coalesce(width=2, depth=2)


def _names(folder: Path) -> set[str]:
    return set(tiny.tree(folder))


# Layout.


def _groups(nbytes: int) -> list[set[str]]:
    shards = layout.arrange(SPECS, max_shard_nbytes=nbytes)
    return [{slot.key for slot in shard.slots} for shard in shards]


def test_shards_are_filled_greedily_in_the_order_of_the_tensors() -> None:
    assert _groups(71) == [set("abcdef")]
    assert _groups(70) == [set("abcde"), set("f")]
    assert _groups(54) == [set("abc"), set("def")]
    assert _groups(40) == [set("ab"), set("cd"), set("ef")]
    assert _groups(22) == [set("ab"), set("c"), set("def")]
    assert _groups(1) == [{key} for key in "abcdef"]


def test_shards_are_named_as_on_the_hub() -> None:
    (only,) = layout.arrange(SPECS, max_shard_nbytes=100)
    assert only.name == "model.safetensors"
    shards = layout.arrange(SPECS, max_shard_nbytes=40)
    assert [shard.name for shard in shards] == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
        "model-00003-of-00003.safetensors",
    ]
    (single,) = layout.arrange(SPECS, max_shard_nbytes=1, single="x.safetensors")
    assert (single.name, len(single.slots)) == ("x.safetensors", 6)


def test_the_widest_dtype_comes_first_so_that_all_are_aligned() -> None:
    (shard,) = layout.arrange(SPECS, max_shard_nbytes=100)
    assert [slot.key for slot in shard.slots] == ["d", "a", "c", "f", "b", "e"]
    assert len(shard.head) % 8 == 0
    for slot in shard.slots:
        assert slot.start % (DTYPE_BITS[slot.spec.dtype] // 8) == 0
    assert shard.nbytes == len(shard.head) + 71


def test_the_layout_of_nothing_is_one_file() -> None:
    (shard,) = layout.arrange({}, max_shard_nbytes=10)
    assert (shard.slots, shard.nbytes) == ((), len(shard.head))


def test_the_index_has_these_bytes() -> None:
    specs = {"b": TensorSpec("F32", (2, 3)), "a": TensorSpec("BF16", (4,))}
    found = layout.index(layout.arrange(specs, max_shard_nbytes=24)).decode()
    assert found == (
        '{\n  "metadata": {\n    "total_parameters": 10,\n    "total_size": 32\n  },\n'
        '  "weight_map": {\n    "a": "model-00002-of-00002.safetensors",\n'
        '    "b": "model-00001-of-00002.safetensors"\n  }\n}\n'
    )


@given(
    st.lists(
        st.builds(
            TensorSpec,
            st.sampled_from(["F32", "BF16", "I64", "U8"]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        max_size=9,
    ),
    st.integers(1, 300),
)
def test_a_layout_holds_each_tensor_once_and_its_files_are_whole(
    specs: list[TensorSpec], nbytes: int
) -> None:
    given_specs = {f"t{i}": spec for i, spec in enumerate(specs)}
    shards = layout.arrange(given_specs, max_shard_nbytes=nbytes)
    found = [slot for shard in shards for slot in shard.slots]
    assert {slot.key: slot.spec for slot in found} == given_specs
    assert len(found) == len(given_specs)
    for shard in shards:
        slots = safetensors_header.decode(shard.head[8:], file=shard.name, file_nbytes=shard.nbytes)
        assert slots == shard.slots
        data = [slot.spec.nbytes for slot in shard.slots if slot.spec.nbytes]
        assert sum(data) <= nbytes or len(data) == 1


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        (1, 1),
        (12345, 12345),
        ("1B", 1),
        ("65536", 65536),
        ("100B", 100),
        ("5GB", 5_000_000_000),
        ("5gb", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("5 GB", 5_000_000_000),
        (" 1.5MB ", 1_500_000),
        ("500KB", 500_000),
        ("2TB", 2 * 10**12),
        ("256MiB", 256 * 2**20),
        ("1KiB", 1024),
        ("0.5GiB", 2**29),
        ("1tib", 2**40),
    ],
)
def test_sizes_are_read(text: str | int, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GB",
        "-1",
        "-5GB",
        "1e9",
        "5PB",
        "5iB",
        "5i",
        "five",
        "5 G B",
        "1,5GB",
        "0x10",
        ".5GB",
        "5GBB",
        "nan",
        "inf",
        "5.GB",
        "9" * 400,
    ],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OutputError, match=r"size '.*': expected one such as 5GB, 500MB or 256MiB"):
        parse_size(text)


@pytest.mark.parametrize("text", ["5", "500", "10", "0.5", " 65535 "])
def test_a_small_number_without_a_unit_is_refused(text: str) -> None:
    n = text.strip()
    hint = f"hint: give {n}GB or {n}MB; {n}B if bytes are meant"
    with pytest.raises(OutputError, match=rf"has no unit, and would be {n} bytes\n  {hint}"):
        parse_size(text)


@pytest.mark.parametrize("option", ["--max-shard-size", "--memory"])
def test_a_unit_that_was_forgotten_is_asked_for_before_anything_is_read(option: str) -> None:
    found = run("coalesce", "nowhere/at/all", "out", "--width", "2", option, "5")
    assert found.exit_code == 1
    assert "size '5' has no unit" in found.stderr


@pytest.mark.parametrize("text", [0, -1, "0", "0GB", "0.1B", "0.0001KB"])
def test_a_size_of_nothing_is_refused(text: str | int) -> None:
    with pytest.raises(OutputError, match="expected more than nothing"):
        parse_size(text)


# Whole runs.


def test_sharded_in_sharded_out_is_what_one_file_is(source: Path, tmp_path: Path) -> None:
    shards = tiny.write(tmp_path / "s", tiny.bert(SIZES), tiny.bert_config(SIZES), n_shards=3)
    _half(source).save(tmp_path / "one")
    report = _half(shards).save(tmp_path / "many", max_shard_size=300)
    names = sorted(file.name for file in (tmp_path / "many").glob("*.safetensors"))
    n = len([name for name in names if name.startswith("model-")])
    assert report.n_shards == n > 3
    assert names[:n] == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    expected = tiny.written(tmp_path / "one")
    tiny.assert_same(tiny.written(tmp_path / "many"), expected)
    tiny.assert_same(tiny.opened(tmp_path / "many"), expected)
    index = json.loads((tmp_path / "many" / tiny.INDEX).read_text())
    assert set(index["weight_map"]) == set(expected)
    assert index["metadata"] == {
        "total_parameters": sum(tensor.numel() for tensor in expected.values()),
        "total_size": sum(4 * tensor.numel() for tensor in expected.values()),
    }
    assert not (tmp_path / "one" / tiny.INDEX).exists()


def test_shards_are_no_larger_than_was_said(source: Path, tmp_path: Path) -> None:
    streammap.open(source).save(tmp_path / "out", max_shard_size=600)
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        slots, _ = safetensors_header.read(file)
        assert sum(slot.spec.nbytes for slot in slots) <= 600
        with safe_open(file, framework="pt") as found:
            assert found.metadata() == {"format": "pt"}


def test_a_report_says_what_was_written(source: Path, tmp_path: Path) -> None:
    report = _half(source).save(tmp_path / "out")
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert (report.nbytes_written, report.n_shards) == (written, 1)
    assert report.n_tensors == len(tiny.written(tmp_path / "out"))
    assert str(report).startswith(f"wrote 1 file, {units.format_nbytes(written)} in ")


@pytest.mark.parametrize("n", [PIECE_NBYTES - 1, PIECE_NBYTES, PIECE_NBYTES + 1])
def test_tensors_larger_than_a_write_are_whole(tmp_path: Path, n: int) -> None:
    state = {"a": torch.arange(n, dtype=torch.int32).to(torch.uint8), "b": torch.arange(9.0)}
    streammap.open(tiny.write(tmp_path / "in", state, None)).save(tmp_path / "out")
    tiny.assert_same(tiny.written(tmp_path / "out"), state)


def test_pieces_end_where_a_file_has_a_multiple() -> None:
    assert list(ranges.pieces(0, 0, 8)) == []
    assert list(ranges.pieces(3, 4, 8)) == [(0, 4)]
    assert list(ranges.pieces(3, 5, 8)) == [(0, 5)]
    assert list(ranges.pieces(3, 22, 8)) == [(0, 5), (5, 13), (13, 21), (21, 22)]
    assert list(ranges.pieces(16, 17, 8)) == [(0, 8), (8, 16), (16, 17)]


def test_two_runs_write_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("1", "2"):
        _half(source).save(tmp_path / name, max_shard_size="1KB", fsync=name == "1")
    assert tiny.tree(tmp_path / "1") == tiny.tree(tmp_path / "2")


# One file.


@pytest.mark.parametrize("name", ["x.safetensors", "new/folder/x.safetensors"])
def test_one_safetensors_file_is_written(source: Path, tmp_path: Path, name: str) -> None:
    report = _half(source).save(tmp_path / "out" / name, max_shard_size=1)
    file = tmp_path / "out" / name
    assert report.n_shards == 1
    assert _names(file.parent) == {"x.safetensors", "x.map.safetensors", "x.streammap.json"}
    tiny.assert_same(tiny.opened(file), dict(_half(source).tensors()))


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin"])
@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
def test_one_torch_file_is_written(tmp_path: Path, suffix: str, nest: str | None) -> None:
    state = tiny.timm_deit(SIZES)
    state["blocks.0.attn.qkv.weight"] = state["blocks.0.attn.qkv.weight"].T.contiguous().T
    torch.save(state if nest is None else {nest: state, "epoch": 3}, tmp_path / "in.pth")
    lazy = streammap.open(tmp_path / "in.pth", config=tiny.timm_config(SIZES)).coalesce(width=2)
    file = tmp_path / f"out{suffix}"
    lazy.save(file)
    content = torch.load(file, weights_only=True)
    expected = dict(lazy.tensors())
    tiny.assert_same(content if nest is None else content[nest], expected)
    tiny.assert_same(tiny.opened(file), expected)
    tiny.assert_same(
        torch.load(file, mmap=True, weights_only=True)[nest] if nest else content, expected
    )


def test_a_torch_file_holds_every_dtype(tmp_path: Path) -> None:
    state = {
        "bf16": torch.randn(3, 3).bfloat16(),
        "f16": torch.randn(5).half(),
        "f64": torch.randn(2).double(),
        "i64": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "f8": torch.randn(3).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
    }
    streammap.open(tiny.write(tmp_path / "in", state, None)).save(tmp_path / "x.pth")
    tiny.assert_same(torch.load(tmp_path / "x.pth", weights_only=True), state)


# Places.


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.pth"])
def test_what_is_there_is_kept_unless_it_may_be_overwritten(
    source: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / name
    _half(source).save(out)
    before = tiny.tree(tmp_path)
    with pytest.raises(OutputError, match=rf"{name}: already exists\n.*--overwrite"):
        streammap.open(source).save(out)
    assert tiny.tree(tmp_path) == before
    streammap.open(source).save(out, overwrite=True)
    assert set(tiny.opened(out)) == set(tiny.bert(SIZES))


def test_a_map_that_is_there_is_kept_unless_it_may_be_overwritten(
    source: Path, tmp_path: Path
) -> None:
    """Without it, the next reader of x.pth would take the map of another file for its own."""
    beside = tmp_path / "x.map.safetensors"
    beside.write_text("mine")
    for lazy in (_half(source), streammap.open(source)):
        with pytest.raises(OutputError, match=r"x\.map\.safetensors: already exists"):
            lazy.save(tmp_path / "x.pth")
        assert beside.read_text() == "mine"
        assert not (tmp_path / "x.pth").exists()


def test_an_empty_folder_may_be_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    _half(source).save(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_folder_of_other_files_is_there_already(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".hidden").touch()
    with pytest.raises(OutputError, match="out: already exists"):
        _half(source).save(tmp_path / "out")
    assert _names(tmp_path / "out") == {".hidden"}


def test_overwriting_removes_stale_shards(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _half(source).save(out, max_shard_size=500)
    (out / "notes.txt").write_text("mine")
    (out / "pytorch_model.bin").write_text("old")
    many = _names(out)
    _half(source).save(out, overwrite=True)
    assert _names(out) == {
        "model.safetensors",
        "config.json",
        "streammap.json",
        "streammap.map.safetensors",
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
        "notes.txt",
    }
    tiny.assert_same(tiny.opened(out), dict(_half(source).tensors()))
    _half(source).save(out, overwrite=True, max_shard_size=500)
    assert _names(out) == many - {"pytorch_model.bin"}
    streammap.open(source).save(out, overwrite=True)
    assert "streammap.map.safetensors" not in _names(out)
    assert tiny.tree(out)["config.json"] == tiny.tree(source)["config.json"]


def test_a_file_where_a_folder_should_be_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    (tmp_path / "out.pth").mkdir()
    with pytest.raises(OutputError, match="out: not a folder"):
        _half(source).save(tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match=r"out\.pth: not a file"):
        _half(source).save(tmp_path / "out.pth", overwrite=True)
    with pytest.raises(OutputError, match="Not a directory"):
        _half(source).save(tmp_path / "out" / "further")
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize(
    ("named", "out"),
    [
        ("in", "in"),
        ("in", "link"),
        ("in", "x/../in"),
        ("link", "in"),
        ("in", "in/model.safetensors"),
        ("in/model.safetensors", "in"),
        ("in/model.safetensors", "link"),
        ("in/model.safetensors", "in/model.safetensors"),
        ("in/model.safetensors", "link/model.safetensors"),
        ("in/model.safetensors", "file.safetensors"),
        ("file.safetensors", "in/model.safetensors"),
        ("sharded", "sharded/model-00001-of-00003.safetensors"),
        ("sharded/model-00001-of-00003.safetensors", "sharded"),
    ],
)
def test_a_source_is_never_the_output(source: Path, tmp_path: Path, named: str, out: str) -> None:
    tiny.write(tmp_path / "sharded", tiny.bert(SIZES), tiny.bert_config(SIZES), n_shards=3)
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file.safetensors").symlink_to(source / "model.safetensors")
    config = source / "config.json"
    before = tiny.tree(tmp_path)
    lazy = streammap.open(tmp_path / named, config=config)
    with pytest.raises(OutputError, match="source"):
        lazy.save(tmp_path / out, overwrite=True)
    assert tiny.tree(tmp_path) == before


def test_no_source_of_a_blend_is_the_output(source: Path, tmp_path: Path) -> None:
    other = tiny.write(tmp_path / "b", tiny.bert(SIZES, seed=1), tiny.bert_config(SIZES))
    lazy = streammap.open(source).interpolate(other, alpha=0.5)
    for out in (source, other):
        with pytest.raises(OutputError, match="is the source itself"):
            lazy.save(out, overwrite=True)


@pytest.mark.parametrize(
    "name",
    ["n" * 300, "n" * 300 + ".pth", "n" * 248 + ".pth", "n" * 240 + ".safetensors"],
    ids=["folder", "torch", "partial torch", "partial safetensors"],
)
def test_a_name_that_is_too_long_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"too long|check the path"):
        _half(source).save(tmp_path / "new" / name)
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(OutputError, match=r"out: the result takes [\d.]+ kB, 1\.00 kB are free"):
        _half(source).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Failures.


def _fail_at(monkeypatch: pytest.MonkeyPatch, n: int, name: str = "pwrite") -> list[int]:
    """Let the n-th call (from 0) of os.pwrite or the like fail; the calls are counted."""
    real: Callable[..., int] = getattr(os, name)
    calls = [0]

    def fails(*args: int) -> int:
        calls[0] += 1
        if calls[0] == n + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, name, fails)
    return calls


def _outside(folder: Path) -> dict[str, bytes]:
    """Files that are not in a work folder."""
    return {k: v for k, v in tiny.tree(folder).items() if ".streammap-run" not in k}


@pytest.mark.parametrize("name", ["out", "deep/er/out", "out.safetensors", "deep/out.pth"])
def test_a_run_that_fails_can_be_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    lazy, where = _half(source), tmp_path / "new" / name
    with monkeypatch.context() as patch:
        calls = _fail_at(patch, -1)
        lazy.save(tmp_path / "whole" / name, max_shard_size=300)
    whole = tiny.tree(tmp_path / "whole")
    assert _outside(tmp_path / "whole") == whole
    n_kept = 0
    for n in [*range(0, calls[0], 7), calls[0] - 1]:
        with monkeypatch.context() as patch:
            _fail_at(patch, n)
            with pytest.raises(OutputError, match="No space left on device") as caught:
                lazy.save(where, max_shard_size=300)
        kept = (tmp_path / "new").exists()
        assert bool(getattr(caught.value, "__notes__", [])) == kept
        assert _outside(tmp_path / "new") == {}, n
        n_kept += kept
        lazy.save(where, max_shard_size=300)
        assert tiny.tree(tmp_path / "new") == whole, n
        shutil.rmtree(tmp_path / "new")
    assert n_kept


@pytest.mark.parametrize("name", ["fsync", "replace", "preadv", "open"])
@pytest.mark.parametrize("n", [0, 1, 2, 9])
def test_an_error_of_the_system_is_ours(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, n: int
) -> None:
    """Whatever call fails, the message is ours and nothing that is left looks whole."""
    lazy = streammap.open(source).coalesce(depth=2)
    lazy.save(tmp_path / "whole", max_shard_size=300)
    lazy.close()
    with monkeypatch.context() as patch:
        calls = _fail_at(patch, n, name)
        with pytest.raises((OutputError, CheckpointError), match="No space left on device"):
            lazy.save(tmp_path / "new" / "out", max_shard_size=300)
    assert calls[0] > n
    with pytest.raises(CheckpointError, match=r"no such folder|no weights|was stopped"):
        streammap.open(tmp_path / "new" / "out")
    lazy.save(tmp_path / "new" / "out", max_shard_size=300)
    assert tiny.tree(tmp_path / "new" / "out") == tiny.tree(tmp_path / "whole")


def test_a_run_that_fails_keeps_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    streammap.open(source).save(out, max_shard_size="1KB")
    before = tiny.tree(out)
    for n in (0, 7, 20):
        with monkeypatch.context() as patch:
            _fail_at(patch, n)
            with pytest.raises(OutputError, match="No space left"):
                _half(source).save(out, overwrite=True, restart=True)
        assert _outside(out) == before


def test_an_interrupted_run_leaves_what_is_whole_or_nothing(source: Path, tmp_path: Path) -> None:
    for told, kept in (("Started", False), ("Wrote", True)):

        def interrupt(event: object, told: str = told) -> None:
            if type(event).__name__ == told:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught:
            _half(source).save(tmp_path / "new" / "out", progress=interrupt)
        assert (tmp_path / "new").exists() == kept
        assert _outside(tmp_path / "new") == {}
        notes = getattr(caught.value, "__notes__", [])
        assert len(notes) == kept
    assert "the same command resumes, --restart starts over" in notes[0]


def test_short_writes_are_finished(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def short(descriptor: int, content: bytes, offset: int) -> int:
        return real(descriptor, content[:7], offset)

    _half(source).save(tmp_path / "whole")
    monkeypatch.setattr(os, "pwrite", short)
    _half(source).save(tmp_path / "out")
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "whole")


def test_a_folder_in_the_place_of_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        out = tmp_path / f"out of {name}"
        (out / name).mkdir(parents=True)
        with pytest.raises(OutputError, match=rf"{name}"):
            _half(source).save(out, overwrite=True)
        assert _names(out) == set()


# What goes along.


def test_files_beside_the_weights_are_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    (source / "sub" / "deeper").mkdir(parents=True)
    (source / "sub" / "deeper" / "x.txt").write_bytes(bytes(range(256)))
    _half(source).save(tmp_path / "out")
    before, after = tiny.tree(source), tiny.tree(tmp_path / "out")
    for name in ("tokenizer.json", "vocab.txt", "sub/deeper/x.txt"):
        assert after[name] == before[name]


def test_weights_and_training_state_are_not_copied(source: Path, tmp_path: Path) -> None:
    skipped = (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "tf_model.h5",
        "flax_model.msgpack",
        "model.onnx",
        "x.gguf",
        ".gitattributes",
        "MapMatrix.safetensors",
        "events.out.tfevents.1",
        "onnx/model.json",
        "checkpoint-500/config.json",
        "runs/x.txt",
        ".git/config",
        "__pycache__/x.pyc",
        "global_step7/x.txt",
    )
    for name in skipped:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("skip me")
    _half(source).save(tmp_path / "out")
    assert _names(tmp_path / "out") == {
        "model.safetensors",
        "config.json",
        "streammap.json",
        "streammap.map.safetensors",
        "tokenizer.json",
        "vocab.txt",
        "1_Pooling/config.json",
    }


@pytest.mark.parametrize("field", ["word_embedding_dimension", "embedding_dimension"])
def test_pooling_follows_the_hidden_size(source: Path, tmp_path: Path, field: str) -> None:
    """The field's name was changed in sentence-transformers 6."""
    pooling = source / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({field: SIZES.embed, "pooling_mode": "mean", "x": 8}))
    _half(source).save(tmp_path / "half")
    streammap.open(source).coalesce(depth=2).save(tmp_path / "same")
    found = json.loads((tmp_path / "half" / "1_Pooling" / "config.json").read_text())
    assert found == {field: SIZES.embed // 2, "pooling_mode": "mean", "x": 8}
    assert (tmp_path / "same" / "1_Pooling" / "config.json").read_bytes() == pooling.read_bytes()


def test_pooling_follows_two_steps(source: Path, tmp_path: Path) -> None:
    streammap.open(source).coalesce(width=2).coalesce(width=2).save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert found == {"word_embedding_dimension": 2}


def test_a_dense_module_that_reads_the_old_size_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text('{"in_features": 8, "out_features": 3}')
    with pytest.raises(OutputError, match=r"2_Dense/config\.json: .* reads 8 features; .* have 4"):
        _half(source).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_module_keeps_its_weights(source: Path, tmp_path: Path) -> None:
    """Without them the folder could not be loaded."""
    (source / "2_Dense").mkdir()
    (source / "2_Dense" / "config.json").write_text('{"in_features": 8, "out_features": 3}')
    (source / "2_Dense" / "model.safetensors").write_bytes(b"weights")
    streammap.open(source).coalesce(depth=2).save(tmp_path / "out")
    assert tiny.tree(tmp_path / "out")["2_Dense/model.safetensors"] == b"weights"


def test_one_file_as_source_has_nothing_that_goes_along(source: Path, tmp_path: Path) -> None:
    streammap.open(source / "model.safetensors").save(tmp_path / "out")
    assert _names(tmp_path / "out") == {"model.safetensors", "config.json", "streammap.json"}


def test_a_link_out_of_the_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    for target in (tmp_path / "secret", Path("../secret"), tmp_path / "nothing"):
        (source / "link.txt").symlink_to(target)
        with pytest.raises(CheckpointError, match=r"link\.txt: a link out of the checkpoint"):
            _half(source).save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        (source / "link.txt").unlink()


def test_a_link_inside_the_folder_is_followed(source: Path, tmp_path: Path) -> None:
    (source / "link.txt").symlink_to("vocab.txt")
    (source / "linked").symlink_to("1_Pooling")
    _half(source).save(tmp_path / "out")
    assert (tmp_path / "out" / "link.txt").read_text() == "[PAD]\n"
    assert not (tmp_path / "out" / "link.txt").is_symlink()


def test_a_link_to_nothing_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "link.txt").symlink_to("gone.txt")
    with pytest.raises(CheckpointError, match=r"link\.txt: No such file"):
        _half(source).save(tmp_path / "out")


def test_what_is_no_file_is_refused(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "pipe")
    with pytest.raises(CheckpointError, match="pipe: not a regular file"):
        _half(source).save(tmp_path / "out")


def _hub_cache(root: Path, source: Path) -> Path:
    """The files of `source` as the Hub's cache keeps them: a snapshot of links to blobs."""
    snapshot = root / "models--x--y" / "snapshots" / "0123abc"
    blobs = root / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    for n, (name, content) in enumerate(tiny.tree(source).items()):
        (blobs / f"etag{n}").write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (2 + name.count("/"))
        link.symlink_to(f"{up}blobs/etag{n}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_a_source(source: Path, tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path / "hub", source)
    _half(source).save(tmp_path / "plain")
    _half(snapshot).save(tmp_path / "cached")
    plain, cached = tiny.tree(tmp_path / "plain"), tiny.tree(tmp_path / "cached")
    for found in (plain, cached):
        del found["streammap.json"]
    assert cached == plain
    (tmp_path / "latest").symlink_to(snapshot)
    _half(tmp_path / "latest").save(tmp_path / "by link")


def test_a_snapshot_links_to_its_own_blobs_only(source: Path, tmp_path: Path) -> None:
    snapshot = _hub_cache(tmp_path / "hub", source)
    other = tmp_path / "hub" / "models--a--b" / "blobs"
    other.mkdir(parents=True)
    (other / "etag").write_text("other")
    (snapshot / "notes.txt").symlink_to(other / "etag")
    with pytest.raises(CheckpointError, match=r"notes\.txt: a link out of the checkpoint"):
        _half(snapshot).save(tmp_path / "out")


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_modes_honour_the_umask(source: Path, tmp_path: Path, mask: int) -> None:
    (source / "vocab.txt").chmod(0o600)
    before = os.umask(mask)
    try:
        _half(source).save(tmp_path / "new" / "out", max_shard_size="1KB")
        _half(source).save(tmp_path / "new" / "out.pth")
    finally:
        os.umask(before)
    for path in [tmp_path / "new", *(tmp_path / "new").rglob("*")]:
        wanted = 0o777 if path.is_dir() else 0o666
        assert stat.S_IMODE(path.stat().st_mode) == wanted & ~mask, path


def test_config_is_byte_identical_where_nothing_changes(source: Path, tmp_path: Path) -> None:
    text = json.dumps(tiny.bert_config(SIZES), indent=7).replace("\n", "\r\n") + "  \n"
    (source / "config.json").write_bytes(text.encode())
    streammap.open(source).save(tmp_path / "same")
    assert (tmp_path / "same" / "config.json").read_bytes() == text.encode()
    _half(source).save(tmp_path / "half")
    found = json.loads((tmp_path / "half" / "config.json").read_text())
    assert found == tiny.bert_config(tiny.Sizes(heads=2, layers=2))


def test_a_config_that_was_given_is_the_one_written(source: Path, tmp_path: Path) -> None:
    other = {**tiny.bert_config(SIZES), "mine": True}
    (tmp_path / "config.json").write_text(json.dumps(other))
    for n, config in enumerate((other, tmp_path, tmp_path / "config.json")):
        streammap.open(source, config=config).save(tmp_path / str(n))  # type: ignore[arg-type]  # a dict of any values
        assert json.loads((tmp_path / str(n) / "config.json").read_text()) == other


def test_fields_that_are_not_sizes_stay_in_config(source: Path, tmp_path: Path) -> None:
    extra = {"id2label": {"0": "é"}, "eps": 1e-12, "none": None, "nested": {"hidden_size": 8}}
    config = {**tiny.bert_config(SIZES), **extra}
    (source / "config.json").write_text(json.dumps(config))
    _half(source).save(tmp_path / "out")
    text = (tmp_path / "out" / "config.json").read_text()
    found = json.loads(text)
    assert {name: found[name] for name in extra} == extra
    assert list(found) == list(config)
    assert "é" in text


def test_half_a_letter_in_config_is_kept_or_refused(source: Path, tmp_path: Path) -> None:
    """JSON can hold what UTF-8 can't."""
    config = {**tiny.bert_config(SIZES), "id2label": {"0": "\ud83d"}}
    (source / "config.json").write_text(json.dumps(config))
    try:
        _half(source).save(tmp_path / "out")
    except CheckpointError:
        return
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["id2label"] == config["id2label"]


def test_the_provenance_says_where_a_result_came_from(source: Path, tmp_path: Path) -> None:
    lazy = _half(source)
    lazy.save(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "streammap.json").read_text())
    assert found["digest"] == fingerprint.of_plan(lazy.plan)
    assert found["promise"] == "approximate"
    assert [step["operator"] for step in found["steps"]] == ["coalesce"]
    (file,) = found["sources"][0]["files"]
    assert file["name"] == "model.safetensors"
    assert file["nbytes"] == (source / "model.safetensors").stat().st_size


def test_a_broken_config_beside_the_weights_is_refused(source: Path, tmp_path: Path) -> None:
    (source / "1_Pooling" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json: not JSON"):
        _half(source).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_drop_in_front_replaces_what_is_there(source: Path, tmp_path: Path) -> None:
    target = tiny.write(
        tmp_path / "target",
        tiny.bert(tiny.Sizes(heads=2, layers=2)),
        tiny.bert_config(tiny.Sizes(heads=2, layers=2)),
    )
    for _ in range(2):
        streammap.BertMapper(source, target, tmp_path / "out").coalesce().save()
    assert streammap.open(tmp_path / "out").sizes["heads"] == 2
    with pytest.raises(PlanError, match="is the source itself"):
        streammap.BertMapper(source, target, source).coalesce().save()
