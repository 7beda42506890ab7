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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self, final

from streammap import api
from streammap.api import LazyCheckpoint
from streammap.architectures import axis_sizes as axes
from streammap.common.declare import takes
from streammap.errors import PlanError
from streammap.io.json_files import read_config
from streammap.io.storage.resolve import PathLike
from streammap.operators import calls
from streammap.operators.configure import Configure
from streammap.operators.interpolate import Interpolate
from streammap.operators.kinds import AxisSizes
from streammap.operators.map_lookup import fitting_level
from streammap.operators.resize import Coalesce, Decoalesce, Direction
from streammap.output import run as executor
from streammap.output.options import OutputOptions
from streammap.output.run import Report
from streammap.output.save_options import SaveOptions
from streammap.planning import requests, scheme
from streammap.planning.plan import Plan
from streammap.planning.requests import Groups
from streammap.planning.scheme import Scheme
from streammap.planning.tensor_maps.axis_change import Rule

GroupsLike = Sequence[Sequence[int]]


class _Mapper:
    """What the three fronts share: a source, a target, and the result so far."""

    def __init__(
        self,
        source: LazyCheckpoint,
        target_sizes: Mapping[str, int] | None,
        target_config: Mapping[str, object] | None,
        open_target: Callable[[], LazyCheckpoint],
        output: Path | None,
        groups: Scheme,
        rule: Rule,
    ) -> None:
        self._source, self._output = source, output
        self._target_sizes, self._target_config = target_sizes, target_config
        self._open_target = open_target
        self._groups, self._rule = groups, rule
        self._result = source

    @property
    def result(self) -> LazyCheckpoint:
        """What `save` would write."""
        return self._result

    def coalesce(self) -> Self:
        """Plan the smaller model."""
        return self._resize("coalesce")

    def decoalesce(self) -> Self:
        """Plan the larger model."""
        return self._resize("decoalesce")

    def interpolate(self, alpha: float = 0.25) -> Self:
        """Plan (1 - alpha) * target + alpha * result so far.

        Raises:
            PlanError: no target was given, or its size is neither the source's nor the result's.
        """
        target = self._open_target()
        if target.sizes != self._result.sizes and self._source.sizes == self._result.sizes:
            target = self._source
        blend = Interpolate(target=target, alpha=alpha)
        self._result = LazyCheckpoint(calls.apply(blend, self._result.plan))
        return self

    def take(self, groups: Scheme) -> None:
        """Use this scheme, instead of the one given at the start."""
        self._groups = groups

    def run(self, opt: str, alpha: float) -> Self:
        """One step of the original's command line: C, D or IP.

        Raises:
            PlanError: source and target are the other way round.
        """
        if opt == "IP":
            return self.interpolate(alpha)
        direction: Direction = "coalesce" if opt == "C" else "decoalesce"
        goal, wanted = self._goal(direction), self._target_sizes
        if goal is not None and wanted is not None and goal != wanted:
            change = ", ".join(f"{k} {v} to {wanted[k]}" for k, v in goal.items())
            raise PlanError(
                f"--opt {opt}: the target is the {'larger' if opt == 'C' else 'smaller'} model "
                f"({change})",
                hint="--opt C makes a model smaller, --opt D larger",
            )
        return self._resize(direction)

    @takes(SaveOptions, n_first=1)
    def save(self, options: SaveOptions) -> Report:
        """Write the result to the save folder, replacing what is there, as the original does.

        Raises:
            PlanError: no save folder was given, or it is the source's.
            OutputError: it can't be written.
        """
        if self._output is None:
            raise PlanError("no save_dir was given", hint="pass save_dir=...")
        place = self._output
        if place.exists() and place.samefile(self._source.plan.sources[0].path):
            raise PlanError(f"{place}: is the source itself", hint="save to another folder")
        where = OutputOptions(place, replace(options, overwrite=True), may_replace_sources=True)
        return executor.run(self._result.plan, where, options.progress)

    def _resize(self, direction: Direction) -> Self:
        model = self._result.plan.model
        sizes, wanted = self._goal(direction), self._target_sizes
        if sizes is not None and all(model.sizes.get(k, v) == v for k, v in sizes.items()):
            return self
        grows = direction == "decoalesce"
        level = fitting_level(self._result.plan.levels, model, sizes, grows=grows)
        operator = (Decoalesce if grows else Coalesce)(
            scheme=None if level is not None else self._scheme(sizes),
            target=None if sizes is None else AxisSizes(sizes),
            rule=self._rule,
        )
        plan = calls.apply(operator, self._result.plan)
        self._result = LazyCheckpoint(plan if sizes is not wanted else self._as_target(plan))
        return self

    def _as_target(self, plan: Plan) -> Plan:
        """With the target's config.json, as the original saves it, where it fits the tensors."""
        if self._target_config is None:
            return plan
        changed = calls.apply(Configure(config=self._target_config), plan)
        return changed if changed.model.tied == plan.model.tied else plan

    def _goal(self, direction: Direction) -> Mapping[str, int] | None:
        """Sizes of the smaller (or larger) of source and target."""
        wanted = self._target_sizes
        if wanted is None:
            return None
        own = {axis: self._source.sizes[axis] for axis in wanted if axis in self._source.sizes}
        smaller, larger = (own, wanted) if _area(own) < _area(wanted) else (wanted, own)
        return smaller if direction == "coalesce" else larger

    def _scheme(self, sizes: Mapping[str, int] | None) -> Scheme:
        """The groups given; where there are none for a size that changes, the original's own."""
        if sizes is None:
            return self._groups
        own = self._result.sizes
        depth_axis = self._result.plan.model.architecture.depth_axes[0]
        width, depth = self._groups.width, self._groups.depth
        heads = sorted((own["heads"], sizes.get("heads", own["heads"])))
        layers = sorted((own[depth_axis], sizes.get(depth_axis, own[depth_axis])))
        if width is None and heads[0] != heads[1]:
            width = scheme.template(heads[1], heads[0])
        if depth is None and layers[0] != layers[1]:
            depth = _adjacent(layers[1], layers[0])
        return replace(self._groups, width=width, depth=depth)


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
        sizes = config = None
        if tgt_dir is not None:
            config = read_config(tgt_dir)
            sizes = axes.of_config(source.plan.model.architecture, config)
        super().__init__(
            source,
            sizes,
            config,
            lambda: api.open(_given("tgt_dir", tgt_dir)),
            None if save_dir is None else Path(save_dir),
            _groups(width_scheme, depth_scheme),
            rule,
        )


