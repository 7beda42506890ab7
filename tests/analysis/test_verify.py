"""What verify must find, each in a result that is whole but for that."""

import json
import math
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import transformers  # noqa: F401  # classes are asked in this process, and not in one each time
from safetensors.torch import load_file, save_file

import streammap
from streammap.errors import CheckpointError, PlanError
from streammap.io.formats import safetensors_header
from streammap.io.problems import Finding
from streammap.io.storage import resolve
from tests.engine.test_memory import MIB, write_gpt2
from tests.support import tiny
from tests.support.typed import ok, run

SIZES = tiny.Sizes(heads=4, layers=4)
INDEX = "model.safetensors.index.json"


def recorded(output: Path, *, sums: bool = True) -> Path:
    """Put sizes and CRCs into a result's record, as a run does.

    Args:
        sums: Whether with checksums of files, and its own, which version 0.1 did not write.
    """
    single = not output.is_dir()
    record = output.with_suffix(".streammap.json") if single else output / "streammap.json"
    content = json.loads(record.read_text()) if record.is_file() else {}
    files, tensors = {}, {}
    for file in [output] if single else sorted(output.glob("model*.safetensors")):
        whole = file.read_bytes()
        for slot in safetensors_header.read(file)[0]:
            crc = zlib.crc32(whole[slot.start : slot.end])
            tensors[slot.key] = {"file": file.name, "crc32": f"{crc:08x}"}
    for file in [output] if single else sorted(set(output.iterdir()) - {record}):
        files[file.name] = file.read_bytes()
    content["files"] = {name: len(data) for name, data in files.items()}
    content["crc32"] = {name: f"{zlib.crc32(data):08x}" for name, data in files.items()}
    sealed(record, {**content, "tensors": tensors}, sums=sums)
    return output


def sealed(record: Path, content: dict[str, object], *, sums: bool = True) -> None:
    """Write a record as a run does, or as version 0.1 did."""
    left = () if sums else ("crc32",)
    content = {name: v for name, v in content.items() if name not in ("own_crc32", *left)}
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if sums:
        text = text.removesuffix("\n}")
        text += f',\n  "own_crc32": "{zlib.crc32(text.encode()):08x}"\n}}'
    record.write_text(f"{text}\n")


@pytest.fixture
def big(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))


@pytest.fixture
def out(big: Path, tmp_path: Path) -> Path:
    """A result of several shards."""
    lazy = streammap.open(big).coalesce(width=2, depth=2)
    lazy.save(tmp_path / "out", max_shard_size=1000, fsync=False)
    return recorded(tmp_path / "out")


def errors(output: Path, **options: object) -> list[Finding]:
    options.setdefault("class_check", False)  # which takes seconds; see test_class_check.py
    found = streammap.verify(output, **options)  # type: ignore[arg-type]
    assert found.ok == (not [f for f in found.findings if f.level == "error"])
    return [f for f in found.findings if f.level == "error"]


def shard_of(out: Path, key: str) -> Path:
    index = json.loads((out / INDEX).read_text())
    return out / str(index["weight_map"][key])


def overwrite(out: Path, key: str, content: bytes, at: int = 0) -> None:
    """Change bytes of a tensor in its file."""
    file = shard_of(out, key)
    slot = next(slot for slot in safetensors_header.read(file)[0] if slot.key == key)
    with file.open("r+b") as opened:
        opened.seek(slot.start + at)
        opened.write(content)


def content_of(out: Path, key: str) -> bytes:
    return tiny.bits(load_file(shard_of(out, key))[key])


KEY = "encoder.layer.1.output.dense.weight"


def test_a_whole_result_is_ok(out: Path) -> None:
    found = streammap.verify(out, recompute=20)
    assert found.ok
    assert found.findings == ()
    assert found.checks == ("structure", "record", "plan", "class", "crc32", "finite", "tiles")
    assert found.n_tiles == 20
    assert found.n_tensors == len(tiny.bert(tiny.Sizes(heads=2, layers=2)))


