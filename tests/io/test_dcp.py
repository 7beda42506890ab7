"""Folders of torch.distributed.checkpoint: torch's are read, and ours are loaded by torch."""

import itertools
import os
import pickle
import shutil
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import metadata as meta
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import streammap
from streammap.cli.main import main
from streammap.common.events import Event, Wrote, nobody
from streammap.errors import CheckpointError, OutputError
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import dcp_metadata
from streammap.io.formats.dcp_metadata import Chunk
from streammap.output.forms import dcp_writer
from tests.support import tiny

SIZES = tiny.Sizes()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def _tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    dtypes = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    )
    state = {str(dtype): torch.randn(3, 5).abs().to(dtype) for dtype in dtypes}
    shapes: tuple[tuple[int, ...], ...] = ((), (7,), (2, 3, 4, 5), (0, 3), (300, 200))
    return state | {str(shape): torch.randn(shape) for shape in shapes}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and tiny.bits(a) == tiny.bits(b)


NESTS: Mapping[str | None, Callable[[Any], dict[str, Any]]] = {
    None: lambda state: {**state, "optim": {"lr": torch.ones(2)}, "step": 3},
    "model": lambda state: {"model": state, "optim": {"model": {"x": torch.ones(2)}}, "step": 3},
    "state_dict": lambda state: {"state_dict": state, "optim": {}, "step": torch.tensor(3)},
    "app.model": lambda state: {"app": {"model": state, "optim": {"x": torch.ones(1)}}},
}


# Reading what torch saved.


@pytest.mark.parametrize("nest", NESTS)
def test_what_torch_saved_is_read(tmp_path: Path, nest: str | None) -> None:
    state = _tensors()
    state["turned"] = torch.randn(4, 6).T
    state["permuted"] = torch.randn(3, 4, 5).permute(2, 0, 1)
    state["cut out"] = torch.randn(9, 9)[2:4, 3:5]
    save(NESTS[nest](state), checkpoint_id=tmp_path / "saved")
    lazy = streammap.open(tmp_path / "saved")
    assert set(lazy.keys()) == set(state)
    for key, x in state.items():
        assert _same(lazy.read(key), x.contiguous()), key
    (source,) = lazy.plan.sources
    assert all(_same(source.tensor(key), x.contiguous()) for key, x in state.items())
    assert source.nest == nest
    beside = {None: {"optim", "step"}, "model": {"optim", "step"}, "state_dict": {"step"}}
    assert set(source.others) == beside.get(nest, set())


def _folder(path: Path, whole: Mapping[str, Tensor], cuts: list[list[int]]) -> None:
    """Write a folder whose tensors are cut into a grid, over two files, as ranks would."""
    path.mkdir(exist_ok=True)
    files = [bytearray(b"head"), bytearray()]
    tensors, places = {}, {}
    for name, x in whole.items():
        grids: list[list[tuple[int, int]]] = [[]]
        for n, given_cuts in zip(x.shape, cuts, strict=False):
            ends = sorted({0, *(min(i, n) for i in given_cuts), n})
            grids = [[*g, span] for g in grids for span in itertools.pairwise(ends)]
        chunks = []
        for number, grid in enumerate(grids):
            part = x
            for dim, (start, end) in enumerate(grid):
                part = part.narrow(dim, start, end - start)
            scratch = path / "scratch"
            torch.save(part.clone() if number % 3 else part.mT.clone().mT, scratch)
            starts = torch.Size([start for start, _ in grid])
            chunks.append(meta.ChunkStorageMetadata(starts, part.size()))
            file = files[number % 2]
            file += b"\0" * (number % 5)  # streams begin anywhere
            content = scratch.read_bytes()
            info = _StorageInfo(f"__{number % 2}_0.distcp", len(file), len(content))
            places[meta.MetadataIndex(name, starts)] = info
            file += content
        properties = meta.TensorProperties(dtype=x.dtype)
        tensors[name] = meta.TensorStorageMetadata(properties, x.size(), chunks[::-1])
    (path / "scratch").unlink()
    for i, file in enumerate(files):
        (path / f"__{i}_0.distcp").write_bytes(file)
    content = pickle.dumps(meta.Metadata(dict(tensors), storage_data=places))
    (path / ".metadata").write_bytes(content)


