"""A folder or file at any URL that fsspec knows: s3://, gs://, az://, https://, memory:// ...

Drivers and credentials are fsspec's: AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, or its own
configuration files (~/.config/fsspec). Reads are ranges; nothing touches the disk.
"""

import importlib
import posixpath
import threading
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, final

from streammap.common import own
from streammap.errors import CheckpointError
from streammap.io.storage.base import N_CONNECTIONS, OpenFile, Stat, read_bytes
from streammap.io.storage.prefetch import AheadFile
from streammap.io.storage.retry import RetryPolicy, TransientError

_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "fsspec aiohttp",
    "https": "fsspec aiohttp",
}
"""Scheme of a URL -> what to install for it."""
_VERSIONS = (
    "ETag",
    "etag",
    "md5Hash",
    "content_md5",
    "generation",
    "mtime",
    "LastModified",
    "last_modified",
    "updated",
    "created",
)
"""What drivers call a file's version."""
_MAX_DEPTH = 4


def filesystem(url: str) -> tuple[Any, str]:
    """Fsspec's file system of a URL, and the path in it.

    Raises:
        CheckpointError: an unknown kind of URL, or a driver that is not installed.
    """
    try:
        core = importlib.import_module("fsspec.core")
        fs, path = core.url_to_fs(url)
    except ImportError as error:
        raise CheckpointError(f"{url}: {error}", hint=_install(url)) from error
    except ValueError as error:
        raise CheckpointError(f"{url}: {error}", hint="check the URL") from error
    except OSError as error:
        raise explained(url, error) from error
    return fs, str(path).rstrip("/")


def explained(url: str, error: Exception) -> CheckpointError:
    """An error of a driver as one of ours."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{url}: no such folder or file", hint="check the URL")
    if isinstance(error, PermissionError) or "redential" in f"{type(error).__name__} {error}":
        return CheckpointError(
            f"{url}: access denied ({first_line(error)})",
            hint="check the credentials: AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, or "
            "~/.config/fsspec",
        )
    return CheckpointError(f"{url}: {first_line(error)}", hint="check the URL and the network")


def is_lasting(error: Exception) -> bool:
    """Whether a retry would fail too."""
    kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
    return isinstance(error, kinds) or "redential" in f"{type(error).__name__} {error}"


def _install(url: str) -> str:
    scheme = url.partition("://")[0].rpartition("::")[2]
    return f"pip install {_PACKAGES.get(scheme, 'fsspec')}"


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class, if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@final
class RemoteStorage:
    """A folder or file of a file system that fsspec knows."""

    n_at_once = N_CONNECTIONS
    is_streamed = True

    def __init__(self, url: str) -> None:
        """List the folder, or look up the file.

        Raises:
            CheckpointError: it does not exist, or can't be reached.
        """
        self._url = url.rstrip("/")
        self._cancelled = own.Event()
        self._fs, self._root = filesystem(url)
        try:
            self._fs.invalidate_cache()
            is_file = bool(self._fs.isfile(self._root))
        except Exception as error:  # drivers raise all kinds of errors
            raise explained(url, error) from error
        self.file = posixpath.basename(self._root) if is_file else None
        self._folder = posixpath.dirname(self._root) if is_file else self._root
        if not self._infos:
            raise CheckpointError(f"{url}: no such folder or file", hint="check the URL")

    def __str__(self) -> str:
        return self._url

    @cached_property
    def _infos(self) -> Mapping[str, Mapping[str, Any]]:
        """Relative name -> the driver's description of the file."""
        try:
            alone = {} if self.file is None else {self._root: self._fs.info(self._root)}
            try:
                listed = self._fs.find(self._folder, maxdepth=_MAX_DEPTH, detail=True)
            except Exception:
                if not alone:
                    raise
                listed = {}  # a file may be readable where its folder can't be listed
        except Exception as error:
            raise explained(self._url, error) from error
        base = len(self._folder.rstrip("/"))
        return {str(path)[base:].lstrip("/"): info for path, info in {**listed, **alone}.items()}

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return posixpath.basename(self._url) or self._url

    @property
    def address(self) -> str:
        """The URL."""
        return self._url

    @property
    def origin(self) -> Mapping[str, str]:
        """The URL."""
        return {"url": self._url}

    def where(self, name: str) -> str:
        """Its URL."""
        folder = self._url if self.file is None else self._url.rpartition("/")[0]
        return f"{folder}/{name}"

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._infos

    def names(self) -> Collection[str]:
        """All files of the folder and of those inside."""
        return self._infos

    def path(self, name: str) -> Path | None:
        """None: never on this machine."""
        return None

    def stat(self, name: str) -> Stat:
        """Its size and version."""
        return stat_of(self._infos[name])

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small file."""
        stat = self.stat(name)
        if stat.nbytes > limit:
            raise CheckpointError(f"{self.where(name)}: {stat.nbytes} bytes, at most {limit}")
        return bytes(read_bytes(self.peek(name), 0, stat.nbytes))

    def peek(self, name: str) -> OpenFile:
        """The file."""
        path = f"{self._folder}/{name}"
        return RemoteFile(self._fs, path, self.where(name), self.stat(name), self._cancelled)

    def open(self, name: str, stat: Stat) -> OpenFile:
        """The file; its bytes can be prefetched."""
        return AheadFile(self.peek(name))

    def expect(self, names: tuple[str, ...]) -> None:
        """Nothing to fetch: tensors are read one by one."""
        self._cancelled.clear()


def stat_of(info: Mapping[str, Any]) -> Stat:
    """Size and version of a file, from its driver's description."""
    value = next((info[key] for key in _VERSIONS if info.get(key)), "unknown")
    # A listing may give a number where a query for one file gives a date.
    version = value.timestamp() if isinstance(value, datetime) else value
    return Stat(int(info["size"]), 0, str(version).strip('"'))