@pytest.mark.parametrize("bit", range(0, 8, 3))
def test_one_flipped_bit(bit: int, out: Path) -> None:
    before = content_of(out, KEY)
    overwrite(out, KEY, bytes([before[5] ^ 1 << bit]), at=5)
    (found,) = errors(out)
    assert (found.check, found.key, found.file) == ("crc32", KEY, shard_of(out, KEY).name)
    assert found.expected == f"{zlib.crc32(before):08x}"
    assert found.found == f"{zlib.crc32(content_of(out, KEY)):08x}"


def test_a_flipped_bit_is_found_by_computing_again_without_crcs(out: Path) -> None:
    content = json.loads((out / "streammap.json").read_text())
    sealed(out / "streammap.json", content | {"tensors": {}}, sums=False)
    overwrite(out, KEY, bytes([content_of(out, KEY)[5] ^ 1]), at=5)
    assert errors(out) == []
    found = errors(out, recompute=400)
    assert {(f.check, f.key) for f in found} == {("tile", KEY)}
    assert found[0].found != found[0].expected


def test_a_swapped_pair_of_tensors(out: Path) -> None:
    other = KEY.replace("layer.1", "layer.0")
    a, b = content_of(out, KEY), content_of(out, other)
    overwrite(out, KEY, b)
    overwrite(out, other, a)
    found = errors(out)
    assert [(f.check, f.key) for f in found] == [("crc32", other), ("crc32", KEY)]
    assert f"its bytes are those of {KEY}" in found[0].message


