"""The sink of a run that writes shards: bytes are written, digested, and journalled once durable.

Threads write tiles as they come. A shard is opened when its first bytes come and closed, synced and
journalled when its last do; tensors that are whole before that are journalled from time to time.
Only here does a byte of a tensor become a byte of a file.
"""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import NamedTuple, final

from streammap.common.losses import NOTHING, Losses
from streammap.engine import crc32
from streammap.engine.crc32 import FileDigests
from streammap.engine.schedule import Job, TensorOffset
from streammap.io.formats.safetensors_header import Slot
from streammap.io.storage.disk import Disk
from streammap.output.files import Output
from streammap.output.journal import Journal
from streammap.output.layout import Shard

JOURNAL_SECONDS = 10.0
"""Time between two journal lines for shards that are not whole."""
_N_AT_ONCE = 2
"""Threads that write to one file: the kernel admits one at a time, and the second is ready when it
is done. Waiting in the kernel keeps a processor busy, so all others wait here."""


@final
class _Turns:
    """Admits a few threads: a semaphore as cheap as a lock, since each write takes it."""

    def __init__(self) -> None:
        self._free: SimpleQueue[None] = SimpleQueue()
        for _ in range(_N_AT_ONCE):
            self._free.put(None)

    def __enter__(self) -> None:
        self._free.get()

    def __exit__(self, *_: object) -> None:
        self._free.put(None)


@final
class _File:
    """A shard: how much of it is written, and who may write to it."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.digests = FileDigests(slot.spec.nbytes for slot in shard.slots)
        self.lock = threading.Lock()
        self.turns = _Turns()
        self.is_there = not shard.head
        """Whether the file exists before its first write: an earlier run's, or a torch file."""
        self.has_begun = False
        self.waiting: list[int] = []
        """Tensors that are whole and not in the journal."""
        self.losses: dict[int, Losses] = {}
        """Which tensors lost numbers when they were rounded, and how many."""

    def take_waiting(self) -> list[int]:
        """Take the list of whole tensors that are not in the journal."""
        taken, self.waiting = self.waiting, []
        return taken


