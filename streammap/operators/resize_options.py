"""Options of coalesce and decoalesce, as users give them: in Python, or on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict

from streammap.architectures import axis_sizes as sizes
from streammap.architectures import schema
from streammap.engine.options import EngineOptions
from streammap.errors import PlanError
from streammap.io.json_files import read_config
from streammap.io.storage.resolve import PathLike
from streammap.operators.resize import Direction, NewLayers, Resize
from streammap.planning import map_file as mapfile
from streammap.planning import requests, scheme
from streammap.planning.axis_maps import KvMerge
from streammap.planning.requests import Grouping
from streammap.planning.scheme import Scheme
from streammap.planning.tensor_maps import Rule

if TYPE_CHECKING:
    from streammap.planning.plan import Plan

SchemeLike = PathLike | Mapping[str, object] | Scheme
RequestLike = int | str | list[object] | tuple[object, ...] | Mapping[str, object]
"""A factor, "=SIZE", groups, or a table of these: see requests.py."""
SPACES = (*schema.SPACES, "layers")


class HasSizes(Protocol):
    """An opened checkpoint, as far as a target goes."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Axis -> size."""
        ...


class ResizeOptions(TypedDict, total=False):
    """What to resize, and how. What is not asked for stays."""

    scheme: SchemeLike | None
    """File or dict: {"width_scheme": [[0, 6], ...], "depth_scheme": ..., "mlp": 2, ...}."""
    width: int | None
    """Factor on all widths: hidden size, heads, kv heads, intermediate size."""
    depth: int | None
    """Factor on the layers."""
    hidden: RequestLike | None
    """What becomes of the hidden size alone."""
    heads: RequestLike | None
    """... of the query heads."""
    kv_heads: RequestLike | None
    """... of the key and value heads."""
    mlp: RequestLike | None
    """... of the intermediate sizes."""
    experts: RequestLike | None
    """... of the number of experts."""
    layers: RequestLike | None
    """... of the number of layers."""
    axes: Mapping[str, RequestLike] | None
    """... of any axis that `streammap inspect` lists, by name."""
    grouping: Grouping
    """ "stacked" (default) puts i with i + n/factor together, "adjacent" neighbours."""
    kv_merge: KvMerge
    """Merged kv heads are the "mean" (default) or the "first" of their group."""
    new_layers: NewLayers
    """Layers of a growth are a "copy" (default), or "zero": they write nothing at first."""
    head_dim: int | None
    """New size of a head; for rotary positions, decoalesce only."""
    map: PathLike | None
    """Map file, or a folder that holds one, instead of groups and factors."""
    target: "PathLike | Mapping[str, object] | HasSizes | None"
    """config.json (its folder, or a dict) whose sizes the result must have,
    or an opened checkpoint."""
    rule: Rule
    """ "exact" (default), or "reference" for the original's numbers."""
    untie: bool
    """Whether a tied head gets a tensor of its own."""


class RunOptions(ResizeOptions, EngineOptions, total=False):
    """What to resize, and what the run may use: see also options.py."""


def split(options: RunOptions) -> tuple[ResizeOptions, EngineOptions]:
    """What to resize, and what the run may use."""
    resizes, run = ResizeOptions(), EngineOptions()
    for name, value in options.items():
        table = run if name in EngineOptions.__annotations__ else resizes
        table[name] = value  # type: ignore[literal-required]
    return resizes, run


def resize(direction: Direction, plan: "Plan", options: ResizeOptions) -> Resize:
    """The operator for a plan.

    Raises:
        StreammapError: an option that is none, or a file that is wrong.
    """
    unknown = [name for name in options if name not in ResizeOptions.__annotations__]
    if unknown:
        raise PlanError(
            f"unknown option {unknown[0]!r}",
            hint=f"known: {', '.join(ResizeOptions.__annotations__)}",
        )
    given = {name: value for name, value in options.items() if value is not None}
    groups, map_file = options.get("scheme"), options.get("map")
    axes, target = options.get("axes") or {}, options.get("target")
    return Resize(
        direction,
        scheme=None if groups is None else scheme.load_scheme(groups),
        width=options.get("width"),
        depth=options.get("depth"),
        grouping=options.get("grouping", "stacked"),
        levels=None if map_file is None else mapfile.load_from(map_file),
        target=None if target is None else _target_sizes(plan, target),
        rule=options.get("rule", "exact"),
        spaces={
            name: requests.parse_request(given[name], f"--{name.replace('_', '-')}")
            for name in SPACES
            if name in given
        },
        axes={name: requests.parse_request(value, name) for name, value in axes.items()},
        head_dim=options.get("head_dim"),
        kv_merge=options.get("kv_merge", "mean"),
        new_layers=options.get("new_layers", "copy"),
        untie=options.get("untie", False),
    )


def _target_sizes(
    plan: "Plan", target: PathLike | Mapping[str, object] | HasSizes
) -> Mapping[str, int]:
    if not isinstance(target, str | Path | Mapping):
        return target.sizes
    config = target if isinstance(target, Mapping) else read_config(target)
    return sizes.of_config(plan.model.architecture, config)
