"""Re-read an output: check CRCs, find NaN and Inf, recompute sample tiles."""

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from streammap.analysis import scan, statistics
from streammap.analysis.scan import ScannedPiece
from streammap.analysis.statistics import Scratch
from streammap.analysis.survey import SavedRecord
from streammap.common import ranges
from streammap.common.events import Listener, nobody
from streammap.common.ranges import Tile
from streammap.common.torch_threads import torch_threads
from streammap.engine import crc32, schedule
from streammap.engine.evaluate import TileReader
from streammap.engine.memory import Memory
from streammap.engine.options import Engine
from streammap.io.dtypes import DTYPE_BITS, to_torch
from streammap.io.problems import Finding
from streammap.planning import graph
from streammap.planning.graph import LinearForm
from streammap.planning.plan import Plan

_ROUNDING = {"F16": 2e-3, "BF16": 2e-2, "F32": 1e-5, "F64": 1e-12}
"""What matrix products may differ by, relative to the largest number of a tile."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What the bytes of a tensor say."""

    crc: int = 0
    n_nan: int = 0
    n_inf: int = 0

    def with_part(self, other: "Reading") -> "Reading":
        """With another part's."""
        return Reading(self.crc ^ other.crc, self.n_nan + other.n_nan, self.n_inf + other.n_inf)


def read(own: Plan, engine: Engine, listener: Listener = nobody) -> dict[str, Reading]:
    """All tensors of a plan."""
    found = dict.fromkeys(own.targets, Reading())

    def collect(key: str, part: Reading) -> None:
        found[key] = found[key].with_part(part)

    scan.scan(own.targets, engine, _reading, collect, listener=listener)
    return found


def compare_crcs(
    readings: Mapping[str, Reading], record: SavedRecord, own: Plan
) -> Iterator[Finding]:
    """Tensors whose bytes are not those that were written."""
    by_crc: dict[str, list[str]] = {}
    for key, crc in record.crcs.items():
        by_crc.setdefault(crc, []).append(key)
    for key, reading in readings.items():
        expected, actual = record.crcs.get(key), f"{reading.crc:08x}"
        if expected is None or expected == actual:
            continue
        message = f"crc32 {actual}, {expected} was written"
        alike = [
            k for k in by_crc.get(actual, ()) if k in own.targets and own.specs[k] == own.specs[key]
        ]
        if alike:
            message += f": its bytes are those of {alike[0]}"
        file = own.sources[0].file_of[key]
        yield Finding("error", "crc32", message, key, file, actual, expected)


def compare_finite(
    readings: Mapping[str, Reading],
    record: SavedRecord,
    own: Plan,
    expected: Plan | None,
    engine: Engine,
) -> Iterator[Finding]:
    """NaN and Inf: errors if no source has any, else notes."""
    bad = {key: r for key, r in readings.items() if r.n_nan or r.n_inf}
    of_sources = {} if expected is None else _of_sources(expected, bad, engine)
    for key, reading in bad.items():
        file = own.sources[0].file_of[key]
        kept = record.crcs.get(key) == f"{reading.crc:08x}"
        source = of_sources.get(key)
        for name, n in (("NaN", reading.n_nan), ("Inf", reading.n_inf)):
            if not n:
                continue
            message = f"{n} {name}"
            if source is not None:
                # Inf - Inf is NaN, so that a source's Inf explains both.
                excused = source.n_inf + (source.n_nan if name == "NaN" else 0)
                total = source.n_nan if name == "NaN" else source.n_inf
                message += f", its sources have {total}"
                level = excused > 0
                yield Finding("note" if level else "error", "finite", message, key, file, n, total)
            else:
                message += ", as it was written" if kept else ", no source to compare with"
                level = kept or name == "Inf"
                yield Finding("note" if level else "error", "finite", message, key, file, n)


