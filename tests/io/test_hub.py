"""Models of the Hub as sources, through huggingface_hub's own client and a Hub on this machine."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streammap
from streammap.errors import CheckpointError
from streammap.io.storage import hub_name, retry
from streammap.testing.hubserver import HubServer
from tests.cli.test_cli import refused
from tests.support import optimized, tiny
from tests.support.typed import ok

SIZES = tiny.Sizes(heads=4, layers=4, vocab=3000)
"""Five shards of 65 kB or less."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub with org/bert, an empty cache, no token, and no patience."""
    with HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "none"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(retry, "WAITS_SECONDS", (0.01,) * 6)
        server.add("org/bert", bert(tmp_path / "bert"))
        yield server


def bert(folder: Path, *, seed: int = 0) -> Path:
    tiny.write(folder, tiny.bert(SIZES, seed=seed), tiny.bert_config(SIZES), n_shards=5)
    tiny.file(folder / "tokenizer.json", '{"version": "1.0"}')
    (folder / "1_Pooling").mkdir()
    tiny.file(folder / "1_Pooling" / "config.json", '{"word_embedding_dimension": 8}')
    (folder / "onnx").mkdir()
    tiny.file(folder / "onnx" / "model.onnx", "no part of it")
    return folder


def same_but_for_origin(found: Path, expected: Path) -> None:
    """Two results with the same files, but for where they say that they are from."""
    one, other = tiny.tree(found), tiny.tree(expected)
    one.pop("streammap.json")
    other.pop("streammap.json")
    assert one == other


def shards_fetched(hub: HubServer) -> set[str]:
    """Weight files of which whole bodies were sent."""
    whole = [s for s in hub.seen if s.method == "GET" and not s.span and s.status == 200]
    return {Path(s.path).name for s in whole if s.path.endswith(".safetensors")}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("redirects", [False, True])
def test_a_model_of_the_hub_gives_the_bytes_of_its_folder(
    hub: HubServer, tmp_path: Path, stream: bool, redirects: bool
) -> None:
    if redirects:
        hub.redirect()
    streammap.coalesce(tmp_path / "bert", tmp_path / "local", width=2, depth=2)
    streammap.coalesce("org/bert", tmp_path / "out", width=2, depth=2, stream=stream)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_text().count("4") == 1
    assert not (tmp_path / "out" / "onnx").exists()


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_an_optimizer_s_state_comes_along(hub: HubServer, tmp_path: Path, stream: bool) -> None:
    folder = tmp_path / "bert"
    names = streammap.open(folder).plan.specs
    state = {name: {"exp_avg": torch.rand(spec.shape)} for name, spec in names.items()}
    optimized.write(folder / optimized.FILE, state)
    hub.add("org/trained", folder)
    streammap.coalesce(folder, tmp_path / "local", width=2, optimizer=True)
    streammap.coalesce("org/trained", tmp_path / "out", width=2, optimizer=True, stream=stream)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    assert (tmp_path / "out" / optimized.FILE).exists()


def test_planning_and_inspecting_fetch_kilobytes(hub: HubServer, tmp_path: Path) -> None:
    tiny.write(
        tmp_path / "wide",
        tiny.bert(tiny.Sizes(heads=16, head_dim=8, layers=4, vocab=20_000)),
        tiny.bert_config(tiny.Sizes(heads=16, head_dim=8, layers=4, vocab=20_000)),
        n_shards=5,
    )
    assert sum(f.stat().st_size for f in (tmp_path / "wide").iterdir()) > 10_000_000
    hub.add("org/wide", tmp_path / "wide")
    said = ok("plan", "coalesce", "org/wide", "--width", 2)
    assert "16 -> 8" in said
    ok("inspect", "org/wide")
    assert hub.nbytes_sent < 1_000_000
    assert shards_fetched(hub) == set()
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_refusals_come_before_any_weight(hub: HubServer) -> None:
    assert "heads" in refused("coalesce", "org/bert", "out", "--width", 3)
    assert shards_fetched(hub) == set()


