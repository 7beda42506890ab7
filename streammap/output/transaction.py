"""Making a result: in its work folder, on from where an earlier run was stopped, then in its place.

work folder, lock -> journal -> tiles -> what goes along -> mark -> commit

Several processes each do the tiles of some shards; rank 0 does all else, see coordination.py.
"""

import contextlib
import errno
import glob
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from streammap.common.events import Event, Listener, Started, Wrote
from streammap.common.version import VERSION
from streammap.engine import loop
from streammap.engine.devices import DeviceChoice
from streammap.engine.loop import Resources
from streammap.engine.memory import Memory
from streammap.engine.options import Engine
from streammap.errors import CheckpointError, OutputError, StreammapError
from streammap.io.storage import disk as disks
from streammap.output import (
    commit,
    files,
    fingerprint,
    journal,
    record,
    side_files,
    side_list,
    work_folder,
)
from streammap.output import shard_writer as writing
from streammap.output import (
    shards as layout,
)
from streammap.output.commit import Commit
from streammap.output.files import Output
from streammap.output.journal import Fingerprint, Journal
from streammap.output.options import OutputOptions
from streammap.output.ranks.coordination import Follower, Leader
from streammap.output.shard_writer import Writer
from streammap.output.shards import Shard
from streammap.output.work_folder import WorkFolder
from streammap.planning import map_file
from streammap.planning.plan import Plan

_SEEN_SECONDS = 90.0
"""Time that a network file system may take to show what another machine wrote."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run did, and what was done before; of rank 0, with what all others did."""

    n_tensors: int
    n_shards: int
    nbytes: int
    """Of the shards."""
    n_read: int
    """Bytes."""
    n_resumed: int
    resumed_nbytes: int


def make(
    plan: Plan,
    where: OutputOptions,
    shards: Sequence[Shard],
    means: tuple[Memory, DeviceChoice],
    listener: Listener,
) -> RunResult:
    """Make the result, or go on with one that an earlier run began."""
    path = work_folder.place_of(where.path, is_file=where.is_file)
    small, side = _small_files(plan, where)
    _check_place(plan, where, path)
    fetched = () if where.is_file else side_list.elsewhere(plan.side)
    names = [*(s.name for s in shards), *small, *side, *fetched, where.record]
    files.check_names(where.folder, names)
    request = fingerprint.request_of(
        plan, shards, max_shard_nbytes=where.max_shard_nbytes, version=VERSION, nest=where.nest
    )
    run = _LocalTransaction(plan, where, shards, means, request, WorkFolder(path))
    return run.help(listener) if where.ranks.rank else run.lead(listener, small, side)


def finish(path: str | Path) -> bool:
    """Put a result in its place whose run was stopped at just that; its sources are not needed.

    Returns:
        Whether there was one.

    Raises:
        OutputError: a file of it is missing, or another run is at it.
    """
    place = Path(path)
    where = OutputOptions(place, 1, True, True, Engine())
    at = work_folder.place_of(place, is_file=where.is_file)
    if not commit.is_marked(at):
        return False
    with WorkFolder(at) as work:
        work.keeps = True
        disk = disks.current()
        found = commit.read(work, None)
        commit.finish(work, where.folder, found, _stale(where), disk=disk, fsync=True)
        work.keeps = False
    return True


