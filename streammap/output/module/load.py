"""A lazy checkpoint into a module, in place: each process computes what it holds, tile by tile."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from streammap.common import text, torch_threads
from streammap.common.events import Finished, Listener, Started, nobody
from streammap.common.ranges import Region
from streammap.engine import devices, loop, memory, regions
from streammap.engine.loop import Resources
from streammap.engine.options import Engine
from streammap.engine.regions import RegionRead
from streammap.engine.schedule import Job
from streammap.errors import PlanError, some
from streammap.io.dtypes import to_torch
from streammap.output import run
from streammap.output.module import names as runtimenames
from streammap.output.module import parameters
from streammap.output.module.names import Pretrained
from streammap.output.module.parameters import FillTarget, SharedTensor
from streammap.output.module.symbolic import Assembly, SourceRegion
from streammap.planning.plan import Plan

if TYPE_CHECKING:
    from streammap.output.module.dtensor import LocalShard


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load_into` did in this process."""

    n_tensors: int
    """Parameters and buffers that were filled; shared ones count once."""
    nbytes: int
    """Bytes of them that this process holds."""
    nbytes_read: int
    missing: tuple[str, ...]
    """Names of the module that the checkpoint does not give."""
    unexpected: tuple[str, ...]
    """Keys of the checkpoint that the module has no use for."""
    on_meta: tuple[str, ...]
    """What is on the meta device still: nobody could fill it."""
    seconds: float
    peak_nbytes: int
    """Largest resident memory of the process so far (VmHWM)."""
    planned_nbytes: int
    """What this was to add to the process at most, beside the module itself."""
    n_threads: int
    promise: str
    reason: str

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        moved = text.moved(self.nbytes, self.seconds)
        return f"filled {self.n_tensors} tensors, {moved}, peak {self.peak_nbytes / 1e9:.2f} GB"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a module is to be filled."""

    device: torch.device | None
    dtype: torch.dtype | None
    strict: bool
    engine: Engine


@final
@dataclass(frozen=True, slots=True)
class FillJob:
    """A piece of a source tensor, on its way into a destination."""

    part: RegionRead
    piece: SourceRegion
    to: FillTarget
    at: Region
    """The region of the destination."""

    def out(self) -> Tensor:
        """The region of the destination, its dimensions in the source's order."""
        held = self.to.out
        for dim, (start, end) in enumerate(self.at):
            held = held.narrow(dim, start, end - start)
        for dim in reversed(range(len(self.piece.axes))):
            if self.piece.axes[dim] is None:
                held = held.squeeze(dim)
        axes = [axis for axis in self.piece.axes if axis is not None]
        return held.permute([axes.index(d) for d in range(len(axes))])


def load(plan: Plan, given: nn.Module, wanted: LoadOptions, listener: Listener) -> LoadReport:
    """Fill a module with a plan's tensors.

    Raises:
        PlanError: names or shapes that do not fit, what can't be filled in place.
        OutputError: the memory is too little.
        CheckpointError: a source can't be read.
    """
    started = time.perf_counter()
    model = parameters.unwrapped(given)
    parameters.reshard(model)
    entries = parameters.entries(model)
    found, missing, unexpected = _matched(plan, model, entries)
    lost = parameters.lost_buffers(model)
    _check(plan, entries, found, (missing, unexpected), wanted)
    pretrained = runtimenames.pretrained_of(model)
    if wanted.strict and pretrained is None:
        parameters.refuse_lost(list(lost))
    destinations = _destinations(entries, found, pretrained, wanted)
    first, again = _works(plan, entries, found, destinations)
    fitted = memory.fit(
        (work.part.form for work in first.values()),
        budget=wanted.engine.memory_nbytes,
        n_workers=wanted.engine.n_threads,
    )
    listener(Started(len(destinations), sum(d.nbytes for d in destinations.values())))
    n_read = _run(first, fitted, wanted.engine, _fill, listener)
    if again:
        n_read += _run(again, fitted, wanted.engine, _compare, nobody)
    for destination in destinations.values():
        destination.finish()  # those of no elements
    for source in plan.sources:
        source.check_unchanged()
    if pretrained is not None:
        for name, other in pretrained.all_tied_weights_keys.items():
            if name in found and found[name] is found.get(other):
                parameters.tie(entries[name], entries[other])
        _complete(pretrained, model, destinations, wanted)
    if wanted.device is not None:
        parameters.move_buffers(model, wanted.device)
    listener(Finished())
    promise, reason = plan.promise
    return LoadReport(
        n_tensors=len(destinations),
        nbytes=sum(d.nbytes for d in destinations.values()),
        nbytes_read=n_read,
        missing=missing,
        unexpected=unexpected,
        on_meta=_on_meta(model),
        seconds=time.perf_counter() - started,
        peak_nbytes=run.peak_nbytes(),
        planned_nbytes=fitted.peak_nbytes,
        n_threads=fitted.n_workers,
        promise=promise,
        reason=reason,
    )


