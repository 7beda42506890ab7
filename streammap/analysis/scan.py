"""All bytes of plans, piece by piece, in bounded memory: what verify, diff and health share.

Tiles are read or computed by the loop of a run, and its sink is a function. Two plans go side by
side: one drives, and for each of its tiles the same part of the other is read or computed. A
piece's bytes are valid until the function returns.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar, final

import torch
from torch import Tensor

from streammap.analysis.statistics import CHUNK, Scratch
from streammap.common.events import Finished, Listener, Started, nobody
from streammap.common.losses import Losses
from streammap.common.ranges import Tile
from streammap.common.torch_threads import torch_threads
from streammap.engine import loop, memory
from streammap.engine.evaluate import TileReader
from streammap.engine.loop import Resources
from streammap.engine.memory import Memory
from streammap.engine.options import Engine
from streammap.engine.schedule import Compute, Job
from streammap.errors import OutputError
from streammap.io.dtypes import DTYPE_BITS, FLOATS, TensorSpec, to_torch
from streammap.planning.graph import LinearForm

MEASURED = (*FLOATS, "F8_E5M2", "F8_E4M3")
"""dtypes whose numbers are measured; of others, only bytes are compared."""
_SCRATCH_NBYTES = 4 * CHUNK * (4 + 8)
"""Per thread, including temporary kernel memory."""
_MAX_WORKERS = 8

Measured = TypeVar("Measured")


@dataclass(frozen=True, slots=True)
class ScannedPiece:
    """A contiguous part of a tensor."""

    key: str
    spec: TensorSpec
    start: int
    """Elements before it; of dtypes smaller than a byte, bytes."""
    view: memoryview
    other_spec: TensorSpec
    other: memoryview
    """The same part of the other plan's tensor; empty where there is none."""

    def numbers(self) -> Tensor:
        """The elements, in order."""
        return torch.frombuffer(self.view, dtype=to_torch(self.spec.dtype))

    def other_numbers(self) -> Tensor:
        """Those of the other."""
        return torch.frombuffer(self.other, dtype=to_torch(self.other_spec.dtype))


Measure = Callable[[ScannedPiece, Scratch], Measured]
Collect = Callable[[str, Measured], None]


def scan(
    forms: Mapping[str, LinearForm],
    engine: Engine,
    measure: Measure[Measured],
    collect: Collect[Measured],
    *,
    others: Mapping[str, LinearForm] | None = None,
    listener: Listener = nobody,
) -> None:
    """Measure all pieces of all tensors.

    Args:
        measure: Called by several threads, each with a scratch of its own.
        collect: Called with what `measure` gave, one call at a time.
        others: For each key the form to read beside it, of the same shape. Where one of the two is
            copied and one is computed, it must be this one that is copied.

    Raises:
        CheckpointError: a source can't be read.
        OutputError: the memory is too little.
    """
    scanned = {key: form for key, form in forms.items() if form.spec.n_elements}
    if not scanned:
        return
    others = {key: form for key, form in (others or {}).items() if key in scanned}
    room = fit([*scanned.values(), *others.values()], engine, n_sides=2 if others else 1)
    listener(Started(len(scanned), sum(form.spec.nbytes for form in scanned.values())))
    with torch_threads():  # also where all forms are copied: `measure` calls kernels
        loop.run(
            scanned,
            _Scan(scanned, others, room, measure, collect),
            Resources(room, reader=engine.reader),
            listener=listener,
        )
    listener(Finished())


def fit(forms: Sequence[LinearForm], engine: Engine, *, n_sides: int) -> Memory:
    """The memory of a scan: a thread has a worker for each side.

    Raises:
        OutputError: it is too little.
    """
    wanted = engine.n_threads or min(max(2, memory.n_processors()), _MAX_WORKERS)
    least = wanted if engine.n_threads else 1
    for n in range(wanted, 0, -1):
        try:
            fitted = memory.fit(
                forms,
                budget=engine.memory_nbytes,
                n_workers=n_sides * n,
                sink_nbytes=_SCRATCH_NBYTES // n_sides,
            )
        except OutputError:
            if n <= least:
                raise
            continue
        return replace(fitted, n_workers=n)
    raise AssertionError(wanted)


@final
class _Scan(Generic[Measured]):
    """The sink of a scan."""

    def __init__(
        self,
        forms: Mapping[str, LinearForm],
        others: Mapping[str, LinearForm],
        room: Memory,
        measure: Measure[Measured],
        collect: Collect[Measured],
    ) -> None:
        self.forms, self.others, self.room = forms, others, room
        self.measure, self._collect = measure, collect
        self._lock = threading.Lock()

    def grid(self, key: str) -> None:
        """Whole tiles: the larger a piece, the fewer calls."""

    def lane(self) -> "_Lane[Measured]":
        return _Lane(self)

    def collect(self, key: str, measured: Measured) -> None:
        with self._lock:
            self._collect(key, measured)


@final
class _Lane(Generic[Measured]):
    """Measures one thread's tiles, with a scratch and a reader of the other side of its own."""

    def __init__(self, scan: _Scan[Measured]) -> None:
        self._scan, self._scratch = scan, Scratch()
        pairs = ((scan.forms[key].spec, form.spec) for key, form in scan.others.items())
        widest = max((_ratio(*specs) for specs in pairs), default=0)
        self._beside = TileReader(scan.room, widest=widest) if widest else None

    def write(self, part: Job, offset: int, piece: memoryview) -> None:
        for place in part.places:
            spec = self._scan.forms[place.key].spec
            start = place.offset * 8 // max(8, DTYPE_BITS[spec.dtype])
            scanned = ScannedPiece(place.key, spec, start, piece, spec, _NOTHING)
            form = self._scan.others.get(place.key)
            if form is not None and self._beside is not None:
                tile, n = _tile(part, spec, start), _n(spec, len(piece))
                other = self._beside.read(form, tile, start, n)
                scanned = replace(scanned, other_spec=form.spec, other=other)
            self._scan.collect(place.key, self._scan.measure(scanned, self._scratch))

    def done(self, part: Job, lost: Losses) -> None:
        pass


_NOTHING = memoryview(b"")


def _n(spec: TensorSpec, nbytes: int) -> int:
    """Elements of so many bytes; of dtypes smaller than a byte, bytes."""
    return nbytes * 8 // max(8, DTYPE_BITS[spec.dtype])


def _ratio(spec: TensorSpec, other: TensorSpec) -> int:
    return max(1, DTYPE_BITS[other.dtype] // max(8, DTYPE_BITS[spec.dtype]))


def _tile(job: Job, spec: TensorSpec, start: int) -> Tile | None:
    """The tile of a computed job whose first element is `start`: each of its places has one."""
    if not isinstance(job, Compute):
        return None
    like = job.recipe.tile
    if not spec.shape or like.offset == start:
        return like
    index, rest = [], start
    for n in reversed(spec.shape):
        rest, i = divmod(rest, n)
        index.append(i)
    index.reverse()
    d = len(like.prefix)
    return Tile(tuple(index[:d]), index[d], index[d] + like.end - like.start, start, like.shape)
