"""Folders and files at URLs of fsspec, in memory; test_s3.py has a real server."""

import json
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import streammap
from streammap.errors import CheckpointError
from streammap.io.storage import prefetch, remote, retry
from streammap.io.storage.base import OpenFile, Stat
from streammap.io.storage.prefetch import AheadFile, Window
from tests.cli.test_cli import refused
from tests.io.test_hub import SIZES, bert, same_but_for_origin
from tests.support import tiny
from tests.support.typed import ok


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bert(tmp_path / "bert")


@pytest.fixture
def url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same in memory."""
    monkeypatch.setattr(retry, "WAITS_SECONDS", (0.01,) * 6)
    root = f"memory://{uuid.uuid4().hex}"
    fs: Any = fsspec.filesystem("memory")
    fs.put(str(folder), f"{root}/bert", recursive=True)
    yield f"{root}/bert"
    fs.rm(root, recursive=True)


def test_a_folder_at_a_url_gives_the_bytes_of_its_folder(
    url: str, folder: Path, tmp_path: Path
) -> None:
    streammap.coalesce(folder, tmp_path / "local", width=2, depth=2)
    ok("coalesce", url, tmp_path / "out", "--width", 2, "--depth", 2)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    (source,) = json.loads((tmp_path / "out" / "streammap.json").read_text())["sources"]
    assert source["url"] == url


def test_a_file_at_a_url(url: str, folder: Path) -> None:
    state = tiny.bert(SIZES)
    fs, root = fsspec.core.url_to_fs(url)
    torch.save({"model": state}, folder / "best.pth")
    fs.put_file(str(folder / "best.pth"), f"{root}/best.pth")
    lazy = streammap.open(f"{url}/best.pth", config=f"{url}/config.json")
    tiny.assert_same(dict(lazy.tensors()), state)
    assert lazy.sizes["heads"] == 4


def test_maps_and_targets_at_a_url(url: str, folder: Path, tmp_path: Path) -> None:
    streammap.coalesce(folder, tmp_path / "small", width=2)
    fs, root = fsspec.core.url_to_fs(url)
    fs.put(str(tmp_path / "small"), f"{root}-small", recursive=True)
    ok("decoalesce", f"{url}-small", tmp_path / "out", "--blend-with", url)
    ok("decoalesce", tmp_path / "small", tmp_path / "local", "--blend-with", folder)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    ok("plan", "decoalesce", tmp_path / "small", "--map", f"{url}-small", "--target", url)


def test_a_file_url_is_this_machine(folder: Path) -> None:
    lazy = streammap.open(folder.as_uri())
    assert lazy.plan.sources[0].is_local
    tiny.assert_same(dict(lazy.tensors()), tiny.opened(folder))


def test_what_is_not_there(url: str) -> None:
    message = refused("inspect", f"{url}/none")
    assert f"{url}/none: no such folder or file" in message
    with pytest.raises(CheckpointError, match=f"{url}/1_Pooling: no weights"):
        streammap.open(f"{url}/1_Pooling")


def test_an_unknown_kind_of_url() -> None:
    assert "nosuch://bucket/bert: " in refused("inspect", "nosuch://bucket/bert")


@pytest.mark.parametrize(
    ("url", "module", "hint"),
    [
        ("s3://bucket/bert", "s3fs", "pip install s3fs"),
        ("gs://bucket/bert", "gcsfs", "pip install gcsfs"),
        ("abfs://bucket/bert", "adlfs", "pip install adlfs"),
    ],
)
def test_a_driver_that_is_not_installed(
    url: str, module: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    known = sys.modules["fsspec.registry"]._registry  # another test may have loaded it
    monkeypatch.delitem(known, url.partition("://")[0], raising=False)
    with pytest.raises(CheckpointError, match=url) as error:
        streammap.open(url)
    assert error.value.hint == hint


class Flaky:
    """A file system that fails now and then."""

    def __init__(self, content: bytes, errors: list[Exception]) -> None:
        self.content, self.errors = content, errors

    def cat_file(self, path: str, *, start: int, end: int) -> bytes:
        if self.errors:
            raise self.errors.pop()
        return self.content[start:end]

    def info(self, path: str) -> dict[str, object]:
        return {"size": len(self.content), "ETag": '"one"'}

    def invalidate_cache(self) -> None:
        pass


def opened(fs: Flaky) -> remote.RemoteFile:
    stat = Stat(len(fs.content), 0, "one")
    return remote.RemoteFile(fs, "a", "x://a", stat, threading.Event())


def test_connections_that_fail_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS_SECONDS", (0.01,) * 3)
    fs = Flaky(b"abcdef", [OSError("reset"), TimeoutError("slow")])
    view = memoryview(bytearray(3))
    opened(fs).read_into(2, view)
    assert bytes(view) == b"cde"
    fs.errors = [OSError("reset")] * 9
    with pytest.raises(CheckpointError, match=r"x://a: no answer \(reset\) at byte 2, 4 times"):
        opened(fs).read_into(2, view)
    fs.errors = [PermissionError("Forbidden")]
    with pytest.raises(CheckpointError, match=r"access denied \(Forbidden\)") as error:
        opened(fs).read_into(2, view)
    assert "credentials" in str(error.value.hint)


def test_a_file_that_is_cut_short_or_written_to_is_refused() -> None:
    file = opened(fs := Flaky(b"abcdef", []))
    file.check_unchanged()
    fs.content = b"abc"
    with pytest.raises(CheckpointError, match="0 bytes came from byte 3 on, 3 were asked for"):
        file.read_into(3, memoryview(bytearray(3)))
    with pytest.raises(CheckpointError, match="3 bytes, version one; it had 6, version one"):
        file.check_unchanged()


def test_a_source_that_is_written_to_midway_is_refused(url: str, tmp_path: Path) -> None:
    lazy = streammap.open(url).coalesce(width=2)
    name = "model-00003-of-00005.safetensors"
    fs, root = fsspec.core.url_to_fs(url)
    content = fs.cat_file(f"{root}/{name}")
    fs.pipe_file(f"{root}/{name}", content)  # the same bytes, written again
    with pytest.raises(CheckpointError, match=f"{name}: .* when it was opened"):
        lazy.save(tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_each_byte_is_read_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = streammap.open(url).coalesce(width=2, depth=2)
    n_read = []
    plain = MemoryFileSystem.cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        if path.endswith(".safetensors"):
            n_read.append(end - start)
        found: bytes = plain(self, path, start=start, end=end, **more)
        return found

    monkeypatch.setattr(MemoryFileSystem, "cat_file", counted)
    report = lazy.save(tmp_path / "out")
    assert sum(n_read) == report.nbytes_read
    assert len(n_read) < 30


class Numbers(OpenFile):
    """A file whose bytes tell where they are, and which remembers what was read."""

    def __init__(self, nbytes: int = 100_000) -> None:
        self.content = bytes(i * i % 251 for i in range(nbytes))
        self.reads: list[tuple[int, int]] = []
        self.error: Exception | None = None
        self.may_go = threading.Event()
        self.may_go.set()

    def read_into(self, offset: int, view: memoryview) -> None:
        self.may_go.wait()
        self.reads.append((offset, offset + len(view)))
        if self.error is not None:
            raise self.error
        view[:] = self.content[offset : offset + len(view)]

    def part(self, start: int, end: int) -> torch.Tensor:
        raise NotImplementedError

    def check_unchanged(self) -> None: ...

    def release(self) -> None: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


def test_a_window_fetches_neighbours_together_and_gives_the_bytes() -> None:
    numbers = Numbers()
    file = AheadFile(numbers)
    with Window(50_000) as window:
        file.window = window
        spans = [(0, 1000), (1000, 5000), (60_000, 61_000), (5000, 5001)]
        parts = [window.ask(file, *span) for span in spans]
        window.begin()
        for start, end in spans:
            view = memoryview(bytearray(end - start))
            file.read_into(start, view)
            assert bytes(view) == numbers.content[start:end]
        assert sorted(numbers.reads) == [(0, 5001), (60_000, 61_000)]
        assert window.room == 50_000 - 6001
        window.drop([part for part in parts if part])
        assert window.room == 50_000
        file.read_into(7, memoryview(bytearray(5)))
        assert numbers.reads[-1] == (7, 12), "not asked for: read as it is"


def test_a_window_does_not_hold_more_than_it_may() -> None:
    numbers = Numbers()
    file = AheadFile(numbers)
    with Window(1000) as window:
        assert window.ask(file, 0, 600) is not None
        assert window.ask(file, 600, 1200) is None
        again = window.ask(file, 0, 600)
        assert again is not None
        assert window.room == 400
        window.drop([again])
        assert window.room == 400, "asked for twice"
        window.drop([again])
        assert window.room == 1000


def test_an_error_of_a_window_is_raised_where_the_bytes_are_wanted() -> None:
    numbers = Numbers()
    numbers.error = CheckpointError("gone")
    file = AheadFile(numbers)
    with Window(1000) as window:
        file.window = window
        window.ask(file, 0, 600)
        window.begin()
        with pytest.raises(CheckpointError, match="gone"):
            file.read_into(0, memoryview(bytearray(600)))


def test_ranges_are_not_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "MAX_RANGE_NBYTES", 2500)
    numbers = Numbers()
    file = AheadFile(numbers)
    with Window(50_000) as window:
        file.window = window
        for at in range(0, 10_000, 1000):
            window.ask(file, at, at + 1000)
        window.begin()
        for at in range(0, 10_000, 1000):
            file.read_into(at, memoryview(bytearray(1000)))
    assert max(end - start for start, end in numbers.reads) == 2000
    assert sum(end - start for start, end in numbers.reads) == 10_000
