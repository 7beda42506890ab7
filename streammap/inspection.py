"""What a checkpoint is: spec, sizes, files, and how each key matched."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from streammap.api import LazyCheckpoint
from streammap.errors import ArchitectureError
from streammap.model import Family


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


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `streammap inspect` prints."""

    path: str
    architecture: str | None
    """The spec that serves it; None where none does."""
    problem: str | None
    """Why none does."""
    tied: bool
    sizes: Mapping[str, int]
    files: Mapping[str, int]
    """File -> bytes."""
    n_tensors: int
    n_parameters: int
    dtypes: Mapping[str, int]
    """dtype -> bytes."""
    n_saved_maps: int
    patterns: tuple[Pattern, ...]

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        total = sum(self.files.values()) / 1e9
        dtypes = ", ".join(f"{name} {nbytes / 1e9:.3f} GB" for name, nbytes in self.dtypes.items())
        lines = [
            f"{self.path}: {files}, {total:.3f} GB",
            f"tensors       {self.n_tensors}, {self.n_parameters / 1e6:.1f} M values ({dtypes})",
            f"architecture  {self.architecture or f'none ({self.problem})'}",
        ]
        if self.sizes:
            lines.append(f"sizes         {', '.join(f'{k} {v}' for k, v in self.sizes.items())}")
        if self.architecture is not None:
            lines.append(
                f"head          {'tied to the embedding' if self.tied else 'none or its own'}"
            )
        if self.n_saved_maps:
            lines.append(
                f"saved maps    {self.n_saved_maps}: `streammap decoalesce` needs no scheme"
            )
        lines.append("")
        width = max((len(pattern.name) for pattern in self.patterns), default=0)
        for pattern in self.patterns:
            shape = str(list(pattern.shape))
            lines.append(
                f"{pattern.name:<{width}}  {pattern.n_tensors:>4}  {pattern.dtype:<5}"
                f"{shape:<16}  {pattern.kind:<9} {pattern.dims}"
            )
        return "\n".join(lines)


def inspect(lazy: LazyCheckpoint) -> Inspection:
    """Read a checkpoint by its spec, where one serves it.

    Raises:
        CheckpointError: a spec serves it, but the tensors are not what that says.
    """
    plan = lazy.plan
    problem, sizes, tied, architecture = None, {}, False, None
    patterns: tuple[Pattern, ...] = ()
    try:
        model = plan.model
        architecture, sizes, tied = model.architecture.name, dict(model.sizes), model.tied
        patterns = tuple(_pattern(lazy, family) for family in model.families)
    except ArchitectureError as error:
        problem = error.message
    dtypes: dict[str, int] = {}
    for form in plan.targets.values():
        dtypes[form.spec.dtype] = dtypes.get(form.spec.dtype, 0) + form.spec.nbytes
    return Inspection(
        path=str(plan.sources[0].path),
        architecture=architecture,
        problem=problem,
        tied=tied,
        sizes=sizes,
        files={file.name: file.nbytes for file in plan.sources[0].files},
        n_tensors=len(plan.targets),
        n_parameters=sum(form.spec.n_elements for form in plan.targets.values()),
        dtypes=dtypes,
        n_saved_maps=len(plan.levels),
        patterns=patterns,
    )


def _pattern(lazy: LazyCheckpoint, family: Family) -> Pattern:
    spec = lazy.spec(next(iter(family.members.values())))
    dims = ", ".join(
        dim.text if dim.role == "keep" else f"{dim.text}:{dim.role}" for dim in family.dims
    )
    return Pattern(family.name, len(family.members), spec.dtype, spec.shape, dims, family.rule.kind)
