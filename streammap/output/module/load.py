"""Fill a module in place from a lazy checkpoint: each process computes what it holds, by tiles."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from streammap.architectures.classes.names import Pretrained
from streammap.common import text, torch_threads
from streammap.common.events import Finished, Listener, Started, nobody
from streammap.common.losses import Losses
from streammap.common.ranges import Region
from streammap.common.units import format_nbytes
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
    """Keys of the checkpoint that nothing in the module takes."""
    on_meta: tuple[str, ...]
    """Tensors still on the meta device: nothing could fill them."""
    seconds: float
    peak_nbytes: int
    """Largest resident memory of the process so far (VmHWM)."""
    planned_nbytes: int
    """What this was planned to add to the process at most, on top of the module itself."""
    n_threads: int
    promise: str
    reason: str

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        moved = text.moved(self.nbytes, self.seconds)
        return f"filled {self.n_tensors} tensors, {moved}, peak {format_nbytes(self.peak_nbytes)}"


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to fill a module."""

    device: torch.device | None
    dtype: torch.dtype | None
    strict: bool
    engine: Engine


@final
@dataclass(frozen=True, slots=True)
class FillJob:
    """A piece of a source tensor, and where in the module it goes."""

    part: RegionRead
    piece: SourceRegion
    to: FillTarget
    at: Region
    """The region of the target."""

    def out(self) -> Tensor:
        """The region of the target, its dimensions in the source's order."""
        held = self.to.out
        for dim, (start, end) in enumerate(self.at):
            held = held.narrow(dim, start, end - start)
        for dim in reversed(range(len(self.piece.axes))):
            if self.piece.axes[dim] is None:
                held = held.squeeze(dim)
        axes = [axis for axis in self.piece.axes if axis is not None]
        return held.permute([axes.index(d) for d in range(len(axes))])


def load(plan: Plan, module: nn.Module, options: LoadOptions, listener: Listener) -> LoadReport:
    """Fill a module with a plan's tensors.

    Raises:
        PlanError: names or shapes that do not fit, what can't be filled in place.
        OutputError: the memory is too little.
        CheckpointError: a source can't be read.
    """
    plan.check_settled()
    started = time.perf_counter()
    plan = plan.without_optimizer
    model = parameters.unwrapped(module)
    parameters.reshard(model)
    tensors = parameters.shared_tensors(model)
    assemblies, missing, unexpected = _matched(plan, model, tensors)
    lost = parameters.lost_buffers(model)
    _check(plan, tensors, assemblies, (missing, unexpected), options)
    pretrained = runtimenames.pretrained_of(model)
    if options.strict and pretrained is None:
        parameters.refuse_lost(list(lost))
    targets = _targets(tensors, assemblies, pretrained, options)
    fills, checks = _jobs(plan, tensors, assemblies, targets)
    fitted = memory.fit(
        (job.part.form for job in fills.values()),
        budget=options.engine.memory_nbytes,
        n_workers=options.engine.n_threads,
    )
    listener(Started(len(targets), sum(d.nbytes for d in targets.values())))
    n_read = _run(fills, fitted, options.engine, _fill, listener)
    if checks:
        n_read += _run(checks, fitted, options.engine, _compare, nobody)
    for target in targets.values():
        target.finish()  # those of no elements
    for source in plan.sources:
        source.check_unchanged()
    if pretrained is not None:
        for name, other in pretrained.all_tied_weights_keys.items():
            if name in assemblies and assemblies[name] is assemblies.get(other):
                parameters.tie(tensors[name], tensors[other])
        _complete(pretrained, model, targets, options)
    if options.device is not None:
        parameters.move_buffers(model, options.device)
    listener(Finished())
    promise, reason = plan.promise
    return LoadReport(
        n_tensors=len(targets),
        nbytes=sum(d.nbytes for d in targets.values()),
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
    plan: Plan, model: nn.Module, tensors: Mapping[str, SharedTensor]
) -> tuple[dict[str, Assembly], tuple[str, ...], tuple[str, ...]]:
    """What makes each tensor of the module; names that nothing makes; keys that make nothing."""
    expected = {name: entry.tensor for name, entry in tensors.items()}
    match = runtimenames.match(model, plan.specs, expected)
    assemblies = dict(match.assemblies)
    pretrained = runtimenames.pretrained_of(model)
    if pretrained is not None:
        _alias(assemblies, pretrained.all_tied_weights_keys, expected)
    filled = {id(tensors[name]) for name in assemblies}
    missing = tuple(name for name, entry in tensors.items() if id(entry) not in filled)
    if pretrained is None:
        return assemblies, missing, match.unexpected
    return assemblies, *runtimenames.ignored(pretrained, missing, match.unexpected)


