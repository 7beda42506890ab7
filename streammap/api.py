"""The calls that a training launcher makes.

    big = streammap.open("bert-base")
    small = big.coalesce(width=2, depth=2)      # nothing is read yet
    small.save("bert-small")
    grown = streammap.open("bert-small-trained").decoalesce(map="bert-small")
    grown.interpolate(big, alpha=0.5).save("bert-base-2")

Each operator of operators/registry.py is a method of LazyCheckpoint, and a function of one_call.py.
Their options are declared by the operators.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, cast, final
from weakref import WeakKeyDictionary, WeakSet

from streammap.common import garbage
from streammap.common.declare import takes
from streammap.common.events import Listener, nobody
from streammap.common.units import format_nbytes
from streammap.engine.options import MEMORY, Engine, RunOptions
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.io.storage.base import Reader
from streammap.io.storage.resolve import PathLike
from streammap.operators import calls, registry
from streammap.operators.declare import Operator, PlanLike
from streammap.operators.interpolate import Interpolate
from streammap.operators.recipes import mergekit
from streammap.operators.resize import Coalesce, Decoalesce
from streammap.output import destination
from streammap.output.run import Report
from streammap.output.save_options import PushOptions, SaveOptions
from streammap.planning.plan import Plan, Promise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streammap.analysis.difference import Difference
    from streammap.analysis.health import Health
    from streammap.analysis.summary import Summary
    from streammap.operators.convert import Convert
    from streammap.operators.depth.restack import Restack
    from streammap.operators.merge_lora import MergeLora
    from streammap.operators.optimizer.carry import CarryOptimizer
    from streammap.operators.ordering.align import Align
    from streammap.operators.ordering.permute import Permute
    from streammap.output.module.load import LoadReport
    from streammap.planning.optimizer.steps import StepFactors
    from streammap.planning.request import Moved

P = ParamSpec("P")
_users: "WeakKeyDictionary[Checkpoint, WeakSet[LazyCheckpoint]]" = WeakKeyDictionary()
"""The open checkpoints that read a source's files."""


def _method(
    operator: Callable[P, Operator],
) -> "Callable[Concatenate[LazyCheckpoint, P], LazyCheckpoint]":
    """An operator as a method: its options are the keywords, its further inputs come by place."""

    def call(self: "LazyCheckpoint", options: Any) -> "LazyCheckpoint":
        return self.apply(options)

    cls = cast("type[Operator]", operator)
    call.__name__, call.__doc__ = cls.name.replace("-", "_"), cls.__doc__
    call.__qualname__ = f"LazyCheckpoint.{call.__name__}"
    return takes(operator, n_first=1)(call)


def card(plan: Plan, engine: Engine, name: str) -> str:
    """The model card of a repository's README.md."""
    from streammap.analysis import model_card

    return model_card.card(plan, engine, name=name)