@final
class ShardWriter:
    """The shards of a run, as its sink."""

    def __init__(
        self, shards: Sequence[Shard], out: Output, journal: Journal, *, disk: Disk, fsync: bool
    ) -> None:
        """No file is opened before its first bytes come."""
        self._out, self._journal, self._disk, self._fsync = out, journal, disk, fsync
        self._files = {shard.name: _File(shard) for shard in shards}
        self._slots = {
            slot.key: (file, i)
            for file in self._files.values()
            for i, slot in enumerate(file.shard.slots)
        }
        """Key -> its file, and which of the file's tensors it is."""
        self._lock = threading.Lock()
        self._n_open = sum(1 for file in self._files.values() if file.digests.left_nbytes)
        self._journalled_at = time.monotonic()
        self.n_journalled = 0
        """Tensors that are durable."""
        self.journalled_nbytes = 0
        self.n_resumed = self.resumed_nbytes = 0

    @property
    def left_nbytes(self) -> int:
        """Bytes that are still to be written."""
        return sum(file.digests.left_nbytes for file in self._files.values())

    def resume(self, durable: Mapping[str, tuple[int, Losses]]) -> None:
        """Take over what an earlier run wrote: CRCs, and what rounding lost.

        Raises:
            OutputError: a file that can't hold it.
        """
        for file in self._files.values():
            there = [i for i, slot in enumerate(file.shard.slots) if slot.key in durable]
            if not there:
                continue
            for i in there:
                crc, lost = durable[file.shard.slots[i].key]
                file.digests.restore(i, crc)
                if lost != NOTHING:
                    file.losses[i] = lost
            self._out.check_existing(file.shard, max(file.shard.slots[i].end for i in there))
            self._count(file, there)
            file.is_there = True
            file.has_begun = not file.digests.left_nbytes
            self._n_open -= file.has_begun
        self.n_resumed, self.resumed_nbytes = self.n_journalled, self.journalled_nbytes

    def missing(self) -> Iterator[str]:
        """Keys of the tensors that are still to be written, in the order of the files."""
        for file in self._files.values():
            for i, slot in enumerate(file.shard.slots):
                if not file.digests.is_whole(i):
                    yield slot.key

    def grid(self, key: str) -> int:
        """Where a tensor begins in its file: pieces are cut on the file's grid."""
        file, i = self._slots[key]
        return file.shard.slots[i].start

    def lane(self) -> "_Lane":
        """What one thread writes through."""
        return _Lane(self, self._out)

    def locate(self, places: Sequence[TensorOffset]) -> "list[_FileOffset]":
        """Where in which files these places are; the files are open then."""
        located = []
        for place in places:
            file, i = self._slots[place.key]
            if not file.has_begun:
                with file.lock:
                    self._begin(file)
            located.append(_FileOffset(file, i, file.shard.slots[i].start + place.offset))
        return located

    def count(self, place: "_FileOffset", offset: int, nbytes: int, crc: int, lost: Losses) -> None:
        """Take note of a part that was written: bytes of a tensor from `offset` on, their CRC."""
        file = place.file
        with file.lock:  # writes are done without: the file ends once all are counted
            if lost != NOTHING:
                file.losses[place.i] = file.losses.get(place.i, NOTHING).plus(lost)
            if file.digests.add(place.i, offset, nbytes, crc):
                file.waiting.append(place.i)
                if not file.digests.left_nbytes:
                    self._end(file)

    def checkpoint_journal(self, *, at_once: bool = False) -> None:
        """Journal the tensors that are whole by now, if it is time to."""
        now = time.monotonic()
        if not at_once and now - self._journalled_at < JOURNAL_SECONDS:
            return
        self._journalled_at = now
        for name, file in self._files.items():
            with file.lock:
                # Taken before the sync: only what was whole by then is surely on the disk after it.
                taken = file.take_waiting()
                descriptor = self._out.duplicate(name) if taken else None
            if descriptor is not None:
                try:
                    if self._fsync:
                        self._disk.sync(descriptor)
                finally:
                    os.close(descriptor)
            self._add(file, taken)

    def finish(self) -> None:
        """Begin the shards that have no bytes but their header."""
        for file in self._files.values():
            if not file.has_begun:
                self._begin(file)
                self._out.close(file.shard.name)

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """(key, file, CRC) of every tensor, when all are whole."""
        for name, file in self._files.items():
            for i, slot in enumerate(file.shard.slots):
                yield slot.key, name, file.digests.crc(i)

    @property
    def losses(self) -> dict[str, Losses]:
        """Key -> what rounding lost, for each tensor that lost something."""
        return {
            file.shard.slots[i].key: lost
            for file in self._files.values()
            for i, lost in file.losses.items()
        }

    def of_shard(self, name: str) -> Iterator[tuple[Slot, int]]:
        """The tensors of a shard that is whole, and their CRCs."""
        file = self._files[name]
        return ((slot, file.digests.crc(i)) for i, slot in enumerate(file.shard.slots))

    def _begin(self, file: _File) -> None:
        if file.has_begun:
            return
        if file.is_there:
            self._out.resume(file.shard)
        else:
            self._out.begin(file.shard)
        file.has_begun = True

    def _end(self, file: _File) -> None:
        taken = file.take_waiting()  # what can't be synced is not journalled either
        self._out.close(file.shard.name)
        with self._lock:
            self._n_open -= 1
            is_last = not self._n_open
        if is_last:
            file.waiting = taken  # no line: the result is about to be committed as a whole
        else:
            self._add(file, taken)

    def _add(self, file: _File, tensors: Sequence[int]) -> None:
        if not tensors:
            return
        keys = {i: file.shard.slots[i].key for i in tensors}
        crcs = {key: file.digests.crc(i) for i, key in keys.items()}
        losses = {key: file.losses[i] for i, key in keys.items() if i in file.losses}
        try:
            with self._lock:
                self._journal.add(crcs, losses)
                self._count(file, tensors)
        except OSError:
            file.waiting.extend(tensors)  # they are on the disk: another line may say so
            raise

    def _count(self, file: _File, tensors: Sequence[int]) -> None:
        self.n_journalled += len(tensors)
        self.journalled_nbytes += sum(file.shard.slots[i].spec.nbytes for i in tensors)


def keys(shards: Sequence[Shard]) -> frozenset[str]:
    """The tensors that have bytes: what a journal may name."""
    return frozenset(slot.key for s in shards for slot in s.slots if slot.spec.nbytes)


class _FileOffset(NamedTuple):
    """A byte of a file."""

    file: _File
    i: int
    """Which of the file's tensors it is of."""
    offset: int


@final
class _Lane:
    """Writes one thread's parts, one after the other; one CRC serves all places of a part."""

    def __init__(self, writer: ShardWriter, out: Output) -> None:
        self._writer, self._out = writer, out
        self._places: list[_FileOffset] = []
        self._crc = 0

    def write(self, part: Job, offset: int, piece: memoryview) -> None:
        if not offset:
            self._places, self._crc = self._writer.locate(part.places), 0
        self._crc = crc32.crc32(piece, self._crc)
        for file, _, start in self._places:
            with file.turns:
                self._out.write_at(file.shard.name, start + offset, piece)

    def done(self, part: Job, lost: Losses) -> None:
        for place, here in zip(part.places, self._places, strict=True):
            self._writer.count(here, place.offset, part.nbytes, self._crc, lost)