@given(
    st.lists(st.integers(1, 7), min_size=2, max_size=4),
    st.lists(st.lists(st.integers(1, 6), max_size=3), min_size=4, max_size=4),
    st.data(),
)
def test_any_bytes_are_read_out_of_any_chunks(
    scratch: Path, shape: list[int], cuts: list[list[int]], data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.uint8]))
    x = torch.randn(shape).mul(10).abs().to(dtype)
    _folder(scratch, {"x": x}, cuts)
    (source,) = streammap.open(scratch).plan.sources
    content = tiny.bits(x)
    start, end = sorted(data.draw(st.integers(0, x.numel())) for _ in range(2))
    room = memoryview(bytearray((end - start) * dtype.itemsize))
    if room:
        source.read_into("x", start * dtype.itemsize, room)
    assert bytes(room) == content[start * dtype.itemsize : end * dtype.itemsize]
    source.close()


def test_large_chunks_are_read_in_strips(tmp_path: Path) -> None:
    x = torch.arange(600 * 700.0).view(600, 700)
    wide = torch.arange(3 * 200_000.0).view(3, 200_000)
    _folder(tmp_path, {"x": x, "wide": wide}, [[1, 450], [10, 690]])
    lazy = streammap.open(tmp_path)
    assert torch.equal(lazy.read("x"), x)
    assert torch.equal(lazy.read("wide"), wide)
    region = (slice(400, 500), slice(5, 695))
    assert torch.equal(lazy.read("x", region=region), x[region])


def test_a_saved_run_is_resized(tmp_path: Path) -> None:
    state, config = tiny.bert(SIZES), tiny.bert_config(SIZES)
    tiny.write(tmp_path / "plain", state, config)
    save({"model": state, "step": 1}, checkpoint_id=tmp_path / "run")
    lazy = streammap.open(tmp_path / "run", config=tmp_path / "plain").coalesce(width=2)
    report = lazy.save(tmp_path / "small")
    wanted = streammap.open(tmp_path / "plain").coalesce(width=2)
    small = streammap.open(tmp_path / "small")
    assert report.nbytes_read == sum(x.nbytes for x in state.values())
    assert "run: step beside the state dict: left out" in lazy.plan.notes
    assert all(_same(small.read(key), wanted.read(key)) for key in wanted.keys())  # noqa: SIM118
    assert not list((tmp_path / "small").glob("*.distcp"))
    shutil.copy(tmp_path / "plain" / "config.json", tmp_path / "run")
    assert streammap.open(tmp_path / "run").config == config


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (os.system, ("touch pwned",))


def test_a_pickle_that_asks_for_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": _Evil()}))
    expected = r"\.metadata: its pickle asks for posix\.system, which is no part"
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(tmp_path)
    assert not (tmp_path / "pwned").exists()
    content = b"\x80\x02ctorch\nload\n."
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"asks for torch\.load"):
        streammap.open(tmp_path)


def _metadata(**changes: object) -> meta.Metadata:
    """Of one tensor of two chunks, with something changed."""
    size = torch.Size
    chunks = [meta.ChunkStorageMetadata(size([i]), size([2])) for i in (0, 2)]
    table = meta.TensorStorageMetadata(meta.TensorProperties(), size([4]), chunks)
    info = _StorageInfo("__0_0.distcp", 0, 10)
    places = {meta.MetadataIndex("a", size([i])): info for i in (0, 2)}
    for name, value in changes.items():
        for record in (table, info):
            if name in vars(record):
                setattr(record, name, value)
    changed = changes.get("places", places)
    return meta.Metadata({"a": table}, storage_data=changed)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (_metadata(size=torch.Size([5])), r"a: 2 chunks do not fill \[5\]"),
        (_metadata(size=torch.Size([3])), "a: a chunk ends at 4, the dimension has 3"),
        (_metadata(chunks=3), "a: no list of chunks"),
        (_metadata(places={}), r"a: no file is listed for its chunk at \[0\]"),
        (_metadata(relative_path="../x.distcp"), r"a is said to be in '\.\./x\.distcp'"),
        (_metadata(transform_descriptors=["zstd"]), "a: stored through an extension"),
        (_metadata(offset=-1), r"\(-1, 10\) are not sizes"),
        (_metadata(relative_path="__1_0.distcp"), "__1_0.distcp: no such file"),
        ({"a": 1}, "no state_dict_metadata"),
        (_metadata(properties=None), "no dtype"),
    ],
)
def test_metadata_that_lies_is_refused(tmp_path: Path, content: object, expected: str) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    (tmp_path / ".metadata").write_bytes(pickle.dumps(content))
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(tmp_path)


