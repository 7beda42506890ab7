"""The table of `streammap architectures`: the model types served, and what is exact for each."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from streammap.architectures import expression as expressions
from streammap.architectures import registry
from streammap.architectures.schema import Architecture
from streammap.common import table
from streammap.common.table import Column

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
    tiny = _tiny_config(model_type, name)
    spec = registry.load(name, tiny)
    norms = [rule.norm for rule in spec.rules if rule.norm is not None]
    is_post = any(norm.post for norm in norms)
    caveats = dict(spec.caveats)
    for axis, experts in spec.experts.items():
        if experts.inexact is not None:
            caveats.setdefault(axis, experts.inexact)
    spoilt = _coupled(spec, set(caveats))
    exact = tuple(
        space.replace("_", " ")
        for space, axes in spec.spaces.items()
        if any(_can_grow(spec, axis) and axis not in spoilt for axis in axes)
    )
    return ArchitectureRow(
        model_type,
        name,
        exact,
        any_size="hidden" in exact and not is_post,
        silent_layers=not is_post and not set(spec.depth_axes) & set(caveats),
        head_size=bool(spec.rope),
        caveats=tuple(f"{axis}: {why}" for axis, why in caveats.items()),
    )


def _coupled(spec: Architecture, axes: set[str]) -> set[str]:
    """These axes and those that can't change without them."""
    coupled = set(axes)
    for _ in spec.constraints:
        for _, left, right in spec.constraints:
            together = {*expressions.names(left), *expressions.names(right)}
            if together & coupled:
                coupled |= {name for name in together if name in spec.axes}
    return coupled


def _can_grow(spec: Architecture, axis: str) -> bool:
    return spec.axes[axis].kind in ("width", "expert") and not (
        spec.axes[axis].kind == "expert" and axis not in spec.experts
    )


def _tiny_config(model_type: str, name: str) -> Mapping[str, object]:
    """The config of a tiny model of this type, for the conditions of its spec."""
    for model in registry.tiny_models(name):
        if model.model_type == model_type:
            return {**model.config, "model_type": model_type}
    return {"model_type": model_type}