def test_a_stale_index(out: Path) -> None:
    index = json.loads((out / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    index["weight_map"][KEY] = next(n for n in names if n != index["weight_map"][KEY])
    del index["weight_map"]["pooler.dense.bias"]
    (out / INDEX).write_text(json.dumps(index))
    assert {f.check for f in errors(out)} == {"index", "size"}
    found = errors(out, edited=[INDEX])
    assert {f.check for f in found} == {"index"}
    assert found[0].key == KEY
    assert found[0].expected == index["weight_map"][KEY]
    assert "the index lacks 1 tensors that the files have: pooler.dense.bias" in found[1].message
    (out / INDEX).unlink()
    assert [(f.check, f.file) for f in errors(out)] == [("index", INDEX)]


def test_a_truncated_file(out: Path) -> None:
    file = shard_of(out, KEY)
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 3)
    found = errors(out)
    assert [f.check for f in found] == ["file", "size"]
    assert f"truncated: {size - 3} bytes, its header needs {size}" in found[0].message
    assert (found[1].found, found[1].expected) == (size - 3, size)
    file.write_bytes(b"")
    assert "0 bytes, a safetensors file has at least 8" in errors(out)[0].message


def test_a_nan_that_no_source_has(out: Path) -> None:
    overwrite(out, KEY, torch.tensor([math.nan]).numpy().tobytes(), at=8)
    found = errors(recorded(out))
    assert [(f.check, f.key, f.found, f.expected) for f in found] == [("finite", KEY, 1, 0)]
    assert "1 NaN, its sources have 0" in found[0].message


def test_a_nan_that_a_source_has_is_a_note(tmp_path: Path) -> None:
    state = tiny.bert(SIZES)
    state["encoder.layer.0.output.dense.weight"][0, 0] = math.nan
    state["pooler.dense.weight"][0, 0] = math.inf
    big = tiny.write(tmp_path / "big", state, tiny.bert_config(SIZES))
    streammap.coalesce(big, tmp_path / "out", width=2, depth=2)
    recorded(tmp_path / "out")
    found = streammap.verify(tmp_path / "out")
    assert found.ok
    assert {(f.level, f.check) for f in found.findings} == {("note", "finite")}
    assert {f.key for f in found.findings} == {
        "encoder.layer.0.output.dense.weight",
        "pooler.dense.weight",
    }
    big.rename(tmp_path / "gone")
    assert "as it was written" in streammap.verify(tmp_path / "out").findings[0].message


def test_an_extra_shard_and_a_missing_one(out: Path) -> None:
    save_file({"x": torch.ones(2)}, out / "model-00099-of-00099.safetensors")
    (found,) = errors(out)
    assert (found.check, found.file) == ("file", "model-00099-of-00099.safetensors")
    assert "neither the record nor the index has it" in found.message
    (out / "model-00099-of-00099.safetensors").unlink()
    file = shard_of(out, KEY)
    file.unlink()
    (found,) = errors(out)
    assert (found.check, found.file, found.message) == ("file", file.name, "missing")


def test_a_missing_and_a_surplus_tensor(out: Path) -> None:
    file = shard_of(out, KEY)
    state = load_file(file)
    state["surplus"] = state.pop(KEY)
    save_file(state, file)
    found = errors(out)
    assert {"missing, it was written", "there, it was not written"} <= {f.message for f in found}
    assert {f.key for f in found if f.check == "key"} == {KEY, "surplus"}


def test_another_dtype_or_shape(out: Path) -> None:
    file = shard_of(out, KEY)
    state = load_file(file)
    state[KEY] = state[KEY].reshape(-1, 2)
    save_file(state, file)
    found = errors(recorded(out))
    assert ("shape", [12, 2], [4, 6]) in [(f.check, f.found, f.expected) for f in found]
    state[KEY] = state[KEY].view(torch.int32)
    save_file(state, file)
    assert {"shape", "dtype"} <= {f.check for f in errors(recorded(out))}


def test_tensors_in_another_order(out: Path) -> None:
    file = shard_of(out, KEY)
    content = file.read_bytes()
    slots = safetensors_header.read(file)[0]
    assert len(slots) > 1
    specs = [(slot.key, slot.spec) for slot in slots[::-1]]
    parts = b"".join(content[slot.start : slot.end] for slot in slots[::-1])
    file.write_bytes(safetensors_header.encode(specs, {"format": "pt"}) + parts)
    found = errors(recorded(out))
    assert {f.check for f in found} == {"offset"}


@pytest.mark.parametrize(
    ("field", "value", "axis"),
    [("hidden_size", 16, ""), ("num_attention_heads", 4, "heads"), ("num_hidden_layers", 3, "")],
)
@pytest.mark.parametrize("with_sources", [True, False])
def test_changed_sizes_in_the_config(
    field: str, value: int, axis: str, with_sources: bool, big: Path, out: Path
) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, field: value}))
    if not with_sources:
        big.rename(big.with_name("gone"))
    assert {f.check for f in errors(out)} in ({"config", "crc32"}, {"config", "size"})
    found = errors(out, edited=("config.json",))
    assert {f.check for f in found} == {"config"}
    if with_sources:
        assert (found[0].found, found[0].expected) == (value, config[field])
    if axis:
        told = f"{axis} is {value}, {config[field]} was written"
        assert told in [f.message for f in found]


def test_an_edited_field_of_the_config(out: Path) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "note": "mine"}))
    (found,) = errors(out)
    assert (found.check, found.file) == ("size", "config.json")
    assert found.message.endswith("were written (if that is meant: --edited config.json)")
    told = run("verify", out, "--edited", "config.json", "--no-class-check")
    assert told.exit_code == 0
    assert "note     config.json: note is 'mine', planned None\n" in told.stdout
    content = json.loads((out / "streammap.json").read_text())
    sealed(out / "streammap.json", content, sums=False)
    found_before = streammap.verify(out, class_check=False)
    assert found_before.ok
    assert [f.level for f in found_before.findings] == ["note", "note"]
    assert any("the record has none of files" in why for why in found_before.skipped)


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/config.json", "README.md"])
def test_files_beside_the_weights_must_be_what_was_written(
    name: str, big: Path, tmp_path: Path
) -> None:
    (big / name).parent.mkdir(exist_ok=True)
    tiny.file(big / name, "{}")
    out = tmp_path / "out"
    streammap.coalesce(big, out, width=2)
    assert streammap.verify(out, class_check=False).findings == ()
    (out / name).write_text("{ ")
    (found,) = errors(out)
    assert (found.check, found.file) == ("crc32", name)
    assert (found.found, found.expected) == (f"{zlib.crc32(b'{ '):08x}", f"{zlib.crc32(b'{}'):08x}")
    (out / name).write_text('{"a": 1}')
    (found,) = errors(out)
    assert (found.check, found.found, found.expected) == ("size", 8, 2)
    assert errors(out, edited=[name]) == []
    (out / name).unlink()
    (found,) = errors(out, edited=[name])
    assert (found.check, found.file, found.message) == ("file", name, "missing")


