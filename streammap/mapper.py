"""The front of the original map tools: BertMapper, GPT2Mapper, DeiTMapper.

    mapper = BertMapper(src_dir="bert-L6-E384", tgt_dir="bert-L6-E768", save_dir="out",
                        width_scheme=config["width_scheme"], depth_scheme=config["depth_scheme"])
    mapper.decoalesce()
    mapper.save()

Calls are planned, and `save` streams the result out. `coalesce` goes to the smaller of the two
models, `decoalesce` to the larger, `interpolate` blends with the one that has the size reached. As
with the original, a map that is saved with the source is used instead of the scheme, and without a
scheme unit i is averaged with unit n+i, layers with their neighbours.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from streammap import api, executor, layout, scheme
from streammap import model as models
from streammap.api import LazyCheckpoint
from streammap.checkpoint import read_config
from streammap.errors import PlanError
from streammap.events import Listener, nobody
from streammap.executor import Report, Where
from streammap.operators import resize
from streammap.operators.interpolate import Interpolate
from streammap.operators.resize import Direction, Resize
from streammap.planner import Rule
from streammap.scheme import Groups, Scheme

PathLike = str | Path
GroupsLike = Sequence[Sequence[int]]
HEAD_DIM = 64


class _Mapper:
    """What the three fronts share: a source, a target, and the result so far."""

    def __init__(
        self,
        source: LazyCheckpoint,
        target_sizes: Mapping[str, int] | None,
        target: Path | None,
        output: Path | None,
        groups: Scheme,
        rule: Rule,
    ) -> None:
        self._source, self._target, self._output = source, target, output
        self._target_sizes = target_sizes
        self._groups, self._rule = groups, rule
        self._result = source

    @property
    def result(self) -> LazyCheckpoint:
        """What `save` would write."""
        return self._result

    def _resize(self, direction: Direction) -> None:
        model = self._result.plan.model
        sizes = self._goal(direction)
        if sizes is not None and all(model.sizes.get(k, v) == v for k, v in sizes.items()):
            return
        level = resize.fitting(self._result.plan.levels, model, direction, sizes)
        op = Resize(
            direction,
            scheme=None if level is not None else self._scheme(direction, sizes),
            target=sizes,
            rule=self._rule,
        )
        self._result = LazyCheckpoint(op.plan(self._result.plan))

    def _goal(self, direction: Direction) -> Mapping[str, int] | None:
        """Sizes of the smaller (or larger) of source and target."""
        if self._target_sizes is None:
            return None
        own = {axis: self._source.sizes[axis] for axis in self._target_sizes}
        shrinks = direction == "coalesce"
        wanted = self._target_sizes
        smaller = own if _area(own) < _area(wanted) else wanted
        larger = wanted if smaller is own else own
        return smaller if shrinks else larger

    def _scheme(self, direction: Direction, sizes: Mapping[str, int] | None) -> Scheme:
        """The groups given; for sizes without any, the original's own."""
        if sizes is None:
            return self._groups
        own = self._result.sizes
        depth_axis = self._result.plan.model.architecture.depth_axis
        width, depth = self._groups.width, self._groups.depth
        heads = sorted((own["heads"], sizes.get("heads", own["heads"])))
        layers = sorted((own[depth_axis], sizes.get(depth_axis, own[depth_axis])))
        if width is None and heads[0] != heads[1]:
            width = scheme.template(heads[1], heads[0])
        if depth is None and layers[0] != layers[1]:
            depth = _adjacent(layers[1], layers[0])
        return replace(self._groups, width=width, depth=depth)

    def _interpolate(self, alpha: float, target: LazyCheckpoint) -> None:
        self._result = LazyCheckpoint(Interpolate(alpha).plan(self._result.plan, target.plan))

    def save(
        self, *, progress: Listener = nobody, max_shard_size: str | int = api.MAX_SHARD_SIZE
    ) -> Report:
        """Write the result to the save folder, replacing what is there, as the original does.

        Raises:
            OutputError: the save folder is the source's, or can't be written.
        """
        if self._output is None:
            raise PlanError("no save_dir was given", hint="pass save_dir=...")
        plan = self._result.plan
        place = self._output
        if place.exists() and place.samefile(self._source.plan.sources[0].path):
            raise PlanError(f"{place}: is the source itself", hint="save to another folder")
        size = layout.parse_size(max_shard_size)
        where = Where(place, size, overwrite=True, fsync=True, may_replace_sources=True)
        return executor.run(plan, where, progress)