def _matched(
    plan: Plan, model: nn.Module, entries: Mapping[str, SharedTensor]
) -> tuple[dict[str, Assembly], tuple[str, ...], tuple[str, ...]]:
    """What makes each name of the module; names that nothing makes; keys that make nothing."""
    expected = {name: entry.tensor for name, entry in entries.items()}
    match = runtimenames.match(model, plan.specs, expected)
    found = dict(match.found)
    pretrained = runtimenames.pretrained_of(model)
    if pretrained is not None:
        _alias(found, pretrained.all_tied_weights_keys, expected)
    filled = {id(entries[name]) for name in found}
    missing = tuple(name for name, entry in entries.items() if id(entry) not in filled)
    if pretrained is None:
        return found, missing, match.unexpected
    return found, *runtimenames.ignored(pretrained, missing, match.unexpected)


def _alias(
    found: dict[str, Assembly], tied: Mapping[str, str], expected: Mapping[str, Tensor]
) -> None:
    """Give tied names that a checkpoint leaves out what the other name has.

    FSDP makes two parameters of a tied one; the values are those of one.
    """
    for name, other in tied.items():
        if name not in expected or other not in expected:
            continue
        if name not in found and other in found:
            found[name] = found[other]
        elif other not in found and name in found:
            found[other] = found[name]


def _check(
    plan: Plan,
    entries: Mapping[str, SharedTensor],
    found: Mapping[str, Assembly],
    left: tuple[tuple[str, ...], tuple[str, ...]],
    wanted: LoadOptions,
) -> None:
    """Refuse what does not fit, before anything is touched."""
    missing, unexpected = left
    if wanted.strict and (missing or unexpected):
        told = [f"{len(missing)} missing: {some(missing)}"] if missing else []
        told += [f"{len(unexpected)} unexpected: {some(unexpected)}"] if unexpected else []
        raise PlanError(
            f"the module's names are not the checkpoint's: {'; '.join(told)}",
            hint="is it a model of this kind, with the same head? or pass strict=False",
        )
    wrong = [
        f"{name}: the checkpoint has {list(made.shape)}, the module {list(shape)}"
        for name, made in found.items()
        if made.shape != (shape := tuple(entries[name].tensor.shape))
    ]
    if wrong:
        raise PlanError(
            some(wrong),
            hint="make the module from the result's config: Config.from_dict(lazy.config)",
        )
    for name, made in found.items():
        for piece in made.pieces:
            spec = plan.targets[piece.key].spec
            if spec.is_float and not entries[name].tensor.is_floating_point():
                raise PlanError(
                    f"{name}: {spec.dtype} of the checkpoint would become "
                    f"{entries[name].tensor.dtype}"
                )


def _destinations(
    entries: Mapping[str, SharedTensor],
    found: Mapping[str, Assembly],
    pretrained: Pretrained | None,
    wanted: LoadOptions,
) -> dict[int, FillTarget]:
    """Id of an entry -> how it is filled."""
    kept = (
        {}
        if pretrained is None or wanted.dtype is None
        else dict(pretrained._get_dtype_plan(wanted.dtype))
    )
    made: dict[int, FillTarget] = {}
    for name in found:
        entry = entries[name]
        if id(entry) in made:
            continue
        dtype = None
        if wanted.dtype is not None and entry.tensor.is_floating_point():
            named = (
                d for pattern, d in kept.items() if re.search(pattern.replace("*", ".*"), name)
            )
            dtype = next(named, wanted.dtype)
        made[id(entry)] = FillTarget(entry, dtype=dtype, device=wanted.device)
    return made


def _works(
    plan: Plan,
    entries: Mapping[str, SharedTensor],
    found: Mapping[str, Assembly],
    destinations: Mapping[int, FillTarget],
) -> tuple[dict[str, FillJob], dict[str, FillJob]]:
    """What fills the destinations; and what must be equal to it, where a tied one has two keys."""
    first: dict[str, FillJob] = {}
    again: dict[str, FillJob] = {}
    filled: dict[int, Assembly] = {}
    for name, made in found.items():
        entry = entries[name]
        before = filled.get(id(entry))
        if before is not None and _source(plan, before) == _source(plan, made):
            continue
        filled.setdefault(id(entry), made)
        table = first if before is None else again
        to = destinations[id(entry)]
        for piece in made.pieces:
            for shard in to.shards:
                work = _work(plan, piece, shard, to)
                if work is not None:
                    key = name if name not in table else f"{name} ({len(table)})"
                    table[key] = work
    return first, again


