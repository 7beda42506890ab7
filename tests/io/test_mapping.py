"""Files that are mapped: which ones, what they give, and what happens when they are cut short."""

import os
import shutil
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammap
from streammap.errors import CheckpointError, TruncatedError
from streammap.io.checkpoint import Checkpoint, open_checkpoint
from streammap.io.storage import disk, mapping
from streammap.io.storage.base import Reader
from streammap.io.storage.mapping import MappedPart
from streammap.testing import faults
from tests.support import tiny

N = 2**20
LOCAL = "ext4"


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mapping, "file_system", lambda descriptor: LOCAL)
    path = tmp_path / "x.safetensors"
    save_file({"x": torch.arange(N, dtype=torch.float32)}, path)
    return path


def part_of(checkpoint: Checkpoint, *, start: int = 0, end: int = 4 * N) -> MappedPart:
    part = MappedPart(end - start)
    assert checkpoint.map_into("x", start, end, part, "auto")
    return part


@pytest.mark.parametrize(("start", "end"), [(0, 4 * N), (4 * 1001, 4 * N), (4 * 513, 4 * (N - 3))])
def test_a_part_holds_the_files_bytes(file: Path, start: int, end: int) -> None:
    part = part_of(open_checkpoint(file), start=start, end=end)
    wanted = torch.arange(start // 4, end // 4, dtype=torch.float32)
    assert torch.equal(part.typed("F32"), wanted)
    assert bytes(part.view) == tiny.bits(wanted)
    part.check()


def test_a_part_gives_its_pages_back(file: Path) -> None:
    def resident() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssFile:")[1].split()[0]) * 1024

    part = part_of(open_checkpoint(file))
    before = resident()
    zlib.crc32(part.view)
    assert resident() - before >= 4 * N
    part.close()
    assert resident() - before < N


@pytest.mark.parametrize(
    ("reader", "file_system", "how"),
    [
        ("auto", "ext4", "mmap"),
        ("auto", "xfs", "mmap"),
        ("auto", "overlay", "mmap"),
        ("auto", "tmpfs", "mmap"),
        ("auto", "nfs", "pread"),
        ("auto", "fuse", "pread"),
        ("auto", "lustre", "pread"),
        ("auto", "unknown", "pread"),
        ("pread", "ext4", "pread"),
        ("mmap", "nfs", "mmap"),
    ],
)
def test_files_are_mapped_where_that_is_safe_and_the_plan_says_so(
    file: Path, monkeypatch: pytest.MonkeyPatch, reader: Reader, file_system: str, how: str
) -> None:
    monkeypatch.setattr(mapping, "file_system", lambda descriptor: file_system)
    summary = streammap.open(file).summary(reader=reader)
    assert (summary.reader, summary.reader_reason) == (how, file_system)
    assert f"\nreader     {how} ({file_system})\n" in str(summary)
    is_mapped = open_checkpoint(file).map_into("x", 0, 4 * N, MappedPart(4 * N), reader)
    assert is_mapped == (how == "mmap")


def test_this_machines_file_systems_are_known(tmp_path: Path) -> None:
    command = ["stat", "--file-system", "--format=%T", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, check=True, text=True)
    name = said.stdout.strip().removesuffix("fs").replace("ext2/ext3", "ext4")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    found = mapping.file_system(descriptor)
    os.close(descriptor)
    assert found.removesuffix("fs") in (name, "unknown")


def test_a_disk_that_a_test_uses_sees_all_reads(file: Path) -> None:
    with disk.using(faults.CountingDisk(lambda *_: None)):
        assert not open_checkpoint(file).map_into("x", 0, 4 * N, MappedPart(4 * N), "auto")


def test_a_file_cut_short_under_a_part_reads_as_zeros_and_is_told(file: Path) -> None:
    size = file.stat().st_size
    part = part_of(open_checkpoint(file))
    os.truncate(file, N)
    got = part.typed("F32").clone()  # without more ado the process would end here
    assert torch.equal(got[: N // 8], torch.arange(N // 8, dtype=torch.float32))
    assert not got[N // 2 :].any()
    with pytest.raises(TruncatedError, match=rf"{N} bytes, it had {size} when it was opened"):
        part.check()


def test_a_part_that_cannot_be_read_is_told_though_the_file_is_as_it_was(file: Path) -> None:
    """A disk that fails sends the same signal."""
    part = part_of(open_checkpoint(file))
    content, status = file.read_bytes(), file.stat()
    os.truncate(file, 0)
    zlib.crc32(part.view)
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: can't be read through a mapping"):
        part.check()


def test_a_bus_error_elsewhere_still_ends_the_process(file: Path) -> None:
    code = f"""
        import mmap, os
        from streammap.io.checkpoint import open_checkpoint
        from streammap.io.storage.mapping import MappedPart
        part = MappedPart({4 * N})
        open_checkpoint({str(file)!r}).map_into("x", 0, {4 * N}, part, "mmap")
        descriptor = os.open({str(file)!r}, os.O_RDONLY)
        other = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        os.truncate({str(file)!r}, 0)
        other[2**20]
        """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False, timeout=60)
    assert ended.returncode == -7


_CUT = """
import os, sys
from streammap.cli.main import main
from streammap.io.storage.mapping import MappedPart

n, path, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
opens, times = MappedPart.open, iter(range(10**9))

def opened(self, *args):
    opens(self, *args)
    if next(times) == n:
        os.truncate(path, os.stat(path).st_size // 2)

MappedPart.open = opened
main(words)
"""


def test_a_run_whose_source_is_cut_short_says_so_and_goes_on_later(tmp_path: Path) -> None:
    """Between the look at the file and the use of its pages, which nothing can prevent."""
    sizes = tiny.Sizes(heads=8, head_dim=64, mlp_per_head=256, layers=2, vocab=512)
    source = tiny.write(tmp_path / "big", tiny.bert(sizes), tiny.bert_config(sizes))
    shutil.copytree(source, tmp_path / "kept")  # with its times
    file, out = source / "model.safetensors", tmp_path / "out"
    wanted = ["coalesce", str(source), str(out), "--width", "2", "--max-shard-size", "1MB"]
    wanted += ["--reader", "mmap", "--threads", "2"]

    def run(n: int) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-c", _CUT, str(n), str(file), *wanted]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)

    ended = run(30)
    assert ended.returncode == 1, ended
    assert f"error: {file}: " in ended.stderr
    assert "when it was opened" in ended.stderr
    assert "put it back as it was" in ended.stderr
    assert "kept: " in ended.stderr
    shutil.copy2(tmp_path / "kept" / file.name, file)
    ended = run(-1)
    assert ended.returncode == 0, ended
    assert "resumed" in ended.stdout
    streammap.open(source).coalesce(width=2).save(tmp_path / "whole", max_shard_size="1MB")
    assert tiny.tree(out) == tiny.tree(tmp_path / "whole")
