"""A folder or file at a URL that fsspec knows, as the destination of a result.

Object stores show a file when it is complete (a multipart upload ends in one step). Elsewhere it is
sent under a temporary name first.
"""

import posixpath
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, final

from streammap.errors import CheckpointError, OutputError, redacted
from streammap.io import filenames
from streammap.io.storage import drivers, remote
from streammap.io.storage.retry import TransientError, patiently

_ATOMIC = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "memory"}
"""File systems that show a file when it is complete."""
_Result = TypeVar("_Result")


@final
class RemoteSink:
    """A folder or file of a file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        """Load the driver.

        Raises:
            OutputError: no driver for the URL, or it is not installed.
        """
        self._given = url
        self.label = redacted(url).rstrip("/")
        self.file = (
            posixpath.basename(self.label) if self.label.endswith(filenames.WEIGHTS) else None
        )
        try:
            self._fs, root = drivers.filesystem(url)
        except CheckpointError as error:
            raise OutputError(error.message, hint=error.hint) from error
        self._folder = posixpath.dirname(root) if self.file else root
        self._is_atomic = bool(_ATOMIC & set(_protocols(self._fs)))

    def names(self) -> Mapping[str, str]:
        """The files that exist, each with its size and version."""

        def ask() -> Mapping[str, str]:
            self._fs.invalidate_cache()
            try:
                infos = self._fs.find(self._folder, detail=True)
            except FileNotFoundError:
                return {}
            base = len(self._folder.rstrip("/"))
            return {str(path)[base:].lstrip("/"): _version(info) for path, info in infos.items()}

        return self._patiently(ask, self.label)

    def is_harmless(self, name: str) -> bool:
        """Never."""
        return False

    def put(self, name: str, path: Path) -> str:
        """Send a file."""
        nbytes = path.stat().st_size

        def send() -> str:
            self._send(name, partial(self._fs.put_file, str(path)))
            self._fs.invalidate_cache()
            info = self._fs.info(f"{self._folder}/{name}")
            if int(info["size"]) != nbytes:
                raise OSError(f"{info['size']} bytes are there, {nbytes} were sent")
            return _version(info)

        return self._patiently(send, f"{self.label}: {name}")

    def put_all(self, contents: Mapping[str, bytes]) -> None:
        """Send small files, one after the other."""
        for name, content in contents.items():

            def write(target: str, content: bytes = content) -> None:
                self._fs.pipe_file(target, content)

            self._patiently(partial(self._send, name, write), f"{self.label}: {name}")

    def _send(self, name: str, write: Callable[[str], object]) -> None:
        """Let `write` make a file, which gets its name when it is complete."""
        target = f"{self._folder}/{name}"
        written = target if self._is_atomic else f"{target}.partial"
        self._fs.makedirs(posixpath.dirname(target), exist_ok=True)
        write(written)
        if not self._is_atomic:
            self._fs.mv(written, target)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, one after the other."""
        for name in names:
            where = f"{self._folder}/{name}"
            self._patiently(partial(self._fs.rm_file, where), f"{self.label}: {name}")

    def extras(self) -> Iterable[tuple[str, bytes]]:
        """None."""
        return ()

    def _patiently(self, do: Callable[[], _Result], where: str) -> _Result:
        def explain(error: Exception) -> CheckpointError | TransientError:
            failure = drivers.explained(where, error, self._given)
            if drivers.is_lasting(error):
                return failure
            return TransientError(f"not sent ({failure.message.removeprefix(f'{where}: ')})")

        try:
            return patiently(do, explain, where=where, cancelled=threading.Event())
        except CheckpointError as error:
            raise OutputError(error.message, hint=error.hint) from error


def _protocols(fs: Any) -> tuple[str, ...]:
    protocol = fs.protocol
    return (protocol,) if isinstance(protocol, str) else tuple(protocol)


def _version(info: Mapping[str, Any]) -> str:
    stat = remote.stat_of(info)
    return f"{stat.nbytes} {stat.version}"