def _source(plan: Plan, made: Assembly) -> object:
    return [(plan.targets[p.key], p.at, p.start, p.axes) for p in made.pieces]


def _work(plan: Plan, piece: SourceRegion, shard: "LocalShard", to: FillTarget) -> FillJob | None:
    common = piece.within(shard.region)
    if common is None:
        return None
    at, source = common
    place = tuple(
        (held + start, held + end) for (held, _), (start, end) in zip(shard.at, at, strict=True)
    )
    return FillJob(regions.region_read(plan.targets[piece.key], source), piece, to, place)


Take = Callable[[FillJob, int, Tensor], None]


def _run(
    jobs: Mapping[str, FillJob],
    fitted: memory.Memory,
    engine: Engine,
    take: Take,
    listener: Listener,
) -> int:
    """Compute all jobs, and give each tile to `take`; gives the bytes read."""
    targets = {key: job.part.form for key, job in jobs.items()}
    device = devices.choose(targets.values(), engine.device).device
    if device != "cpu" and engine.device == "auto":
        device = f"cuda:{torch.cuda.current_device()}"  # each process has one of its own
    with torch_threads.torch_threads():  # also where all forms are copied: `take` calls kernels
        return loop.run(
            targets,
            _ModuleFiller(jobs, take),
            Resources(fitted, device, mapped=engine.reader == "mmap"),
            listener=listener,
            rows={key: job.part.rows for key, job in jobs.items() if job.part.rows is not None},
        )


@final
class _ModuleFiller:
    """The sink of a run that fills a module. Threads fill different elements: they share a lane."""

    def __init__(self, jobs: Mapping[str, FillJob], take: Take) -> None:
        self._jobs, self._take = jobs, take

    def grid(self, key: str) -> None:
        """Whole tiles: the larger a piece, the fewer calls."""

    def lane(self) -> "_ModuleFiller":
        return self

    def write(self, part: Job, offset: int, piece: memoryview) -> None:
        for place in part.places:
            job = self._jobs[place.key]
            dtype = to_torch(job.part.form.spec.dtype)
            elements = torch.frombuffer(piece, dtype=dtype)
            self._take(job, (place.offset + offset) // dtype.itemsize, elements)

    def done(self, part: Job) -> None:
        pass


def _fill(job: FillJob, offset: int, elements: Tensor) -> None:
    job.to.wrote(regions.copy_into(job.part, offset, elements, job.out()))


def _compare(job: FillJob, offset: int, elements: Tensor) -> None:
    """Refuse a second key of a shared tensor that has other numbers."""
    for source, target in regions.overlaps(job.part, offset, elements, job.out()):
        other = source.to(dtype=target.dtype, device=target.device)
        same = (other == target) | ((other != other) & (target != target))
        if not bool(same.all()):
            names = job.to.entry.names
            raise PlanError(
                f"{some(names)} are one tensor in the module, and differ in the checkpoint",
                hint="make the module without tying: tie_word_embeddings=False in its config",
            )


def _complete(
    pretrained: Pretrained,
    model: nn.Module,
    destinations: Mapping[int, FillTarget],
    wanted: LoadOptions,
) -> None:
    """Give a model of transformers what no checkpoint holds, as from_pretrained does.

    Only what is on the meta device: rotary frequencies, and a head that the checkpoint lacks.
    """
    left = [
        owner for owner in parameters.on_meta(model).values() if not parameters.is_sharded(owner)
    ]
    if not left:
        return
    device = wanted.device or next((d.device for d in destinations.values()), None)
    for owner in left:
        parameters.materialize(owner, device or torch.device("cpu"))
    made = {id(owner.tensor) for owner in left}
    for tensor in (*model.parameters(), *model.buffers()):
        tensor._is_hf_initialized = id(tensor) not in made  # type: ignore[attr-defined]
    for module in model.modules():
        vars(module).pop("_is_hf_initialized", None)
    pretrained.initialize_weights()


def _on_meta(model: nn.Module) -> tuple[str, ...]:
    return tuple(parameters.on_meta(model))