def test_a_stream_uses_no_disk_but_the_output(hub: HubServer, tmp_path: Path) -> None:
    before = set(tmp_path.iterdir())
    streammap.coalesce("org/bert", tmp_path / "out", width=2, stream=True)
    assert set(tmp_path.iterdir()) - before == {tmp_path / "out"}


def test_a_stream_fetches_each_byte_once(hub: HubServer, tmp_path: Path) -> None:
    lazy = streammap.open("org/bert", stream=True)
    hub.forget()
    report = lazy.coalesce(width=2, depth=2).save(tmp_path / "out")
    ranges = [s for s in hub.seen if s.path.endswith(".safetensors")]
    assert sum(s.nbytes for s in ranges) == report.nbytes_read
    assert len(ranges) < 30, "neighbours are fetched together"


def test_what_goes_along_is_looked_at_once(hub: HubServer, tmp_path: Path) -> None:
    """Once to see whether a folder is another checkpoint, once for the copy."""
    streammap.open("org/bert", stream=True).save(tmp_path / "out")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()
    asked = [seen for seen in hub.seen if seen.path.endswith("1_Pooling/config.json")]
    assert len([seen for seen in asked if seen.method == "GET"]) == 2


def test_only_the_shards_that_a_plan_needs_are_fetched(hub: HubServer, tmp_path: Path) -> None:
    listed = ("pooler.dense.weight", "embeddings.word_embeddings.weight")
    files = {"small": listed[:1], "large": listed[1:]}
    state = tiny.bert(SIZES)
    config = {**tiny.bert_config(SIZES), "num_hidden_layers": 4}
    weight_map: dict[str, object] = {}
    layers = {f"layer{i}": [k for k in state if f"layer.{i}." in k] for i in range(4)}
    rest = [k for k in state if "layer." not in k and k not in listed]

    (tmp_path / "by-layer").mkdir()
    for name, keys in {**files, **layers, "rest": rest}.items():
        save_file({k: state[k] for k in keys}, tmp_path / "by-layer" / f"{name}.safetensors")
        weight_map |= dict.fromkeys(keys, f"{name}.safetensors")
    tiny.write_index(tmp_path / "by-layer", weight_map)
    tiny.file(tmp_path / "by-layer" / "config.json", json.dumps(config))
    hub.add("org/by-layer", tmp_path / "by-layer")
    streammap.coalesce("org/by-layer", tmp_path / "out", layers=[[0, 1], [3]])
    assert shards_fetched(hub) == {f"{n}.safetensors" for n in (*files, *layers, "rest")} - {
        "layer2.safetensors"
    }


def test_a_second_run_fetches_nothing(hub: HubServer, tmp_path: Path) -> None:
    streammap.coalesce("org/bert", tmp_path / "out", width=2)
    hub.forget()
    streammap.coalesce("org/bert", tmp_path / "again", width=2)
    assert [seen.path for seen in hub.seen] == ["/api/models/org/bert/revision/main"]
    assert tiny.tree(tmp_path / "out") == tiny.tree(tmp_path / "again")


