"""The fault kit does what it says, and runs live with all of it or end in our errors."""

import errno
import os
import re
from pathlib import Path

import pytest

import streammap
from streammap.errors import CheckpointError, OutputError
from streammap.io.dtypes import TensorSpec
from streammap.io.storage import disk
from streammap.io.storage.disk import Disk, LocalDisk
from streammap.output import layout
from streammap.output.files import Output
from streammap.testing import faults
from tests.support import tiny

SIZES = tiny.Sizes(layers=2)
READS: frozenset[faults.Operation] = frozenset(("read",))
WRITES: frozenset[faults.Operation] = frozenset(("write",))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny.write(folder / "big", tiny.bert(SIZES), tiny.bert_config(SIZES), n_shards=2)
    lazy = streammap.open(folder / "big").coalesce(width=2)
    lazy.save(folder / "whole", max_shard_size=500, fsync=False)
    return folder


def save(source: Path, out: Path, wrong: Disk) -> None:
    with disk.using(wrong):
        streammap.open(source / "big").coalesce(width=2).save(out, max_shard_size=500, threads=2)


@pytest.mark.parametrize(
    "wrong",
    [
        LocalDisk(),
        faults.ShortDisk(),
        faults.ShortDisk(seed=7, around=LocalDisk()),
        faults.slow(0.001),
        faults.watched(),
        faults.FullDisk(10**6),
        faults.PowerCut(),
        faults.fail_at(10**6),
    ],
    ids=lambda wrong: type(wrong).__name__,
)
def test_a_disk_that_works_in_the_end_changes_no_byte(
    source: Path, tmp_path: Path, wrong: Disk
) -> None:
    save(source, tmp_path / "out", wrong)
    assert tiny.tree(tmp_path / "out") == tiny.tree(source / "whole")
    assert disk.current() is not wrong


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("n", [0, 5, 40])
def test_a_write_that_fails_names_the_file(source: Path, tmp_path: Path, code: int, n: int) -> None:
    with pytest.raises(OutputError, match=rf"out.*: {re.escape(os.strerror(code))}"):
        save(source, tmp_path / "out", faults.fail_at(n, code, kinds=WRITES))


def test_a_disk_without_room_for_a_shard_says_so_before_it_is_written(
    source: Path, tmp_path: Path
) -> None:
    wrong = faults.fail_at(2, errno.ENOSPC, kinds=frozenset(("allocate",)))
    told = r"model-\d+-of-\d+.safetensors: No space left on device for \d+ bytes"
    with pytest.raises(OutputError, match=told) as caught:
        save(source, tmp_path / "out", wrong)
    assert str(caught.value.hint).startswith("free disk space")
    save(source, tmp_path / "out", LocalDisk())
    assert tiny.tree(tmp_path / "out") == tiny.tree(source / "whole")


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EPERM, 0])
def test_a_file_system_that_reserves_nothing_is_written_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(disk, "_fallocate", lambda: (lambda *_: code) if code else None)
    save(source, tmp_path / "out", LocalDisk())
    assert tiny.tree(tmp_path / "out") == tiny.tree(source / "whole")


def test_room_is_reserved_where_that_can_be_done(tmp_path: Path) -> None:
    local = LocalDisk()
    descriptor = local.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        local.allocate(descriptor, 0)
        local.allocate(descriptor, 2**20)
        found = os.fstat(descriptor)
        assert found.st_size == 2**20
        assert found.st_blocks * 512 >= 2**20
        with pytest.raises(OSError, match=re.escape(os.strerror(errno.EBADF))):
            local.allocate(2**20, 1)
    finally:
        os.close(descriptor)


def test_every_nth_write_may_fail(source: Path, tmp_path: Path) -> None:
    """Each run gets a bit further."""
    wrong, n_runs = faults.fail_at(25, every=True, kinds=WRITES), 0
    while True:
        try:
            save(source, tmp_path / "out", wrong)
        except OutputError:
            n_runs += 1
            assert n_runs < 20
        else:
            break
    assert n_runs > 1
    assert tiny.tree(tmp_path / "out") == tiny.tree(source / "whole")


@pytest.mark.parametrize("n", [0, 9])
def test_a_read_that_fails_names_the_source(source: Path, tmp_path: Path, n: int) -> None:
    wrong = faults.fail_at(n, kinds=READS)
    with pytest.raises(CheckpointError, match=r"big/model-.*: Input/output error at byte \d+"):
        save(source, tmp_path / "out", wrong)
    save(source, tmp_path / "out", LocalDisk())
    assert tiny.tree(tmp_path / "out") == tiny.tree(source / "whole")


def test_one_bad_file_is_named(source: Path, tmp_path: Path) -> None:
    bad = "model-00002-of-00002"
    wrong = faults.CountingDisk(lambda kind, _, path: _fail(kind, path, bad), kinds=READS)
    with pytest.raises(CheckpointError, match=rf"{bad}\.safetensors: Input/output error"):
        save(source, tmp_path / "out", wrong)


def _fail(kind: str, path: Path, bad: str) -> None:
    assert kind == "read"
    if bad in path.name:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_file_that_could_not_begin_is_closed(tmp_path: Path) -> None:
    """Else a second thread that begins it would forget the descriptor of the first."""
    (shard,) = layout.arrange({"a": TensorSpec("U8", (4,))}, max_shard_nbytes=10)
    with Output(tmp_path, tmp_path, disk=faults.FullDisk(3), fsync=False) as out:
        for _ in range(3):
            with pytest.raises(OutputError, match="No space left on device at byte"):
                out.begin(shard)
        links = Path("/proc/self/fd").iterdir()
        assert not [link for link in links if os.path.realpath(link).startswith(str(tmp_path))]


def test_a_full_disk_writes_what_it_has_room_for(tmp_path: Path) -> None:
    full = faults.FullDisk(5)
    descriptor = full.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    assert full.pwrite(descriptor, memoryview(b"12345678"), 0) == 5
    with pytest.raises(OSError, match="No space left"):
        full.pwrite(descriptor, memoryview(b"678"), 5)
    os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == b"12345"


def test_a_power_cut_loses_what_was_not_synced(tmp_path: Path) -> None:
    power = faults.PowerCut()
    descriptor = power.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    power.pwrite(descriptor, memoryview(b"1234"), 0)
    power.sync(descriptor)
    power.pwrite(descriptor, memoryview(b"56"), 4)
    os.close(descriptor)
    assert power.cut(tmp_path) == 2
    assert (tmp_path / "x").read_bytes() == b"1234\0\0"


def test_a_child_is_killed_at_a_point_or_not_at_all(tmp_path: Path) -> None:
    def act() -> None:
        for i in range(3):
            used = disk.current()
            descriptor = used.open(tmp_path / str(i), os.O_RDWR | os.O_CREAT)
            used.pwrite(descriptor, memoryview(b"x"), 0)
            os.close(descriptor)

    assert faults.killed(act, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"0": b"x", "1": b""}
    assert not faults.killed(act, 3)
    with pytest.raises(AssertionError, match="the child failed"):
        faults.killed(lambda: 1 / 0, 0)
