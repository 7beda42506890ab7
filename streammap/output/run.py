"""Run a plan: compute tile by tile, write each tile at its final place, in bounded memory."""

import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from streammap.common import events, garbage, text
from streammap.common.events import Finished, Listener
from streammap.common.ranks import ALONE, Ranks
from streammap.common.units import format_nbytes
from streammap.engine import devices, memory
from streammap.engine.devices import DeviceChoice
from streammap.engine.memory import Memory
from streammap.engine.options import Engine
from streammap.errors import OutputError
from streammap.io import filenames
from streammap.io.storage.base import Reading, Sink
from streammap.output import layout, losses, side_files, transaction
from streammap.output.layout import Shard
from streammap.output.options import OutputOptions
from streammap.output.transaction import RunResult
from streammap.planning import graph
from streammap.planning.graph import Derived, LinearForm, TensorRef
from streammap.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Report:
    """Figures of a finished run."""

    output: str
    n_tensors: int
    n_shards: int
    nbytes_read: int
    nbytes_written: int
    seconds: float
    cpu_seconds: float
    peak_nbytes: int
    """Largest resident memory of the process so far (VmHWM)."""
    planned_nbytes: int
    """What the run was to add to the process at most."""
    n_threads: int
    device: str
    promise: str
    reason: str
    n_resumed: int = 0
    """Tensors that an earlier run had written."""
    nbytes_resumed: int = 0
    rank: int = 0
    """Of several processes, 0 counts what all of them wrote, each other one its own part; times and
    memory are the process's own."""
    world_size: int = 1
    notes: tuple[str, ...] = ()
    """What a user might not expect of the result."""
    n_overflowed: int = 0
    """Numbers that became infinite when they were rounded to the result's dtype."""
    n_vanished: int = 0
    """Numbers that became 0."""

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        shards = "1 file" if self.n_shards == 1 else f"{self.n_shards} shards"
        if self.world_size > 1:
            shards += (
                f" with {self.world_size} ranks" if self.rank == 0 else f" as rank {self.rank}"
            )
        return (
            f"wrote {shards}, {text.moved(self.nbytes_written, self.seconds)}, "
            f"peak {format_nbytes(self.peak_nbytes)}"
        )


def fit(plan: Plan, engine: Engine, ranks: Ranks = ALONE) -> Memory:
    """The memory of a run of `plan`.

    Raises:
        OutputError: the engine's is too little.
    """
    forms = plan.targets.values()
    return memory.fit(
        forms,
        budget=engine.memory_nbytes,
        n_workers=engine.n_threads,
        networks={source.network for source in plan.sources},
        n_sharing=ranks.local_world_size,
    )


def device(plan: Plan, engine: Engine, ranks: Ranks = ALONE) -> DeviceChoice:
    """Where a run of `plan` computes.

    Raises:
        OutputError: the engine's GPU is not there.
    """
    return devices.choose(plan.targets.values(), engine.device, local_rank=ranks.local_rank)


def readings(plan: Plan, engine: Engine) -> tuple[Reading, ...]:
    """How a run of `plan` reads its sources, each way once.

    Raises:
        CheckpointError: a file can't be opened.
    """
    found = (reading for source in plan.sources for reading in source.readings(engine.reader))
    return tuple(dict.fromkeys(found))


def read_nbytes(plan: Plan) -> int:
    """Bytes of the source tensors that a run reads: as often as tensors that are derived from them
    ask for. Where maps are dense, some are read again.
    """
    times: dict[TensorRef, int] = {}
    for form in plan.targets.values():
        _count(form, 1, times)
    return sum(n * load.spec.nbytes for load, n in times.items() if not graph.is_constant(load))


def _count(form: LinearForm, n: int, times: dict[TensorRef, int]) -> None:
    """How often each stored tensor is read for a form that is read n times."""
    for ref in form.reads():
        if isinstance(ref.source, Derived):
            for inner in ref.source.inputs:
                _count(inner, n * ref.source.n_passes, times)
        else:
            times[ref] = max(n, times.get(ref, 0))


