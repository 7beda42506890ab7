"""Results that go elsewhere: URLs of fsspec, and repositories of the Hub."""

import json
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub import constants

import streammap
from streammap.api import LazyCheckpoint
from streammap.errors import OutputError
from streammap.io.storage import retry
from streammap.output import side_files
from streammap.testing.hubserver import HubServer
from tests.cli.test_cli import refused
from tests.io.test_hub import bert, hub, same_but_for_origin
from tests.support import tiny
from tests.support.typed import ok, run

__all__ = ["hub"]
# The client's own, about its transport.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
SHARD = "20kB"
"""Of which the results below have several."""


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMMAP_SPOOL", str(tmp_path / "spool"))
    monkeypatch.setattr(retry, "WAITS_SECONDS", (0.01,) * 3)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return tmp_path / "spool"


@pytest.fixture
def url() -> Iterator[str]:
    """Nothing is there."""
    root = f"memory://{uuid.uuid4().hex}"
    yield f"{root}/out"
    fs: Any = fsspec.filesystem("memory")
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture
def small(tmp_path: Path) -> LazyCheckpoint:
    return streammap.open(bert(tmp_path / "bert")).coalesce(width=2)


def fetched(url: str, folder: Path) -> Path:
    fs, root = fsspec.core.url_to_fs(url)
    fs.get(root, str(folder), recursive=True)
    return folder


def same(found: Path, expected: Path) -> None:
    """The same files, and the same record but for who made it when."""
    one, other = (json.loads((p / "streammap.json").read_text()) for p in (found, expected))
    assert one == other
    same_but_for_origin(found, expected)


def test_a_result_at_a_url_is_that_of_a_folder(
    url: str, small: LazyCheckpoint, tmp_path: Path, spool: Path
) -> None:
    small.save(tmp_path / "local", max_shard_size=SHARD)
    report = small.save(url, max_shard_size=SHARD)
    same(fetched(url, tmp_path / "out"), tmp_path / "local")
    assert report.output == url
    assert report.n_shards > 1
    assert not list(spool.iterdir()), "nothing stays here"
    tiny.assert_same(dict(streammap.open(url).tensors()), tiny.opened(tmp_path / "local"))


def test_a_large_map_is_sent_by_way_of_the_spool(
    url: str, small: LazyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "MAX_FETCHED_NBYTES", -1)
    small.save(tmp_path / "here", fsync=False)
    small.save(url)
    same(fetched(url, tmp_path / "there"), tmp_path / "here")


@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".pth", marks=pytest.mark.slow)])
def test_one_file_at_a_url(url: str, small: LazyCheckpoint, tmp_path: Path, suffix: str) -> None:
    small.save(tmp_path / f"out{suffix}")
    small.save(f"{url}{suffix}")
    fs, root = fsspec.core.url_to_fs(url)
    for name in (f"out{suffix}", "out.map.safetensors"):
        expected = (tmp_path / name).read_bytes()
        assert fs.cat_file(f"{root.rpartition('/')[0]}/{name}") == expected


def test_what_is_there_is_not_replaced_unless_asked(
    url: str, small: LazyCheckpoint, tmp_path: Path
) -> None:
    small.save(url, max_shard_size=SHARD)
    with pytest.raises(OutputError, match=f"{url}: already exists"):
        small.save(url)
    small.save(url, overwrite=True)
    small.save(tmp_path / "local")
    same(fetched(url, tmp_path / "out"), tmp_path / "local")


def test_the_last_file_makes_it_whole(
    url: str, small: LazyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    put, pipe = MemoryFileSystem.put_file, MemoryFileSystem.pipe_file

    def put_file(self: Any, local: str, there: str, **more: Any) -> None:
        names.append(there.rpartition("/")[2])
        put(self, local, there, **more)

    def pipe_file(self: Any, there: str, content: bytes, **more: Any) -> None:
        names.append(there.rpartition("/")[2])
        pipe(self, there, content, **more)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)
    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    small.save(url, max_shard_size=SHARD)
    assert names[0].startswith("model-00001-of-")
    assert names[-2:] == ["model.safetensors.index.json", "config.json"]


