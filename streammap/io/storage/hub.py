"""A repository of the Hub at one commit, through huggingface_hub: its cache, tokens and settings.

    org/name, org/name@revision, hf://org/name@revision/folder/or/file

The revision is resolved to a commit once, and all later requests name that commit, so that a push
in between changes nothing. Headers are fetched by ranges. Weights come through the client's own
download into its cache (hub_file.py), or by ranges without touching the disk; files that are in the
cache already are read there.
"""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeVar, final

from streammap.common import own
from streammap.errors import CheckpointError
from streammap.io.storage import hub_client, nearby
from streammap.io.storage.base import N_CONNECTIONS, OpenFile, Stat, read_bytes
from streammap.io.storage.hub_file import CachedFile, Downloads, RangeFile
from streammap.io.storage.hub_name import HubName
from streammap.io.storage.local import LocalFile
from streammap.io.storage.prefetch import AheadFile
from streammap.io.storage.retry import TransientError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class _Listing:
    """A commit and its files."""

    sha: str
    files: Mapping[str, Stat]


@final
class HubStorage:
    """A repository's folder, or a file of it, at one commit."""

    n_at_once = N_CONNECTIONS

    def __init__(self, name: HubName, *, stream: bool) -> None:
        """Ask for the commit and its files; offline, look into the cache.

        Raises:
            CheckpointError: no such repository or revision, no access to it, no connection.
        """
        self._name = name
        self._client = hub_client.Client(name.repo, own.Event())
        self._seen: dict[str, str] = {}
        """The etags of answers so far: each must stay as it is."""
        self.is_offline = hub_client.is_offline()
        listing = self._cached_listing() if self.is_offline else self._listing()
        self.commit = listing.sha
        self._files = listing.files
        inside = name.path
        self.file = PurePosixPath(inside).name if inside in listing.files else None
        self._prefix = inside.rpartition("/")[0] if self.file else inside
        self._prefix += "/" if self._prefix else ""
        self.is_streamed = stream and not self.is_offline
        self._downloads = Downloads(self._client, self.commit)

    def __str__(self) -> str:
        inside = f"/{self._name.path}" if self._name.path else ""
        return f"{self._name.repo}@{self.commit[:12]}{inside}"

    @property
    def name(self) -> str:
        """The repository's name, or that of the folder or file inside."""
        return (self._name.path or self._name.repo).rpartition("/")[2]

    @property
    def address(self) -> str:
        """Its repository at this commit."""
        inside = f"/{self._name.path}" if self._name.path else ""
        return f"hf://{self._name.repo}@{self.commit}{inside}"

    @property
    def origin(self) -> Mapping[str, str]:
        """Repository, revision as given, and the commit that it was."""
        origin = {"repo": self._name.repo, "revision": self._name.revision, "commit": self.commit}
        return {**origin, "path": self._name.path} if self._name.path else origin

    def where(self, name: str) -> str:
        """Repository, commit and file."""
        return f"{self._name.repo}@{self.commit[:12]}/{self._prefix}{name}"

    def has(self, name: str) -> bool:
        """Whether the commit has such a file."""
        return self._prefix + name in self._files

    def names(self) -> Collection[str]:
        """All files of the folder and of those inside."""
        n = len(self._prefix)
        return [name[n:] for name in self._files if name.startswith(self._prefix)]

    def path(self, name: str) -> Path | None:
        """Where a file is in the cache."""
        return self._client.cached(self._prefix + name, self.commit)

    def stat(self, name: str) -> Stat:
        """Size and etag of a file in the commit."""
        return self._files[self._prefix + name]

    def read(self, name: str, *, limit: int) -> bytes:
        """All of a small file; it goes into the cache, unless this storage is streamed."""
        stat, path = self.stat(name), self.path(name)
        if stat.nbytes > limit:
            raise CheckpointError(f"{self.where(name)}: {stat.nbytes} bytes, at most {limit}")
        if path is None and not self.is_streamed:
            path = self._downloads.fetch(self._prefix + name, stat, self._name.revision)
        if path is not None:
            return path.read_bytes()
        return bytes(read_bytes(self.peek(name), 0, stat.nbytes))

    def peek(self, name: str) -> OpenFile:
        """The file in the cache, or else by ranges."""
        stat, path = self.stat(name), self.path(name)
        if path is not None:
            return _local(path, self.where(name), stat)
        full = self._prefix + name
        return RangeFile(self._client, full, self.commit, stat, self._seen)

    def open(self, name: str, stat: Stat) -> OpenFile:
        """The file in the cache or on its way there, or by ranges."""
        path = self.path(name)
        if path is not None:
            return _local(path, self.where(name), stat)
        if self.is_streamed:
            return AheadFile(self.peek(name))
        return CachedFile(self._downloads, self._prefix + name, stat)

    def expect(self, names: tuple[str, ...]) -> None:
        """Fetch shards into the cache ahead of their use."""
        self._client.cancelled.clear()
        if not self.is_streamed:
            missing = [self._prefix + name for name in names if self.path(name) is None]
            self._downloads.expect({name: self._files[name] for name in missing})

    def _listing(self) -> _Listing:
        api: HfApi = self._client.api
        name = self._name

        def ask() -> _Listing:
            info = api.model_info(name.repo, revision=name.revision, files_metadata=True)
            files = {}
            for sibling in info.siblings or ():
                version = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
                files[sibling.rfilename] = Stat(sibling.size or 0, 0, version or "")
            return _Listing(info.sha or name.revision, files)

        return self._asked(ask)

    def _asked(self, ask: Callable[[], _Result]) -> _Result:
        given = self._name.given
        path = None if given.startswith("hf://") else Path(given)
        # With a folder here of the owner's name it is a path with a typing error, most likely.
        is_near = path is not None and path.parent.is_dir()
        try:
            return ask() if is_near else self._client.patiently(ask, given, needs_name=True)
        except Exception as error:
            found = self._client.explained(error) if is_near else error
            if path is None or not isinstance(found, CheckpointError | TransientError):
                raise
            reason = found.message if isinstance(found, CheckpointError) else found.reason
            reason = reason.removeprefix(f"{self._name.repo}: ").removeprefix(f"{given}: ")
            hint = found.hint if isinstance(found, CheckpointError) else None
            told = f"{given}: no folder of that name here"
            if is_near:
                told = f"{given}: no such folder or file in {path.parent}"
                hint = nearby.hint(path, instead=hint)
            cause = error.__cause__ if error is found else error
            raise CheckpointError(f"{told}; as a model of the Hub: {reason}", hint=hint) from cause

    def _cached_listing(self) -> _Listing:
        """The files of the revision that are in the cache."""
        name = self._name
        folder = self._client.snapshot(name.revision)
        if folder is None:
            raise CheckpointError(
                f"{name.given}: no folder of that name here, nor is it in the Hub's cache, and "
                "HF_HUB_OFFLINE is set",
                hint="unset HF_HUB_OFFLINE, or fetch it first where there is a network: "
                f"hf download {name.repo}",
            )
        files = {}
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                # The cache names each file's content by its etag.
                blob = Path(os.path.realpath(path))
                version = blob.name if path.is_symlink() else ""
                files[path.relative_to(folder).as_posix()] = Stat(blob.stat().st_size, 0, version)
        return _Listing(folder.name, files)


def _local(path: Path, where: str, stat: Stat) -> LocalFile:
    """A file in the cache, whose size must be the commit's."""
    status = path.stat()
    if status.st_size != stat.nbytes:
        raise CheckpointError(
            f"{where}: {status.st_size} bytes in the cache, the Hub says {stat.nbytes}",
            hint=f"remove {path} and let it be fetched again",
        )
    return LocalFile(path, status.st_size, status.st_mtime_ns)