DOUBLING = b")" + b"q\x00h\x00\x86" * 60  # tuples of tuples: 2^60 leaves, in 60 objects


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"}" + DOUBLING + b"Ns", "no state_dict_metadata"),
        (
            pickle.dumps(_metadata(relative_path="FILE"), protocol=2).replace(
                b"X\x04\0\0\0FILE", DOUBLING.replace(b"q\0", b"q\xff").replace(b"h\0", b"h\xff")
            ),
            r"a is said to be in \(\(",
        ),
        (b"Nr\xff\xff\xff\x7f", "no state_dict_metadata"),
        (b"ctorch\nFloatStorage\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R", "asks for torch.FloatStorage"),
    ],
    ids=["key", "text", "memo", "storage"],
)
def test_small_metadata_take_little_time_and_memory(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    (tmp_path / ".metadata").write_bytes(content.removesuffix(b".") + b".")
    started = time.process_time()
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(tmp_path)
    assert time.process_time() - started < 0.5


def test_chunks_that_overlap_are_refused() -> None:
    chunks = [Chunk(((0, 2), (0, 3)), "f", 0, 1), Chunk(((1, 3), (0, 2)), "f", 0, 1)]
    with pytest.raises(CheckpointError, match=r"a: its chunk at \[1, 0\] overlaps another"):
        dcp_metadata._check_cover("a", (3, 3), chunks)


@given(st.binary(max_size=60))
def test_no_bytes_are_metadata_by_chance(scratch: Path, content: bytes) -> None:
    (scratch / "__0_0.distcp").touch()
    (scratch / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError):
        dcp_metadata.read(scratch)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda raw: raw[:-700], "its chunk ends at byte"),
        (lambda raw: b"\0" * len(raw), "a: not a torch file in the zip form"),
        (
            lambda raw: raw.replace(b"FloatStorage", b"HalfxStorage"),
            "asks for more than tensors: torch.Half",
        ),
    ],
)
def test_a_broken_file_is_refused(
    tmp_path: Path, change: Callable[[bytes], bytes], expected: str
) -> None:
    save({"a": torch.ones(20, 3)}, checkpoint_id=tmp_path)
    file = tmp_path / "__0_0.distcp"
    raw = change(file.read_bytes())
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(tmp_path).read("a")


def test_a_chunk_of_another_kind_is_refused(tmp_path: Path) -> None:
    save({"a": torch.ones(20, 3)}, checkpoint_id=tmp_path)
    file = tmp_path / ".metadata"
    file.write_bytes(file.read_bytes().replace(b"float32", b"float16"))
    expected = r"__0_0\.distcp: a: its chunk is F32 \[20, 3\], the metadata says F16 \[20, 3\]"
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(tmp_path).read("a")


