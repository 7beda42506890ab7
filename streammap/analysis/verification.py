"""Verify an output against its record, its plan and its sources; report all that is wrong.

    record    streammap.json: files, sizes, CRC-32 of each file and each tensor as it was written
    plan      rebuilt from the record's request: keys, dtypes, shapes, offsets, config.json
    sources   NaN and Inf that they do not have; random tiles recomputed
    class     keys and shapes of the class that config.json names, where its library is installed

Without a record, only the structure is checked, and that all numbers are finite.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import final

from streammap.analysis import result_files, survey
from streammap.analysis.survey import SavedRecord, Survey
from streammap.architectures import quantization
from streammap.common.declare import declared, option, takes
from streammap.common.events import Listener
from streammap.common.kinds import Anything, Names
from streammap.common.units import format_nbytes
from streammap.engine.options import Engine, RunOptions
from streammap.errors import ArchitectureError, CheckpointError, StreammapError, redacted
from streammap.io.problems import Finding
from streammap.io.storage import resolve
from streammap.io.storage.local import LocalStorage
from streammap.io.storage.resolve import PathLike
from streammap.operators import calls, request_json
from streammap.output import layout
from streammap.output import record as records
from streammap.output.loading import class_check
from streammap.planning import map_file, plan, request
from streammap.planning.optimizer.state import OptimizerState
from streammap.planning.plan import Plan
from streammap.planning.request import Moved

_CHECKS = ("structure", "record", "plan", "class", "crc32", "finite", "tiles")
"""In the order in which they are told."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was checked, and all findings."""

    path: str
    checks: tuple[str, ...]
    """What was checked: structure, record, plan, class, crc32, finite, tiles."""
    skipped: tuple[str, ...]
    """What could not be checked, and why."""
    findings: tuple[Finding, ...]
    n_tensors: int
    n_tiles: int
    """Tiles that were recomputed."""
    nbytes: int
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.n_errors

    @property
    def n_errors(self) -> int:
        """Findings that are errors."""
        return sum(found.level == "error" for found in self.findings)

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return {
            "path": self.path,
            "ok": self.ok,
            "checks": list(self.checks),
            "skipped": list(self.skipped),
            "findings": [found.as_json() for found in self.findings],
            "n_tensors": self.n_tensors,
            "n_tiles": self.n_tiles,
            "nbytes": self.nbytes,
            "seconds": self.seconds,
        }

    def __str__(self) -> str:
        lines = [str(found) for found in sorted(self.findings, key=lambda f: f.level)]
        lines += [f"skipped  {reason}" for reason in self.skipped]
        checks = ", ".join(self.checks)
        tiles = f", {self.n_tiles} tiles recomputed" if self.n_tiles else ""
        verdict = "ok" if self.ok else f"{self.n_errors} errors"
        total = f"{self.n_tensors} tensors, {format_nbytes(self.nbytes)} in {self.seconds:.1f} s"
        lines += [f"checked  {checks}{tiles}", f"verdict  {verdict}: {total}"]
        return "\n".join(lines)


@final
@declared
class VerifyOptions(RunOptions):
    """What to check, and what the pass may use."""

    sources: Moved = option(
        default=None,
        help="Where its sources are now: a path if there is one source, else {old: new}.",
        kind=Anything(),
    )
    recompute: int = option(
        default=0, help="Random tiles to compute again from the sources, and compare."
    )
    seed: int = option(default=0, help="Which tiles these are.")
    class_check: bool = option(
        default=True,
        help="Whether the class in transformers or timm is asked if it would load the result.",
        off="Do not ask the class in transformers or timm if it would load the result.",
    )
    edited: Sequence[str] = option(
        default=(),
        help="A file that was changed on purpose, such as README.md: no error.",
        kind=Names(),
        metavar="NAME",
    )