@final
@dataclass(frozen=True, eq=False, repr=False)
class LazyCheckpoint:
    """A checkpoint, opened or planned. Its tensors are read, or computed, when asked for."""

    plan: Plan

    def __post_init__(self) -> None:
        for source in self.plan.sources:
            _users.setdefault(source, WeakSet()).add(self)

    def __reduce__(self) -> tuple[type["LazyCheckpoint"], tuple[Plan]]:
        return LazyCheckpoint, (self.plan,)

    def __enter__(self) -> "LazyCheckpoint":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def __repr__(self) -> str:
        plan = self.plan
        names = " + ".join(dict.fromkeys(source.name for source in plan.sources)) or "nothing"
        steps = "".join(f" -> {step.operator}" for step in plan.steps)
        return (
            f"<LazyCheckpoint {names}{steps}: {len(plan.targets)} tensors, "
            f"{format_nbytes(plan.nbytes)}, {plan.promise[0]}>"
        )

    def __getattr__(self, name: str) -> Any:
        """All operators are methods: those that are rarely used, and those of others, too."""
        known = name.replace("_", "-")
        if name.startswith("_") or known not in registry.names():
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return partial(_method(registry.load(known)), self)

    def settled(self, options: Engine = Engine()) -> "LazyCheckpoint":  # noqa: B008 (a value)
        """The checkpoint with all that has to be found by reading first; itself where nothing has.

        `save`, `read` and others do this by themselves; what was found is kept.

        Raises:
            OutputError: the memory is too little for a search.
        """
        if self.plan.pending is None:
            return self
        from streammap.engine.searching import settle

        return LazyCheckpoint(settle.settled(self.plan, options))

    def close(self) -> None:
        """Close the files of sources that no other checkpoint uses; a later read opens them again.

        What another thread reads meanwhile it gets.
        """
        for source in self.plan.sources:
            users = _users.setdefault(source, WeakSet())
            users.discard(self)
            if not users:
                source.close()

    def keys(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(self.plan.targets)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor.

        Raises:
            PlanError: there is none of this name.
        """
        return self.plan.form(key).spec

    def read(
        self,
        key: str,
        *,
        region: "slice | Sequence[slice] | None" = None,
        out: "Tensor | None" = None,
        dtype: "torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
    ) -> "Tensor":
        """One tensor or a region of it, computed now, tile by tile.

        Args:
            region: A slice for each dimension from the first on, without a step; None for all.
            out: A tensor of the region's shape to fill, of any strides, dtype and device.
            dtype: Of a new tensor; by default the checkpoint's. The numbers are those of the file,
                then cast.
            device: Of a new tensor; by default the processor.

        Raises:
            PlanError: an `out` or a region that does not fit.
        """
        from streammap.engine import evaluate

        plan = self.settled().plan
        return evaluate.read_tensor(plan, key, region, out=out, dtype=dtype, device=device)

    def tensors(self) -> Iterator[tuple[str, "Tensor"]]:
        """(key, tensor) one after the other; only one is held at a time."""
        for key in self.plan.targets:
            yield key, self.read(key)

    def state_dict(self) -> "Mapping[str, Tensor]":
        """The tensors as a mapping; each is computed when it is asked for, each time again."""
        from streammap.engine import evaluate

        return evaluate.LazyState(self.settled().plan)

    @property
    def config(self) -> Mapping[str, object] | None:
        """config.json, rewritten where sizes changed."""
        return self.plan.config

    @property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of the model's axes: embed, heads, mlp, layer ..."""
        return self.plan.model.sizes

    @property
    def promise(self) -> tuple[Promise, str]:
        """Whether the function is kept ("exact" or "approximate"), and why."""
        return self.plan.promise

    @property
    def step_factors(self) -> "Mapping[str, StepFactors]":
        """Of a checkpoint with its optimizer's state: parameter -> factors of lr, eps and decay.

        With them the source's steps go on; a parameter that no one factor fits is not in it.
        """
        return {} if self.plan.optimizer is None else self.plan.optimizer.factors

    @takes(Engine, n_first=1)
    def summary(self, options: Engine) -> "Summary":
        """What a run would do: shapes, formulas, bytes, memory, guarantee.

        Raises:
            OutputError: the memory is too little for any run.
        """
        from streammap.analysis.summary import summarize

        return summarize(self.plan, options)

    @takes(RunOptions, n_first=1)
    def health(self, options: RunOptions) -> "Health":
        """NaN, Inf, ranges, dead rows of each tensor, worst first; of a plan, what it would be.

        Raises:
            CheckpointError: a source can't be read.
        """
        from streammap.analysis import health

        plan = self.settled(options).plan
        return health.measure(plan, options, listener=options.progress)

    def apply(self, operator: Operator, *, stream: bool = False) -> "LazyCheckpoint":
        """The checkpoint that an operator makes of this one; nothing is computed.

        Args:
            operator: Its options, such as Coalesce(width=2).
            stream: Whether inputs that it opens are read from the Hub as needed.

        Raises:
            StreammapError: options that do not fit the model, see errors.py.
        """
        with garbage.paused():
            return LazyCheckpoint(calls.apply(operator, self.plan, stream=stream))

    coalesce = _method(Coalesce)
    decoalesce = _method(Decoalesce)
    interpolate = _method(Interpolate)
    if TYPE_CHECKING:  # __getattr__ has it, as it has the operators of others
        merge_lora = _method(MergeLora)
        convert = _method(Convert)
        permute = _method(Permute)
        carry_optimizer = _method(CarryOptimizer)
        restack = _method(Restack)
        align = _method(Align)

        def blend(self, *others: PlanLike, **options: Any) -> "LazyCheckpoint":
            """See operators/blend.py; further checkpoints come by place."""

    @takes(SaveOptions)
    def save(self, output: PathLike, options: SaveOptions) -> Report:
        """Compute and write the result; the model is never held.

        `output` is a folder, or a file that ends in .safetensors or .pth; or a URL of one,
        "s3://bucket/out", which shards are sent to one by one. "hf://org/name@branch" is
        push_to_hub without its options. A run that was interrupted is resumed by the same call.

        Raises:
            OutputError: the output exists, is a source's own folder, or has too little room; or
                the memory is too little.
            PlanError: a result that its class in transformers or timm, where that was asked
                (`class_check`), would not load.
        """
        return destination.save(self.plan, output, options, card=card)

    @takes(PushOptions)
    def push_to_hub(self, repo: str, options: PushOptions) -> Report:
        """Compute the result and push it to a repository of the Hub, shard by shard.

        No copy of all is kept here: two shards at most. A run that was interrupted is resumed; what
        the repository has already is not sent again. `repo` is "org/name"; it is created when
        needed.

        Raises:
            OutputError: no token, no right to write; a branch with a model, without `overwrite`.
        """
        return destination.push(self.plan, repo, options, card=card)


def open(
    source: PathLike,
    *,
    config: PathLike | Mapping[str, object] | None = None,
    arch: str | None = None,
    stream: bool = False,
) -> LazyCheckpoint:
    """Open a folder or file of weights; no tensor is read.

    Args:
        source: On this machine; "org/name" or "org/name@revision" on the Hub, where no folder has
            that name; or a URL ("s3://bucket/folder"). "model+adapter" is the first of them with
            LoRA adapters merged.
        config: config.json, where it is not beside the weights.
        arch: Name of the architecture spec, where config.json does not tell.
        stream: Whether to read from the Hub what is needed when it is, and keep nothing on disk,
            instead of fetching files into the Hub's cache.

    Raises:
        CheckpointError: nothing there, or a file that is not what it says.
    """
    with garbage.paused():
        plan = calls.open_source(source, config=config, arch=arch, stream=stream)
    return LazyCheckpoint(plan)


def open_request(
    request: PathLike | Mapping[str, object], *, sources: "Moved" = None
) -> LazyCheckpoint:
    """The checkpoint that a request tells of, planned.

        open_request("small/streammap.json")                    # as it was recorded
        open_request("small", sources={"/old/big": "/big"})     # its source has moved
        open_request({"operator": "coalesce", "width": 2,
                      "source": {"operator": "open", "path": "big"}})

    Args:
        request: The tree (see operators/request_json.py), a file with it, a result's streammap.json
            or the result itself; or a recipe of mergekit (config.yml).
        sources: Recorded path -> where that source is now; or where the only source is now.

    Raises:
        StreammapError: not a request, a source that is not there, an option that makes no sense.
    """
    from streammap.output import record
    from streammap.planning import request as requests

    if mergekit.is_recipe(request) and not isinstance(request, Mapping):
        return open(request)
    with garbage.paused():
        call, maps = record.saved_request(request)
        moved = requests.moved(call, sources)
        return LazyCheckpoint(calls.build(call, moved=moved, known=maps))


def load_into(
    model: "torch.nn.Module",
    lazy: LazyCheckpoint | PathLike,
    *,
    device: "str | torch.device | None" = None,
    dtype: "torch.dtype | None" = None,
    strict: bool = True,
    progress: Listener = nobody,
    memory: str | int = MEMORY,
    threads: int | None = None,
    reader: Reader = "auto",
) -> "LoadReport":
    """Fill a module in place with a checkpoint's tensors, computed as they are put there.

    Parameters and persistent buffers are filled; those on the meta device get memory one by one.
    Of a DTensor (FSDP2, tensor parallelism) each process computes its own shard alone. Names are
    the checkpoint's, or for a model of transformers those that from_pretrained takes.

    Args:
        device: Where all tensors go. By default they stay where they are; those on the meta device
            go to the CPU (or the mesh's device).
        dtype: What floating-point tensors become. By default they keep their dtype.
        strict: Whether missing or unexpected names, and buffers that can't be filled, are an error.
            Otherwise the report lists them.
        progress: Called with each progress event.
        memory: Memory that this may add to the process, on top of the module.
        threads: Threads that read and compute; None for a run's default (--threads).
        reader: How files of this machine are read: "pread", "mmap", or "auto".

    Raises:
        PlanError: names, shapes or tensors that do not fit. Nothing was touched then.
        OutputError: the memory is too little.
        CheckpointError: a source can't be read. The module is filled in part then.
    """
    import torch

    from streammap.output.module import load

    opened = lazy if isinstance(lazy, LazyCheckpoint) else open(lazy)
    options = Engine(memory=memory, threads=threads, reader=reader)
    place = None if device is None else torch.device(device)
    wanted = load.LoadOptions(place, dtype, strict, options)
    return load.load(opened.settled(options).plan, model, wanted, progress)


def load_optimizer_into(
    optimizer: "torch.optim.Optimizer",
    model: "torch.nn.Module",
    lazy: LazyCheckpoint,
    *,
    progress: Listener = nobody,
    memory: str | int = MEMORY,
    threads: int | None = None,
    reader: Reader = "auto",
) -> "LoadReport":
    """Fill an optimizer in place with a checkpoint's state, as `load_into` fills its model.

    Moments get the dtype, device and shards of their parameters. A group takes the options (lr,
    betas ...) of the state's group with the same parameters; other groups keep their own.

    Args:
        optimizer: Of the model's parameters.
        model: Gives them their names.
        lazy: A checkpoint with its optimizer's state: lazy.carry_optimizer().
        progress: Called with each progress event.
        memory: Memory that this may add to the process, on top of the moments.
        threads: Threads that read and compute; None for a run's default (--threads).
        reader: How files of this machine are read: "pread", "mmap", or "auto".

    Raises:
        PlanError: no state, or parameters that do not fit. Nothing was touched then.
        OutputError: the memory is too little.
        CheckpointError: a source can't be read.
    """
    from streammap.output.module import load
    from streammap.output.module import optimizer as optimizers

    options = Engine(memory=memory, threads=threads, reader=reader)
    wanted = load.LoadOptions(None, None, True, options)
    return optimizers.fill(lazy.plan, model, optimizer, wanted, progress)


@takes(RunOptions)
def diff(
    a: LazyCheckpoint | PathLike, b: LazyCheckpoint | PathLike, options: RunOptions
) -> "Difference":
    """Compare two checkpoints tensor by tensor: folders, files, opened or planned ones.

    Differences are relative to `a`.

    Raises:
        CheckpointError: one is not there, or can't be read.
        OutputError: the memory is too little.
    """
    from streammap.analysis import difference

    first, second = (
        x.settled(options).plan if isinstance(x, LazyCheckpoint) else x for x in (a, b)
    )
    return difference.compare(first, second, options, listener=options.progress)
