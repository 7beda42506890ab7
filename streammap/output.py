"""A result on its way to disk: partial files, renamed when all of them are whole.

    OUT/                      shards + index, config.json and what goes along
    OUT.safetensors, OUT.pth  one file

Everything is written beside its place as `.NAME.partial`, synced, and renamed in the end; the index
and config.json come last. A run that fails removes what it began.
"""

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import final

from streammap import layout, reading, torchfile
from streammap.errors import OutputError
from streammap.layout import Shard

PIECE_NBYTES = 256 * 1024
"""One write at most: larger ones are slower on some kernels."""
STALE = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
"""Weights by the names that loaders look for."""
_PARTIAL = ".partial"
_LAST = (layout.INDEX, "config.json")


@final
class Output:
    """Files being written. Use as a context: leaving it with an error removes them."""

    def __init__(self, folder: Path, *, fsync: bool) -> None:
        """Write into `folder`, which is made when needed."""
        self._folder = folder
        self._fsync = fsync
        self._partial: dict[str, Path] = {}
        self._descriptors: dict[str, int] = {}
        self._made: list[Path] = []
        self._piece = memoryview(bytearray(PIECE_NBYTES))

    def __enter__(self) -> "Output":
        try:
            self._make(self._folder)
        except OutputError:
            self._remove_folders()
            raise
        for left in self._folder.glob(f".model*{_PARTIAL}"):  # of a run that was killed
            left.unlink()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()
        for path in self._partial.values():
            with contextlib.suppress(OSError):
                path.unlink()
        if kind is not None:
            self._remove_folders()

    def begin(self, shard: Shard) -> None:
        """Open a safetensors file and write its header."""
        self._open(shard.name)
        self.write_at(shard.name, 0, memoryview(shard.head))

    def begin_torch(self, shard: Shard, nest: str | None) -> Shard:
        """Open a torch file with room for the shard's tensors; its slots come back in place."""
        path = self._place(shard.name)
        specs = [(slot.key, slot.spec) for slot in shard.slots]
        try:
            slots = torchfile.write_skeleton(path, specs, nest)
        except (OSError, RuntimeError) as error:
            raise OutputError(f"{path}: {error}", hint="check the path") from error
        self._descriptors[shard.name] = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        return Shard(shard.name, b"", slots)

    def write_at(self, name: str, offset: int, view: memoryview) -> None:
        """Write bytes at a place of a file that has begun."""
        descriptor = self._descriptors[name]
        at = 0
        while at < len(view):
            try:
                at += os.pwrite(descriptor, view[at : at + PIECE_NBYTES], offset + at)
            except OSError as error:
                raise OutputError(
                    f"{self._folder / name}: {error.strerror} at byte {offset + at}",
                    hint="free disk space, or write elsewhere",
                ) from error
        if self._fsync and at:
            # Begins to write these pages back, so that fsync has little left to wait for.
            os.posix_fadvise(descriptor, offset, at, os.POSIX_FADV_DONTNEED)

    def close(self, name: str) -> None:
        """Let the disk have a file that is whole; it gets its name with all others."""
        descriptor = self._descriptors.pop(name)
        try:
            if self._fsync:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def copy_at(self, name: str, offset: int, source: int, start: int, nbytes: int) -> None:
        """Copy bytes of an open file to a place of a file that has begun."""
        at = 0
        while at < nbytes:
            room = self._piece[: min(PIECE_NBYTES, nbytes - at)]
            read = os.preadv(source, [room], start + at)
            if not read:
                raise OutputError(
                    f"{self._folder / name}: its source ended {nbytes - at} bytes early",
                    hint="is another program writing the source?",
                )
            self.write_at(name, offset + at, room[:read])
            at += read

    def add(self, name: str, content: bytes) -> None:
        """A small file with this content."""
        self._make((self._folder / name).parent)
        self._open(name)
        self.write_at(name, 0, memoryview(content))

    def copy(self, name: str, path: Path) -> None:
        """A copy of a file."""
        self._make((self._folder / name).parent)
        self._open(name)
        source = reading.open_file(path)
        try:
            self.copy_at(name, 0, source, 0, os.fstat(source).st_size)
        finally:
            os.close(source)

    def commit(self, *, stale: Sequence[str]) -> None:
        """Sync all files and give them their names; remove `stale` ones (glob patterns) first."""
        for name in list(self._descriptors):
            self.close(name)
        for glob in stale:
            for old in self._folder.glob(glob):
                old.unlink()
        last = [name for name in _LAST if name in self._partial]
        for name in [*(n for n in self._partial if n not in last), *last]:
            self._partial[name].replace(self._folder / name)
            del self._partial[name]
        if self._fsync:
            descriptor = os.open(self._folder, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

    def _remove_folders(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _open(self, name: str) -> None:
        path = self._place(name)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptors[name] = os.open(path, flags, 0o666)
        except OSError as error:
            raise OutputError(f"{path.parent}: {error.strerror}") from error

    def _place(self, name: str) -> Path:
        final = self._folder / name
        if final.is_dir():
            raise OutputError(f"{final}: a folder is in the place of a file", hint="remove it")
        self._partial[name] = final.with_name(f".{final.name}{_PARTIAL}")
        return self._partial[name]

    def _make(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for path in reversed(missing):
            try:
                path.mkdir()
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror}", hint="check the path") from error
            self._made.append(path)


def check_place(
    path: Path, *, overwrite: bool, beside: Sequence[Path], sources: Sequence[Path], needed: int
) -> None:
    """Refuse an output that can't or shouldn't be written, before anything is.

    Args:
        path: A folder, or the file that the result is.
        beside: Files that are written with a single file.
        sources: Folders and files that are read and must stay.
        needed: Bytes that the result takes.

    Raises:
        OutputError: it is there already, it is a source, or the disk is too small.
    """
    is_file = bool(beside)
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise OutputError(f"{path}: is the source itself", hint="write to another place")
        if not is_file and source.is_file() and path.exists() and path.samefile(source.parent):
            raise OutputError(f"{path}: is the folder of the source", hint="write to another place")
    if path.exists():
        if is_file != path.is_file():
            what = "no file" if is_file else "no folder"
            raise OutputError(f"{path}: is {what}", hint="write to another place")
        if not overwrite and (is_file or not all(_is_partial(found) for found in path.iterdir())):
            raise OutputError(f"{path}: is there already", hint="pass --overwrite to replace it")
    for other in beside:
        if other.exists() and not overwrite:
            raise OutputError(f"{other}: is there already", hint="pass --overwrite to replace it")
    around = path
    while not around.exists():
        around = around.parent
    free = shutil.disk_usage(around).free
    if free < needed:
        raise OutputError(
            f"{path}: the result takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
            hint="free disk space, or write elsewhere",
        )


def _is_partial(path: Path) -> bool:
    """Whether a run that was killed left this."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)
