"""Repositories of a HubServer: blobs, commits and branches, in memory or as files.

A commit is a table of names and blobs. Its id is a digest of the table, so that equal content has
an equal commit id.
"""

import hashlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
"""Files that the Hub keeps in LFS storage, by their sha256."""
LFS_NBYTES = 10_000_000
"""Larger files are kept there too."""


@dataclass(frozen=True, slots=True)
class Blob:
    """The content of a file."""

    content: bytes | Path
    """A path is read again each time."""
    nbytes: int
    sha256: str
    git_oid: str
    is_lfs: bool

    @property
    def etag(self) -> str:
        """The Hub's etag."""
        return self.sha256 if self.is_lfs else self.git_oid

    def read(self, start: int, end: int) -> bytes:
        """Its bytes from `start` to `end`."""
        if isinstance(self.content, bytes):
            return self.content[start:end]
        with self.content.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def entry(self, name: str) -> dict[str, object]:
        """Its entry in a listing of a folder."""
        entry: dict[str, object] = {"type": "file", "path": name, "size": self.nbytes}
        entry["oid"] = self.git_oid
        if self.is_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": self.nbytes, "pointerSize": 134}
        return entry

    def sibling(self, name: str) -> dict[str, object]:
        """Its entry in the description of a model."""
        entry: dict[str, object] = {"rfilename": name, "size": self.nbytes, "blobId": self.git_oid}
        if self.is_lfs:
            entry["lfs"] = {"sha256": self.sha256, "size": self.nbytes, "pointerSize": 134}
        return entry


def blob(name: str, content: bytes | Path) -> Blob:
    """A file's content; its name decides whether it goes to LFS storage."""
    nbytes = len(content) if isinstance(content, bytes) else content.stat().st_size
    sha256 = hashlib.sha256()
    git = hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    for piece in _pieces(content):
        sha256.update(piece)
        git.update(piece)
    is_lfs = nbytes > LFS_NBYTES or name.endswith(LFS_SUFFIXES)
    return Blob(content, nbytes, sha256.hexdigest(), git.hexdigest(), is_lfs)


def _pieces(content: bytes | Path) -> Iterable[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while piece := file.read(2**20):
            yield piece


@final
@dataclass(eq=False)
class Repo:
    """One repository."""

    name: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Mapping[str, Blob]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    """Branch or tag -> commit."""
    messages: list[str] = field(default_factory=list)
    """Messages of pushed commits, the oldest first."""
    uploaded: dict[str, Blob] = field(default_factory=dict)
    """sha256 -> what was uploaded, committed or not."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, files: Mapping[str, Blob], branch: str) -> str:
        """Make `files` the content of a branch; returns the commit id."""
        text = "\n".join(f"{name} {files[name].etag}" for name in sorted(files))
        sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def resolve(self, revision: str) -> str | None:
        """The commit that a branch, tag or commit id means."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None

    def files(self, revision: str) -> Mapping[str, Blob]:
        """The files of a branch or commit; none if it does not exist."""
        return self.commits.get(self.branches.get(revision, revision), {})

    def stored(self, sha256: str) -> Blob | None:
        """A blob that was uploaded or committed."""
        if sha256 in self.uploaded:
            return self.uploaded[sha256]
        blobs = (b for files in self.commits.values() for b in files.values())
        return next((b for b in blobs if b.sha256 == sha256), None)


def of_folder(folder: Path) -> dict[str, Blob]:
    """The files of a folder, except hidden ones; they are read in place."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not any(part.startswith(".") for part in name.split("/")):
            files[name] = blob(name, path)
    return files
