"""Compare two checkpoints (or plans) tensor by tensor, side by side in bounded memory.

    max        largest |a - b|
    mean       mean of |a - b|
    relative   ||a - b|| / ||a||, Euclidean norms, summed in float64; infinite where a is all 0

Tensors are paired as blends pair them: by what the spec says they are, where keys differ.
Equal bits are equal, NaN too. Pairs with a NaN or Inf are in none of the figures; they are counted
(n_odd) unless both are NaN, or the same Inf.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING

from streammap.common import garbage, table
from streammap.common import text as wording
from streammap.common.events import Listener, nobody
from streammap.common.table import Column
from streammap.engine.options import Engine
from streammap.errors import printable, redacted
from streammap.io.dtypes import TensorSpec
from streammap.io.storage.resolve import PathLike
from streammap.operators import calls
from streammap.planning.graph import LinearForm
from streammap.planning.matching import pairing
from streammap.planning.plan import Plan

if TYPE_CHECKING:
    from streammap.analysis.pair_statistics import PairStats
    from streammap.analysis.scan import ScannedPiece
    from streammap.analysis.statistics import Scratch

_COLUMNS = (
    Column("tensor", wraps=True),
    *(Column(title, align="right") for title in ("relative", "max", "mean")),
    Column("differ", wraps=True),
)
_LAYER_COLUMNS = (
    Column("layer", align="right"),
    Column("differ"),
    *(Column(title, align="right") for title in ("mean relative", "largest")),
    Column("of tensor", wraps=True),
)
LAYER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")
"""The first number of a key: which layer it is in."""
Source = Plan | PathLike


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor that both have, in one shape."""

    key: str
    shape: tuple[int, ...]
    dtype: str
    other_dtype: str
    """The same, or another: numbers are compared then."""
    is_equal: bool
    """Bit by bit, dtypes too."""
    n_different: int
    """Numbers that differ; bytes, of dtypes that have no arithmetic here."""
    n_odd: int
    """Pairs of which one is NaN or Inf, and the other something else."""
    max: float | None
    mean: float | None
    relative: float | None
    """None if there are no numbers to compare."""

    @property
    def badness(self) -> tuple[float, ...]:
        """The larger, the worse."""
        unlike = self.dtype != self.other_dtype
        return self.n_odd > 0, self.relative or 0.0, self.max or 0.0, self.n_different, unlike


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """The tensors of one layer that both have, in one shape."""

    layer: int | None
    """None for those in no layer."""
    n_tensors: int
    n_different: int
    relative: float
    """Mean of their relative differences."""
    worst: TensorDifference

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return {
            "layer": self.layer,
            "n_tensors": self.n_tensors,
            "n_different": self.n_different,
            "relative": "inf" if self.relative == math.inf else self.relative,
            "worst": self.worst.key,
        }