def test_offline_the_cache_serves(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streammap.coalesce("org/bert", tmp_path / "out", width=2)
    hub.forget()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    streammap.coalesce("org/bert", tmp_path / "again", width=2)
    streammap.coalesce("org/bert@main", tmp_path / "streamed", width=2, stream=True)
    assert hub.seen == ()
    whole, again = tiny.tree(tmp_path / "out"), tiny.tree(tmp_path / "again")
    # The cache does not know what it lacks: its record has no note on files that are left out.
    assert b"onnx/: further weights" in whole.pop("streammap.json")
    assert b"onnx/" not in again.pop("streammap.json")
    assert whole == again
    with pytest.raises(CheckpointError, match="nor is it in the Hub's cache") as error:
        streammap.open("org/other")
    assert "hf download org/other" in str(error.value.hint)


def test_offline_a_shard_that_the_cache_lacks_is_named(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streammap.open("org/bert").summary()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00005.safetensors: missing"):
        streammap.open("org/bert")


@pytest.mark.parametrize("stream", [False, True])
def test_connections_that_break_off_do_no_harm(
    hub: HubServer, tmp_path: Path, stream: bool
) -> None:
    streammap.coalesce(tmp_path / "bert", tmp_path / "local", width=2)
    hub.faults.drop_every = 5
    streammap.coalesce("org/bert", tmp_path / "out", width=2, stream=stream)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")


def test_a_stream_goes_on_from_the_byte_reached(hub: HubServer, tmp_path: Path) -> None:
    lazy = streammap.open("org/bert", stream=True).coalesce(width=2)
    hub.forget()
    hub.faults.drop_every = 3
    report = lazy.save(tmp_path / "out")
    ranges = [s for s in hub.seen if s.path.endswith(".safetensors")]
    assert any(s.nbytes and s.span != "" for s in ranges)
    assert sum(s.nbytes for s in ranges) == report.nbytes_read


@pytest.mark.parametrize("stream", [False, True])
def test_a_hub_that_is_busy_is_asked_again(hub: HubServer, tmp_path: Path, stream: bool) -> None:
    streammap.coalesce(tmp_path / "bert", tmp_path / "local", width=2)
    hub.faults.unavailable = 2
    streammap.coalesce("org/bert", tmp_path / "out", width=2, stream=stream)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    assert sum(seen.status == 503 for seen in hub.seen) >= 10


def test_a_hub_that_stays_busy_is_given_up(hub: HubServer, tmp_path: Path) -> None:
    lazy = streammap.open("org/bert", stream=True).coalesce(width=2)
    hub.faults.unavailable = 1000
    with pytest.raises(CheckpointError, match=r"the Hub answers 503 at byte \d+, 7 times in a row"):
        lazy.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hub.faults.unavailable = 0
    lazy.save(tmp_path / "out")


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_are_too_short_are_no_end(
    hub: HubServer, tmp_path: Path, stream: bool
) -> None:
    lazy = streammap.open("org/bert", stream=stream).coalesce(width=2)
    hub.faults.short_by = 7
    lazy.save(tmp_path / "out")
    streammap.coalesce(tmp_path / "bert", tmp_path / "local", width=2)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")


@pytest.mark.parametrize("stream", [False, True])
def test_a_shard_that_changes_midway_is_refused(
    hub: HubServer, tmp_path: Path, stream: bool
) -> None:
    lazy = streammap.open("org/bert", stream=stream).coalesce(width=2)
    hub.faults.etag = "0" * 64
    with pytest.raises(CheckpointError, match=f"its content changed: etag {'0' * 64}, it was"):
        lazy.save(tmp_path / "out")


def test_a_server_without_ranges_is_refused_in_a_stream(hub: HubServer, tmp_path: Path) -> None:
    lazy = streammap.open("org/bert", stream=True).coalesce(width=2)
    hub.faults.ignore_ranges = True
    with pytest.raises(CheckpointError, match="sends whole files only") as error:
        lazy.save(tmp_path / "out")
    assert error.value.hint == "use it without --stream"


def test_the_commit_is_pinned_when_it_is_opened_and_recorded(
    hub: HubServer, tmp_path: Path
) -> None:
    lazy = streammap.open("org/bert@main", stream=True)
    commit = hub.repos["org/bert"].branches["main"]
    hub.add("org/bert", bert(tmp_path / "newer", seed=1))
    lazy.coalesce(width=2).save(tmp_path / "out")
    streammap.coalesce(tmp_path / "bert", tmp_path / "local", width=2)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    (source,) = json.loads((tmp_path / "out" / "streammap.json").read_text())["sources"]
    expected = {"name": "bert", "repo": "org/bert", "revision": "main", "commit": commit}
    assert {name: source[name] for name in expected} == expected
    assert len(source["files"][0]["version"]) == 64


def test_a_result_is_verified_against_the_hub(hub: HubServer, tmp_path: Path) -> None:
    streammap.open("org/bert", stream=True).coalesce(width=2).save(tmp_path / "out")
    found = streammap.verify(tmp_path / "out")
    assert found.ok
    assert "plan" not in found.checks
    (told,) = found.skipped
    assert "is on another machine" in told
    found = streammap.verify(tmp_path / "out", sources="org/bert")
    assert found.ok
    assert "plan" in found.checks
    assert not found.skipped


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.add("org/bert", bert(tmp_path / "newer", seed=1), revision="v2/beta")
    expected = tiny.opened(tmp_path / "newer")
    for name in (
        "org/bert@v2/beta",
        f"org/bert@{commit}",
        f"hf://org/bert@{commit}",
        "hf://org/bert@v2%2Fbeta",
    ):
        tiny.assert_same(dict(streammap.open(name, stream=True).tensors()), expected)


def test_a_folder_and_a_file_inside(hub: HubServer, tmp_path: Path) -> None:
    inside = tmp_path / "repo" / "step" / "10"
    state = tiny.bert(SIZES)
    tiny.write(inside, state, tiny.bert_config(SIZES))
    torch.save({"model": state}, tmp_path / "repo" / "best.pth")
    hub.add("org/runs", tmp_path / "repo")
    found = streammap.open("hf://org/runs/step/10")
    tiny.assert_same(dict(found.tensors()), state)
    found.coalesce(width=2).save(tmp_path / "out")
    for stream in (True, False):
        lazy = streammap.open(
            "hf://org/runs@main/best.pth", config=inside / "config.json", stream=stream
        )
        tiny.assert_same(dict(lazy.tensors()), state)


def test_torch_files_are_streamed_too(hub: HubServer, tmp_path: Path) -> None:
    state = tiny.bert(SIZES)
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    tiny.file(tmp_path / "old" / "config.json", json.dumps(tiny.bert_config(SIZES)))
    hub.add("org/old", tmp_path / "old")
    hub.forget()
    lazy = streammap.open("org/old", stream=True)
    assert hub.nbytes_sent < (tmp_path / "old" / "pytorch_model.bin").stat().st_size
    tiny.assert_same(dict(lazy.tensors()), state)


def test_transposed_tensors_are_fetched_whole(hub: HubServer, tmp_path: Path) -> None:
    state = {k: t.T.contiguous().T if t.dim() == 2 else t for k, t in tiny.bert(SIZES).items()}
    (tmp_path / "old").mkdir()
    torch.save(state, tmp_path / "old" / "pytorch_model.bin")
    tiny.file(tmp_path / "old" / "config.json", json.dumps(tiny.bert_config(SIZES)))
    hub.add("org/old", tmp_path / "old")
    with pytest.raises(CheckpointError, match="transposed tensors") as error:
        streammap.open("org/old", stream=True)
    assert "without --stream" in str(error.value.hint)
    tiny.assert_same(dict(streammap.open("org/old").tensors()), state)


def test_a_chain_of_models_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    streammap.coalesce(tmp_path / "bert", tmp_path / "small", width=2)
    hub.add("org/small", tmp_path / "small")
    ok("decoalesce", "org/small", tmp_path / "out", "--blend-with", "org/bert", "--stream")
    ok("decoalesce", tmp_path / "small", tmp_path / "local", "--blend-with", tmp_path / "bert")
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    ok("decoalesce", tmp_path / "small", tmp_path / "by-map", "--map", "org/small")
    ok("plan", "decoalesce", "org/small", "--target", "org/bert")


def test_a_folder_wins_over_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "org" / "bert", tiny.bert(SIZES, seed=7), tiny.bert_config(SIZES))
    found = streammap.open("org/bert")
    assert found.plan.sources[0].is_local
    assert hub.seen == ()
    assert streammap.open("hf://org/bert").plan.sources[0].origin["repo"] == "org/bert"


def test_a_path_is_never_looked_up_on_the_hub(hub: HubServer) -> None:
    with pytest.raises(CheckpointError, match="org/bert: no such folder or file"):
        streammap.open(Path("org/bert"))
    for text in ("./org/bert", "bert", "/org/bert", "org/bert/", "org/bert/x", "org/b.safetensors"):
        with pytest.raises(CheckpointError, match="no such folder or file"):
            streammap.open(text)
    assert hub.seen == ()


def test_no_repository(hub: HubServer) -> None:
    message = refused("inspect", "org/none")
    assert message.startswith("error: org/none: no folder of that name here; as a model of the Hub")
    assert f"not on {hub.url}, or private" in message
    assert "hf auth login" in message
    assert "hint: check the name" in refused("inspect", "hf://org/none")


def test_a_private_one_needs_a_token(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/mine", tmp_path / "bert", private=True)
    hub.redirect()
    assert "or private" in refused("inspect", "org/mine")
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    for stream in ((), ("--stream",)):
        ok("coalesce", "org/mine", tmp_path / f"out{len(stream)}", "--width", 2, *stream)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    message = refused("inspect", "org/mine")
    assert "the Hub does not accept the token" in message
    assert "hf auth login" in message


def test_a_gated_one_says_where_to_accept_its_terms(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", tmp_path / "bert", gated=True)
    for _ in range(2):
        message = refused("plan", "coalesce", "org/gated", "--width", 2)
        assert "gated" in message
        assert f"accept them at {hub.url}/org/gated" in message
        monkeypatch.setenv("HF_TOKEN", "hf_test")
    hub.let_in("tester", "org/gated")
    ok("plan", "coalesce", "org/gated", "--width", 2)


def test_no_revision(hub: HubServer) -> None:
    message = refused("inspect", "org/bert@v9")
    assert "no such revision" in message
    assert f"{hub.url}/org/bert" in message


def test_no_network(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    message = refused("inspect", "org/bert")
    assert "no connection to http://127.0.0.1:9" in message
    assert "7 times in a row" in message


def test_a_broken_shard_is_refused_by_its_header(hub: HubServer, tmp_path: Path) -> None:
    shard = tmp_path / "bert" / "model-00003-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    hub.add("org/broken", tmp_path / "bert")
    with pytest.raises(CheckpointError, match=r"model-00003-of-00005\.safetensors: truncated"):
        streammap.open("org/broken")


def test_a_header_larger_than_the_first_range(hub: HubServer, tmp_path: Path) -> None:
    sizes = tiny.Sizes(heads=1, layers=150)
    state = tiny.bert(sizes)
    tiny.write(tmp_path / "deep", state, tiny.bert_config(sizes))
    hub.add("org/deep", tmp_path / "deep")
    assert (
        streammap.open("org/deep", stream=True).keys() == streammap.open(tmp_path / "deep").keys()
    )


def test_large_side_files_stay_where_they_are(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streammap.output.side_files.MAX_FETCHED_NBYTES", 100)
    tiny.file(tmp_path / "bert" / "video.mp4", "x" * 101)
    hub.add("org/bert", tmp_path / "bert")
    said = ok("coalesce", "org/bert", tmp_path / "out", "--width", 2)
    assert "note       bert: video.mp4: large, not copied" in said
    assert not (tmp_path / "out" / "video.mp4").exists()
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_names() -> None:
    name = hub_name.parse("org/name@refs/pr/7")
    assert (name.repo, name.revision, name.path) == ("org/name", "refs/pr/7", "")
    name = hub_name.parse("hf://models/org/name@refs/pr/7/a/b.pth")
    assert (name.repo, name.revision, name.path) == ("org/name", "refs/pr/7", "a/b.pth")
    for text in ("hf://datasets/org/name", "hf://name", "hf://"):
        with pytest.raises(CheckpointError, match="not a model of the Hub"):
            hub_name.parse(text)


_INTERRUPTED = """
import os, signal, sys, threading, torch
import streammap
from streammap.engine import kernels
from streammap.common.events import Started
def listen(event):
    if isinstance(event, Started):
        threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
lazy = streammap.open("org/bert", stream=sys.argv[1] == "stream").coalesce(width=2)
try:
    lazy.save(sys.argv[2], progress=listen)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cache", "stream"])
def test_an_interrupted_run_ends_at_once(hub: HubServer, tmp_path: Path, way: str) -> None:
    wide = tiny.Sizes(heads=16, head_dim=8, layers=4, vocab=20_000)
    tiny.write(tmp_path / "wide", tiny.bert(wide), tiny.bert_config(wide))
    hub.add("org/bert", tmp_path / "wide")
    hub.faults.nbytes_per_second = 5e6
    said = subprocess.run(
        [sys.executable, "-c", _INTERRUPTED, way, str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "HF_ENDPOINT": hub.url},
    )
    assert said.stdout.strip() == "interrupted"
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
