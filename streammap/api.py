"""The calls a training launcher makes. Defaults of options are here and in resize_options.py only.

big = streammap.open("bert-base")
small = big.coalesce(width=2, depth=2)      # nothing is read yet
small.save("bert-small")
grown = streammap.open("bert-small-trained").decoalesce(map="bert-small")
grown.interpolate(big, alpha=0.5).save("bert-base-2")
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, final

from streammap.common import garbage
from streammap.common.events import Listener, nobody
from streammap.engine.options import MEMORY, EngineOptions, Reader, engine
from streammap.errors import OutputError
from streammap.io import filenames
from streammap.io.storage import hub_name, resolve
from streammap.io.storage.hub_sink import MESSAGE, PushOptions
from streammap.io.storage.resolve import PathLike
from streammap.io.storage.sink import Sink
from streammap.io.tensor_spec import TensorSpec
from streammap.operators import registry
from streammap.output import config_check, shards
from streammap.output import run as executor
from streammap.output.options import FORMATS, Format, OutputOptions
from streammap.output.ranks.launcher import Ranks
from streammap.output.run import Report
from streammap.planning.plan import Plan, Promise

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streammap.analysis.health import Health
    from streammap.analysis.summary import Summary
    from streammap.operators.resize import Direction
    from streammap.operators.resize_options import ResizeOptions, RunOptions
    from streammap.output.module.load import LoadReport

MAX_SHARD_SIZE = "5GB"


@final
@dataclass(frozen=True, eq=False)
class LazyCheckpoint:
    """A checkpoint, opened or planned. Its tensors are read, or computed, when asked for."""

    plan: Plan

    def __enter__(self) -> "LazyCheckpoint":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the sources' files; what is read later opens them again."""
        for source in self.plan.sources:
            source.close()

    def keys(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(self.plan.targets)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.plan.targets[key].spec

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
        if region is None and out is None and dtype is None and device is None:
            return self.plan.read(key)
        from streammap.engine import lazy_tensors as tensors

        return tensors.read(self.plan, key, region, out=out, dtype=dtype, device=device)

    def tensors(self) -> Iterator[tuple[str, "Tensor"]]:
        """(key, tensor) one after the other; only one is held at a time."""
        for key in self.plan.targets:
            yield key, self.plan.read(key)

    def state_dict(self) -> "Mapping[str, Tensor]":
        """The tensors as a mapping; each is computed when it is asked for, each time anew."""
        from streammap.engine import lazy_tensors as tensors

        return tensors.LazyState(self.plan)

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

    def summary(self, **options: Unpack[EngineOptions]) -> "Summary":
        """What a run would do: shapes, formulas, bytes, memory, promise.

        Args:
            options: See options.py: memory, threads, device, reader.

        Raises:
            OutputError: the memory is too little for any run.
        """
        from streammap.analysis.summary import summarize

        return summarize(self.plan, engine(options))

    def health(self, *, progress: Listener = nobody, **options: Unpack[EngineOptions]) -> "Health":
        """NaN, Inf, ranges, dead rows of each tensor, worst first; of a plan, what it would be.

        Args:
            progress: Called with each event of events.py.
            options: What the pass may use, see options.py: memory, threads, reader.

        Raises:
            CheckpointError: a source can't be read.
        """
        from streammap.analysis import health

        return health.measure(self.plan, engine(options), listener=progress)

    def coalesce(self, **options: "Unpack[ResizeOptions]") -> "LazyCheckpoint":
        """The smaller model: units of a group (heads, layers ...) become their mean.

        Args:
            options: See resize_options.py: scheme, width, depth, hidden, heads, kv_heads, mlp,
                experts, layers, axes, grouping, kv_merge, map, target, rule, untie.

        Raises:
            StreammapError: a request that does not fit, see errors.py.
        """
        return self._resize("coalesce", options)

    def decoalesce(self, **options: "Unpack[ResizeOptions]") -> "LazyCheckpoint":
        """The larger model: each unit is copied to the members of its group.

        Groups are those for coalescing. Without any, the map saved with the source is used.
        Arguments and errors are those of `coalesce`; more are new_layers and head_dim.
        """
        return self._resize("decoalesce", options)

    def interpolate(self, target: "LazyCheckpoint | PathLike", *, alpha: float) -> "LazyCheckpoint":
        """(1 - alpha) * target + alpha * self, every tensor; files and dtypes are target's.

        Raises:
            PlanError: the two are not of one model and size.
        """
        other = target if isinstance(target, LazyCheckpoint) else open(target)
        with garbage.paused():
            return LazyCheckpoint(registry.interpolate(self.plan, other.plan, alpha=alpha))

    def save(
        self,
        output: PathLike,
        *,
        max_shard_size: str | int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        restart: bool = False,
        fsync: bool = True,
        format: Format = "safetensors",
        nest: str | None = None,
        progress: Listener = nobody,
        ranks: Ranks | bool = False,
        **options: Unpack[EngineOptions],
    ) -> Report:
        """Compute and write the result; the model is never held.

        Args:
            output: A folder, or a file that ends in .safetensors or .pth; or a URL of one,
                "s3://bucket/out", which shards are sent to one by one. "hf://org/name@branch" is
                push_to_hub without its options.
            max_shard_size: "5GB" (10^9 bytes) or "500MiB" (2^20), or a number of bytes.
            overwrite: Whether an output that is there may be replaced.
            restart: Whether to begin anew where an earlier run was stopped. By default its
                work is gone on with; a run that asks for something else is refused.
            fsync: Whether to wait until the disk has it.
            format: "safetensors", or "dcp" for a folder of torch.distributed.checkpoint.
            nest: Entry that the tensors stand under in a DCP folder, such as "model"; by default
                where they stood in the source, or at the top.
            progress: Called with each event of events.py.
            ranks: True where all processes of a torchrun or srun make this call: each then writes
                some of the shards, and all return when the result is whole. See docs/clusters.md.
            options: What the run may use, see options.py: memory, threads, device, reader.

        Raises:
            OutputError: the place is taken or too small, or a source's own folder; or the memory
                is too little.
            PlanError: a config.json that transformers, where it is installed, would refuse.
        """
        size = shards.parse_size(max_shard_size)
        self._check_config()
        if format not in FORMATS:
            raise OutputError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
        here = Ranks.of(ranks)
        where = OutputOptions(
            resolve.local_path(output),
            size,
            overwrite,
            fsync,
            engine(options),
            restart=restart,
            format=format,
            nest=nest,
            ranks=here,
        )
        if resolve.is_url(output):
            return self._send(self._sink(str(output), where, options), where, progress)
        return executor.run(self.plan, where, progress)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = True,
        branch: str = "main",
        message: str = MESSAGE,
        max_shard_size: str | int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        restart: bool = False,
        fsync: bool = True,
        progress: Listener = nobody,
        ranks: Ranks | bool = False,
        **options: Unpack[EngineOptions],
    ) -> Report:
        """Compute the result and push it to a repository of the Hub, shard by shard.

        No copy of all is kept here: two shards at most. A run that was stopped goes on; what the
        repository has already is not sent again.

        Args:
            repo: "org/name"; it is made when needed.
            private: Whether a repository that is made is private.
            branch: It is made when needed.
            message: Of the commits.
            max_shard_size: As for `save`, and so are the others.

        Raises:
            OutputError: no token, no right to write; a branch with a model, without `overwrite`.
        """
        size = shards.parse_size(max_shard_size)
        self._check_config()
        here = Ranks.of(ranks)
        where = OutputOptions(
            Path(), size, overwrite, fsync, engine(options), restart=restart, ranks=here
        )
        push = PushOptions(repo, branch, private, message)
        return self._send(self._hub(push, options), where, progress)

    def _check_config(self) -> None:
        before = None if self.plan.side is None else self.plan.side.config
        config_check.check(before, self.plan.config, nbytes=self.plan.nbytes)

    def _sink(self, url: str, where: OutputOptions, options: EngineOptions) -> Sink:
        """Where a URL leads."""
        if where.format != "safetensors" and not url.endswith(filenames.WEIGHTS):
            raise OutputError(
                f"{url}: a folder of format {where.format} is written on this machine only",
                hint="write it to a folder, and copy that",
            )
        if url.startswith("hf://"):
            name = hub_name.parse(url)
            return self._hub(PushOptions(name.repo, name.revision), options)
        from streammap.io.storage.remote_sink import RemoteSink

        return RemoteSink(url)

    def _hub(self, push: PushOptions, options: EngineOptions) -> Sink:
        from streammap.analysis import model_card
        from streammap.io.storage.hub_sink import HubSink

        return HubSink(push, partial(model_card.card, self.plan, engine(options), name=push.repo))

    def _send(self, sink: Sink, where: OutputOptions, progress: Listener) -> Report:
        if where.ranks.world_size > 1:
            raise OutputError(
                f"{sink.label}: {where.ranks.world_size} processes, expected 1: they share a "
                "folder on a file system",
                hint="write to a folder, or run it in one process (--no-ranks)",
            )
        from streammap.output import upload

        where = replace(where, path=upload.spool_of(sink.label))
        return executor.run(self.plan, where, progress, sink=sink)

    def _resize(self, direction: "Direction", given: "ResizeOptions") -> "LazyCheckpoint":
        with garbage.paused():
            from streammap.operators import resize_options as options

            op = options.resize(direction, self.plan, given)
            return LazyCheckpoint(registry.resize(self.plan, op))


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
            that name; or a URL ("s3://bucket/folder").
        config: config.json, where it is not beside the weights.
        arch: Name of the architecture spec, where config.json does not tell.
        stream: Whether to read from the Hub what is needed when it is, and keep nothing on disk,
            instead of fetching files into the Hub's cache.

    Raises:
        CheckpointError: nothing there, or a file that is not what it says.
    """
    with garbage.paused():
        plan = registry.open_source(source, config=config, arch=arch, stream=stream)
    return LazyCheckpoint(plan)


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
    reader: Reader = "pread",
) -> "LoadReport":
    """Fill a module in place with a checkpoint's tensors, computed as they are put there.

    Parameters and persistent buffers are filled; those on the meta device get memory one by one.
    Of a DTensor (FSDP2, tensor parallelism) each process computes its own shard alone. Names are
    the checkpoint's, or for a model of transformers those that from_pretrained takes.

    Args:
        device: Where all goes; by default where it is, and the processor (or the mesh's device) for
            what is on the meta device.
        dtype: What floating-point tensors become; by default they stay what they are.
        strict: Whether names that are missing or left over, or buffers that nobody can fill, are an
            error; else they are told in the report.
        progress: Called with each event of events.py.
        memory: What this may add to the process, beside the module.
        threads: See options.py, as `reader`.

    Raises:
        PlanError: names, shapes or tensors that do not fit. Nothing was touched then.
        OutputError: the memory is too little.
        CheckpointError: a source can't be read. The module is filled in part then.
    """
    import torch

    from streammap.output.module import load

    opened = lazy if isinstance(lazy, LazyCheckpoint) else open(lazy)
    options = EngineOptions(memory=memory, threads=threads, reader=reader)
    place = None if device is None else torch.device(device)
    wanted = load.LoadOptions(place, dtype, strict, engine(options))
    return load.load(opened.plan, model, wanted, progress)


def coalesce(
    source: PathLike,
    output: PathLike,
    *,
    stream: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    restart: bool = False,
    progress: Listener = nobody,
    ranks: Ranks | bool = False,
    **options: "Unpack[RunOptions]",
) -> Report:
    """Write the coalesced `source` to `output`. See open, LazyCheckpoint.coalesce and .save."""
    from streammap.operators.resize_options import split

    resize, run = split(options)
    with open(source, stream=stream) as lazy:
        return lazy.coalesce(**resize).save(
            output,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
            ranks=ranks,
            **run,
        )


def decoalesce(
    source: PathLike,
    output: PathLike,
    *,
    blend_with: PathLike | None = None,
    alpha: float = 0.5,
    stream: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    restart: bool = False,
    progress: Listener = nobody,
    ranks: Ranks | bool = False,
    **options: "Unpack[RunOptions]",
) -> Report:
    """Write the decoalesced `source` to `output`, blended with `blend_with` where it is given.

    The blend is (1 - alpha) * blend_with + alpha * grown, in the same pass.
    See open, LazyCheckpoint.decoalesce, .interpolate and .save.
    """
    from streammap.operators.resize_options import split

    resize, run = split(options)
    big = None if blend_with is None else open(blend_with, stream=stream)
    if big is not None and resize.get("target") is None:
        resize["target"] = big
    lazy = open(source, stream=stream).decoalesce(**resize)
    with lazy if big is None else lazy.interpolate(big, alpha=alpha) as planned:
        return planned.save(
            output,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
            ranks=ranks,
            **run,
        )


def interpolate(
    source: PathLike,
    target: PathLike,
    output: PathLike,
    *,
    alpha: float,
    stream: bool = False,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    restart: bool = False,
    progress: Listener = nobody,
    ranks: Ranks | bool = False,
    **run: Unpack[EngineOptions],
) -> Report:
    """Write (1 - alpha) * target + alpha * source to `output`. See open and LazyCheckpoint."""
    other = open(target, stream=stream)
    with open(source, stream=stream).interpolate(other, alpha=alpha) as blended:
        return blended.save(
            output,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            restart=restart,
            progress=progress,
            ranks=ranks,
            **run,
        )
