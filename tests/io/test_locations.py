"""Locations that mean harm, or hold secrets: what names a source, and what names a result."""

import base64
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

import streammap
from streammap.architectures import parser
from streammap.errors import (
    ArchitectureError,
    CheckpointError,
    OutputError,
    StreammapError,
    redacted,
)
from streammap.io.storage import drivers, resolve, retry
from tests.support import tiny, typed

SIZES = tiny.Sizes()
PASSWORD, SIGNATURE, KEY_ID = "p4ssw0rd", "s1gnatur3", "AKIAIOSFODNN7EXAMPLE"
SECRETS = (PASSWORD, SIGNATURE, KEY_ID)
QUERY = (
    f"X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={KEY_ID}/20250101/us-east-1/s3/aws4_request"
    f"&X-Amz-Signature={SIGNATURE}"
)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    folder = tiny.write(tmp_path / "big", tiny.bert(SIZES), tiny.bert_config(SIZES))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"word_embedding_dimension": 8}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def refused(*arguments: object) -> str:
    """The message of a command that is refused."""
    result = typed.run(*arguments)
    assert isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert result.exit_code in (1, 2)
    return result.stderr


class Server(http.server.SimpleHTTPRequestHandler):
    """Lists folders, and sends parts of files, to those who know the password or signature."""

    answers = 200

    def do_GET(self) -> None:
        if not self._is_known():
            return self.send_error(403)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            return super().do_GET()
        content = path.read_bytes()
        start, end = 0, len(content)
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.write(content[start:end])
        return None

    def do_HEAD(self) -> None:
        if not self._is_known():
            return self.send_error(403)
        return super().do_HEAD()

    def _is_known(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        knows = base64.b64decode(given) == f"me:{PASSWORD}".encode()
        return type(self).answers == 200 and (knows or f"X-Amz-Signature={SIGNATURE}" in self.path)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(big: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Of a web server for the folder above `big`."""
    monkeypatch.setattr(retry, "WAITS_SECONDS", (0.01,) * 6)
    monkeypatch.setattr(Server, "answers", 200)
    handler = functools.partial(Server, directory=str(big.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


# What a location must not tell.


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("https://me:pw@host/a?sig=x", "https://host/a"),
        ("https://host:8080/a", "https://host:8080/a"),
        ("https://me:1234@host:8080/a", "https://host:8080/a"),
        ("https://gh_token@host/a", "https://host/a"),
        ("https://me:p@ss@host/a", "https://host/a"),
        ("https://me:p/w?d@host/a", "https://host/a"),
        ("sftp://me:pw@host/a", "sftp://host/a"),
        ("abfs://container@account.dfs.core.windows.net/a", None),
        ("s3://bucket/a@v1/b", None),
        ("hf://org/name@main/a", None),
        ("memory://a@b/c", None),
        (f"in (https://host/a?{QUERY}): no", "in (https://host/a): no"),
        ("URL('https://host/a?sv=2020&sig=x%2F')", "URL('https://host/a')"),
        ("AWSAccessKeyId=A&Signature=B&Expires=1", "AWSAccessKeyId=***&Signature=***&Expires=1"),
        ("{'secret': 'abc', 'anon': False}", "{'secret': '***', 'anon': False}"),
        ("token=abc, tokens=3", "token=***, tokens=3"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer ***"),
        ("is hf_aBcDeFgHiJkLmN123 yours?", "is *** yours?"),
        ("hf_hub_download, hf_transformers", None),
        ("cls_token: shape [1], mask_token=3", None),
    ],
)
def test_secrets_of_a_text(text: str, told: str | None) -> None:
    assert redacted(text) == (text if told is None else told)
    assert redacted(redacted(text)) == redacted(text)
    assert StreammapError(text, hint=text).args == (redacted(text),)


@pytest.fixture(params=[f"me:{PASSWORD}@", ""], ids=["password", "presigned"])
def url(host: str, request: pytest.FixtureRequest) -> str:
    """A file at an address that is secret."""
    query = "" if request.param else f"?{QUERY}"
    return f"http://{request.param}{host}/big/model.safetensors{query}"


def test_no_secret_of_a_source_is_written_or_printed(
    url: str, host: str, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = ("--config", big / "config.json"), tmp_path / "out"
    told = [
        typed.ok("coalesce", url, out, "--width", 2, *config),
        typed.ok("plan", "coalesce", url, "--width", 2, "--json", *config),
        typed.ok("inspect", url, *config),
        typed.ok("inspect", url, "--json", *config),
        typed.ok("interpolate", url, big, tmp_path / "blend", "--alpha", 0.5, "--json", *config),
        typed.run("diff", big, url, "--json").output,
        typed.ok("verify", out, "--json", "--no-class-check"),
        typed.ok("verify", out, "--source", url, "--recompute", 2, "--no-class-check"),
        repr(streammap.open(url).plan),
        typed.run("coalesce", big, url).output,
        typed.run("verify", out, "--source", f"{url}=", "--source", "b").output,
    ]
    monkeypatch.setattr(Server, "answers", 403)
    for command in (("inspect",), ("verify",), ("coalesce", "--width", 2), ("diff", big)):
        ended = typed.run("--traceback", command[0], url, tmp_path / "none", *command[1:])
        assert ended.exit_code in (1, 2)
        told.append(ended.output)
    monkeypatch.setattr(Server, "answers", 200)
    told += map(os.fsdecode, typed_files(tmp_path))
    for n, text in enumerate(told):
        assert not [(n, secret) for secret in SECRETS if secret in text]
    (source,) = json.loads((out / "streammap.json").read_text())["sources"]
    assert source["url"] == f"http://{host}/big/model.safetensors"
    assert source["name"] == "model.safetensors"
    assert streammap.verify(out, sources=url, class_check=False).checks[:3] == (
        "structure",
        "record",
        "plan",
    )


def typed_files(folder: Path) -> Iterator[bytes]:
    """All that was written, but weights."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield os.fsencode(path) + path.read_bytes()


def test_an_unfinished_run_has_no_secret_and_another_signature_resumes_it(
    host: str, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = f"http://{host}/big/model.safetensors?{QUERY}"
    lazy = streammap.open(state, config=big / "config.json").coalesce(width=2)

    def stop(event: object) -> None:
        if "Wrote" in type(event).__name__:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        lazy.save(tmp_path / "out", progress=stop, max_shard_size=500, threads=1)
    left = [*typed_files(tmp_path / "out"), *map(str.encode, error.value.__notes__)]
    assert not [s for s in SECRETS for content in left if s.encode() in content]
    other = state.replace("20250101", "20260202")
    report = streammap.open(other, config=big / "config.json").coalesce(width=2)
    report.save(tmp_path / "out", max_shard_size=500)


def test_no_secret_of_a_place_for_results_is_told(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "WAITS_SECONDS", (0.01,) * 6)
    for place in (
        f"ftp://me:{PASSWORD}@127.0.0.1:1/out",
        f"http://127.0.0.1:1/out?sig={SIGNATURE}",
    ):
        told = refused("--traceback", "coalesce", big, place, "--width", 2)
        assert not [secret for secret in SECRETS if secret in told]


# What a web server says.


def test_a_web_server_that_lists_folders_is_a_folder(host: str, big: Path) -> None:
    for end in ("", "/"):
        place = resolve.locate(f"http://me:{PASSWORD}@{host}/big{end}", stream=False)
        assert place.file is None
        assert {"config.json", "model.safetensors", "1_Pooling/config.json"} <= {*place.names()}
        assert place.stat("tokenizer.json").nbytes == 2
    lazy = streammap.open(f"http://me:{PASSWORD}@{host}/big")
    tiny.assert_same(dict(lazy.tensors()), tiny.bert(SIZES))


def test_a_folder_elsewhere_without_a_config(big: Path) -> None:
    root = f"memory://{uuid.uuid4().hex}"
    fsspec.filesystem("memory").pipe_file(f"{root}/a.txt", b"a")
    told = refused("coalesce", big, big.parent / "out", "--width", 2, "--config", root)
    assert f"{root}/config.json: no such file" in told


def test_a_web_server_can_not_name_files_elsewhere() -> None:
    class Lists:
        def find(self, folder: str, **_: object) -> dict[str, dict[str, object]]:
            names = ("a", "../b", "c/../../d", "e\\f", "g\0", "//h", "i/j")
            return {f"{folder}/{name}": {"size": 1} for name in names}

    assert set(drivers.listed(Lists(), "bucket/x")) == {"a", "h", "i/j"}


def test_listings_without_an_end() -> None:
    class Lists:
        def walk(self, folder: str, **_: object) -> Iterator[tuple[str, object, dict[str, object]]]:
            while True:
                yield folder, {}, {}

    with pytest.raises(CheckpointError, match="more than 200 folders inside"):
        drivers.listed(Lists(), "http://host/x")


# What waits for ever, or breaks.

HOSTILE = (
    *("", " ", "\t\n", "file://", "a\0", "a/b\0c", "x" * 300, "x/" * 3000, "~nobody/x"),
    *(
        "://",
        "http://",
        "http://[::1",
        "https://[::1]:99999/x",
        "http://a b/c",
        "http://127.0.0.1:1/x",
    ),
    *("reference://x", "jupyter://x", "zip://a::/etc/passwd", "tar://x", "dir://x", "generic://x"),
    *("filecache://x", "simplecache::file:///etc", "local:///etc", "data:text/plain,x", "data://x"),
    *("github://x/y", "git://x", "dbfs://x", "ftp://127.0.0.1:1/x", "webhdfs://127.0.0.1:1/x"),
    *("memory://", "memory://none", "nosuch://x", "hf://", "hf://x", "hf://a/b@", "hf://[::1/x"),
    *(
        "file://[::1/x",
        "file://host/none",
        "sftp://[::1",
        "lakefs://x",
        "s3:///",
        "gs://",
        "abfs://",
    ),
)


@pytest.mark.parametrize("location", HOSTILE)
def test_a_hostile_location_ends_in_an_error(
    location: str, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setattr(retry, "WAITS_SECONDS", (0.01,) * 6)
    out = tmp_path / "out"
    commands: tuple[tuple[object, ...], ...] = (
        ("inspect", location),
        ("plan", "coalesce", location, "--width", 2),
        ("coalesce", location, out, "--width", 2),
        ("coalesce", big, out, "--width", 2, "--config", location),
        ("decoalesce", big, out, "--map", location),
        ("decoalesce", big, out, "--width", 2, "--arch", f"{location}.toml"),
        ("coalesce", big, out, "--width", 2, "--scheme", location),
        ("interpolate", big, location, out, "--alpha", 0.5),
        ("diff", big, location),
        ("verify", location),
        ("apply", location, out),
    )
    for command in commands:
        before = time.monotonic()
        told = refused(*command)
        assert told.startswith("error: "), command
        assert time.monotonic() - before < 5, command
    assert not out.exists()


@pytest.mark.parametrize("place", ["", " ", "file://", "a\0", "out\0", "/proc/out", "/proc/a/b"])
def test_a_place_that_can_not_be_ends_in_an_error(place: str, big: Path) -> None:
    told = refused("coalesce", big, place, "--width", 2, "--overwrite")
    assert told.startswith("error: ")
    with pytest.raises(OutputError):
        streammap.open(big).coalesce(width=2).save(place)


@pytest.mark.parametrize("command", ["inspect BIG", "coalesce BIG out --width 2", "diff BIG big"])
def test_a_current_folder_that_was_removed(command: str, big: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    words = command.replace("BIG", str(big)).split()
    script = f"import os, shutil, sys; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); "
    script += "from streammap.cli.main import main; sys.argv[0] = 'streammap'; main()"
    environment = {**os.environ, "PYTHONPATH": str(Path(streammap.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: the current folder: No such file")


def test_a_dotted_key_without_an_end() -> None:
    before = time.monotonic()
    for text in ("a" + ".a" * 100_000 + " = 1", "[" + ".".join("a" * 100_000) + "]"):
        with pytest.raises(ArchitectureError, match="more than 200 dots in a line"):
            parser.read(text, name="x")
    assert time.monotonic() - before < 1
    worst = "\n".join(f"k{i}" + ".a" * 200 + "=1" for i in range(500))
    with pytest.raises(ArchitectureError, match="unknown entry"):
        parser.read(worst, name="x")