def recompute(
    own: Plan, expected: Plan, engine: Engine, *, n_tiles: int, seed: int
) -> tuple[int, list[Finding]]:
    """Recompute random tiles; gives how many, and those that differ."""
    keys = [
        key
        for key, form in expected.targets.items()
        if form.spec.n_elements and own.specs.get(key) == form.spec
    ]
    if not keys:
        return 0, []
    forms = [expected.targets[key] for key in keys]
    room = scan.fit(forms, engine, n_sides=2)
    mine, theirs = TileReader(room), TileReader(room)
    source = random.Random(seed)
    weights = [form.spec.nbytes for form in forms]
    wrong: list[Finding] = []
    with torch_threads():
        for key in source.choices(keys, weights, k=n_tiles):
            form = expected.targets[key]
            tile = _random_tile(form, room, source)
            n = tile.n_elements * min(8, DTYPE_BITS[form.spec.dtype]) // 8
            start = tile.offset * min(8, DTYPE_BITS[form.spec.dtype]) // 8
            a = mine.read(own.targets[key], tile, start, n)
            b = theirs.read(form, tile, start, n)
            differs = _differ(form, a, b)
            if differs is not None:
                i, x, y = differs
                place = tile.offset + i
                text = f"number {place} is {x}, computed again it is {y}"
                file = own.sources[0].file_of[key]
                wrong.append(Finding("error", "tile", text, key, file, x, y))
    return n_tiles, wrong


def _reading(piece: ScannedPiece, scratch: Scratch) -> Reading:
    bits = max(8, DTYPE_BITS[piece.spec.dtype])
    after = piece.spec.nbytes - piece.start * bits // 8 - len(piece.view)
    crc = crc32.shifted(crc32.crc32(piece.view), after)
    if piece.spec.dtype not in scan.MEASURED:
        return Reading(crc)
    n_nan = n_inf = 0
    numbers = piece.numbers()
    for start in range(0, numbers.numel(), statistics.CHUNK):
        held = scratch.single(0, numbers[start : start + statistics.CHUNK])
        low, high = torch.aminmax(held)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            more_nan, more_inf = statistics.not_finite(held)
            n_nan, n_inf = n_nan + more_nan, n_inf + more_inf
    return Reading(crc, n_nan, n_inf)


def _of_sources(expected: Plan, keys: Mapping[str, object], engine: Engine) -> dict[str, Reading]:
    """For each key, the NaN and Inf of all source tensors that it is made of."""
    loads = {
        key: [
            load
            for load in dict.fromkeys(expected.targets[key].loads())
            if not graph.is_constant(load)
        ]
        for key in keys
        if key in expected.targets
    }
    names = {load: str(i) for i, load in enumerate({x for xs in loads.values() for x in xs})}
    forms = {
        name: LinearForm(load.spec, (graph.Term((None,) * len(load.spec.shape), ((1.0, load),)),))
        for load, name in names.items()
    }
    read_again = dict.fromkeys(forms, Reading())

    def collect(name: str, part: Reading) -> None:
        read_again[name] = read_again[name].with_part(part)

    scan.scan(forms, engine, _reading, collect)
    totals = {}
    for key, many in loads.items():
        total = Reading()
        for load in many:
            total = total.with_part(read_again[names[load]])
        totals[key] = total
    return totals


def _random_tile(form: LinearForm, room: Memory, source: random.Random) -> Tile:
    cut = schedule.cut_of(form, schedule.limits_of(form, room))
    shape = form.spec.shape
    if not shape:
        return ranges.tile_at(shape, (), 0, 1)
    prefix = tuple(source.randrange(n) for n in shape[: cut.dim])
    start = source.randrange(shape[cut.dim]) // cut.rows * cut.rows
    return ranges.tile_at(shape, prefix, start, min(start + cut.rows, shape[cut.dim]))


def _differ(form: LinearForm, a: memoryview, b: memoryview) -> tuple[int, object, object] | None:
    """Index and values of the first difference, if there is one."""
    if a == b:
        return None
    if not form.spec.is_float:
        i = next(i for i in range(len(a)) if a[i] != b[i])
        return i * 8 // max(8, DTYPE_BITS[form.spec.dtype]), a[i], b[i]
    item = DTYPE_BITS[form.spec.dtype] // 8
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[item]
    x, y = (torch.frombuffer(view, dtype=whole) for view in (a, b))
    differs = x != y
    dtype = to_torch(form.spec.dtype)
    p, q = x.view(dtype), y.view(dtype)
    if form.is_dense:
        size = float(q.abs().nan_to_num().max()) * _ROUNDING[form.spec.dtype]
        differs &= ~torch.isclose(p.double(), q.double(), rtol=0.0, atol=size, equal_nan=True)
    if not bool(differs.any()):
        return None
    i = int(differs.nonzero()[0])
    return i, float(p[i]), float(q[i])