@takes(VerifyOptions, n_first=1)
def verify(path: PathLike, options: VerifyOptions) -> Verification:
    """Check a result, a folder or a file. Whatever is wrong is a finding, not an error.

    Raises:
        CheckpointError: nothing is there, or its record is not valid.
        PlanError: `sources` that the record does not have.
    """
    begun = perf_counter()
    place = resolve.here(path)
    record = survey.read_record(records.path_of(place))
    seen = survey.survey(place, record)
    expected, why = _expected(place, record, options.sources)
    work = _Work(record, seen, expected, options)
    folder = place if place.is_dir() else place.parent
    work.findings += result_files.check(folder, seen, record, options.edited)
    if record.is_there:
        work.checks.append("record")
        work.findings += _own(record, records.path_of(place))
    else:
        work.skipped.append("record, plan: there is no record of how it was made")
    if expected is not None:
        work.checks.append("plan")
        work.findings += _planned(seen, expected, record)
    elif record.is_there:
        work.skipped.append(f"plan: {why}")
    if not any(found.check in ("key", "file", "shape", "dtype") for found in work.findings):
        work.findings += _config(work.own, record, expected)
    work.read(options.progress)
    n_tiles = work.recompute(options.recompute, options.seed)
    if options.class_check and not any(found.level == "error" for found in work.findings):
        work.ask_class()  # the last: it takes seconds, and says nothing of what is damaged
    return Verification(
        path=redacted(str(path)),
        checks=tuple(check for check in _CHECKS if check in work.checks),
        skipped=tuple(work.skipped),
        findings=tuple(work.findings),
        n_tensors=len(work.own.targets),
        n_tiles=n_tiles,
        nbytes=work.own.nbytes,
        seconds=perf_counter() - begun,
    )


@final
class _Work:
    """What is known, and the findings so far."""

    def __init__(
        self, record: SavedRecord, seen: Survey, expected: Plan | None, engine: Engine
    ) -> None:
        self.record, self.expected, self.engine = record, expected, engine
        self.findings = list(seen.findings)
        self.checks = ["structure"]
        self.skipped: list[str] = []
        arch = None if expected is None else expected.architecture
        own = plan.from_checkpoint(seen.checkpoint, (), architecture=arch, as_stored=True)
        state = None if seen.optimizer is None else OptimizerState.of_file(seen.optimizer)
        self.own = replace(own, optimizer=state)

    def ask_class(self) -> None:
        """Whether the class of config.json would load the tensors."""
        if self.own.config is None or quantization.is_quantized(self.own.specs, self.own.config):
            return
        found = class_check.findings(self.own, self.own.config, self.expected)
        if found is None:
            self.skipped.append(f"class: {class_check.why_not(self.own.config)}")
        else:
            self.checks.append("class")
            self.findings += found

    def read(self, progress: Listener) -> None:
        """All bytes: CRCs, NaN and Inf."""
        from streammap.analysis import reread

        readings = reread.read(self.own, self.engine, progress)
        if self.record.crcs and all(f.crc is None for f in self.record.files.values()):
            self.skipped.append("crc32 of files: the record has none of files, only of tensors")
        if self.record.crcs:
            self.checks.append("crc32")
            self.findings += reread.compare_crcs(readings, self.record, self.own)
        elif self.record.is_there:
            self.skipped.append("crc32: the record has none")
        self.checks.append("finite")
        self.findings += reread.compare_finite(
            readings, self.record, self.own, self.expected, self.engine
        )

    def recompute(self, n_tiles: int, seed: int) -> int:
        """Random tiles; gives how many."""
        from streammap.analysis import reread

        if n_tiles and self.expected is None:
            self.skipped.append("tiles: no plan to compute them from")
        if not n_tiles or self.expected is None:
            return 0
        self.checks.append("tiles")
        done, wrong = reread.recompute(
            self.own, self.expected, self.engine, n_tiles=n_tiles, seed=seed
        )
        self.findings += wrong
        return done


def _own(record: SavedRecord, path: Path) -> Iterator[Finding]:
    if record.is_changed:
        message = "changed since it was written: its own checksum is another"
        yield Finding("error", "record", message, file=path.name)


def _expected(path: Path, record: SavedRecord, sources: Moved) -> tuple[Plan | None, str]:
    """The plan rebuilt, or why it can't be."""
    if record.content.get("request") is None:
        return None, "the record does not say how it was made"
    try:
        call = request_json.parse(record.content["request"], recorded=True)
    except StreammapError as error:
        if not record.is_changed:
            raise
        return None, error.message
    moved = request.moved(call, sources)  # a wrong --source is the user's error, no finding
    far = [one for one in request.paths_of(call) if one not in moved and resolve.is_elsewhere(one)]
    if far:
        return None, (
            f"its source {far[0]} is on another machine, which a record alone does not make us "
            "ask; --source names it again to read it"
        )
    try:
        near = map_file.find(LocalStorage(path)) if path.exists() else ()
        made = calls.build(call, moved=moved, known=near)
    except StreammapError as error:
        return None, error.message
    changed = _changed(made, record)
    return (made, "") if changed is None else (None, changed)


