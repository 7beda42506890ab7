"""The calls a training launcher makes. The defaults of all options are here, and only here.

big = streammap.open("bert-base")
small = big.coalesce(width=2, depth=2)      # nothing is read yet
small.save("bert-small")
grown = streammap.open("bert-small-trained").decoalesce(map="bert-small")
grown.interpolate(big, alpha=0.5).save("bert-base-2")
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from streammap import executor, layout, mapfile, plan, scheme, sizes
from streammap.checkpoint import open_checkpoint, read_config
from streammap.events import Listener, nobody
from streammap.executor import Report, Where
from streammap.operators.interpolate import Interpolate
from streammap.operators.resize import Direction, Resize
from streammap.plan import Plan, Promise
from streammap.planner import Rule
from streammap.scheme import Grouping, Scheme
from streammap.spec import TensorSpec
from streammap.summary import Summary, summarize

if TYPE_CHECKING:
    from torch import Tensor

PathLike = str | Path
SchemeLike = PathLike | Mapping[str, object] | Scheme
MAX_SHARD_SIZE = "5GB"


@final
@dataclass(frozen=True, eq=False)
class LazyCheckpoint:
    """A checkpoint, opened or planned. Its tensors are read, or computed, when asked for."""

    plan: Plan

    def keys(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(self.plan.targets)

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.plan.targets[key].spec

    def read(self, key: str) -> "Tensor":
        """One tensor, computed now, as a new torch tensor."""
        return self.plan.read(key)

    def tensors(self) -> Iterator[tuple[str, "Tensor"]]:
        """(key, tensor) one after the other; only one is held at a time."""
        for key in self.plan.targets:
            yield key, self.plan.read(key)

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

    def summary(self) -> Summary:
        """What a run would do: shapes, formulas, bytes, memory, promise."""
        return summarize(self.plan)

    def coalesce(
        self,
        *,
        scheme: SchemeLike | None = None,
        width: int | None = None,
        depth: int | None = None,
        grouping: Grouping = "stacked",
        map: PathLike | None = None,
        target: "TargetLike | None" = None,
        rule: Rule = "exact",
    ) -> "LazyCheckpoint":
        """The smaller model: heads and layers of a group become their mean.

        Args:
            scheme: File or dict in the original's form, {"width_scheme": [[0, 6], ...], ...}.
            width: Factor on all widths, instead of a scheme.
            depth: Factor on the layers, instead of a scheme.
            grouping: "stacked" merges i with i + n/factor, "adjacent" merges neighbours.
            map: Map file, or a folder that holds one, instead of a scheme.
            target: config.json (its folder, a dict, or an opened checkpoint) whose sizes the
                result must have.
            rule: "exact", or "reference" for the original's numbers.

        Raises:
            StreammapError: a request that does not fit, see errors.py.
        """
        return self._resize("coalesce", scheme, width, depth, grouping, map, target, rule)

    def decoalesce(
        self,
        *,
        scheme: SchemeLike | None = None,
        width: int | None = None,
        depth: int | None = None,
        grouping: Grouping = "stacked",
        map: PathLike | None = None,
        target: "TargetLike | None" = None,
        rule: Rule = "exact",
    ) -> "LazyCheckpoint":
        """The larger model: each head and layer is copied to the members of its group.

        The scheme is the one for coalescing. Without one, the map saved with the source is used.
        Arguments and errors are those of `coalesce`.
        """
        return self._resize("decoalesce", scheme, width, depth, grouping, map, target, rule)

    def interpolate(self, target: "LazyCheckpoint | PathLike", *, alpha: float) -> "LazyCheckpoint":
        """(1 - alpha) * target + alpha * self, every tensor; files and dtypes are target's.

        Raises:
            PlanError: the two are not of one model and size.
        """
        other = target if isinstance(target, LazyCheckpoint) else open(target)
        return LazyCheckpoint(Interpolate(alpha).plan(self.plan, other.plan))

    def save(
        self,
        output: PathLike,
        *,
        max_shard_size: str | int = MAX_SHARD_SIZE,
        overwrite: bool = False,
        fsync: bool = True,
        progress: Listener = nobody,
    ) -> Report:
        """Compute and write the result; the model is never held.

        Args:
            output: A folder, or a file that ends in .safetensors or .pth.
            max_shard_size: "5GB" (10^9 bytes) or "500MiB" (2^20), or a number of bytes.
            overwrite: Whether an output that is there may be replaced.
            fsync: Whether to wait until the disk has it.
            progress: Called with each event of events.py.

        Raises:
            OutputError: the place is taken or too small, or a source's own folder.
        """
        size = layout.parse_size(max_shard_size)
        return executor.run(self.plan, Where(Path(output), size, overwrite, fsync), progress)

    def _resize(
        self,
        direction: Direction,
        groups: SchemeLike | None,
        width: int | None,
        depth: int | None,
        grouping: Grouping,
        map_file: PathLike | None,
        target: "TargetLike | None",
        rule: Rule,
    ) -> "LazyCheckpoint":
        levels = None if map_file is None else mapfile.load(Path(map_file))
        op = Resize(
            direction,
            None if groups is None else scheme.load_scheme(groups),
            width,
            depth,
            grouping,
            levels,
            None if target is None else self._target_sizes(target),
            rule,
        )
        return LazyCheckpoint(op.plan(self.plan))

    def _target_sizes(self, target: "TargetLike") -> Mapping[str, int]:
        if isinstance(target, LazyCheckpoint):
            return target.sizes
        config = target if isinstance(target, Mapping) else read_config(target)
        return sizes.of_config(self.plan.model.architecture, config)


TargetLike = PathLike | Mapping[str, object] | LazyCheckpoint


def open(
    source: PathLike,
    *,
    config: PathLike | Mapping[str, object] | None = None,
    arch: str | None = None,
) -> LazyCheckpoint:
    """Open a folder or file of weights; no tensor is read.

    Args:
        config: config.json, where it is not beside the weights.
        arch: Name of the architecture spec, where config.json does not tell.

    Raises:
        CheckpointError: nothing there, or a file that is not what it says.
    """
    opened = open_checkpoint(source, config=None if isinstance(config, Mapping) else config)
    if isinstance(config, Mapping):
        opened = replace(opened, config=config, config_path=None)
    levels = mapfile.find(opened.path)
    return LazyCheckpoint(plan.from_checkpoint(opened, levels, architecture=arch))


def coalesce(
    source: PathLike,
    output: PathLike,
    *,
    scheme: SchemeLike | None = None,
    width: int | None = None,
    depth: int | None = None,
    grouping: Grouping = "stacked",
    map: PathLike | None = None,
    target: "TargetLike | None" = None,
    rule: Rule = "exact",
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Listener = nobody,
) -> Report:
    """Write the coalesced `source` to `output`. See LazyCheckpoint.coalesce and .save."""
    lazy = open(source).coalesce(
        scheme=scheme, width=width, depth=depth, grouping=grouping, map=map, target=target,
        rule=rule,
    )  # fmt: skip
    return lazy.save(output, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress)


def decoalesce(
    source: PathLike,
    output: PathLike,
    *,
    scheme: SchemeLike | None = None,
    width: int | None = None,
    depth: int | None = None,
    grouping: Grouping = "stacked",
    map: PathLike | None = None,
    target: "TargetLike | None" = None,
    rule: Rule = "exact",
    blend_with: PathLike | None = None,
    alpha: float = 0.5,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Listener = nobody,
) -> Report:
    """Write the decoalesced `source` to `output`, blended with `blend_with` where it is given.

    The blend is (1 - alpha) * blend_with + alpha * grown, in the same pass.
    See LazyCheckpoint.decoalesce, .interpolate and .save.
    """
    big = None if blend_with is None else open(blend_with)
    lazy = open(source).decoalesce(
        scheme=scheme, width=width, depth=depth, grouping=grouping, map=map,
        target=big if target is None else target, rule=rule,
    )  # fmt: skip
    if big is not None:
        lazy = lazy.interpolate(big, alpha=alpha)
    return lazy.save(output, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress)


def interpolate(
    source: PathLike,
    target: PathLike,
    output: PathLike,
    *,
    alpha: float,
    max_shard_size: str | int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    progress: Listener = nobody,
) -> Report:
    """Write (1 - alpha) * target + alpha * source to `output`. See LazyCheckpoint."""
    return (
        open(source)
        .interpolate(target, alpha=alpha)
        .save(output, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress)
    )