def run(
    plan: Plan, options: OutputOptions, listener: Listener, *, sink: Sink | None = None
) -> Report:
    """Write a plan's result.

    Args:
        sink: Where it goes, if not to a place on this machine; `options.path` is the spool then.

    Raises:
        OutputError: the place is taken, too small, or can't be written.
        CheckpointError: a source changed or can't be read.
    """
    plan.check_settled()
    started, cpu_started = time.perf_counter(), time.process_time()
    ranks = options.ranks
    fitted, choice = fit(plan, options.save, ranks), device(plan, options.save, ranks)
    label = str(options.path) if sink is None else sink.label
    with events.as_raised(listener) as heard:
        result = _write(plan, options, (fitted, choice), heard, sink, label)
    listener(Finished())
    promise, reason = plan.promise
    lost = losses.total(result.lost)
    return Report(
        output=label,
        n_tensors=result.n_tensors,
        n_shards=result.n_shards,
        nbytes_read=result.n_read,
        nbytes_written=result.nbytes - result.resumed_nbytes,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        peak_nbytes=peak_nbytes(),
        planned_nbytes=fitted.peak_nbytes,
        n_threads=fitted.n_workers,
        device=choice.device,
        promise=promise,
        reason=reason,
        n_resumed=result.n_resumed,
        nbytes_resumed=result.resumed_nbytes,
        rank=ranks.rank,
        world_size=ranks.world_size,
        notes=(*side_files.notes(plan), *losses.notes(result.lost)),
        n_overflowed=lost.overflowed,
        n_vanished=lost.vanished,
    )


def _write(
    plan: Plan,
    options: OutputOptions,
    means: tuple[Memory, DeviceChoice],
    listener: Listener,
    sink: Sink | None,
    label: str,
) -> RunResult:
    shards = _arranged(plan, options, sink)
    try:
        with garbage.of_new_objects():
            if sink is None:
                return transaction.run(plan, options, shards, means, listener)
            from streammap.output import upload

            return upload.run(plan, options, sink, shards, means, listener)
    except OSError as error:
        raised = OutputError(f"{label}: {error.strerror or error}", hint="check the path and disk")
        for note in getattr(error, "__notes__", ()):
            raised.add_note(note)
        raise raised from error


def _arranged(plan: Plan, options: OutputOptions, sink: Sink | None) -> tuple[Shard, ...]:
    """The files of a result's tensors; an optimizer's state is a file of its own, but in DCP."""
    state = plan.optimizer
    if state is None or options.save.format == "dcp":
        return _of_tensors(plan, options, sink)
    from streammap.output.forms import optimizer_files

    if options.is_file or (sink is not None and sink.file is not None):
        raise OutputError(
            f"{options.path}: a file has no place for the optimizer's state",
            hint="write to a folder, or leave --optimizer out",
        )
    specs = {key: plan.targets[key].spec for key in state.entries}
    weights = _of_tensors(plan.without_optimizer, options, sink)
    return (*weights, optimizer_files.arrange(state, specs))


def _of_tensors(plan: Plan, options: OutputOptions, sink: Sink | None) -> tuple[Shard, ...]:
    most = options.save.max_shard_nbytes
    if options.save.format == "dcp":
        from streammap.output.forms import dcp_writer

        return dcp_writer.arrange(plan.specs, max_shard_nbytes=most)
    single = options.single if sink is None else sink.file
    if options.save.format == "torch" or (single or "").endswith(filenames.TORCH):
        from streammap.output.forms import torch_files

        nest = (plan.nest or "").rpartition(".")[2] or None
        return torch_files.arrange(plan.specs, max_shard_nbytes=most, single=single, nest=nest)
    return layout.arrange(plan.specs, max_shard_nbytes=most, single=single)


def peak_nbytes() -> int:
    """Largest resident memory of this process so far, mapped pages included."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