class _TextMapper(_Mapper):
    """BERT and GPT-2: folders with a config.json."""

    def __init__(
        self,
        src_dir: PathLike,
        tgt_dir: PathLike | None = None,
        save_dir: PathLike | None = None,
        width_scheme: GroupsLike | None = None,
        depth_scheme: GroupsLike | None = None,
        *,
        rule: Rule = "reference",
    ) -> None:
        """Open both folders; of `tgt_dir` only config.json is read until `interpolate`."""
        source = api.open(src_dir)
        sizes = None
        if tgt_dir is not None:
            spec = source.plan.model.architecture
            sizes = models.sizes_of(spec, read_config(tgt_dir))
        super().__init__(
            source,
            sizes,
            None if tgt_dir is None else Path(tgt_dir),
            None if save_dir is None else Path(save_dir),
            _groups(width_scheme, depth_scheme),
            rule,
        )

    def coalesce(self) -> "_TextMapper":
        """Plan the smaller model."""
        self._resize("coalesce")
        return self

    def decoalesce(self) -> "_TextMapper":
        """Plan the larger model."""
        self._resize("decoalesce")
        return self

    def interpolate(self, alpha: float = 0.25) -> "_TextMapper":
        """Plan (1 - alpha) * target + alpha * result so far."""
        if self._target is None:
            raise PlanError("no tgt_dir was given", hint="pass tgt_dir=...")
        target = api.open(self._target)
        if target.sizes != self._result.sizes and self._source.sizes == self._result.sizes:
            target = self._source
        self._interpolate(alpha, target)
        return self


class BertMapper(_TextMapper):
    """The original's BertMapper."""


class GPT2Mapper(_TextMapper):
    """The original's GPT2Mapper."""


class DeiTMapper(_Mapper):
    """The original's DeiTMapper: .pth files, sizes given as "L12-H12"."""

    def __init__(
        self,
        src_arch: str,
        tgt_arch: str,
        src_dir: PathLike,
        src_ckp: str,
        tgt_dir: PathLike | None = None,
        tgt_ckp: str | None = None,
        save_dir: PathLike | None = None,
        save_ckp: str | None = None,
        width_scheme: GroupsLike | None = None,
        depth_scheme: GroupsLike | None = None,
        *,
        rule: Rule = "reference",
    ) -> None:
        """Open the source; `tgt_ckp` is read by `interpolate` only."""
        source = _open_deit(Path(src_dir) / src_ckp, src_arch)
        n_layers, n_heads = _parse_arch(tgt_arch)
        head_dim = source.sizes["embed"] // source.sizes["heads"]
        sizes = {"layer": n_layers, "heads": n_heads, "embed": n_heads * head_dim}
        target = None
        if tgt_ckp is not None:
            target = (Path(src_dir) if tgt_dir is None else Path(tgt_dir)) / tgt_ckp
        output = None if save_dir is None else Path(save_dir) / (save_ckp or src_ckp)
        super().__init__(
            source, sizes, target, output, _groups(width_scheme, depth_scheme), rule
        )
        self._target_arch = tgt_arch

    def coalesce(self) -> "DeiTMapper":
        """Plan the smaller model."""
        self._resize("coalesce")
        return self

    def decoalesce(self) -> "DeiTMapper":
        """Plan the larger model."""
        self._resize("decoalesce")
        return self

    def interpolate(self, alpha: float = 0.25) -> "DeiTMapper":
        """Plan (1 - alpha) * target + alpha * result so far."""
        if self._target is None:
            raise PlanError("no tgt_ckp was given", hint="pass tgt_dir=..., tgt_ckp=...")
        target = _open_deit(self._target, self._target_arch)
        if target.sizes != self._result.sizes and self._source.sizes == self._result.sizes:
            target = self._source
        self._interpolate(alpha, target)
        return self


def _open_deit(path: Path, arch: str) -> LazyCheckpoint:
    n_layers, n_heads = _parse_arch(arch)
    found = api.open(path)
    if found.plan.config is None:
        found = api.open(path, config={"model_args": {"num_heads": n_heads}})
    for axis, told in (("layer", n_layers), ("heads", n_heads)):
        if found.sizes[axis] != told:
            raise PlanError(
                f"{path}: {axis} is {found.sizes[axis]}, {arch} says {told}",
                hint="give the arch of this checkpoint, such as L12-H12",
            )
    return found


def _parse_arch(arch: str) -> tuple[int, int]:
    found = re.fullmatch(r"L(\d{1,6})-H(\d{1,6})", arch)
    if found is None:
        raise PlanError(f"arch {arch!r}: expected layers and heads, such as L12-H12")
    return int(found[1]), int(found[2])


def _groups(width: GroupsLike | None, depth: GroupsLike | None) -> Scheme:
    return scheme.load_scheme({"width_scheme": width, "depth_scheme": depth})


def _adjacent(n_large: int, n_small: int) -> Groups:
    if n_large != 2 * n_small:
        raise PlanError(
            f"layers: from {n_large} to {n_small} without a depth_scheme; neighbours are merged "
            f"in pairs only",
            hint="give a depth_scheme",
        )
    return scheme.uniform(n_large, 2, "adjacent", what="layers")


def _area(sizes: Mapping[str, int]) -> tuple[int, int]:
    return sizes.get("layer", 0) * sizes.get("embed", 1), sizes.get("embed", 0)
