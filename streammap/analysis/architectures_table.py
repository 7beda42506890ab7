"""The table of `streammap architectures`: the model types served, and what is exact for each."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass

from streammap.architectures import axis_facts, axis_sizes, registry
from streammap.architectures import expression as expressions
from streammap.architectures.model import Family, Model
from streammap.architectures.schema import Architecture
from streammap.common import table
from streammap.common.table import Column
from streammap.planning import compensation, experts, maps, requests

_COLUMNS = (
    Column("model type", wraps=True),
    Column("spec", wraps=True),
    Column("growth that is exact", wraps=True),
)


@dataclass(frozen=True, slots=True)
class ArchitectureRow:
    """One model type."""

    model_type: str
    spec: str
    exact: tuple[str, ...]
    """Spaces whose growth by whole factors is function-preserving."""
    any_size: bool
    """Whether the hidden size can grow to any size (of whole heads, if it is made of heads)."""
    silent_layers: bool
    """Whether zero-initialised (identity) layers can be added."""
    head_size: bool
    """Whether heads can become wider."""
    caveats: tuple[str, ...]
    """What is not exact, and why."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What `streammap architectures` prints."""

    rows: tuple[ArchitectureRow, ...]

    def as_json(self) -> dict[str, object]:
        """All rows."""
        return {"architectures": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        cells = [cells for row in self.rows for cells in _cells(row)]
        return "\n".join(
            [
                f"{len(self.rows)} model types, {len({r.spec for r in self.rows})} specs",
                "",
                *table.table(_COLUMNS, cells),
                "",
                "Merging is approximate everywhere, except where the merged parts are equal.",
            ]
        )


def _cells(row: ArchitectureRow) -> Iterator[tuple[str, str, str]]:
    growth = [
        *row.exact,
        *(["hidden to any size"] if row.any_size else []),
        *(["zero-initialised layers"] if row.silent_layers else []),
        *(["head size"] if row.head_size else []),
    ]
    yield row.model_type, row.spec, ", ".join(growth) or "none"
    for caveat in row.caveats:
        yield "", "", f"not: {caveat}"


def listing() -> Listing:
    """Every model type that a spec serves, by name.

    Raises:
        ArchitectureError: a spec that is wrong.
    """
    types = sorted(registry.model_types().items(), key=lambda pair: (pair[0].lower(), pair[1]))
    return Listing(tuple(_row(model_type, spec) for model_type, spec in types))


def _row(model_type: str, name: str) -> ArchitectureRow:
    model = _virtual(model_type, name)
    spec = model.architecture
    norms = [family.rule.norm for family in model.families if family.rule.norm is not None]
    is_post = any(norm.post for norm in norms)
    caveats = dict(spec.caveats)
    for axis in spec.experts:
        why = _inexact_experts(model, axis)
        if why is not None:
            caveats.setdefault(axis, why)
    # What is frozen stays as it is when others grow.
    kinds = {axis: about.kind for axis, about in spec.axes.items()}
    spoilt = _coupled(spec, {axis for axis in caveats if kinds[axis] != "frozen"})
    exact = tuple(
        space.replace("_", " ")
        for space, axes in spec.spaces.items()
        if (there := [axis for axis in axes if model.sizes.get(axis) != 0])
        and all(_can_grow(model, axis, axes) and axis not in spoilt for axis in there)
    )
    hidden = [axis for axis in spec.spaces.get("hidden", ()) if axis not in spoilt]
    return ArchitectureRow(
        model_type,
        name,
        exact,
        any_size=any(_can_grow(model, x, hidden) and _any_size(model, x) for x in hidden),
        silent_layers=not is_post and not set(spec.depth_axes) & set(caveats),
        head_size=any(_can_widen(spec, axis) for axis in spec.rope),
        caveats=tuple(f"{axis}: {why}" for axis, why in caveats.items()),
    )


def _virtual(model_type: str, name: str) -> Model:
    """A model of this type with all tensors that its spec knows."""
    config = _tiny_config(model_type, name)
    spec = registry.load(name, config)
    families = (Family(rule, rule.pattern.text, {}, rule.dims) for rule in spec.rules)
    return Model(spec, config, axis_sizes.of_config(spec, config), tuple(families), ())


def _inexact_experts(model: Model, axis: str) -> str | None:
    """Why twice the experts are another function; None where they aren't, or there are none."""
    n = model.sizes.get(axis, 0)
    if not n:
        return None
    twice = maps.growing(maps.merging(requests.cyclic(2 * n, n), 2 * n))
    fields = experts.follow(model, axis, twice, grows=True, asked=None).fields
    return experts.inexact(model, axis, twice, fields)


def _any_size(model: Model, axis: str) -> bool:
    """Whether a hidden size can grow to any size of whole heads."""
    spec = model.architecture
    of_heads = {*spec.spaces.get("heads", ()), *spec.spaces.get("kv_heads", ())}
    # Heads that follow are copied unevenly then, which a norm over all of them would see.
    normed = of_heads & axis_facts.normed_axes(model)
    return compensation.can_fill(model, axis) and not normed & _coupled(spec, {axis})


def _can_widen(spec: Architecture, head_dim: str) -> bool:
    """Whether a head size can grow by itself, and the function stays."""
    fixed = any(
        head_dim in {*expressions.names(left), *expressions.names(right)}
        for _, left, right in spec.constraints
    )
    return "." not in head_dim and not fixed and head_dim not in spec.caveats


def _coupled(spec: Architecture, axes: set[str]) -> set[str]:
    """These axes and those that can't change without them."""
    coupled = set(axes)
    for _ in spec.constraints:
        for _, left, right in spec.constraints:
            together = {*expressions.names(left), *expressions.names(right)}
            if together & coupled:
                coupled |= {name for name in together if name in spec.axes}
    return coupled


def _can_grow(model: Model, axis: str, beside: Collection[str]) -> bool:
    """Whether an axis grows, by itself or with others beside it."""
    spec = model.architecture
    about = spec.axes[axis]
    if about.kind == "expert":
        return axis in spec.experts
    # Kv heads without a field of their own are the query heads, or other kv heads.
    origin = axis_sizes.axis_origin(about, model.config)
    followed = () if origin is None or isinstance(origin, str) else expressions.names(origin)
    is_query = axis in spec.spaces.get("kv_heads", ()) and not {*beside}.issuperset(followed)
    return about.kind == "width" and not is_query


def _tiny_config(model_type: str, name: str) -> Mapping[str, object]:
    """The config of a tiny model of this type, for the conditions of its spec."""
    for model in registry.tiny_models(name):
        if model.model_type == model_type:
            return {**model.config, "model_type": model_type}
    return {"model_type": model_type}
