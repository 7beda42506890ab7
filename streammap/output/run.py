"""Run a plan: compute tile by tile, write each at its final place, in a fixed amount of memory."""

import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from streammap.common import garbage
from streammap.common import text as wording
from streammap.common.events import Finished, Listener
from streammap.engine import devices, memory
from streammap.engine.devices import DeviceChoice
from streammap.engine.memory import Memory
from streammap.engine.options import Engine
from streammap.errors import OutputError
from streammap.io.storage.base import Sink
from streammap.output import shards as layout
from streammap.output import transaction
from streammap.output.options import OutputOptions
from streammap.output.ranks.launcher import ALONE, Ranks
from streammap.output.shards import Shard
from streammap.planning import graph
from streammap.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did."""

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
    """What the plan said the run would add to the process at most."""
    n_threads: int
    device: str
    promise: str
    reason: str
    n_resumed: int = 0
    """Tensors that an earlier run had written."""
    nbytes_resumed: int = 0
    rank: int = 0
    """Of several processes: 0 tells of the result that all of them made, the others of their part;
    times and memory are each one's own."""
    world_size: int = 1

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
            f"wrote {shards}, {wording.moved(self.nbytes_written, self.seconds)}, "
            f"peak {self.peak_nbytes / 1e9:.2f} GB"
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


def read_nbytes(plan: Plan) -> int:
    """Bytes of the source tensors that a run reads; where maps are dense, some are read again."""
    loads = {found for form in plan.targets.values() for found in form.loads()}
    return sum(found.spec.nbytes for found in loads if not graph.is_constant(found))


def run(
    plan: Plan, where: OutputOptions, listener: Listener, *, sink: Sink | None = None
) -> Report:
    """Write a plan's result.

    Args:
        sink: Where it goes, if not to a place of this machine; `where.path` is the spool then.

    Raises:
        OutputError: the place is taken, too small, or can't be written.
        CheckpointError: a source changed or can't be read.
    """
    started, cpu = time.perf_counter(), time.process_time()
    here = where.ranks
    fitted, choice = fit(plan, where.engine, here), device(plan, where.engine, here)
    label = str(where.path) if sink is None else sink.label
    shards = _arranged(plan, where, sink)
    try:
        with garbage.of_new_objects():
            if sink is None:
                done = transaction.make(plan, where, shards, (fitted, choice), listener)
            else:
                from streammap.output import upload

                done = upload.send(plan, where, sink, shards, (fitted, choice), listener)
    except OSError as error:
        text = f"{label}: {error.strerror or error}"
        made = OutputError(text, hint="check the path and the disk")
        for note in getattr(error, "__notes__", ()):
            made.add_note(note)
        raise made from error
    listener(Finished())
    promise, reason = plan.promise
    return Report(
        output=label,
        n_tensors=done.n_tensors,
        n_shards=done.n_shards,
        nbytes_read=done.n_read,
        nbytes_written=done.nbytes - done.resumed_nbytes,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        peak_nbytes=peak_nbytes(),
        planned_nbytes=fitted.peak_nbytes,
        n_threads=fitted.n_workers,
        device=choice.device,
        promise=promise,
        reason=reason,
        n_resumed=done.n_resumed,
        nbytes_resumed=done.resumed_nbytes,
        rank=here.rank,
        world_size=here.world_size,
    )


def _arranged(plan: Plan, where: OutputOptions, sink: Sink | None) -> tuple[Shard, ...]:
    if where.format == "dcp":
        from streammap.output import dcp_writer

        return dcp_writer.arrange(plan.specs, max_shard_nbytes=where.max_shard_nbytes)
    single = where.path.name if where.is_file else None
    single = sink.file if sink is not None else single
    return layout.arrange(plan.specs, max_shard_nbytes=where.max_shard_nbytes, single=single)


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
