"""Describe a checkpoint: spec, sizes, files, and how each key matched."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field

from streammap.architectures import adapters, axis_facts, quantization
from streammap.architectures.key_pattern import INDEX
from streammap.architectures.layer_kinds import LayerKind
from streammap.architectures.model import Family
from streammap.common import table
from streammap.common.table import Column
from streammap.common.units import format_count, format_nbytes
from streammap.errors import ArchitectureError, CheckpointError, printable
from streammap.planning.plan import Plan

_AXES = {
    "width": "widths",
    "depth": "layers",
    "expert": "experts",
    "group": "groups",
    "frozen": "fixed sizes",
}


_COLUMNS = (
    Column("tensors", wraps=True),
    Column("number", align="right"),
    Column("dtype"),
    Column("shape", wraps=True),
    Column("kind", colours={"unknown": "red"}),
    Column("dimensions", wraps=True),
    Column("rule of the spec", wraps=True, can_go=True),
)


@dataclass(frozen=True, slots=True)
class Pattern:
    """The tensors of one key pattern."""

    name: str
    n_tensors: int
    dtype: str
    shape: tuple[int, ...]
    dims: str
    """What each dimension is: "embed:out, heads*head_dim:in"."""
    kind: str
    """linear, norm, embedding, buffer ..."""
    rule: str
    """The pattern of the spec that it matched."""


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `streammap inspect` prints."""

    path: str
    architecture: str | None
    """The spec that serves it; None if none does."""
    problem: str | None
    """Why none does."""
    hint: str | None
    """What to do then."""
    tied: bool
    sizes: Mapping[str, int]
    files: Mapping[str, int]
    """File -> bytes."""
    n_tensors: int
    n_parameters: int
    dtypes: Mapping[str, int]
    """dtype -> bytes."""
    n_saved_maps: int
    axes: Mapping[str, str]
    """Axis -> what can be done with it: width, depth, expert, group, frozen."""
    layer_kinds: Mapping[str, tuple[str, ...]]
    """Depth axis -> its kinds of layers, "0-2: before first_k_dense_replace 3"."""
    patterns: tuple[Pattern, ...]
    expert_layouts: Mapping[str, str] = field(default_factory=dict)
    """Axis of experts -> how the files have them: "one by one", "stacked"."""
    wrappers: tuple[str, ...] = ()
    """What wrappers wrote into the keys of its files: "_orig_mod. (torch.compile)"."""
    notes: tuple[str, ...] = ()
    """What is odd about its files, and keeps no loader from reading it."""
    by_layer: tuple[str, ...] = ()
    """Axes whose saved maps differ from layer to layer."""

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        total = format_nbytes(sum(self.files.values()))
        title = printable(f"{self.path}: {files}, {total}")
        rows = table.table(_COLUMNS, [_cells(pattern) for pattern in self.patterns])
        return "\n".join([title, *table.fields(self._facts()), "", *rows])

    def _facts(self) -> Iterator[tuple[str, str]]:
        dtypes = ", ".join(f"{name} {format_nbytes(n)}" for name, n in self.dtypes.items())
        yield "tensors", f"{self.n_tensors}, {format_count(self.n_parameters)} values ({dtypes})"
        yield "architecture", self.architecture or f"none ({self.problem})"
        if self.hint is not None:
            yield "", self.hint
        by_kind: dict[str, list[str]] = {}
        for axis, size in self.sizes.items():
            layout = self.expert_layouts.get(axis)
            shown = f"{axis} {size}" + (f" ({layout})" if layout else "")
            by_kind.setdefault(self.axes.get(axis, "frozen"), []).append(shown)
        for kind, sizes in by_kind.items():
            yield _AXES[kind], ", ".join(sizes)
        for axis, kinds in self.layer_kinds.items():
            yield f"{axis} kinds", "; ".join(kinds)
        if self.architecture is not None:
            yield "head", "tied to the embedding" if self.tied else "none, or one of its own"
        if self.wrappers:
            yield "wrappers", f"{' and '.join(self.wrappers)}: left out of the keys"
        for note in self.notes:
            yield "note", printable(note)
        if self.n_saved_maps:
            own = f", another {' and '.join(self.by_layer)} in each layer" if self.by_layer else ""
            yield "saved maps", f"{self.n_saved_maps}{own}: `streammap decoalesce` needs no scheme"