def test_a_folder_of_two_formats_is_refused(tmp_path: Path) -> None:
    save({"a": torch.ones(2)}, checkpoint_id=tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has model\.safetensors and \.metadata"):
        streammap.open(tmp_path)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    save({"optim": {"model": {"a": torch.ones(2)}}}, checkpoint_id=tmp_path)
    with pytest.raises(CheckpointError, match="no state dict at its top or under 'model'"):
        streammap.open(tmp_path)


# Writing what torch loads.


def _source(folder: Path) -> tuple[dict[str, Tensor], streammap.LazyCheckpoint]:
    state = _tensors()
    (folder / "source").mkdir()
    save_file(state, folder / "source" / "model.safetensors")
    return state, streammap.open(folder / "source")


@pytest.mark.parametrize("nest", [None, "model", "app.model"])
@pytest.mark.parametrize("size", ["5GB", "1KB"])
def test_torch_loads_what_is_written(tmp_path: Path, nest: str | None, size: str) -> None:
    state, lazy = _source(tmp_path)
    out = tmp_path / "out"
    report = lazy.save(out, format="dcp", nest=nest, max_shard_size=size)
    assert report.n_shards == len(list(out.glob("*.distcp")))
    assert (report.n_shards > 1) == (size == "1KB")
    found = {key: torch.zeros_like(x) for key, x in state.items()}
    whole: dict[str, Any] = found
    for part in reversed(nest.split(".") if nest else []):
        whole = {part: whole}
    load(whole, checkpoint_id=out)
    again = streammap.open(out)
    assert again.plan.sources[0].nest == nest
    for key, x in state.items():
        assert _same(found[key], x), key
        assert _same(again.read(key), x), key
    dcp_to_torch_save(out, tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt")
    for part in nest.split(".") if nest else []:
        loaded = loaded[part]
    assert all(_same(loaded[key], x) for key, x in state.items())


def test_a_stream_is_a_zip_file_that_torch_loads(tmp_path: Path) -> None:
    """Larger than 4 GiB too: the file has holes."""
    for n, path in ((5, tmp_path / "small"), (5 * 2**28, tmp_path / "large")):
        (shard,) = dcp_writer.arrange({"a": TensorSpec("F32", (n,))}, max_shard_nbytes=2**40)
        assert shard.slots[0].start % 64 == 0
        with path.open("wb") as file:
            assert shard.around is not None
            for offset, piece in shard.around():
                file.seek(offset)
                file.write(piece)
            file.seek(shard.slots[0].end - 4)
            file.write(b"\0\0\x80\x3f")
        found = torch.load(path, mmap=True)
        assert found.shape == (n,)
        assert float(found[-1]) == 1.0
        with zipfile.ZipFile(path) as archive:
            assert archive.read("archive/version") == b"3\n"


def test_a_result_goes_where_the_source_stood(tmp_path: Path) -> None:
    state, config = tiny.bert(SIZES), tiny.bert_config(SIZES)
    save({"app": {"model": state}}, checkpoint_id=tmp_path / "run")
    lazy = streammap.open(tmp_path / "run", config=config).coalesce(width=2)
    lazy.save(tmp_path / "small", format="dcp")
    small = streammap.open(tmp_path / "small")  # its config.json lies in the folder
    assert small.plan.sources[0].nest == "app.model"
    assert small.sizes["embed"] == SIZES.embed // 2
    grown = small.decoalesce()  # by the map that lies there too
    grown.save(tmp_path / "grown", format="dcp", nest="")
    assert streammap.open(tmp_path / "grown").plan.sources[0].nest is None
    lazy.save(tmp_path / "small.pth")
    assert OrderedDict(torch.load(tmp_path / "small.pth")).keys() == {"model"}
    assert set(grown.keys()) == set(state)


def test_a_format_replaces_the_other(tmp_path: Path) -> None:
    _, lazy = _source(tmp_path)
    out = tmp_path / "out"
    lazy.save(out, max_shard_size="1KB")
    lazy.save(out, format="dcp", overwrite=True)
    assert not list(out.glob("*.safetensors*"))
    assert len(streammap.open(out).keys()) == len(lazy.keys())
    lazy.save(out, overwrite=True)
    assert not list(out.glob("*.distcp"))
    assert not (out / ".metadata").exists()
    assert len(streammap.open(out).keys()) == len(lazy.keys())
    with pytest.raises(OutputError, match="format is 'npz', expected safetensors or torch or dcp"):
        lazy.save(tmp_path / "no", format="npz")  # type: ignore[arg-type]


def test_the_command_line_writes_it(tmp_path: Path) -> None:
    tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    words = ["coalesce", str(tmp_path / "big"), str(tmp_path / "out"), "--width", "2"]
    found = CliRunner().invoke(main, [*words, "--format", "dcp", "--nest", "model"])
    assert found.exit_code == 0, found.output
    small = streammap.open(tmp_path / "out")
    assert small.plan.sources[0].nest == "model"
    found = CliRunner().invoke(main, ["inspect", str(tmp_path / "out")])
    assert found.exit_code == 0
    assert "out: 1 file" in found.output


def test_a_written_folder_is_verified(tmp_path: Path) -> None:
    _, lazy = _source(tmp_path)
    out = tmp_path / "out"
    lazy.save(out, format="dcp", nest="model", max_shard_size="100KB")
    found = streammap.verify(out)
    assert not [f for f in found.findings if f.level == "error"]
    file = out / "__0_1.distcp"
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    wrong = [f for f in streammap.verify(out).findings if f.level == "error"]
    assert {f.check for f in wrong} == {"crc32"}  # the tensor, and its file
    file.write_bytes(raw[:-2000])
    wrong = [f for f in streammap.verify(out).findings if f.level == "error"]
    assert any("its chunk ends at byte" in f.message for f in wrong)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    _, lazy = _source(tmp_path)

    def stop(event: Event) -> None:
        if isinstance(event, Wrote):
            raise KeyboardInterrupt

    for name, progress in (("whole", nobody), ("again", stop)):
        try:
            lazy.save(tmp_path / name, format="dcp", max_shard_size="1KB", progress=progress)
        except KeyboardInterrupt:
            report = lazy.save(tmp_path / name, format="dcp", max_shard_size="1KB")
            assert report.n_resumed > 0
    for path in (tmp_path / "whole").glob("*.distcp"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    with pytest.raises(KeyboardInterrupt):
        lazy.save(tmp_path / "other", format="dcp", max_shard_size="1KB", progress=stop)
    with pytest.raises(OutputError, match="nest"):
        lazy.save(tmp_path / "other", format="dcp", max_shard_size="1KB", nest="model")