@final
class BertMapper(_TextMapper):
    """The original's BertMapper: folders of a BERT."""


@final
class GPT2Mapper(_TextMapper):
    """The original's GPT2Mapper: folders of a GPT-2."""


@final
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
        """Open the source; `tgt_ckp` (in `tgt_dir` or `src_dir`) is read by `interpolate` only."""
        source = _open_deit(Path(src_dir) / src_ckp, src_arch)
        n_layers, n_heads = _parse_arch(tgt_arch)
        head_dim = source.sizes["embed"] // source.sizes["heads"]
        folder = Path(src_dir if tgt_dir is None else tgt_dir)
        super().__init__(
            source,
            {"layer": n_layers, "heads": n_heads, "embed": n_heads * head_dim},
            None,
            lambda: _open_deit(folder / _given("tgt_ckp", tgt_ckp), tgt_arch),
            None if save_dir is None else Path(save_dir) / (save_ckp or src_ckp),
            _groups(width_scheme, depth_scheme),
            rule,
        )


def _given(name: str, value: PathLike | None) -> PathLike:
    if value is None:
        raise PlanError(f"no {name} was given", hint=f"pass {name}=...")
    return value


def from_flags(
    *,
    arch: str,
    opt: str,
    src_dir: str,
    save_dir: str,
    tgt_dir: str | None,
    config: str | None,
    alpha: float,
    src_arch: str | None,
    tgt_arch: str | None,
    src_ckp: str | None,
    tgt_ckp: str | None,
    save_ckp: str | None,
    rule: Rule,
) -> "BertMapper | GPT2Mapper | DeiTMapper":
    """The original's command line as a mapper that is ready to `save`.

    Raises:
        PlanError: a flag that is missing, or a direction that does not fit the two models.
    """
    groups = Scheme() if config is None else scheme.load_scheme(config)
    made: BertMapper | GPT2Mapper | DeiTMapper
    if arch == "deit":
        made = DeiTMapper(
            _flag("--src-arch", src_arch),
            _flag("--tgt-arch", tgt_arch),
            src_dir,
            _flag("--src-ckp", src_ckp),
            tgt_dir,
            _flag("--tgt-ckp", tgt_ckp) if opt == "IP" else tgt_ckp,
            save_dir,
            _flag("--save-ckp", save_ckp),
            rule=rule,
        )
    else:
        front = BertMapper if arch == "bert" else GPT2Mapper
        made = front(src_dir, _flag("--tgt-dir", tgt_dir), save_dir, rule=rule)
    made.take(groups)
    made.run(opt, alpha)
    return made


def _flag(name: str, value: str | None) -> str:
    if value is None:
        raise PlanError(f"{name} is missing", hint=f"give {name}; the original needs it too")
    return value


def _open_deit(path: Path, arch: str) -> LazyCheckpoint:
    n_layers, n_heads = _parse_arch(arch)
    found = api.open(path)
    if found.plan.config is None:
        found = api.open(path, config={"model_args": {"num_heads": n_heads}})
    for axis, expected in (("layer", n_layers), ("heads", n_heads)):
        if found.sizes[axis] != expected:
            raise PlanError(
                f"{path}: {axis} is {found.sizes[axis]}, {arch} says {expected}",
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
    return requests.uniform(n_large, 2, "adjacent", units="layers")


def _area(sizes: Mapping[str, int]) -> tuple[int, int]:
    return sizes.get("layer", 0) * sizes.get("embed", 1), sizes.get("embed", 0)
