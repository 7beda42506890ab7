"""A result is written as a transaction: whole in its place, or not there and resumable.

    begun -> writing -> whole -> committing -> done

    begun        the work folder is locked; an earlier run may have left some of the result in it
    writing      tiles go into shards, whole tensors into the journal
    whole        all tensors are durable; side files, index and record follow
    committing   commit.json is there: files are renamed into place, nothing is computed any more
    done         the work folder is removed

What a failure leaves depends on the state, see `_on_failure`. A kill leaves the same, since all
that counts is on the disk. Several processes each write some of the shards, and the one that leads
does all the rest, see ranks/coordination.py.
"""

import contextlib
import enum
import errno
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from streammap.common.events import Event, Listener, Started, Wrote
from streammap.common.losses import Losses
from streammap.common.units import format_nbytes
from streammap.common.version import VERSION
from streammap.engine import loop
from streammap.engine.devices import DeviceChoice
from streammap.engine.loop import Resources
from streammap.engine.memory import Memory
from streammap.errors import CheckpointError, OutputError, StreammapError, TruncatedError
from streammap.io.storage import disk as disks
from streammap.output import (
    commit,
    fingerprint,
    journal,
    layout,
    losses,
    place,
    record,
    shard_writer,
    side_files,
    work_folder,
)
from streammap.output.commit import Commit
from streammap.output.files import Output
from streammap.output.fingerprint import Fingerprint
from streammap.output.journal import Journal
from streammap.output.layout import Shard
from streammap.output.options import OutputOptions
from streammap.output.ranks import coordination
from streammap.output.ranks.coordination import Participant
from streammap.output.save_options import SaveOptions
from streammap.output.shard_writer import ShardWriter
from streammap.output.side_files import SideFile
from streammap.output.work_folder import WorkFolder
from streammap.planning.plan import Plan

_VISIBLE_SECONDS = 90.0
"""Time that a network file system may take to show what another machine wrote."""


class State(enum.Enum):
    """How far a transaction is."""

    BEGUN = enum.auto()
    WRITING = enum.auto()
    WHOLE = enum.auto()
    COMMITTING = enum.auto()
    DONE = enum.auto()


@dataclass(frozen=True, slots=True)
class RunResult:
    """Counters of a finished run, including resumed work; on the rank that leads, of all ranks."""

    n_tensors: int
    n_shards: int
    nbytes: int
    """Of the shards."""
    n_read: int
    """Bytes."""
    n_resumed: int
    """Tensors that an earlier run had written."""
    resumed_nbytes: int
    lost: Mapping[str, Losses]
    """Key -> what rounding lost, for each tensor that lost something."""


def run(
    plan: Plan,
    options: OutputOptions,
    shards: Sequence[Shard],
    resources: tuple[Memory, DeviceChoice],
    listener: Listener,
) -> RunResult:
    """Write the result, or resume an earlier run that was to write the same.

    Raises:
        OutputError: the place is taken, too small, or can't be written.
        CheckpointError: a source changed or can't be read.
    """
    path = work_folder.path_for(options.path, is_file=options.is_file)
    side = tuple(side_files.collect(plan, single=options.single))
    check_place(plan, options)
    names = [*(s.name for s in shards), *(file.name for file in side), options.record]
    place.check_names(options.folder, names)
    if not options.may_replace_sources:
        names += commit.stale_names(options.folder, options.single)
        place.check_sources(plan, options.folder, names, side=side)
    request = fingerprint.of_result(
        plan,
        shards,
        max_shard_nbytes=options.save.max_shard_nbytes,
        version=VERSION,
        nest=options.save.nest,
    )
    work = WorkFolder(path)
    return _Transaction(plan, options, shards, side, resources, request, work).run(listener)


