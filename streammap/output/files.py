"""A result's files as they are written in its work folder."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import final

from streammap.common.ranges import PIECE_NBYTES
from streammap.engine import checksums, crc32
from streammap.engine.checksums import Known, Written
from streammap.errors import OutputError
from streammap.io import safe_open
from streammap.io.storage.disk import Disk
from streammap.output import work_folder
from streammap.output.layout import Shard
from streammap.output.work_folder import RESTART

NO_ROOM = "free disk space, or write elsewhere"
_NEW = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
_EXISTING = os.O_RDWR | os.O_NOFOLLOW


@final
class Output:
    """Files being written. Use as a context: leaving it closes them."""

    def __init__(self, files: Path, named: Path, *, disk: Disk, fsync: bool) -> None:
        """Write into `files`; messages name `named`, the folder that they will be in."""
        self._files, self._named = files, named
        self._disk, self._fsync = disk, fsync
        self._pwrite = disk.pwrite
        self._descriptors: dict[str, int] = {}
        self._piece = memoryview(bytearray(PIECE_NBYTES))
        self.written: dict[str, Written] = {}
        """The side files that were added."""

    def __enter__(self) -> "Output":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def begin(self, shard: Shard) -> None:
        """Create a file and write all bytes around its tensors."""
        self._open(shard.name, _NEW)
        try:
            self._reserve(shard.name, shard.nbytes)
            self.write_at(shard.name, 0, memoryview(shard.head))
            for offset, piece in shard.around() if shard.around is not None else ():
                self.write_at(shard.name, offset, memoryview(piece))
        except BaseException:
            os.close(self._descriptors.pop(shard.name))  # another thread may try again
            raise

    def resume(self, shard: Shard) -> None:
        """Open a file that an earlier run has begun."""
        self._open(shard.name, _EXISTING)

    def check_existing(self, shard: Shard, end: int) -> None:
        """Refuse a file of an earlier run that can't hold what the journal says.

        Args:
            end: One past the last byte that is written, by the journal.

        Raises:
            OutputError: the file is missing, too short or too long, or has another header.
        """
        path = self._files / shard.name
        try:
            descriptor = work_folder.open_file(path)
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint=RESTART) from error
        try:
            nbytes = os.fstat(descriptor).st_size
            head = os.pread(descriptor, len(shard.head), 0) if nbytes >= end else shard.head
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}", hint=RESTART) from error
        finally:
            os.close(descriptor)
        most = shard.nbytes if shard.head else nbytes
        if not end <= nbytes <= most:
            raise OutputError(
                f"{path}: {nbytes} bytes, by its journal {end} at least and {most} at most",
                hint=RESTART,
            )
        if head != shard.head:
            raise OutputError(f"{path}: another header than this result's", hint=RESTART)

    def write_at(self, name: str, offset: int, view: memoryview) -> None:
        """Write bytes into an open file."""
        descriptor = self._descriptors[name]
        done = 0
        while done < len(view):
            # Up to the next multiple of a piece: two writes that share a page are slow.
            end = done + PIECE_NBYTES - (offset + done) % PIECE_NBYTES
            try:
                done += self._pwrite(descriptor, view[done:end], offset + done)
            except OSError as error:
                message = f"{self._named / name}: {error.strerror} at byte {offset + done}"
                raise OutputError(message, hint=NO_ROOM) from error
        if self._fsync and done:
            # Begins to write these pages back, so that fsync has little left to wait for.
            os.posix_fadvise(descriptor, offset, done, os.POSIX_FADV_DONTNEED)

    def close(self, name: str) -> None:
        """Close a file that is whole, and wait until the disk has it."""
        descriptor = self._descriptors.pop(name)
        try:
            if self._fsync:
                self._disk.sync(descriptor)
        finally:
            os.close(descriptor)

    def duplicate(self, name: str) -> int | None:
        """Another descriptor of an open file, so that it can be synced while it is written."""
        descriptor = self._descriptors.get(name)
        return None if descriptor is None else os.dup(descriptor)

    def add(self, name: str, content: bytes) -> None:
        """Write a side file."""
        self.add_parts(name, [content])

    def add_parts(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a side file part by part."""
        self._begin_side(name)
        offset = crc = 0
        for part in parts:
            self.write_at(name, offset, memoryview(part))
            offset, crc = offset + len(part), crc32.crc32(part, crc)
        self._end_side(name, Written(offset, crc))

    def copy(self, name: str, path: Path) -> None:
        """Copy a file."""
        self._begin_side(name)
        source = safe_open.open_file(path)
        try:
            written = self._copy(name, source, os.fstat(source).st_size)
        finally:
            os.close(source)
        self._end_side(name, written)

    def of_shard(self, name: str, known: Known) -> Written:
        """Size and CRC of a shard that is whole.

        Args:
            known: Its tensors, and their CRCs.
        """
        return checksums.of_file(self._files / name, known)

    def _reserve(self, name: str, nbytes: int) -> None:
        try:
            self._disk.allocate(self._descriptors[name], nbytes)
        except OSError as error:
            message = f"{self._named / name}: {error.strerror} for {nbytes} bytes"
            raise OutputError(message, hint=NO_ROOM) from error

    def _copy(self, name: str, source: int, nbytes: int) -> Written:
        offset = crc = 0
        while offset < nbytes:
            piece = self._piece[: min(PIECE_NBYTES, nbytes - offset)]
            n_read = self._disk.pread(source, piece, offset)
            if not n_read:
                raise OutputError(
                    f"{self._named / name}: its source ended {nbytes - offset} bytes early",
                    hint="is another program writing the source?",
                )
            self.write_at(name, offset, piece[:n_read])
            offset, crc = offset + n_read, crc32.crc32(piece[:n_read], crc)
        return Written(offset, crc)

    def _begin_side(self, name: str) -> None:
        work_folder.make((self._files / name).parent, [])
        self._open(name, _NEW)

    def _end_side(self, name: str, written: Written) -> None:
        self.close(name)
        self.written[name] = written

    def _open(self, name: str, flags: int) -> None:
        try:
            self._descriptors[name] = self._disk.open(self._files / name, flags)
        except OSError as error:
            raise OutputError(f"{self._named / name}: {error.strerror}") from error