def _alias(
    assemblies: dict[str, Assembly], tied: Mapping[str, str], expected: Mapping[str, Tensor]
) -> None:
    """Give tied names that a checkpoint leaves out the tensor of the other name.

    FSDP makes two parameters of a tied one; the values are those of one.
    """
    for name, other in tied.items():
        if name not in expected or other not in expected:
            continue
        if name not in assemblies and other in assemblies:
            assemblies[name] = assemblies[other]
        elif other not in assemblies and name in assemblies:
            assemblies[other] = assemblies[name]


def _check(
    plan: Plan,
    tensors: Mapping[str, SharedTensor],
    assemblies: Mapping[str, Assembly],
    left: tuple[tuple[str, ...], tuple[str, ...]],
    options: LoadOptions,
) -> None:
    """Refuse what does not fit, before anything is changed."""
    missing, unexpected = left
    if options.strict and (missing or unexpected):
        wrong_names = [f"{len(missing)} missing: {some(missing)}"] if missing else []
        wrong_names += [f"{len(unexpected)} unexpected: {some(unexpected)}"] if unexpected else []
        raise PlanError(
            f"the module's names are not the checkpoint's: {'; '.join(wrong_names)}",
            hint="is it a model of this kind, with the same head? or pass strict=False",
        )
    wrong = [
        f"{name}: the checkpoint has {list(assembly.shape)}, the module {list(shape)}"
        for name, assembly in assemblies.items()
        if assembly.shape != (shape := tuple(tensors[name].tensor.shape))
    ]
    if wrong:
        raise PlanError(
            some(wrong),
            hint="make the module from the result's config: Config.from_dict(lazy.config)",
        )
    for name, assembly in assemblies.items():
        for piece in assembly.pieces:
            spec = plan.targets[piece.key].spec
            if spec.is_float and not tensors[name].tensor.is_floating_point():
                raise PlanError(
                    f"{name}: {spec.dtype} of the checkpoint would become "
                    f"{tensors[name].tensor.dtype}"
                )


def _targets(
    tensors: Mapping[str, SharedTensor],
    assemblies: Mapping[str, Assembly],
    pretrained: Pretrained | None,
    options: LoadOptions,
) -> dict[int, FillTarget]:
    """Id of a shared tensor -> how it is filled."""
    kept = (
        {}
        if pretrained is None or options.dtype is None
        else dict(pretrained._get_dtype_plan(options.dtype))
    )
    targets: dict[int, FillTarget] = {}
    for name in assemblies:
        entry = tensors[name]
        if id(entry) in targets:
            continue
        dtype = None
        if options.dtype is not None and entry.tensor.is_floating_point():
            named = (
                d for pattern, d in kept.items() if re.search(pattern.replace("*", ".*"), name)
            )
            dtype = next(named, options.dtype)
        targets[id(entry)] = FillTarget(entry, dtype=dtype, device=options.device)
    return targets


def _jobs(
    plan: Plan,
    tensors: Mapping[str, SharedTensor],
    assemblies: Mapping[str, Assembly],
    targets: Mapping[int, FillTarget],
) -> tuple[dict[str, FillJob], dict[str, FillJob]]:
    """What fills the targets; and what must equal it, if a tied tensor has two keys."""
    fills: dict[str, FillJob] = {}
    checks: dict[str, FillJob] = {}
    filled: dict[int, Assembly] = {}
    for name, assembly in assemblies.items():
        entry = tensors[name]
        before = filled.get(id(entry))
        if before is not None and _source(plan, before) == _source(plan, assembly):
            continue
        filled.setdefault(id(entry), assembly)
        table = fills if before is None else checks
        to = targets[id(entry)]
        for piece in assembly.pieces:
            for shard in to.shards:
                job = _job(plan, piece, shard, to)
                if job is not None:
                    key = name if name not in table else f"{name} ({len(table)})"
                    table[key] = job
    return fills, checks


def _source(plan: Plan, made: Assembly) -> object:
    return [(plan.targets[p.key], p.at, p.start, p.axes) for p in made.pieces]


def _job(plan: Plan, piece: SourceRegion, shard: "LocalShard", to: FillTarget) -> FillJob | None:
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
            Resources(fitted, device, reader=engine.reader),
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

    def done(self, part: Job, lost: Losses) -> None:
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
    targets: Mapping[int, FillTarget],
    options: LoadOptions,
) -> None:
    """Give a model of transformers what no checkpoint holds, as from_pretrained does.

    Only tensors on the meta device: rotary frequencies, and a head that the checkpoint lacks.
    """
    left = [
        owner for owner in parameters.on_meta(model).values() if not parameters.is_sharded(owner)
    ]
    if not left:
        return
    device = options.device or next((d.device for d in targets.values()), None)
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
