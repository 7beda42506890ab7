"""Files of a result while they are made, in its work folder, and whether it may be made at all."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import final

from streammap.common.ranges import PIECE_NBYTES
from streammap.errors import CheckpointError, OutputError
from streammap.io import safe_open, weight_files
from streammap.io.storage.disk import Disk
from streammap.output import journal, work_folder
from streammap.output.shards import Shard
from streammap.output.work_folder import SUFFIX

_NO_ROOM = "free disk space, or write elsewhere"
_NEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
_THERE = os.O_RDWR | os.O_NOFOLLOW


@final
class Output:
    """Files being written. Use as a context: leaving it closes them."""

    def __init__(self, files: Path, named: Path, *, disk: Disk, fsync: bool) -> None:
        """Write into `files`; messages name the folder `named`, where they will be."""
        self._files, self._named = files, named
        self._disk, self._fsync = disk, fsync
        self._pwrite = disk.pwrite
        self._descriptors: dict[str, int] = {}
        self._piece = memoryview(bytearray(PIECE_NBYTES))
        self.names: list[str] = []
        """Small files that were added."""

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def begin(self, shard: Shard) -> None:
        """Open a file and write its header; all that stands around the tensors of a DCP file."""
        self._open(shard.name, _NEW)
        try:
            self._reserve(shard.name, shard.nbytes)
            self.write_at(shard.name, 0, memoryview(shard.head))
            if shard.name.endswith(weight_files.DCP_SUFFIX):
                from streammap.output import dcp_writer

                for offset, piece in dcp_writer.around(shard):
                    self.write_at(shard.name, offset, memoryview(piece))
        except BaseException:
            os.close(self._descriptors.pop(shard.name))  # another thread may begin it again
            raise

    def go_on(self, shard: Shard) -> None:
        """Open a file that an earlier run has begun."""
        self._open(shard.name, _THERE)

    def begin_torch(self, shard: Shard, nest: str | None) -> Shard:
        """Make a torch file with room for the shard's tensors; its slots come back in place."""
        from streammap.io.formats import torch_zip

        path = self._files / shard.name
        specs = [(slot.key, slot.spec) for slot in shard.slots]
        try:
            path.unlink(missing_ok=True)
            slots = torch_zip.write_skeleton(path, specs, nest)
        except (OSError, RuntimeError) as error:
            raise OutputError(
                f"{self._named / shard.name}: {error}", hint="check the path"
            ) from error
        return Shard(shard.name, b"", slots)

    def torch_there(self, shard: Shard) -> Shard:
        """The same for the file of an earlier run.

        Raises:
            OutputError: it is not there, or has not these tensors.
        """
        from streammap.io.formats import torch_zip

        path = self._files / shard.name
        wanted = {slot.key: slot.spec for slot in shard.slots}
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(CheckpointError):
                slots = torch_zip.read(path).slots
                if {slot.key: slot.spec for slot in slots} == wanted:
                    return Shard(shard.name, b"", slots)
        raise OutputError(f"{path}: is not the file that its journal is of", hint=journal.RESTART)

    def check_there(self, shard: Shard, end: int) -> None:
        """Refuse a file of an earlier run that can't hold what the journal says.

        Args:
            end: One past the last byte that it says is there.

        Raises:
            OutputError: the file is missing, too short or too long, or has another header.
        """
        path = self._files / shard.name
        try:
            descriptor = work_folder.opened(path)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint=journal.RESTART) from error
        try:
            nbytes = os.fstat(descriptor).st_size
            head = os.pread(descriptor, len(shard.head), 0) if nbytes >= end else shard.head
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint=journal.RESTART) from error
        finally:
            os.close(descriptor)
        most = shard.nbytes if shard.head else nbytes
        if not end <= nbytes <= most:
            raise OutputError(
                f"{path}: {nbytes} bytes, by its journal {end} at least and {most} at most",
                hint=journal.RESTART,
            )
        if head != shard.head:
            raise OutputError(f"{path}: another header than this result's", hint=journal.RESTART)

    def write_at(self, name: str, offset: int, view: memoryview) -> None:
        """Write bytes at a place of a file that has begun."""
        descriptor = self._descriptors[name]
        at = 0
        while at < len(view):
            end = at + PIECE_NBYTES - (offset + at) % PIECE_NBYTES
            try:
                at += self._pwrite(descriptor, view[at:end], offset + at)
            except OSError as error:
                told = f"{self._named / name}: {error.strerror} at byte {offset + at}"
                raise OutputError(told, hint=_NO_ROOM) from error
        if self._fsync and at:
            # Begins to write these pages back, so that fsync has little left to wait for.
            os.posix_fadvise(descriptor, offset, at, os.POSIX_FADV_DONTNEED)

    def close(self, name: str) -> None:
        """Let the disk have a file that is whole; it gets its place with all others."""
        descriptor = self._descriptors.pop(name)
        try:
            if self._fsync:
                self._disk.sync(descriptor)
        finally:
            os.close(descriptor)

    def duplicate(self, name: str) -> int | None:
        """Another descriptor of an open file, to sync it while it is written."""
        descriptor = self._descriptors.get(name)
        return None if descriptor is None else os.dup(descriptor)

    def add(self, name: str, content: bytes) -> None:
        """A small file with this content."""
        self.add_parts(name, [content])

    def add_parts(self, name: str, parts: Iterable[bytes]) -> None:
        """A small file with this content, part by part."""
        self._begin_small(name)
        at = 0
        for part in parts:
            self.write_at(name, at, memoryview(part))
            at += len(part)
        self.close(name)

    def copy(self, name: str, path: Path) -> None:
        """A copy of a file."""
        self._begin_small(name)
        source = safe_open.open_file(path)
        try:
            self._copy(name, source, os.fstat(source).st_size)
        finally:
            os.close(source)
        self.close(name)

    def sizes(self, names: Sequence[str]) -> Mapping[str, int]:
        """The files' sizes."""
        return {name: (self._files / name).stat().st_size for name in names}

    def _reserve(self, name: str, nbytes: int) -> None:
        try:
            self._disk.allocate(self._descriptors[name], nbytes)
        except OSError as error:
            told = f"{self._named / name}: {error.strerror} for {nbytes} bytes"
            raise OutputError(told, hint=_NO_ROOM) from error

    def _copy(self, name: str, source: int, nbytes: int) -> None:
        at = 0
        while at < nbytes:
            room = self._piece[: min(PIECE_NBYTES, nbytes - at)]
            read = self._disk.pread(source, room, at)
            if not read:
                raise OutputError(
                    f"{self._named / name}: its source ended {nbytes - at} bytes early",
                    hint="is another program writing the source?",
                )
            self.write_at(name, at, room[:read])
            at += read

    def _begin_small(self, name: str) -> None:
        work_folder.make((self._files / name).parent, [])
        self._open(name, _NEW)
        self.names.append(name)

    def _open(self, name: str, flags: int) -> None:
        try:
            self._descriptors[name] = self._disk.open(self._files / name, flags)
        except OSError as error:
            raise OutputError(f"{self._named / name}: {error.strerror}") from error


