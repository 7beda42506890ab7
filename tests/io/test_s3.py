"""A folder in an S3-compatible store: moto's server on this machine, and s3fs's own client."""

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import streammap
from streammap.errors import CheckpointError
from tests.io.test_hub import bert, same_but_for_origin
from tests.support.typed import ok

pytest.importorskip("s3fs", reason="pip install s3fs")
pytest.importorskip("moto", reason="pip install 'moto[server]'")
pytestmark = pytest.mark.filterwarnings("default")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty bucket, and the environment that leads to it."""
    import s3fs
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # All servers of a process share their buckets: forget those of other tests.
    urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir("models")
    yield "s3://models"
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_a_folder_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    import s3fs

    folder = bert(tmp_path / "bert")
    s3fs.S3FileSystem().put(str(folder), f"{bucket}/bert", recursive=True)
    streammap.coalesce(folder, tmp_path / "local", width=2, depth=2)
    ok("coalesce", f"{bucket}/bert", tmp_path / "out", "--width", 2, "--depth", 2)
    same_but_for_origin(tmp_path / "out", tmp_path / "local")
    with pytest.raises(CheckpointError, match="no such folder or file"):
        streammap.open(f"{bucket}/none")
    with pytest.raises(CheckpointError, match="s3://nobucket/none"):
        streammap.open("s3://nobucket/none")
