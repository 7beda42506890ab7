"""A folder or file at any URL that fsspec knows: s3://, gs://, az://, https://, memory:// ...

Drivers and credentials are fsspec's: AWS_PROFILE, GOOGLE_APPLICATION_CREDENTIALS, or its own
configuration files (~/.config/fsspec). Reads are ranges; nothing touches the disk.
"""

import posixpath
import threading
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, final

from streammap.common import own
from streammap.errors import CheckpointError, redacted
from streammap.io.storage import drivers
from streammap.io.storage.base import N_CONNECTIONS, OpenFile, Stat, read_bytes
from streammap.io.storage.drivers import Info
from streammap.io.storage.prefetch import AheadFile
from streammap.io.storage.retry import RetryPolicy, TransientError

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
        self._given = url
        self._url = redacted(url).rstrip("/")
        """For people and records: nobody who reads them gets a password or a signature."""
        self._cancelled = own.Event()
        self._fs, self._root = drivers.filesystem(url)
        is_file = drivers.asked(self._look, self._url, url)
        self.file = posixpath.basename(self._url) if is_file else None
        if not self._files:
            raise CheckpointError(f"{url}: no such folder or file", hint="check the URL")

    def __str__(self) -> str:
        return self._url

    def _look(self) -> bool:
        self._fs.invalidate_cache()
        return drivers.is_file(self._fs, self._root)

    @cached_property
    def _files(self) -> dict[str, tuple[str, Info]]:
        """Relative name -> the driver's path and description of the file."""
        return drivers.asked(self._list, self._url, self._given)

    def _list(self) -> dict[str, tuple[str, Info]]:
        if self.file is None:
            return drivers.listed(self._fs, self._root)
        alone = {self.file: (self._root, self._fs.info(self._root))}
        try:
            beside = drivers.listed(self._fs, posixpath.dirname(self._root.partition("?")[0]))
        except Exception:  # a file may be readable where its folder can't be listed
            beside = {}
        return {**beside, **alone}

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
        return name in self._files

    def names(self) -> Collection[str]:
        """All files of the folder and of those inside."""
        return self._files.keys()

    def path(self, name: str) -> Path | None:
        """None: never on this machine."""
        return None

    def stat(self, name: str) -> Stat:
        """Its size and version.

        Raises:
            CheckpointError: the driver does not know them.
        """
        path, info = self._files[name]
        if info.get("size") is None:  # a web server's list has names alone
            info = drivers.asked(lambda: self._fs.info(path), self.where(name), self._given)
            self._files[name] = path, info
        if info.get("size") is None:
            raise CheckpointError(
                f"{self.where(name)}: the server does not say how large it is",
                hint="download it, and name the folder",
            )
        return stat_of(info)

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small file."""
        stat = self.stat(name)
        if stat.nbytes > limit:
            raise CheckpointError(f"{self.where(name)}: {stat.nbytes} bytes, at most {limit}")
        return bytes(read_bytes(self.peek(name), 0, stat.nbytes))

    def peek(self, name: str) -> OpenFile:
        """The file."""
        stat, (path, _) = self.stat(name), self._files[name]
        where = self.where(name)
        return RemoteFile(self._fs, path, where, stat, self._cancelled, given=self._given)

    def open(self, name: str, stat: Stat) -> OpenFile:
        """The file; its bytes can be prefetched."""
        return AheadFile(self.peek(name))

    def expect(self, names: tuple[str, ...]) -> None:
        """Nothing to fetch: tensors are read one by one."""
        self._cancelled.clear()


def stat_of(info: Info) -> Stat:
    """Size and version of a file, from its driver's description."""
    value = next((info[key] for key in _VERSIONS if info.get(key)), "unknown")
    # A listing may give a number where a query for one file gives a date.
    version = value.timestamp() if isinstance(value, datetime) else value
    return Stat(int(info["size"]), 0, str(version).strip('"'))


@final
class RemoteFile(OpenFile):
    """A file that is read by ranges. Nothing is kept."""

    def __init__(
        self,
        fs: Any,
        path: str,
        where: str,
        stat: Stat,
        cancelled: threading.Event,
        *,
        given: str = "",
    ) -> None:
        """Connect to nothing yet.

        Args:
            path: The driver's.
            where: What messages call it.
            given: The URL that it was opened by, which may have secrets.
        """
        self._fs, self._path, self._where, self._given = fs, path, where, given
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
                failure = drivers.explained(self._where, error, self._given)
                if drivers.is_lasting(error):
                    raise failure from error
                reason = f"no answer ({failure.message.removeprefix(f'{self._where}: ')})"
                patience.wait(TransientError(reason), f" at byte {offset + n_done}")
                continue
            if len(content) == self._stat.nbytes > len(view) - n_done:
                raise CheckpointError(
                    f"{self._where}: the server sends whole files, expected one that sends parts",
                    hint="download the folder, and name it",
                )
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

        def ask() -> Stat:
            self._fs.invalidate_cache()
            return stat_of(self._fs.info(self._path))

        stat = drivers.asked(ask, self._where, self._given)
        if stat != self._stat:
            raise CheckpointError(
                f"{self._where}: {stat.nbytes} bytes, version {stat.version}; it had "
                f"{self._stat.nbytes}, version {self._stat.version}, when it was opened",
                hint="is another program writing it?",
            )

    def cancel(self) -> None:
        """Let waiting reads end in an error."""
        self._cancelled.set()