def _changed(made: Plan, record: SavedRecord) -> str | None:
    """The source that is not what it was, if there is one."""
    sources = record.content.get("sources")
    recorded = sources if isinstance(sources, list) else []
    for source, before in zip(made.sources, recorded, strict=False):
        files = before.get("files") if isinstance(before, dict) else None
        now = [file.as_json() for file in source.files]
        if isinstance(files, list) and files != now:
            old = {f["name"]: f for f in files if isinstance(f, dict) and "name" in f}
            wrong = next((f for f in now if old.get(f["name"]) != f), now[0])
            return f"{source.label}: {wrong['name']} has changed since"
    return None


def _planned(seen: Survey, expected: Plan, record: SavedRecord) -> Iterator[Finding]:
    """Keys, dtypes, shapes and offsets."""
    there = seen.checkpoint
    for key, spec in expected.specs.items():
        slot = there.slots.get(key)
        if slot is None:
            if key not in record.places and not seen.n_unread:
                yield Finding("error", "key", "missing, it is in the plan", key)
            continue
        file = there.file_of[key]
        for name, found, planned in (
            ("dtype", slot.spec.dtype, spec.dtype),
            ("shape", list(slot.spec.shape), list(spec.shape)),
        ):
            if found != planned:
                message = f"{name} {found}, planned {planned}"
                yield Finding("error", name, message, key, file, found, planned)
    for key in there.slots:
        if key not in expected.specs and (not record.places or key in record.places):
            message = "there, it is not in the plan"
            yield Finding("error", "key", message, key, there.file_of[key])
    yield from _offsets(seen, expected)


def _offsets(seen: Survey, expected: Plan) -> Iterator[Finding]:
    """In a file, tensors stand in the order of the plan, the widest dtype first."""
    surplus = {file for key, file in seen.checkpoint.file_of.items() if key not in expected.specs}
    by_file: dict[str, list[str]] = {}
    for key in expected.specs:
        if key in seen.checkpoint.slots:
            by_file.setdefault(seen.checkpoint.file_of[key], []).append(key)
    for file, keys in by_file.items():
        if not file.endswith(".safetensors") or file in surplus:
            continue
        specs = {key: seen.checkpoint.slots[key].spec for key in keys}
        (shard,) = layout.arrange(specs, max_shard_nbytes=2**62, single=file)
        planned = {slot.key: slot.start for slot in shard.slots}
        first = min(planned.values(), default=0)
        least = min((seen.checkpoint.slots[key].start for key in keys), default=0)
        for key in keys:
            found = seen.checkpoint.slots[key].start - least
            if found != planned[key] - first:
                message = f"its bytes begin at {found}, planned {planned[key] - first}"
                yield Finding("error", "offset", message, key, file, found, planned[key] - first)


def _config(own: Plan, record: SavedRecord, expected: Plan | None) -> Iterator[Finding]:
    """config.json: whether the tensors fit it, and its sizes are those that were written."""
    if own.config is None:
        if expected is not None and expected.config is not None and own.sources[0].path.is_dir():
            yield Finding("error", "config", "missing", file="config.json")
        return
    if expected is not None and expected.config is not None:
        yield from _fields(own.config, expected.config)
    if quantization.is_quantized(own.specs, own.config):
        yield Finding("note", "config", "quantised: no spec reads it", file="config.json")
        return
    try:
        sizes = own.model.sizes
    except ArchitectureError as error:
        # It had sizes when it was written, so its config.json told its architecture then.
        was_known = isinstance(record.content.get("sizes"), dict)
        yield Finding("error" if was_known else "note", "config", error.message, file="config.json")
        return
    except CheckpointError as error:
        yield Finding("error", "config", error.message, file="config.json")
        return
    written = record.content.get("sizes")
    for axis, size in written.items() if isinstance(written, dict) else ():
        if sizes.get(axis) != size:
            message = f"{axis} is {sizes.get(axis)}, {size} was written"
            yield Finding("error", "config", message, None, "config.json", sizes.get(axis), size)


def _fields(found: object, planned: object, name: str = "") -> Iterator[Finding]:
    """Numbers that differ are errors: they are sizes. Other fields may be edited."""
    if isinstance(found, dict) and isinstance(planned, dict):
        for field in dict.fromkeys((*planned, *found)):
            inner = f"{name}.{field}" if name else str(field)
            yield from _fields(found.get(field), planned.get(field), inner)
    elif found != planned:
        is_size = type(planned) is int or type(found) is int
        message = f"{name} is {found!r}, planned {planned!r}"
        yield Finding(
            "error" if is_size else "note", "config", message, None, "config.json", found, planned
        )