def test_weights_in_a_folder_inside_are_files_like_others(big: Path, tmp_path: Path) -> None:
    (big / "2_Dense").mkdir()
    save_file({"x": torch.ones(2)}, big / "2_Dense" / "model.safetensors")
    (big / "2_Dense" / "config.json").write_text("{}")  # a module of its own
    out = tmp_path / "out"
    streammap.coalesce(big, out, width=2)
    assert streammap.verify(out, class_check=False).findings == ()
    save_file({"x": torch.zeros(2)}, out / "2_Dense" / "model.safetensors")
    (found,) = errors(out)
    assert (found.check, found.file) == ("crc32", "2_Dense/model.safetensors")


def test_a_record_that_was_changed(out: Path, tmp_path: Path) -> None:
    record = out / "streammap.json"
    text = record.read_text()
    for changed in (text + " ", text.replace('": 2', '": 4', 1), json.dumps(json.loads(text))):
        record.write_text(changed)
        (found,) = [f for f in errors(out) if f.check == "record"]
        assert "changed since it was written" in found.message
        told = run("apply", record, tmp_path / "again")
        assert told.exit_code == 1
        assert "changed since it was written" in told.stderr
        assert not (tmp_path / "again").exists()


def test_names_of_a_record_that_no_file_can_have(out: Path) -> None:
    content = json.loads((out / "streammap.json").read_text())
    names = ("x" * 300, "y/" * 3000 + "z", "a\0b", "/etc/passwd", "../x", "a//b")
    for name in names:
        files = {**content["files"], name: 1, f"{name}.safetensors": 1}
        sealed(out / "streammap.json", {**content, "files": files})
        assert "no name of a file of this folder" in [f.message for f in errors(out)]


def test_the_library_of_the_format_reads_each_file(out: Path) -> None:
    """A header that this project's own reader takes, and the library does not."""
    file = shard_of(out, KEY)
    whole = file.read_bytes()
    n = int.from_bytes(whole[:8], "little")
    head = json.loads(whole[8 : 8 + n])
    head["__metadata__"] = {"format": "pt", "x": ""}
    text = json.dumps(head).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + n :])
    assert errors(recorded(out)) == []
    seen: list[str] = []
    original = safetensors.safe_open

    def spy(path: Path, framework: str) -> object:
        seen.append(Path(path).name)
        return original(path, framework=framework)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "safe_open", spy)
        streammap.verify(out)
    assert {*seen} >= {f.name for f in out.glob("*.safetensors")}
    assert "streammap.map.safetensors" in seen