def finish(path: str | Path) -> bool:
    """Commit a result that is whole and whose run was stopped; its sources are not needed.

    Returns:
        Whether there was one.

    Raises:
        OutputError: a file of it is missing, or another run is at work there.
    """
    output = Path(path)
    options = OutputOptions(output, SaveOptions())
    work = WorkFolder(work_folder.path_for(output, is_file=options.is_file))
    if not work.is_marked:
        return False
    with work:
        written = commit.read(work, None)
        stale, disk = commit.stale(options.single), disks.current()
        commit.finish(work, options.folder, written, stale, disk=disk, fsync=True)
        work.keep_on_exit = False
    return True


@final
class _Transaction:
    """One run of one process."""

    def __init__(
        self,
        plan: Plan,
        options: OutputOptions,
        shards: Sequence[Shard],
        side: Sequence[SideFile],
        resources: tuple[Memory, DeviceChoice],
        request: Fingerprint,
        work: WorkFolder,
    ) -> None:
        self._plan, self._options, self._shards, self._side = plan, options, shards, side
        self._memory, self._choice = resources
        self._request, self._work = request, work
        self._state = State.BEGUN
        self._keys = shard_writer.keys(shards)
        self._disk, ranks = disks.current(), options.ranks
        log = work.path / journal.name_of(ranks.rank, ranks.world_size)
        self._journal = Journal(log, request, disk=self._disk, fsync=options.save.fsync)
        self._out = Output(work.files, options.folder, disk=self._disk, fsync=options.save.fsync)
        self._writer = self._new_writer(())

    def run(self, listener: Listener) -> RunResult:
        """Take it to its end, alone or with other processes."""
        options, result = self._options, self._options.folder / self._options.record
        with (
            coordination.join(self._work, self._request, options.ranks, result) as group,
            contextlib.closing(self._journal),
            self._out,
            self._on_failure(),
        ):
            written = self._begin() if group.leads else None
            if written is not None:
                group.assign([0] * len(self._shards))
                counters = self._already_whole(listener)
            else:
                counters = self._write(group, listener)
                written = self._complete() if group.leads else None
            if written is not None:
                self._commit(written)
        return counters

    def _begin(self) -> Commit | None:
        """Look at what is there; gives the commit that an earlier run began."""
        # A second look, now that the folder is locked: another run may have ended meanwhile.
        check_place(self._plan, self._options)
        if self._options.save.restart:
            if self._work.is_marked:
                # What is in place is half of a result: none that could be kept.
                commit.discard(self._options.folder, commit.stale(self._options.single), self._disk)
            self._work.start_over()
        if not self._work.is_marked:
            return None
        written = commit.read(self._work, self._request)
        self._state = State.COMMITTING
        return written

    def _write(self, group: Participant, listener: Listener) -> RunResult:
        """Write this process's shards, and wait for the others: all are whole, or committed."""
        # The leader has discarded what is of no use before it assigns, and the others have been
        # assigned their shards when they get here: nobody reads a journal that is about to go.
        durable = journal.read_all(self._work.path, self._request, self._keys)
        crcs = {key: crc for key, (crc, _) in durable.items()}
        if group.leads:
            self._make_room(crcs)
        owners = group.assign([shard.left_nbytes(crcs) for shard in self._shards])
        rank = self._options.ranks.rank
        own = [s for s, owner in zip(self._shards, owners, strict=True) if owner == rank]
        counted = self._shards if group.leads else own

        def check() -> None:
            if nbytes := group.check():
                listener(Wrote("", nbytes))

        def relay(event: Event) -> None:
            check()
            if isinstance(event, Wrote):
                group.count(event.nbytes)
            listener(event)

        resumed = [slot for shard in counted for slot in shard.slots if slot.key in crcs]
        resumed_nbytes = sum(slot.spec.nbytes for slot in resumed)
        n_read = 0
        self._writer = self._new_writer(own)
        self._writer.resume(durable)
        self._state = State.WRITING
        losses.check(self._plan, self._writer.losses)
        if counted:
            listener(self._started(counted, resumed_nbytes))
            n_read = self._compute(self._writer, relay)
        n_read += group.wait(n_read, check)
        if any(owners) and group.leads:
            self._writer = self._all_whole()
        losses.check(self._plan, self._writer.losses)
        self._state = State.WHOLE
        return _counters(counted, n_read, len(resumed), resumed_nbytes, self._writer.losses)

    def _make_room(self, crcs: Mapping[str, int]) -> None:
        if not crcs:
            self._work.start_over()  # nothing that an earlier run left is of use
        place.check_room(
            self._options.path,
            needed=sum(shard.nbytes for shard in self._shards),
            written=place.written_nbytes(self._work.files),
        )

    def _new_writer(self, shards: Sequence[Shard]) -> ShardWriter:
        fsync = self._options.save.fsync
        return ShardWriter(shards, self._out, self._journal, disk=self._disk, fsync=fsync)

    def _started(self, shards: Sequence[Shard], resumed_nbytes: int) -> Started:
        nbytes = sum(slot.spec.nbytes for shard in shards for slot in shard.slots)
        return Started(sum(len(shard.slots) for shard in shards), nbytes, resumed_nbytes)

    def _compute(self, writer: ShardWriter, listener: Listener) -> int:
        """Write the tensors, and journal them where others wait for it; gives the bytes read."""
        plan = self._plan

        def journal_too(event: Event) -> None:
            writer.checkpoint_journal()
            listener(event)

        targets = {key: plan.targets[key] for key in writer.missing()}
        resources = Resources(self._memory, self._choice.device, reader=self._options.save.reader)
        n_read = loop.run(targets, writer, resources, listener=journal_too)
        writer.finish()
        if self._options.ranks.world_size > 1:
            writer.checkpoint_journal(at_once=True)
        for source in plan.sources:
            source.check_unchanged()
        return n_read

    def _all_whole(self) -> ShardWriter:
        """A writer that knows the CRCs of all shards, by the journals of all ranks.

        Raises:
            OutputError: some tensor is in none of them.
        """
        until = time.monotonic() + _VISIBLE_SECONDS
        while True:
            writer = self._new_writer(self._shards)
            writer.resume(journal.read_all(self._work.path, self._request, self._keys))
            if not writer.left_nbytes:
                return writer
            if time.monotonic() > until:
                raise OutputError(
                    f"{self._work.path}: all ranks are done, and {writer.left_nbytes} bytes are in "
                    "no journal",
                    hint="let all ranks see one file system, and run the command again",
                )
            time.sleep(1.0)

    def _complete(self) -> Commit:
        """Write the files beside the shards, and the mark: then nothing is left but renames."""
        options, out, shards = self._options, self._out, [shard.name for shard in self._shards]
        for file in (*self._side, *self._index()):
            if file.path is not None:
                out.copy(file.name, file.path)
            else:
                out.add_parts(file.name, file.parts())
        side, writer = tuple(out.written), self._writer
        files = {name: out.of_shard(name, writer.of_shard(name)) for name in shards} | out.written
        content = record.encode(self._plan, files, writer.tensors(), writer.losses)
        out.add_parts(options.record, content)
        side = (*side, options.record)
        names = (*side, *shards) if options.is_file else commit.in_order([*shards, *side])
        written = Commit(names, options.save.overwrite)
        commit.begin(self._work, self._request, written, disk=self._disk, fsync=options.save.fsync)
        self._state, self._work.keep_on_exit = State.COMMITTING, True
        return written

    def _index(self) -> Iterator[SideFile]:
        """Which shard has what."""
        weights = layout.holding(self._shards, self._plan.weights)
        if self._options.save.format == "dcp":
            from streammap.io.formats import dcp_metadata
            from streammap.output.forms import dcp_writer

            nest = self._options.save.nest
            nest = self._plan.nest if nest is None else nest
            state = self._plan.optimizer
            if state is not None:
                yield SideFile(dcp_writer.OBJECTS, dcp_writer.objects(state))
            content = dcp_writer.metadata(self._shards, nest, state)
            yield SideFile(dcp_metadata.METADATA, content)
        elif len(weights) > 1:
            is_torch = self._options.save.format == "torch"
            name = layout.TORCH_INDEX if is_torch else layout.INDEX
            yield SideFile(name, layout.index(weights))

    def _commit(self, written: Commit) -> None:
        options, stale = self._options, commit.stale(self._options.single)
        commit.finish(
            self._work, options.folder, written, stale, disk=self._disk, fsync=options.save.fsync
        )
        self._work.keep_on_exit = False
        self._state = State.DONE

    def _already_whole(self, listener: Listener) -> RunResult:
        """The counters where an earlier run wrote everything."""
        nbytes = sum(shard.nbytes for shard in self._shards)
        listener(self._started(self._shards, self._plan.nbytes))
        return _counters(self._shards, 0, len(self._plan.targets), nbytes, {})

    @contextlib.contextmanager
    def _on_failure(self) -> Iterator[None]:
        """Keep what is of use to the next run, and add to the error how to get there."""
        try:
            yield
        except BaseException as error:
            if self._state is State.COMMITTING:
                error.add_note(
                    "the result is whole: the same command puts it in its place, "
                    f"{self._work.path} has it"
                )
            elif self._state is not State.BEGUN:
                self._keep_durable(error)
                self._explain_full_disk(error)
            raise

    def _keep_durable(self, error: BaseException) -> None:
        writer, work, ranks = self._writer, self._work, self._options.ranks
        with contextlib.suppress(OSError, StreammapError):
            writer.checkpoint_journal(at_once=True)
        work.keep_on_exit = writer.n_journalled > 0 and self._are_sources_unchanged()
        if work.keep_on_exit:
            by = f" by rank {ranks.rank}" if ranks.world_size > 1 else ""
            error.add_note(
                f"kept: {writer.n_journalled} of {len(self._plan.targets)} tensors{by}, "
                f"{format_nbytes(writer.journalled_nbytes)}, in {work.path}; the same command "
                "resumes, --restart starts over"
            )

    def _explain_full_disk(self, error: BaseException) -> None:
        """Raise a better error if the disk is full: what is missing, and how to resume."""
        cause = error.__cause__ if isinstance(error, OutputError) else error
        if not isinstance(cause, OSError) or cause.errno not in (errno.ENOSPC, errno.EDQUOT):
            return
        hint = "free disk space, or write elsewhere"
        if self._work.keep_on_exit:
            hint = (
                f"free disk space and run the same command again; or remove {self._work.path} "
                "to get the space back"
            )
        message = f"{self._options.path}: {cause.strerror}"
        message = error.message if isinstance(error, OutputError) else message
        n_left = self._writer.left_nbytes
        full = OutputError(f"{message}: {n_left} bytes of the result are not written", hint=hint)
        for note in getattr(error, "__notes__", ()):
            full.add_note(note)
        raise full from cause

    def _are_sources_unchanged(self) -> bool:
        """Whether the sources are what they were: else what is written is of no use.

        One that was cut short may come back, and each read saw it as it was.
        """
        for source in self._plan.sources:
            try:
                source.check_unchanged()
            except TruncatedError:
                continue
            except (CheckpointError, OSError):
                return False
        return True


def check_place(plan: Plan, options: OutputOptions) -> None:
    """Refuse a place that is taken, or that holds a source.

    Raises:
        OutputError: saying what is there.
    """
    work = work_folder.path_for(options.path, is_file=options.is_file)
    sources = [] if options.may_replace_sources else [p for s in plan.sources for p in s.paths]
    is_half = WorkFolder(work).is_marked
    place.check_place(
        options.path,
        single=options.single,
        overwrite=options.save.overwrite or is_half,
        sources=sources,
    )


def _counters(
    shards: Sequence[Shard],
    n_read: int,
    n_resumed: int,
    resumed_nbytes: int,
    lost: Mapping[str, Losses],
) -> RunResult:
    n_tensors, nbytes = sum(len(s.slots) for s in shards), sum(s.nbytes for s in shards)
    return RunResult(n_tensors, len(shards), nbytes, n_read, n_resumed, resumed_nbytes, lost)
