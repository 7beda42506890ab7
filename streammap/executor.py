"""Run a plan: compute tile by tile, write each at its final place.

Nothing is held but one tile and its scratch. Pages of the sources are given back every few MiB, so
that mapped memory stays small too.
"""

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammap import layout, mapfile, output, sidefiles, tiling
from streammap.errors import OutputError
from streammap.events import Finished, Listener, Started, Wrote
from streammap.graph import Form, Load
from streammap.header import Slot
from streammap.layout import Shard
from streammap.maps import DenseMap
from streammap.output import Output
from streammap.plan import Plan
from streammap.version import VERSION

if TYPE_CHECKING:
    from streammap.evaluate import Scratch

_COPY_NBYTES = 16 * 2**20


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
    may_replace_sources: bool = False
    """Whether the output may be the folder of a source; its files are replaced at the end."""

    @property
    def is_file(self) -> bool:
        """Whether the result is one file instead of a folder."""
        return self.path.suffix in (".safetensors", *_TORCH)


_TORCH = (".pth", ".pt", ".bin")


def planned_nbytes(plan: Plan) -> int:
    """Memory that a run of `plan` adds to a process that has torch imported, at most.

    Tiles, dense maps, scratch, mapped pages, one entry of bookkeeping a tensor, and what torch's
    threads take.
    """
    tile = max((tiling.scratch_nbytes(form) for form in plan.targets.values()), default=0)
    matrices = {
        id(m): m.matrix.nbytes
        for form in plan.targets.values()
        for term in form.terms
        for m in term.maps
        if isinstance(m, DenseMap)
    }
    maps = sum(matrices.values())
    return tile + maps + 2 * tiling.WINDOW_NBYTES + 8192 * len(plan.targets) + 32 * 2**20


def read_nbytes(plan: Plan) -> int:
    """Bytes of source tensors that a run reads."""
    return sum(found.spec.nbytes for form in plan.targets.values() for found in form.loads())


def run(plan: Plan, where: Where, listener: Listener) -> Report:
    """Write a plan's result.

    Raises:
        OutputError: the place is taken, too small, or can't be written.
        CheckpointError: a source changed or can't be read.
    """
    started, cpu = time.perf_counter(), time.process_time()
    single = where.path.name if where.is_file else None
    shards = layout.arrange(plan.specs, max_shard_nbytes=where.max_shard_nbytes, single=single)
    total = sum(shard.nbytes for shard in shards)
    try:
        _write(plan, where, shards, total, listener)
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
        nbytes_read=read_nbytes(plan),
        nbytes_written=total,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu,
        peak_nbytes=peak_nbytes(),
        planned_nbytes=planned_nbytes(plan),
        promise=promise,
        reason=reason,
    )


def _write(
    plan: Plan, where: Where, shards: Sequence[Shard], total: int, listener: Listener
) -> None:
    beside = (mapfile.beside(where.path),) if where.is_file else ()
    kept = [] if where.may_replace_sources else [path for s in plan.sources for path in s.paths]
    output.check_place(
        where.path, overwrite=where.overwrite, beside=beside, sources=kept, needed=total
    )
    contents, side = _small_files(plan, where)
    listener(Started(len(plan.targets), plan.nbytes))
    with Output(where.path.parent if where.is_file else where.path, fsync=where.fsync) as out:
        for shard in shards:
            _write_shard(plan, shard, out, listener)
        for name, path in side.items():
            if name not in contents:
                out.copy(name, path)
        if len(shards) > 1:
            contents[layout.INDEX] = layout.index(shards)
        for name, content in contents.items():
            out.add(name, content)
        for source in plan.sources:
            source.check_unchanged()
        out.commit(stale=_stale(where))


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


def _write_shard(plan: Plan, shard: Shard, out: Output, listener: Listener) -> None:
    if Path(shard.name).suffix in _TORCH:
        nest = plan.side.nest if plan.side is not None else None
        shard = out.begin_torch(shard, nest)
    else:
        out.begin(shard)
    scratch = None
    for slot in shard.slots:
        form = plan.targets[slot.key]
        copied = form.copied
        start = None if copied is None else copied.source.start(copied.key)
        if copied is not None and start is not None:
            _copy(copied, start, slot, shard.name, out, listener)
        else:
            scratch = scratch or _new_scratch()
            _compute(form, slot, shard.name, out, scratch, listener)


def _new_scratch() -> "Scratch":
    """Imports torch: a result of copies only does without."""
    from streammap.evaluate import Scratch

    return Scratch()


def _copy(found: Load, start: int, slot: Slot, file: str, out: Output, listener: Listener) -> None:
    descriptor = found.source.file(found.key).descriptor
    for at in range(0, slot.spec.nbytes, _COPY_NBYTES):
        nbytes = min(_COPY_NBYTES, slot.spec.nbytes - at)
        out.copy_at(file, slot.start + at, descriptor, start + at, nbytes)
        listener(Wrote(slot.key, nbytes))


def _compute(
    form: Form, slot: Slot, file: str, out: Output, scratch: "Scratch", listener: Listener
) -> None:
    import torch

    from streammap import evaluate
    from streammap.dtypes import to_torch

    dtype = to_torch(slot.spec.dtype)
    used = 0
    per_element = tiling.loads_nbytes(form) / max(1, slot.spec.n_elements)
    buffer = memoryview(b"")
    for tile in tiling.tiles(slot.spec, tiling.widening(form)):
        nbytes = tile.n_elements * dtype.itemsize
        if len(buffer) < nbytes:
            buffer = memoryview(bytearray(nbytes))
        part = torch.frombuffer(buffer, dtype=dtype, count=tile.n_elements).view(tile.shape)
        evaluate.compute(form, tile, part, scratch)
        out.write_at(file, slot.start + tile.offset * dtype.itemsize, buffer[:nbytes])
        listener(Wrote(slot.key, nbytes))
        used += int(per_element * tile.n_elements)
        if used >= tiling.WINDOW_NBYTES:
            _release(form)
            used = 0
    _release(form)


def _release(form: Form) -> None:
    for source in {id(found.source): found.source for found in form.loads()}.values():
        source.release()
