"""Run a plan: compute tile by tile, write each at its final place, in a fixed amount of memory."""

import resource
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import final

from streammap import (
    devices,
    graph,
    layout,
    mapfile,
    memory,
    output,
    pipeline,
    readahead,
    schedule,
    sidefiles,
    sidelist,
)
from streammap.devices import Choice
from streammap.engine import Engine
from streammap.errors import OutputError
from streammap.events import Finished, Listener, Started
from streammap.header import Slot
from streammap.layout import Shard
from streammap.memory import Memory
from streammap.output import Output
from streammap.plan import Plan
from streammap.schedule import Job
from streammap.version import VERSION


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

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        rate = self.nbytes_written / 1e6 / max(self.seconds, 1e-9)
        shards = "1 file" if self.n_shards == 1 else f"{self.n_shards} shards"
        return (
            f"wrote {shards}, {self.nbytes_written / 1e9:.3f} GB in {self.seconds:.1f} s "
            f"({rate:.0f} MB/s), peak {self.peak_nbytes / 1e9:.2f} GB"
        )


@dataclass(frozen=True, slots=True)
class Where:
    """Where and how a result is written."""

    path: Path
    """A folder, or a file that ends in .safetensors, .pth, .pt or .bin."""
    max_shard_nbytes: int
    overwrite: bool
    fsync: bool
    engine: Engine
    may_replace_sources: bool = False
    """Whether the output may be the folder of a source; its files are replaced at the end."""

    @property
    def is_file(self) -> bool:
        """Whether the result is one file instead of a folder."""
        return self.path.suffix in (".safetensors", *_TORCH)


_TORCH = (".pth", ".pt", ".bin")


def fit(plan: Plan, engine: Engine) -> Memory:
    """The memory of a run of `plan`.

    Raises:
        OutputError: the engine's is too little.
    """
    forms = plan.targets.values()
    return memory.fit(
        forms,
        budget=engine.memory_nbytes,
        n_workers=engine.n_threads,
        is_streamed=any(source.is_streamed for source in plan.sources),
    )


def device(plan: Plan, engine: Engine) -> Choice:
    """Where a run of `plan` computes.

    Raises:
        OutputError: the engine's GPU is not there.
    """
    return devices.choose(plan.targets.values(), engine.device)


def read_nbytes(plan: Plan) -> int:
    """Bytes of the source tensors that a run reads; where maps are dense, some are read again."""
    loads = {found for form in plan.targets.values() for found in form.loads()}
    return sum(found.spec.nbytes for found in loads if not graph.is_constant(found))


def run(plan: Plan, where: Where, listener: Listener) -> Report:
    """Write a plan's result.

    Raises:
        OutputError: the place is taken, too small, or can't be written.
        CheckpointError: a source changed or can't be read.
    """
    started, cpu = time.perf_counter(), time.process_time()
    fitted, choice = fit(plan, where.engine), device(plan, where.engine)
    single = where.path.name if where.is_file else None
    shards = layout.arrange(plan.specs, max_shard_nbytes=where.max_shard_nbytes, single=single)
    total = sum(shard.nbytes for shard in shards)
    try:
        n_read = _write(plan, where, shards, total, (fitted, choice), listener)
    except OSError as error:
        raise OutputError(
            f"{where.path}: {error.strerror or error}", hint="check the path and the disk"
        ) from error
    listener(Finished())
    promise, reason = plan.promise
    return Report(
        output=str(where.path),
        n_tensors=len(plan.targets),
        n_shards=len(shards),
        nbytes_read=n_read,
        nbytes_written=total,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        peak_nbytes=peak_nbytes(),
        planned_nbytes=fitted.peak_nbytes,
        n_threads=fitted.n_workers,
        device=choice.device,
        promise=promise,
        reason=reason,
    )


