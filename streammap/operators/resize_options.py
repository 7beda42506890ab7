"""Options that coalesce and decoalesce share: sizes, groups, maps, and how they are taken."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

from streammap.errors import PlanError
from streammap.operators.declare import Operator, check, declared, option
from streammap.operators.kinds import (
    AxisSizes,
    Factor,
    GroupingOf,
    ManyAxes,
    Maps,
    MapsLike,
    OneAxis,
    RequestLike,
    SchemeLike,
    SchemeOf,
    Sizes,
    TargetLike,
    TopK,
    TopKOf,
)
from streammap.planning.requests import AxisRequest, Grouping

if TYPE_CHECKING:  # help texts need the declarations alone
    from streammap.planning.map_file import MapLevel
    from streammap.planning.scheme import Scheme

AXES = ("hidden", "heads", "kv_heads", "mlp", "experts", "layers")
"""What can be asked for by an option of its own."""
_SIZE = (
    "What to resize (R: a factor 2 or x2, a size to:768, groups [[0, 1], [2, 3]] or slices 0:4,6:8)"
)
HOW = "How"


def _axis(what: str) -> Any:
    """An option that resizes one axis by itself."""
    return option(default=None, help=f"{what} only.", group=_SIZE, kind=OneAxis(), metavar="R")


@declared
class Resize(Operator):
    """What both directions share."""

    width: int | str | None = option(
        default=None,
        help="Factor on all widths: hidden size, heads, kv heads, MLP.",
        group=_SIZE,
        kind=Factor(instead="--hidden to:N, --mlp to:N ..."),
        metavar="K",
    )
    depth: int | str | None = option(
        default=None,
        help="Factor on the number of layers.",
        group=_SIZE,
        kind=Factor(instead="--layers to:N"),
        metavar="K",
    )
    hidden: RequestLike | None = _axis("Hidden size")
    heads: RequestLike | None = _axis("Query heads")
    kv_heads: RequestLike | None = _axis("Key and value heads")
    mlp: RequestLike | None = _axis("MLP neurons")
    experts: RequestLike | None = _axis("Experts")
    layers: RequestLike | None = _axis("Layers")
    axes: Mapping[str, RequestLike] | Sequence[str] | None = option(
        default=None,
        help="Any axis that `inspect` lists: moe_mlp=2, moe_mlp=to:768, moe_mlp=[[0,1],...].",
        group=_SIZE,
        kind=ManyAxes(),
        metavar="NAME=R",
        flag="axis",
    )
    scheme: SchemeLike | None = option(
        default=None,
        help="File with groups of heads, layers and other axes (JSON).",
        group=_SIZE,
        kind=SchemeOf(),
        metavar="FILE",
    )
    map: MapsLike | None = option(
        default=None,
        help="Map file of an earlier run, or the folder that holds it.",
        group=_SIZE,
        kind=Maps(),
        metavar="FILE",
        json="maps",
    )
    target: TargetLike | None = option(
        default=None,
        help="config.json with the sizes of the result.",
        group=_SIZE,
        kind=Sizes(),
        metavar="CONFIG",
        json="sizes",
    )
    grouping: Grouping | None = option(
        default=None,
        help="Members of a group: i with i + n/K (stacked), or neighbours (adjacent).  "
        "[default: stacked; adjacent where --layers gives a size]",
        group=HOW,
        kind=GroupingOf(),
    )
    kv_merge: Literal["mean", "first"] = option(
        default="mean", help="What merged kv heads become.", group=HOW
    )
    rule: Literal["exact", "reference"] = option(
        default="exact",
        help="exact keeps the function where it can; reference has the original tools' numbers.",
        group=HOW,
    )
    top_k: TopK | str | None = option(
        default=None,
        help="Experts that a token takes, where their number changes: keep, scale or =N. Merging "
        "and copying scale, a selection keeps.",
        group=HOW,
        kind=TopKOf(),
        metavar="N",
    )
    untie: bool = option(default=False, help="Give a tied head a tensor of its own.", group=HOW)

    def __post_init__(self) -> None:
        """Read the values, and refuse two ways to say one thing."""
        check(self)
        given = [name for name in ("width", "depth", *AXES) if getattr(self, name) is not None]
        given += self.by_axis
        given = [f"--{name.replace('_', '-')}" for name in given]
        ways = [*(["a scheme"] if self.scheme else []), *given]
        if self.scheme is not None and given:
            raise PlanError(f"both a scheme and {given[0]}", hint="give one of the two")
        if self.depth is not None and self.layers is not None:
            raise PlanError("both --depth and --layers", hint="give one of the two")
        if self.map is not None and ways:
            raise PlanError(f"both a map file and {ways[0]}", hint="give one of the two")

    @property
    def groups(self) -> "Scheme | None":
        """The scheme, read."""
        return cast("Scheme | None", self.scheme)

    @property
    def levels(self) -> "tuple[MapLevel, ...] | None":
        """Maps of a file, to choose from; None for those saved with the source."""
        return cast("tuple[MapLevel, ...] | None", self.map)

    @property
    def widths(self) -> AxisRequest | None:
        """What was asked for all widths together."""
        return cast("AxisRequest | None", self.width)

    @property
    def by_name(self) -> Mapping[str, AxisRequest]:
        """hidden, heads, kv_heads, mlp, experts, layers -> what was asked for."""
        asked = {name: getattr(self, name) for name in AXES}
        asked["layers"] = self.depth if self.layers is None else self.layers
        return {name: request for name, request in asked.items() if request is not None}

    @property
    def by_axis(self) -> Mapping[str, AxisRequest]:
        """Axis of the architecture spec -> what was asked for."""
        return cast("Mapping[str, AxisRequest]", self.axes or {})

    @property
    def adds_zero_layers(self) -> bool:
        """Whether a recipe is asked for that adds zero-initialised layers."""
        asked = [*self.by_name.values(), *self.by_axis.values()]
        if self.groups is not None:
            asked += [*self.groups.spaces.values(), *self.groups.axes.values()]
        return any(request.taken is not None and request.taken.zero for request in asked)

    @property
    def is_explicit(self) -> bool:
        """Whether sizes or groups are asked for; a target's sizes are not."""
        return bool(self.groups or self.widths or self.by_name or self.by_axis)

    @property
    def target_sizes(self) -> Mapping[str, int] | None:
        """Axis sizes that the result must have."""
        return self.target.sizes if isinstance(self.target, AxisSizes) else None