def _cells(pattern: Pattern) -> tuple[str, ...]:
    shape = str(list(pattern.shape))
    number = str(pattern.n_tensors)
    return pattern.name, number, pattern.dtype, shape, pattern.kind, pattern.dims, pattern.rule


def inspect(plan: Plan) -> Inspection:
    """Describe a checkpoint by its spec, if one serves it.

    Raises:
        CheckpointError: a spec serves it, but its tensors do not fit that spec.
    """
    problem, hint, sizes, tied, architecture = None, None, {}, False, None
    axes: dict[str, str] = {}
    layer_kinds: dict[str, tuple[str, ...]] = {}
    expert_layouts: dict[str, str] = {}
    patterns: tuple[Pattern, ...] = ()
    try:
        model = plan.model
        architecture, sizes, tied = model.architecture.name, dict(model.sizes), model.tied
        patterns = tuple(_pattern(plan, family) for family in model.families)
        axes = {name: axis.kind for name, axis in model.architecture.axes.items()}
        expert_layouts = {
            axis: layout
            for axis, kind in axes.items()
            if kind == "expert" and (layout := axis_facts.expert_layout(model, axis))
        }
        found = {axis: _runs(model.kinds(axis)) for axis in model.architecture.depth_axes}
        layer_kinds = {axis: kinds for axis, kinds in found.items() if len(kinds) > 1}
    except ArchitectureError as error:
        problem, hint = error.message, error.hint
    except CheckpointError as error:
        quantized = quantization.is_quantized(plan.specs, plan.config or {})
        if not quantized and not adapters.has_adapter(plan.specs.keys()):
            raise
        problem, hint = error.message, error.hint
    if architecture is None:
        patterns = _unmatched(plan)
    dtypes: dict[str, int] = {}
    for form in plan.targets.values():
        dtypes[form.spec.dtype] = dtypes.get(form.spec.dtype, 0) + form.spec.nbytes
    return Inspection(
        path=plan.sources[0].label,
        architecture=architecture,
        problem=problem,
        hint=hint,
        tied=tied,
        sizes=sizes,
        files={file.name: file.nbytes for file in plan.sources[0].files},
        n_tensors=len(plan.targets),
        n_parameters=sum(form.spec.n_elements for form in plan.targets.values()),
        dtypes=dtypes,
        n_saved_maps=len(plan.levels),
        axes=axes,
        layer_kinds=layer_kinds,
        patterns=patterns,
        expert_layouts=expert_layouts,
        wrappers=plan.sources[0].wrappers,
        notes=plan.sources[0].notes,
        by_layer=tuple(dict.fromkeys(axis for level in plan.levels for axis in level.by_layer)),
    )


def _runs(kinds: tuple[LayerKind, ...]) -> tuple[str, ...]:
    """Layers of one kind, as "0-2: before first_k_dense_replace 3"."""
    layers_of: dict[LayerKind, list[int]] = {}
    for i, kind in enumerate(kinds):
        layers_of.setdefault(kind, []).append(i)
    return tuple(f"{_ranges(layers)}: {', '.join(kind)}" for kind, layers in layers_of.items())


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _unmatched(plan: Plan) -> tuple[Pattern, ...]:
    """The keys with their numbers as *, if no spec serves the model."""
    keys_of: dict[str, list[str]] = {}
    for key in plan.targets:
        keys_of.setdefault(INDEX.sub("*", key), []).append(key)
    specs = {name: plan.targets[keys[0]].spec for name, keys in keys_of.items()}
    return tuple(
        Pattern(name, len(keys), specs[name].dtype, specs[name].shape, "", "unknown", "")
        for name, keys in keys_of.items()
    )


def _pattern(plan: Plan, family: Family) -> Pattern:
    spec = plan.targets[next(iter(family.members.values()))].spec
    dims = ", ".join(
        dim.text if dim.role == "keep" else f"{dim.text}:{dim.role}" for dim in family.dims
    )
    return Pattern(
        family.name,
        len(family.members),
        spec.dtype,
        spec.shape,
        dims,
        family.rule.kind,
        family.rule.pattern.text.replace("{ prefix}", ""),
    )