def break_off(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let all fail once some shards were sent."""
    n, put = 0, MemoryFileSystem.put_file

    def put_file(self: Any, local: str, there: str, **more: Any) -> None:
        nonlocal n
        n += 1
        if n > after:
            raise OSError("no route")
        put(self, local, there, **more)

    monkeypatch.setattr(MemoryFileSystem, "put_file", put_file)


def test_a_run_that_was_stopped_goes_on(
    url: str, small: LazyCheckpoint, tmp_path: Path, spool: Path
) -> None:
    small.save(tmp_path / "local", max_shard_size="1kB")
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, after=2)
        with pytest.raises(OutputError, match=r"not sent \(no route\), 4 times in a row"):
            small.save(url, max_shard_size="1kB")
    fs, root = fsspec.core.url_to_fs(url)
    assert not fs.exists(f"{root}/config.json")
    assert len(list(spool.rglob("model-*.safetensors"))) <= 2, "two shards are here at most"
    with pytest.raises(OutputError, match="asked for something else, and has sent 2 files"):
        small.save(url, max_shard_size="2kB")
    report = small.save(url, max_shard_size="1kB")
    assert report.n_resumed > 0
    assert report.nbytes_written < small.plan.nbytes
    same(fetched(url, tmp_path / "out"), tmp_path / "local")
    assert not list(spool.iterdir())


def test_a_run_can_begin_anew(url: str, small: LazyCheckpoint, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, after=2)
        with pytest.raises(OutputError, match="not sent"):
            small.save(url, max_shard_size="1kB")
    small.save(url, max_shard_size="2kB", restart=True, overwrite=True)
    small.save(tmp_path / "local", max_shard_size="2kB")
    same(fetched(url, tmp_path / "out"), tmp_path / "local")


def test_a_shard_that_is_gone_is_made_again(
    url: str, small: LazyCheckpoint, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        break_off(patch, after=2)
        with pytest.raises(OutputError, match="not sent"):
            small.save(url, max_shard_size="1kB")
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm_file(sorted(fs.find(root))[0])
    small.save(url, max_shard_size="1kB")
    small.save(tmp_path / "local", max_shard_size="1kB")
    same(fetched(url, tmp_path / "out"), tmp_path / "local")


def test_a_file_url_is_this_machine(small: LazyCheckpoint, tmp_path: Path) -> None:
    small.save((tmp_path / "out").as_uri())
    small.save(tmp_path / "local")
    same(tmp_path / "out", tmp_path / "local")


def test_urls_on_the_command_line(url: str, small: LazyCheckpoint, tmp_path: Path) -> None:
    said = ok("coalesce", tmp_path / "bert", url, "--width", 2)
    assert said.strip().endswith(f"-> {url}")
    assert "already exists" in refused("coalesce", tmp_path / "bert", url, "--width", 2)
    ok("decoalesce", url, tmp_path / "back")


# ---- the Hub


@pytest.fixture
def token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")


def content(server: HubServer, name: str, folder: Path, branch: str = "main") -> Path:
    for file, text in server.content(name, revision=branch).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(text)
    return folder


@pytest.mark.usefixtures("token")
def test_a_result_is_pushed_shard_by_shard(hub: HubServer, tmp_path: Path, spool: Path) -> None:
    lazy = streammap.open("org/bert").coalesce(width=2)
    report = lazy.push_to_hub("tester/small", max_shard_size=SHARD)
    repo = hub.repos["tester/small"]
    assert repo.private
    assert len(repo.messages) == report.n_shards + 1
    assert not list(spool.iterdir())
    lazy.save(tmp_path / "local", max_shard_size=SHARD)
    pushed = content(hub, "tester/small", tmp_path / "pushed")
    card = (pushed / "README.md").read_text()
    (pushed / "README.md").unlink()
    one, other = (
        json.loads((p / "streammap.json").read_text()) for p in (pushed, tmp_path / "local")
    )
    assert one["files"].pop("README.md") == len(card.encode())
    assert one["crc32"].pop("README.md") == f"{zlib.crc32(card.encode()):08x}"
    assert one.pop("own_crc32") != other.pop("own_crc32")
    assert one == other
    same_but_for_origin(pushed, tmp_path / "local")
    commit = hub.repos["org/bert"].branches["main"]
    for part in (
        "base_model:\n- org/bert",
        "library_name: transformers",
        "- streammap",
        "- arxiv:2404.07999",
        f"org/bert at commit `{commit}`",
        "coalesce",
        "approximate",
        "mean of 2",
        "8 -> 4",
        'from_pretrained("tester/small")',
    ):
        assert part in card, part
    tiny.assert_same(
        dict(streammap.open("tester/small", stream=True).tensors()), tiny.opened(tmp_path / "local")
    )


@pytest.mark.usefixtures("token")
def test_the_command_line_pushes(hub: HubServer, tmp_path: Path) -> None:
    tiny.file(tmp_path / "bert" / "README.md", "---\nlicense: mit\ntags:\n- x\n---\n# BERT\n")
    hub.add("org/bert", tmp_path / "bert")
    ok(
        "coalesce",
        "org/bert",
        "--width",
        2,
        "--push-to-hub",
        "tester/small",
        "--public",
        "--branch",
        "half",
        "--commit-message",
        "Half of it",
    )
    repo = hub.repos["tester/small"]
    assert not repo.private
    assert set(hub.content("tester/small")) == set()
    assert repo.messages[-1] == "Half of it"
    assert "license: mit" in hub.content("tester/small", revision="half")["README.md"].decode()
    ok("coalesce", "org/bert", "hf://tester/other@two", "--width", 2)
    assert "config.json" in hub.content("tester/other", revision="two")
    both = run("coalesce", "org/bert", "out", "--width", 2, "--push-to-hub", "tester/small")
    assert both.exit_code == 2
    assert run("coalesce", "org/bert", "--width", 2).exit_code == 2
    assert run("coalesce", "org/bert", "out", "--width", 2, "--public").exit_code == 2


@pytest.mark.usefixtures("token")
def test_a_push_that_was_stopped_goes_on(hub: HubServer, tmp_path: Path) -> None:
    lazy = streammap.open("org/bert").coalesce(width=2)
    hub.faults.refuse_uploads_after = 2
    with pytest.raises(OutputError):
        lazy.push_to_hub("tester/small", max_shard_size="1kB")
    assert "config.json" not in hub.content("tester/small")
    n_sent = sum(seen.method == "PUT" and seen.status == 200 for seen in hub.seen)
    assert n_sent == 2
    hub.faults.refuse_uploads_after = None
    hub.forget()
    report = lazy.push_to_hub("tester/small", max_shard_size="1kB")
    sent = [s.path for s in hub.seen if s.method == "PUT"]
    assert len(sent) == len(set(sent)) == report.n_shards - n_sent + 1, "and the map"
    lazy.save(tmp_path / "local", max_shard_size="1kB")
    tiny.assert_same(
        tiny.opened(content(hub, "tester/small", tmp_path / "pushed")),
        tiny.opened(tmp_path / "local"),
    )


@pytest.mark.usefixtures("token")
def test_a_model_that_is_there_is_not_replaced_unless_asked(hub: HubServer, tmp_path: Path) -> None:
    lazy = streammap.open("org/bert").coalesce(width=2)
    lazy.push_to_hub("tester/small", max_shard_size=SHARD)
    with pytest.raises(OutputError, match="hf://tester/small@main: already exists"):
        lazy.push_to_hub("tester/small")
    lazy.push_to_hub("tester/small", overwrite=True)
    names = set(hub.content("tester/small"))
    assert "model.safetensors" in names
    assert "model.safetensors.index.json" not in names
    assert not any(name.startswith("model-") for name in names)


def test_a_push_needs_a_token(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refused("coalesce", "org/bert", "--width", 2, "--push-to-hub", "tester/small")
    assert "error: hf://tester/small@main: pushing needs a token, and none is set" in message
    assert "hint: log in with one that may write: hf auth login" in message
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refused("coalesce", "org/bert", "--width", 2, "--push-to-hub", "tester/small")
    assert "the Hub does not accept the token" in message