def check_place(
    path: Path, *, overwrite: bool, beside: Sequence[Path], sources: Sequence[Path]
) -> None:
    """Refuse an output that shouldn't be written, before anything is.

    Args:
        path: A folder, or the file that the result is.
        beside: Files that are written with a single file.
        sources: Folders and files that are read and must stay.

    Raises:
        OutputError: it is there already, or it is a source.
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
        if not overwrite and (is_file or any(found.name != SUFFIX for found in path.iterdir())):
            raise OutputError(f"{path}: is there already", hint="pass --overwrite to replace it")
    for other in beside:
        if other.exists() and not overwrite:
            raise OutputError(f"{other}: is there already", hint="pass --overwrite to replace it")


def check_names(output: Path, names: Iterable[str]) -> None:
    """Refuse a place in which a folder has the name of a file of the result.

    Raises:
        OutputError: naming the folder.
    """
    for name in names:
        if (output / name).is_dir():
            raise OutputError(
                f"{output / name}: a folder is in the place of a file", hint="remove it"
            )


def check_room(path: Path, *, needed: int, there: int) -> None:
    """Refuse a disk that is too small, before the first byte.

    Args:
        needed: Bytes that the result takes.
        there: Bytes of it that an earlier run has written.

    Raises:
        OutputError: it is.
    """
    around = path
    while not around.exists():
        around = around.parent
    free = shutil.disk_usage(around).free
    if free < needed - there:
        told = f" ({there / 1e9:.2f} GB of it are written)" if there else ""
        raise OutputError(
            f"{path}: the result takes {needed / 1e9:.2f} GB{told}, {free / 1e9:.2f} GB are free",
            hint=_NO_ROOM,
        )


def written_nbytes(files: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    stats = [path.stat() for path in files.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(min(found.st_blocks * 512, found.st_size) for found in stats)