def _write(
    plan: Plan,
    where: Where,
    shards: Sequence[Shard],
    total: int,
    means: tuple[Memory, Choice],
    listener: Listener,
) -> int:
    """Write everything; gives the bytes read."""
    fitted, choice = means
    beside = (mapfile.beside(where.path),) if where.is_file else ()
    kept = [] if where.may_replace_sources else [path for s in plan.sources for path in s.paths]
    output.check_place(
        where.path, overwrite=where.overwrite, beside=beside, sources=kept, needed=total
    )
    contents, side = _small_files(plan, where)
    listener(Started(len(plan.targets), plan.nbytes))
    with Output(where.path.parent if where.is_file else where.path, fsync=where.fsync) as out:
        writer = _Writer(plan, shards, out)
        jobs = schedule.bundles(plan.targets, writer.slots(), fitted)
        computes = any(form.copied is None for form in plan.targets.values())
        with _torch_threads() if computes else nullcontext():
            mapped = where.engine.reader == "mmap"
            readahead.expect(plan, writer.slots())
            with readahead.ahead(jobs, plan, fitted.ahead_nbytes) as bundles:
                n_read = pipeline.run(
                    bundles, fitted, writer.write,
                    listener=listener, mapped=mapped, device=choice.device,
                    cancel=partial(readahead.cancel, plan),
                )  # fmt: skip
        writer.finish()
        for name, path in side.items():
            if name not in contents:
                out.copy(name, path)
        for name in () if where.is_file else sidelist.elsewhere(plan.side):
            if name not in contents and plan.side is not None:
                out.add(name, sidelist.fetch(plan.side, name))
        if len(shards) > 1:
            contents[layout.INDEX] = layout.index(shards)
        for name, content in contents.items():
            out.add(name, content)
        for source in plan.sources:
            source.check_unchanged()
        out.commit(stale=_stale(where))
    return n_read


def _torch_threads() -> AbstractContextManager[None]:
    """Imports torch: a result of copies only does without."""
    from streammap import kernels

    return kernels.one_thread_each()


@final
class _Writer:
    """Writes bytes of the shards, which begin when their first bytes come."""

    def __init__(self, plan: Plan, shards: Sequence[Shard], out: Output) -> None:
        """Torch files begin at once: their layout is known when they are there."""
        self._out = out
        nest = plan.side.nest if plan.side is not None else None
        self._shards = [
            out.begin_torch(s, nest) if Path(s.name).suffix in _TORCH else s for s in shards
        ]
        self._waiting = {s.name: s for s in self._shards if Path(s.name).suffix not in _TORCH}
        self._locks = {s.name: threading.Lock() for s in self._shards}
        self._left = {s.name: sum(slot.spec.nbytes for slot in s.slots) for s in self._shards}

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """(file, slot) of every tensor."""
        for shard in self._shards:
            for slot in shard.slots:
                yield shard.name, slot

    def write(self, job: Job, view: memoryview) -> None:
        """Write a job's bytes to all of its places."""
        for place in job.places:
            with self._locks[place.file]:
                self._begin(place.file)
                self._out.write_at(place.file, place.offset, view)
                self._left[place.file] -= len(view)
                if not self._left[place.file]:
                    self._out.close(place.file)

    def finish(self) -> None:
        """Begin the shards that have no bytes but their header."""
        for name in list(self._waiting):
            self._begin(name)

    def _begin(self, name: str) -> None:
        shard = self._waiting.pop(name, None)
        if shard is not None:
            self._out.begin(shard)


def _stale(where: Where) -> tuple[str, ...]:
    """What an earlier result may have left where this one goes (glob patterns)."""
    if not where.overwrite:
        return ()
    if where.is_file:
        return (mapfile.beside(where.path).name,)
    return (*output.STALE, *mapfile.NAMES, sidefiles.PROVENANCE)


def _small_files(plan: Plan, where: Where) -> tuple[dict[str, bytes], dict[str, Path]]:
    """What goes along: files with new content, and files to copy."""
    if not where.is_file:
        return sidefiles.contents(plan, VERSION), sidefiles.copied(plan.side)
    if not plan.levels:
        return {}, {}
    return {mapfile.beside(where.path).name: mapfile.encode(plan.levels)}, {}


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
