"""Health of tensors: NaN, Inf, ranges, dead rows, constants, counted as the bytes stream by.

Rows are those of the last dimension; of kernels (four dimensions and more), all behind the first.
A row is dead where all of it is 0. Means are of finite numbers, in float64.
"""

import math
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from streammap.common import table
from streammap.common import text as wording
from streammap.common.events import Listener, nobody
from streammap.common.table import Column
from streammap.common.units import format_count
from streammap.engine.options import Engine
from streammap.io.dtypes import TensorSpec
from streammap.planning.plan import Plan

if TYPE_CHECKING:
    from streammap.analysis.scan import ScannedPiece
    from streammap.analysis.statistics import Scratch, TensorStats


_COLUMNS = (
    Column("tensor", wraps=True),
    Column("dtype"),
    *(Column(title, align="right") for title in ("min", "max", "mean", "rms")),
    Column("flags", wraps=True),
)


@dataclass(frozen=True, slots=True)
class TensorHealth:
    """Figures of one tensor; None if no value is finite."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    n_elements: int
    n_nan: int
    n_inf: int
    n_zero: int
    n_subnormal: int
    """Subnormal numbers of the tensor's own dtype: too small to keep all digits."""
    n_over_f16: int
    """Finite numbers beyond float16's range."""
    n_rows: int
    """Of matrices; 0 for others."""
    n_dead_rows: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    rms: float | None

    @property
    def is_constant(self) -> bool:
        """Whether all numbers are equal."""
        plain = self.n_elements > 1 and not self.n_nan and not self.n_inf
        return plain and self.minimum is not None and self.minimum == self.maximum

    @property
    def flags(self) -> tuple[str, ...]:
        """What is worth a look, worst first."""
        dead = self.n_rows and f"{self.n_dead_rows} of {self.n_rows} rows dead"
        flags = (
            (self.n_nan, f"{self.n_nan} NaN"),
            (self.n_inf, f"{self.n_inf} Inf"),
            (self.n_over_f16, f"{self.n_over_f16} beyond float16"),
            (self.n_dead_rows and not self.is_constant, str(dead)),
            (self.is_constant, f"all {self.minimum:g}" if self.is_constant else ""),
            # Small weights of float16 have some; where there are many, digits are lost.
            (self.n_subnormal > 0.01 * self.n_elements, f"{self.n_subnormal} subnormal"),
        )
        return tuple(text for count, text in flags if count)

    @property
    def badness(self) -> tuple[float, ...]:
        """The larger, the worse. A vector may be constant: biases and norms are, at first."""
        largest = max(abs(self.minimum or 0.0), abs(self.maximum or 0.0))
        dead = 0 if self.is_constant else self.n_dead_rows
        constant = self.is_constant and self.n_rows > 0
        return self.n_nan, self.n_inf, self.n_over_f16, constant, dead, largest


@dataclass(frozen=True, slots=True)
class Health:
    """All tensors of a checkpoint, worst first."""

    tensors: tuple[TensorHealth, ...]
    n_unlooked: int
    """Tensors of other dtypes, which are not measured."""
    nbytes: int
    seconds: float

    @property
    def totals(self) -> dict[str, int]:
        """Sums over all tensors."""
        names = ("n_elements", "n_nan", "n_inf", "n_over_f16", "n_subnormal", "n_dead_rows")
        totals = {name: sum(getattr(t, name) for t in self.tensors) for name in names}
        return totals | {"n_constant": sum(t.is_constant for t in self.tensors)}

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return {
            "tensors": [{**asdict(tensor), "flags": list(tensor.flags)} for tensor in self.tensors],
            "totals": self.totals,
            "n_unlooked": self.n_unlooked,
            "nbytes": self.nbytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        return self.text(limit=None)

    def text(self, *, limit: int | None) -> str:
        """A table of the first `limit` tensors, and totals."""
        shown = self.tensors[:limit]
        lines = table.table(_COLUMNS, [_cells(tensor) for tensor in shown])
        lines += wording.more(len(shown), len(self.tensors))
        return "\n".join([*lines, "", *table.fields(self._totals())])

    def _totals(self) -> list[tuple[str, str]]:
        total = self.totals
        pairs = [
            ("tensors", f"{len(self.tensors)}, {format_count(total['n_elements'])} numbers"),
            ("flags", f"in {sum(bool(t.flags) for t in self.tensors)} tensors"),
            ("finite", f"{total['n_nan']} NaN, {total['n_inf']} Inf"),
            ("range", f"{total['n_over_f16']} beyond float16, {total['n_subnormal']} subnormal"),
            ("zeros", f"{total['n_dead_rows']} dead rows, {total['n_constant']} constant tensors"),
            ("read", wording.moved(self.nbytes, self.seconds)),
        ]
        if self.n_unlooked:
            pairs.append(("note", f"{self.n_unlooked} tensors of other dtypes were not measured"))
        return pairs


def _cells(tensor: TensorHealth) -> tuple[str, ...]:
    values = (tensor.minimum, tensor.maximum, tensor.mean, tensor.rms)
    numbers = ("-" if value is None else f"{value:.3g}" for value in values)
    return tensor.key, tensor.dtype, *numbers, ", ".join(tensor.flags)


def measure(plan: Plan, engine: Engine, *, listener: Listener = nobody) -> Health:
    """Measure all tensors of a plan, computed as they would be written.

    Raises:
        CheckpointError: a source can't be read.
        OutputError: the memory is too little.
    """
    from streammap.analysis import scan
    from streammap.analysis.statistics import TensorStats, counted

    begun = perf_counter()
    forms = {key: f for key, f in plan.targets.items() if f.spec.dtype in scan.MEASURED}
    tallies = {key: TensorStats() for key in forms}

    def look(piece: "ScannedPiece", scratch: "Scratch") -> TensorStats:
        return counted(piece.numbers(), piece.start, row_length(piece.spec), scratch)

    scan.scan(forms, engine, look, lambda key, part: tallies[key].add(part), listener=listener)
    tensors = [_health(key, forms[key].spec, tallies[key]) for key in forms]
    tensors.sort(key=lambda tensor: tensor.badness, reverse=True)
    nbytes = sum(form.spec.nbytes for form in forms.values())
    return Health(tuple(tensors), len(plan.targets) - len(forms), nbytes, perf_counter() - begun)


def row_length(spec: TensorSpec) -> int:
    """Numbers of a row; 0 where there are no rows."""
    if len(spec.shape) < 2 or not spec.n_elements:
        return 0
    return spec.shape[-1] if len(spec.shape) < 4 else math.prod(spec.shape[1:])


def _health(key: str, spec: TensorSpec, tally: "TensorStats") -> TensorHealth:
    n_finite = spec.n_elements - tally.n_nan - tally.n_inf
    length = row_length(spec)
    return TensorHealth(
        key=key,
        dtype=spec.dtype,
        shape=spec.shape,
        n_elements=spec.n_elements,
        n_nan=tally.n_nan,
        n_inf=tally.n_inf,
        n_zero=tally.n_zero,
        n_subnormal=tally.n_subnormal,
        n_over_f16=tally.n_over_f16,
        n_rows=spec.n_elements // length if length else 0,
        n_dead_rows=tally.dead_rows(length),
        minimum=tally.minimum if n_finite else None,
        maximum=tally.maximum if n_finite else None,
        mean=tally.total.value / n_finite if n_finite else None,
        rms=math.sqrt(tally.squares.value / n_finite) if n_finite else None,
    )