@final
class _LocalTransaction:
    """What makes one result."""

    def __init__(
        self,
        plan: Plan,
        where: OutputOptions,
        shards: Sequence[Shard],
        means: tuple[Memory, DeviceChoice],
        request: Fingerprint,
        work: WorkFolder,
    ) -> None:
        self._plan, self._where, self._shards = plan, where, shards
        self._memory, self._choice = means
        self._request, self._work = request, work
        self._disk = disks.current()

    def lead(
        self, listener: Listener, small: Mapping[str, bytes], side: Mapping[str, Path]
    ) -> RunResult:
        """Make the result, alone or with others, and put it in its place."""
        plan, where, shards = self._plan, self._where, self._shards
        with self._work as work:
            path = work.path
            work.keeps = not where.restart and (commit.is_marked(path) or journal.is_there(path))
            _check_place(plan, where, path)  # another run may have ended meanwhile
            with Leader(work, self._request, where.ranks) as group:
                if where.restart:
                    work.begin_anew()
                if commit.is_marked(path):
                    group.deal([0] * len(shards))
                    listener(Started(len(plan.targets), plan.nbytes, plan.nbytes))
                    found = commit.read(work, self._request)
                    nbytes = sum(shard.nbytes for shard in shards)
                    done = self._done(shards, 0, (len(plan.targets), nbytes))
                else:
                    found, done = self._make(group, listener, small, side)
                with _noted(
                    f"the result is whole: the same command puts it in its place, {path} has it"
                ):
                    disk, stale = self._disk, _stale(where)
                    commit.finish(work, where.folder, found, stale, disk=disk, fsync=where.fsync)
                work.keeps = False
        return done

    def help(self, listener: Listener) -> RunResult:
        """Write the shards that rank 0 deals to this one, and wait until all is in its place."""
        where, work = self._where, self._work
        with Follower(work, self._request, where.ranks) as group:

            def told(event: Event) -> None:
                group.check()
                if isinstance(event, Wrote):
                    group.count(event.nbytes)
                listener(event)

            mine = self._of(where.ranks.rank, group.owners)
            done = self._done(mine, 0, (0, 0))
            if mine:
                crcs = journal.read(work.path, self._request, writing.keys(self._shards))
                notes, out = self._opened()
                with contextlib.closing(notes), out:
                    writer = self._writer(mine, out, notes)
                    writer.resume(crcs)
                    resumed = writer.n_resumed, writer.resumed_nbytes
                    with self._kept(writer):
                        listener(Started(done.n_tensors, done.nbytes, writer.resumed_nbytes))
                        n_read = self._compute(writer, told)
                done = self._done(mine, n_read, resumed)
            group.wait(done.n_read, where.folder / where.record)
        return done

    def _make(
        self,
        group: Leader,
        listener: Listener,
        small: Mapping[str, bytes],
        side: Mapping[str, Path],
    ) -> tuple[Commit, RunResult]:
        """Write all files, and mark them as whole."""
        where, work = self._where, self._work
        crcs = journal.read(work.path, self._request, writing.keys(self._shards))
        if not crcs:
            work.begin_anew()  # nothing of an earlier run is of use
            work.keeps = False
        files.check_room(
            where.path,
            needed=sum(shard.nbytes for shard in self._shards),
            there=files.written_nbytes(work.files),
        )
        resumed = self._resumed(crcs)
        owners = group.deal([shard.left_nbytes(crcs) for shard in self._shards])

        def told_by_others() -> None:
            group.check()
            if nbytes := group.news():
                listener(Wrote("", nbytes))

        def told(event: Event) -> None:
            told_by_others()
            listener(event)

        notes, out = self._opened()
        with contextlib.closing(notes), out:
            writer = self._writer(self._torch_placed(out, owners, bool(crcs)), out, notes)
            writer.resume(crcs)
            with self._kept(writer):
                listener(Started(len(self._plan.targets), self._plan.nbytes, resumed[1]))
                n_read = self._compute(writer, told)
                if not group.is_alone:
                    n_read += group.wait(told_by_others)
                if any(owners):
                    writer = self._all_whole(out, notes)
                found = self._complete(out, writer, small, side)
        return found, self._done(self._shards, n_read, resumed)

    def _opened(self) -> tuple[Journal, Output]:
        """This process's journal, and the files that it writes."""
        work, where = self._work, self._where
        name = journal.name_of(where.ranks.rank, where.ranks.world_size)
        notes = Journal(work.path / name, self._request, disk=self._disk, fsync=where.fsync)
        return notes, Output(work.files, where.folder, disk=self._disk, fsync=where.fsync)

    def _writer(self, shards: Sequence[Shard], out: Output, notes: Journal) -> Writer:
        return Writer(shards, out, notes, disk=self._disk, fsync=self._where.fsync)

    def _of(self, rank: int, owners: Sequence[int]) -> list[Shard]:
        """The shards that a rank makes."""
        return [shard for shard, owner in zip(self._shards, owners, strict=True) if owner == rank]

    def _resumed(self, crcs: Mapping[str, int]) -> tuple[int, int]:
        """How many tensors an earlier run has written, and their bytes."""
        slots = [slot for shard in self._shards for slot in shard.slots if slot.key in crcs]
        return len(slots), sum(slot.spec.nbytes for slot in slots)

    def _done(self, shards: Sequence[Shard], n_read: int, resumed: tuple[int, int]) -> RunResult:
        n_tensors, nbytes = sum(len(s.slots) for s in shards), sum(s.nbytes for s in shards)
        return RunResult(n_tensors, len(shards), nbytes, n_read, *resumed)

    def _all_whole(self, out: Output, notes: Journal) -> Writer:
        """What knows of all shards, when all ranks say that theirs are whole.

        Raises:
            OutputError: by the journals they are not.
        """
        until = time.monotonic() + _SEEN_SECONDS
        while True:
            writer = self._writer(self._shards, out, notes)
            writer.resume(journal.read(self._work.path, self._request, writing.keys(self._shards)))
            if not writer.left_nbytes:
                return writer
            if time.monotonic() > until:
                raise OutputError(
                    f"{self._work.path}: all ranks are done, and {writer.left_nbytes} bytes are in "
                    "no journal",
                    hint="let all ranks see one file system, and run the command again",
                )
            time.sleep(1.0)

    def _torch_placed(
        self, out: Output, owners: Sequence[int], is_resumed: bool
    ) -> Sequence[Shard]:
        """Rank 0's shards; a torch file's, which says itself where its tensors are, from it."""
        if not self._where.is_torch:
            return self._of(0, owners)
        nest = (_nest(self._plan) or "").rpartition(".")[2] or None
        if not is_resumed:
            return [out.begin_torch(shard, nest) for shard in self._shards]
        return [out.torch_there(shard) for shard in self._shards]

    def _compute(self, writer: Writer, listener: Listener) -> int:
        """Write the tensors, and journal them where others wait for it; gives the bytes read."""
        plan, engine = self._plan, self._where.engine

        def told(event: Event) -> None:
            writer.keep()
            listener(event)

        targets = {key: plan.targets[key] for key in writer.missing()}
        resources = Resources(self._memory, self._choice.device, mapped=engine.reader == "mmap")
        n_read = loop.run(targets, writer, resources, listener=told)
        writer.finish()
        if self._where.ranks.world_size > 1:
            writer.keep(at_once=True)
        for source in plan.sources:
            source.check_unchanged()
        return n_read

    def _complete(
        self, out: Output, writer: Writer, small: Mapping[str, bytes], side: Mapping[str, Path]
    ) -> Commit:
        """Write what goes along with the tensors."""
        where, shards = self._where, [shard.name for shard in self._shards]
        for name, path in side.items():
            if name not in small:
                out.copy(name, path)
        for name in () if where.is_file else side_list.elsewhere(self._plan.side):
            if name not in small and self._plan.side is not None:
                out.add(name, side_list.fetch(self._plan.side, name))
        if where.format == "dcp":
            from streammap.io.formats import dcp_metadata
            from streammap.output import dcp_writer

            nest = _nest(self._plan) if where.nest is None else where.nest
            out.add(dcp_metadata.METADATA, dcp_writer.metadata(self._shards, nest))
        elif len(shards) > 1:
            out.add(layout.INDEX, layout.index(self._shards))
        for name, content in small.items():
            out.add(name, content)
        sizes = out.sizes([*shards, *out.names])
        out.add_parts(where.record, record.encode(self._plan, VERSION, sizes, writer.tensors()))
        names = (*out.names, *shards) if where.is_file else commit.ordered((*shards, *out.names))
        found = Commit(names, where.overwrite)
        self._work.keeps = True
        commit.begin(self._work, self._request, found, disk=self._disk, fsync=where.fsync)
        return found

    @contextlib.contextmanager
    def _kept(self, writer: Writer) -> Iterator[None]:
        """Where it fails, keep what is durable, and say so."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError, StreammapError):
                writer.keep(at_once=True)
            self._work.keeps = writer.n_journalled > 0 and self._are_unchanged()
            if self._work.keeps:
                by = f" by rank {here.rank}" if (here := self._where.ranks).world_size > 1 else ""
                error.add_note(
                    f"kept: {writer.n_journalled} of {len(self._plan.targets)} tensors{by}, "
                    f"{writer.journalled_nbytes / 1e9:.3f} GB, in {self._work.path}; the same "
                    "command goes on, --restart begins anew"
                )
            cause = error.__cause__ if isinstance(error, OutputError) else error
            if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._full(error, cause, writer) from cause
            raise

    def _full(self, error: BaseException, cause: OSError, writer: Writer) -> OutputError:
        """The error of a disk that is full: what is missing, how to go on."""
        hint = "free disk space, or write elsewhere"
        if self._work.keeps:
            hint = (
                f"free disk space and run the same command again; or remove {self._work.path} "
                "to get the space back"
            )
        told = f"{self._where.path}: {cause.strerror}"
        told = error.message if isinstance(error, OutputError) else told
        left = writer.left_nbytes
        made = OutputError(f"{told}: {left} bytes of the result are not written", hint=hint)
        for note in getattr(error, "__notes__", ()):
            made.add_note(note)
        return made

    def _are_unchanged(self) -> bool:
        """Whether the sources are what they were: else what is kept could be of both."""
        try:
            for source in self._plan.sources:
                source.check_unchanged()
        except (CheckpointError, OSError):
            return False
        return True


@contextlib.contextmanager
def _noted(note: str) -> Iterator[None]:
    """Where it fails, say this too."""
    try:
        yield
    except BaseException as error:
        error.add_note(note)
        raise


def _check_place(plan: Plan, where: OutputOptions, work: Path) -> None:
    kept = [] if where.may_replace_sources else [path for s in plan.sources for path in s.paths]
    goes_on = not where.restart and commit.is_marked(work)
    beside = (map_file.beside(where.path), record.beside(where.path)) if where.is_file else ()
    overwrite = where.overwrite or goes_on
    files.check_place(where.path, overwrite=overwrite, beside=beside, sources=kept)


def _nest(plan: Plan) -> str | None:
    """What the source's state dict is nested under."""
    return None if plan.side is None else plan.side.nest


def _stale(where: OutputOptions) -> commit.Stale:
    """What an earlier result may have left where this one goes."""
    if not where.is_file:
        return (*commit.STALE, (*map_file.NAMES, record.NAME))
    beside = (map_file.beside(where.path).name, record.beside(where.path).name)
    return ((glob.escape(where.path.name),), tuple(map(glob.escape, beside)))


def _small_files(plan: Plan, where: OutputOptions) -> tuple[dict[str, bytes], dict[str, Path]]:
    """What goes along: files with new content, and files to copy."""
    if not where.is_file:
        along = side_files.copied(plan.side)
        return side_files.contents(plan, along), along
    if not plan.levels:
        return {}, {}
    return {map_file.beside(where.path).name: map_file.encode(plan.levels)}, {}