@dataclass(frozen=True, slots=True)
class Difference:
    """All that differs."""

    names: tuple[str, str]
    tensors: tuple[TensorDifference, ...]
    """Those that both have in one shape, worst first."""
    only: tuple[tuple[str, ...], tuple[str, ...]]
    """Keys that only the first has, and only the second."""
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    """Key -> both shapes, where they differ."""
    nbytes: int
    """Read of both."""
    seconds: float
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Key of the first -> key of the same tensor in the second, where that is another key.

    A copy of a tied tensor that only the second has is compared under its own key.
    """

    @property
    def is_equal(self) -> bool:
        """Whether all tensors are there in both, bit by bit the same."""
        return not (self.shapes or any(self.only)) and self.n_equal == len(self.tensors)

    @property
    def n_equal(self) -> int:
        """Tensors that are equal bit by bit."""
        return sum(tensor.is_equal for tensor in self.tensors)

    @property
    def layers(self) -> tuple[LayerDifference, ...]:
        """Layer by layer, in order; those in no layer last."""
        by_layer: dict[int | None, list[TensorDifference]] = {}
        for tensor in self.tensors:
            found = LAYER.search(tensor.key)
            by_layer.setdefault(None if found is None else int(found[0]), []).append(tensor)
        return tuple(
            LayerDifference(
                layer,
                len(held),
                sum(not tensor.is_equal for tensor in held),
                sum(tensor.relative or 0.0 for tensor in held) / len(held),
                held[0],
            )
            for layer, held in sorted(
                by_layer.items(), key=lambda one: math.inf if one[0] is None else one[0]
            )
        )

    def as_json(self) -> dict[str, object]:
        """All fields by name; an infinite relative difference is the text "inf"."""
        found = [asdict(tensor) for tensor in self.tensors]
        for tensor in found:
            if tensor["relative"] == math.inf:
                tensor["relative"] = "inf"
        return {
            "a": self.names[0],
            "b": self.names[1],
            "equal": self.is_equal,
            "n_equal": self.n_equal,
            "tensors": found,
            "layers": [layer.as_json() for layer in self.layers],
            "only_a": list(self.only[0]),
            "only_b": list(self.only[1]),
            "shapes": {key: [list(a), list(b)] for key, (a, b) in self.shapes.items()},
            "nbytes": self.nbytes,
            "seconds": self.seconds,
            "renamed": dict(self.renamed),
        }

    def __str__(self) -> str:
        return self.text(limit=None)

    def text(self, *, limit: int | None, by_layer: bool = False) -> str:
        """A table of the `limit` worst tensors, what only one has, and totals.

        Args:
            by_layer: A table of all layers instead.
        """
        apart = [f"only in {self.names[0]}: {key}" for key in self.only[0][:limit]]
        apart += [f"only in {self.names[1]}: {key}" for key in self.only[1][:limit]]
        for key, (a, b) in list(self.shapes.items())[:limit]:
            apart.append(f"{key}: shape {list(a)} and {list(b)}")
        lines = [printable(line) for line in apart]
        unequal = [tensor for tensor in self.tensors if not tensor.is_equal]
        shown = unequal[:limit]
        if by_layer:
            lines += table.table(_LAYER_COLUMNS, [_layer_cells(layer) for layer in self.layers])
        elif shown:
            lines += table.table(_COLUMNS, [_cells(tensor) for tensor in shown])
        if not by_layer:
            lines += wording.more(len(shown), len(unequal))
        n_only = len(self.only[0]) + len(self.only[1])
        counts = (
            f"{self.n_equal} equal, {len(unequal)} differ, {len(self.shapes)} of other shapes, "
            f"{n_only} in one only"
        )
        totals = [("tensors", counts)]
        if self.renamed:
            key, other = next(iter(self.renamed.items()))
            totals.append(("names", f"{len(self.renamed)} differ: {key} is {other} there"))
        totals.append(("read", wording.moved(self.nbytes, self.seconds)))
        return "\n".join([*lines, *table.fields(totals)])


def _layer_cells(layer: LayerDifference) -> tuple[str, ...]:
    worst = layer.worst
    differ = f"{layer.n_different} of {layer.n_tensors}"
    if worst.is_equal:
        return ("-" if layer.layer is None else str(layer.layer), differ, "0", "0", "")
    largest = "-" if worst.relative is None else f"{worst.relative:.2e}"
    name = "-" if layer.layer is None else str(layer.layer)
    return name, differ, f"{layer.relative:.2e}", largest, printable(worst.key)


def _cells(tensor: TensorDifference) -> tuple[str, ...]:
    values = (tensor.relative, tensor.max, tensor.mean)
    numbers = ("-" if value is None else f"{value:.2e}" for value in values)
    n = math.prod(tensor.shape)
    unit = "" if tensor.max is not None else " bytes"
    notes = [f"{tensor.n_different} of {n}{unit}" if not unit else f"{tensor.n_different}{unit}"]
    if tensor.n_odd:
        notes.append(f"{tensor.n_odd} NaN or Inf in one only")
    if tensor.dtype != tensor.other_dtype:
        notes.append(f"{tensor.dtype} and {tensor.other_dtype}")
    return tensor.key, *numbers, ", ".join(notes)


def compare(a: Source, b: Source, engine: Engine, *, listener: Listener = nobody) -> Difference:
    """Compare two checkpoints: paths, or plans.

    Args:
        a: What `relative` is relative to.
        b: The other.
        engine: What the pass may use.
        listener: Called with each event.

    Raises:
        CheckpointError: one is not there, or can't be read.
        OutputError: the memory is too little.
    """
    from streammap.analysis import pair_statistics, scan
    from streammap.analysis.pair_statistics import PairStats

    begun = perf_counter()
    with garbage.paused():
        first, second = map(calls.plan_of, (a, b))
        matched = pairing.pair(first, second)
    ours, theirs = first.targets, second.targets
    both = {
        key: (form, other)
        for key, form in ours.items()
        if (other := theirs.get(matched.other(key))) is not None
    }
    both |= {key: (ours[own], theirs[key]) for key, own in matched.copies.items()}
    shapes = {
        key: (x.spec.shape, y.spec.shape)
        for key, (x, y) in both.items()
        if x.spec.shape != y.spec.shape
    }
    pairs = {key: pair for key, pair in both.items() if key not in shapes}
    stats = {key: PairStats() for key in pairs}
    drivers: dict[str, LinearForm] = {}
    others: dict[str, LinearForm] = {}
    swapped: set[str] = set()
    for key, (x, y) in pairs.items():
        alike = x.spec.dtype == y.spec.dtype
        measured = x.spec.dtype in scan.MEASURED and y.spec.dtype in scan.MEASURED
        if not alike and not measured:
            stats[key] = PairStats(is_equal=False, n_different=max(x.spec.nbytes, y.spec.nbytes))
            continue
        if x.copied is not None and y.copied is None:  # the one that is copied can be read anywhere
            x, y = y, x
            swapped.add(key)
        drivers[key], others[key] = x, y

    def measure(piece: "ScannedPiece", scratch: "Scratch") -> PairStats:
        return pair_statistics.compared(piece, scratch, swapped=piece.key in swapped)

    scan.scan(
        drivers,
        engine,
        measure,
        lambda key, part: stats[key].add(part),
        others=others,
        listener=listener,
    )
    for key, (x, y) in pairs.items():
        if not x.spec.n_elements and x.spec.dtype != y.spec.dtype:
            stats[key].is_equal = False
    tensors = [_difference(key, x.spec, y.spec, stats[key]) for key, (x, y) in pairs.items()]
    tensors.sort(key=lambda tensor: tensor.badness, reverse=True)
    return Difference(
        names=(_name(a), _name(b)),
        tensors=tuple(tensors),
        only=matched.only,
        shapes=shapes,
        nbytes=sum(form.spec.nbytes for form in (*drivers.values(), *others.values())),
        seconds=perf_counter() - begun,
        renamed=matched.renamed,
    )


def _difference(key: str, a: TensorSpec, b: TensorSpec, sums: "PairStats") -> TensorDifference:
    n = sums.n_compared
    return TensorDifference(
        key=key,
        shape=a.shape,
        dtype=a.dtype,
        other_dtype=b.dtype,
        is_equal=sums.is_equal,
        n_different=sums.n_different,
        n_odd=sums.n_odd,
        max=sums.max if n else None,
        mean=sums.total.value / n if n else None,
        relative=sums.relative if n else None,
    )


def _name(source: Source) -> str:
    if not isinstance(source, Plan):
        return redacted(str(source))
    path = str(source.sources[0].path)
    return f"plan from {path}" if source.steps else path