def test_the_library_of_the_format_disagrees(
    out: Path, big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        """Says that each tensor is a number."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> "Other":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def keys(self) -> list[str]:
            keys: list[str] = self.file.keys()
            return [*keys, "more"]

        def get_slice(self, key: str) -> "Other":
            return self

        def get_dtype(self) -> str:
            return "F32"

        def get_shape(self) -> list[int]:
            return []

    original = safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda p, framework: Other(original(p, framework))
    )
    told = [str(f) for f in errors(out)]
    assert any(f"{KEY}: the safetensors library reads ('F32', ()), not F32" in t for t in told)
    assert any("the safetensors library reads" in t and "tensors, not" in t for t in told)


def test_files_with_the_keys_of_wrappers_are_read_by_the_library(tmp_path: Path) -> None:
    state = {f"_orig_mod.{key}": tensor for key, tensor in tiny.bert(SIZES).items()}
    wrapped = tiny.write(tmp_path / "wrapped", state, tiny.bert_config(SIZES))
    assert errors(wrapped) == []


@pytest.mark.parametrize(
    "place", ["hf://org/name@0123", "org/name", "s3://bucket/big", "http://127.0.0.1:9/big"]
)
def test_a_record_alone_reaches_no_other_machine(
    place: str, big: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = json.loads((out / "streammap.json").read_text())
    content["request"]["source"]["path"] = place
    sealed(out / "streammap.json", content)
    monkeypatch.setattr(resolve, "locate", _no_locate)
    monkeypatch.setattr("streammap.io.storage.remote.RemoteStorage.__init__", _no_locate)
    monkeypatch.setattr("streammap.io.storage.hub.HubStorage.__init__", _no_locate)
    found = streammap.verify(out, recompute=1, class_check=False)
    assert found.ok
    (told,) = [why for why in found.skipped if why.startswith("plan: ")]
    assert place in told
    assert "--source" in told
    monkeypatch.undo()
    assert "plan" in streammap.verify(out, sources={place: big}, class_check=False).checks


def _no_locate(*_: object, **__: object) -> None:
    raise AssertionError("asked for it")


def test_a_run_records_what_is_verified(big: Path, tmp_path: Path) -> None:
    """As `recorded` does."""
    streammap.open(big).coalesce(width=2).save(tmp_path / "out", max_shard_size=1000)
    written = json.loads((tmp_path / "out" / "streammap.json").read_text())["tensors"]
    recorded(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "streammap.json").read_text())["tensors"] == written


def test_all_that_is_wrong_is_listed(out: Path) -> None:
    overwrite(out, KEY, bytes([content_of(out, KEY)[0] ^ 1]))
    save_file({"x": torch.ones(2)}, out / "model-00099-of-00099.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": 12}))
    assert {f.check for f in errors(out)} == {
        "crc32",
        "file",
        "size",
    }  # and what to trust is not known
    (out / "model-00099-of-00099.safetensors").unlink()
    assert {f.check for f in errors(out)} == {"crc32", "config", "size"}


def test_sources_elsewhere_gone_or_changed(big: Path, out: Path, tmp_path: Path) -> None:
    moved = big.rename(tmp_path / "moved")
    found = streammap.verify(out, recompute=3)
    assert found.ok
    assert "plan" not in found.checks
    assert any("big: no such folder" in told for told in found.skipped)
    assert "tiles: no plan to compute them from" in found.skipped
    for sources in (moved, {str(big): moved}):
        assert "plan" in streammap.verify(out, sources=sources).checks
    with pytest.raises(PlanError, match="nowhere: no source of this result"):
        streammap.verify(out, sources={"nowhere": moved})
    other = tiny.Sizes(heads=4, layers=4, vocab=12)
    tiny.write(moved, tiny.bert(other), tiny.bert_config(other))
    found = streammap.verify(out, sources=moved)
    assert found.ok
    assert "model.safetensors has changed since" in found.skipped[0]


def test_a_checkpoint_from_elsewhere(big: Path, tmp_path: Path) -> None:
    found = streammap.verify(big)
    assert found.ok
    assert found.checks == ("structure", "class", "finite")
    assert found.skipped == ("record, plan: there is no record of how it was made",)
    state = tiny.bert(SIZES)
    state[KEY][0, 0] = math.nan
    tiny.write(tmp_path / "bad", state, tiny.bert_config(SIZES), n_shards=3)
    (wrong,) = errors(tmp_path / "bad")
    assert wrong.message == "1 NaN, no source to compare with"
    with pytest.raises(CheckpointError, match="no such folder or file"):
        streammap.verify(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        streammap.verify(tmp_path / "empty")


def test_a_single_file(big: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.safetensors"
    streammap.open(big).coalesce(width=2).save(file)
    found = streammap.verify(file, recompute=10)
    assert found.ok
    assert found.checks == ("structure", "record", "plan", "crc32", "finite", "tiles")
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\x55")
    assert [f.check for f in errors(file)] == ["crc32"]


@pytest.mark.parametrize(
    "chain",
    [
        lambda big: big,
        lambda big: big.coalesce(width=2).decoalesce().interpolate(big, alpha=0.25),
        lambda big: big.decoalesce(hidden="=12"),
    ],
)
def test_chains_are_computed_again(
    chain: Callable[[streammap.LazyCheckpoint], streammap.LazyCheckpoint],
    big: Path,
    tmp_path: Path,
) -> None:
    chain(streammap.open(big)).save(tmp_path / "out")
    found = streammap.verify(tmp_path / "out", recompute=200, seed=1, threads=1)
    assert (found.ok, found.findings) == (True, ())


def test_dense_maps_are_compared_to_rounding(big: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    maps = {name: torch.rand(4, 8) for name in ("embed_F", "qk_F", "v_F")}
    torch.save(maps, tmp_path / "MapMatrix.bin")
    lazy = streammap.open(big).coalesce(map=tmp_path / "MapMatrix.bin", rule="reference")
    lazy.save(tmp_path / "out", memory="32MiB")
    found = streammap.verify(tmp_path / "out", recompute=100, memory="64MiB")
    assert (found.ok, found.findings) == (True, ())
    assert found.n_tiles == 100


def test_the_command(out: Path) -> None:
    said = ok("verify", out, "--recompute", 5)
    assert (
        "checked  structure, record, plan, class, crc32, finite, tiles, 5 tiles recomputed" in said
    )
    assert "verdict  ok: " in said
    overwrite(out, KEY, bytes([content_of(out, KEY)[0] ^ 1]))
    result = run("verify", out)
    assert result.exit_code == 1
    assert f"{KEY}: crc32" in result.stdout
    assert "verdict  1 errors: " in result.stdout
    content = json.loads(run("verify", out, "--json").stdout)
    assert content["ok"] is False
    assert content["findings"][0]["key"] == KEY
    quiet = run("verify", out, "--quiet")
    assert (quiet.exit_code, quiet.stdout) == (1, "")
    assert run("verify", out.with_name("nowhere")).exit_code == 1


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"files": []}, "files and tensors are no tables"),
        ({"tensors": {"a": 1}}, "tensors: a: no file"),
        ({"request": {"operator": "eat"}}, "operator 'eat'"),
    ],
)
def test_a_record_that_is_none(record: dict[str, object], message: str, big: Path) -> None:
    tiny.file(big / "streammap.json", json.dumps(record))
    with pytest.raises(streammap.StreammapError, match=message):
        streammap.verify(big)


def test_file_names_of_a_record_do_not_lead_out_of_the_folder(big: Path) -> None:
    bad = {"tensors": {"a": {"file": "../big/model.safetensors", "crc32": "0"}}}
    tiny.file(big / "streammap.json", json.dumps(bad))
    assert "no name of a file of this folder" in [f.message for f in errors(big)]


_RUN = """
import sys, torch, streammap
from streammap.output.run import peak_nbytes
before = peak_nbytes()
found = streammap.verify(sys.argv[1], memory=sys.argv[2])
assert found.ok, found
print(peak_nbytes() - before)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    size = write_gpt2(tmp_path / "big", vocab=80_000, dtype="BF16")
    assert size > 3 * 32 * MIB
    command = [sys.executable, "-c", _RUN, str(tmp_path / "big"), "32MiB"]
    said = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(said.stdout) < 32 * MIB