@final
class RemoteFile(OpenFile):
    """A file that is read by ranges. Nothing is kept."""

    def __init__(
        self, fs: Any, path: str, where: str, stat: Stat, cancelled: threading.Event
    ) -> None:
        """Connect to nothing yet."""
        self._fs, self._path, self._where = fs, path, where
        self._stat, self._cancelled = stat, cancelled

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the file's bytes from `offset` on.

        Raises:
            CheckpointError: it can't be read, or ends before.
        """
        patience, n_done = RetryPolicy(self._where, self._cancelled), 0
        while n_done < len(view):
            try:
                content = self._fs.cat_file(
                    self._path, start=offset + n_done, end=offset + len(view)
                )
            except Exception as error:
                if is_lasting(error):
                    raise explained(self._where, error) from error
                reason = f"no answer ({first_line(error)})"
                patience.wait(TransientError(reason), f" at byte {offset + n_done}")
                continue
            if not content or len(content) > len(view) - n_done:
                raise CheckpointError(
                    f"{self._where}: {len(content)} bytes came from byte {offset + n_done} on, "
                    f"{len(view) - n_done} were asked for; it had {self._stat.nbytes} when it was "
                    "opened",
                    hint="is another program writing it?",
                )
            view[n_done : n_done + len(content)] = content
            n_done += len(content)
            patience.progress()

    def check_unchanged(self) -> None:
        """Ask for the file's size and version again.

        Raises:
            CheckpointError: it was written to since it was opened.
        """
        try:
            self._fs.invalidate_cache()
            stat = stat_of(self._fs.info(self._path))
        except Exception as error:
            raise explained(self._where, error) from error
        if stat != self._stat:
            raise CheckpointError(
                f"{self._where}: {stat.nbytes} bytes, version {stat.version}; it had "
                f"{self._stat.nbytes}, version {self._stat.version}, when it was opened",
                hint="is another program writing it?",
            )

    def cancel(self) -> None:
        """Let waiting reads end in an error."""
        self._cancelled.set()
