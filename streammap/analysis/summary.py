"""What a plan would do, as text and as JSON: shapes, formulas in words, bytes, memory."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePath

from streammap.architectures import axis_facts
from streammap.architectures import key_pattern as pattern
from streammap.common import table
from streammap.common.table import Column
from streammap.common.units import format_count, format_nbytes
from streammap.engine.options import Engine
from streammap.engine.searching import settle
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TORCH_NAMES
from streammap.io.optimizer.state import PREFIX
from streammap.output import run, side_files
from streammap.planning import exactness, graph
from streammap.planning.graph import Derived, LinearForm, Term
from streammap.planning.plan import Plan

_COLUMNS = (
    Column("tensors", wraps=True),
    Column("number"),
    Column("shape", wraps=True),
    Column("guarantee", wraps=True, colours={"approximate": "yellow"}),
    Column("formula", wraps=True, colours={"copied": "faint"}),
)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """The tensors of one key pattern."""

    pattern: str
    """The key with its indices as *."""
    n_before: int
    n_after: int
    dtype: str
    before: tuple[int, ...]
    """Shape in the source."""
    after: tuple[int, ...]
    formula: str
    """What happens, in words."""
    promise: str
    """What these tensors keep of the function."""


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in figures."""

    rows: tuple[PlanRow, ...]
    sizes: Mapping[str, tuple[int, int]]
    """Axis -> size before and after, for each that changes."""
    n_tensors: int
    n_parameters: int
    nbytes_read: int
    nbytes_written: int
    peak_nbytes: int
    """Memory that the run adds to the process, at most."""
    n_threads: int
    device: str
    """Where the run would compute."""
    device_reason: str
    reader: str
    """How the sources' files are read: mapped, with pread, or over a network."""
    reader_reason: str
    """What the files lie on."""
    promise: str
    reason: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        read, written = format_nbytes(self.nbytes_read), format_nbytes(self.nbytes_written)
        sizes = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in self.sizes.items())
        totals = [
            ("sizes", sizes or "as they were"),
            ("result", f"{self.n_tensors} tensors, {format_count(self.n_parameters)} parameters"),
            ("reads", f"{read}, writes {written}"),
            ("memory", f"at most {self.peak_nbytes / 2**20:.0f} MiB on top of torch's own"),
            ("device", f"{self.device}, {self.n_threads} threads: {self.device_reason}"),
            ("reader", f"{self.reader} ({self.reader_reason})"),
            ("guarantee", f"{self.promise}: {self.reason}"),
            *(("note", note) for note in self.notes),
        ]
        rows = table.table(_COLUMNS, [_cells(row) for row in self.rows])
        return "\n".join([*rows, "", *table.fields(totals)])


def summarize(plan: Plan, engine: Engine) -> Summary:
    """The figures of a plan, run by `engine`."""
    before: dict[str, set[str]] = {}
    after: dict[str, list[LinearForm]] = {}
    states = [s for s in plan.sources if any(key.startswith(PREFIX) for key in s.slots)]
    for source in (*plan.sources[:1], *states):
        for key in source.slots:
            before.setdefault(pattern.INDEX.sub("*", key), set()).add(key)
    for key, form in plan.targets.items():
        after.setdefault(pattern.INDEX.sub("*", key), []).append(form)
    rows = []
    axes, names = _axes_by_key(plan), _names(plan.sources)
    first = {pattern.INDEX.sub("*", key): key for key in reversed(tuple(plan.targets))}
    for name, forms in after.items():
        form = forms[0]
        source_spec = form.terms[0].blend[0][1].spec
        rows.append(
            PlanRow(
                name,
                len(before.get(name, ())),
                len(forms),
                form.spec.dtype,
                source_spec.shape,
                form.spec.shape,
                _formulas(forms, names),
                exactness.of_family(plan, axes.get(first[name], frozenset()), form),
            )
        )
    promise, reason = plan.promise
    fitted, choice = run.fit(plan, engine), run.device(plan, engine)
    readings = run.readings(plan, engine)
    searches = () if plan.pending is None else plan.pending.searches
    for search in searches:
        settle.check(search, engine)
    return Summary(
        rows=tuple(rows),
        sizes={name: pair for name, pair in plan.sized.items() if pair[0] != pair[1]},
        n_tensors=len(plan.targets),
        n_parameters=sum(form.spec.n_elements for form in plan.weights.values()),
        nbytes_read=run.read_nbytes(plan) + sum(search.pass_nbytes for search in searches),
        nbytes_written=plan.nbytes,
        peak_nbytes=max([fitted.peak_nbytes, *map(settle.peak_nbytes, searches)]),
        n_threads=fitted.n_workers,
        device=choice.device,
        device_reason=choice.reason,
        reader=" and ".join(dict.fromkeys(reading.how for reading in readings)),
        reader_reason=", ".join(dict.fromkeys(reading.where for reading in readings)),
        promise=promise,
        reason=reason,
        notes=side_files.notes(plan),
    )


def _axes_by_key(plan: Plan) -> dict[str, frozenset[str]]:
    """Key -> the axes that its tensor is made of; empty if no spec is known."""
    if not any(step.axes for step in plan.steps):
        return {}
    return {
        key: axes
        for family in plan.model.families
        for axes in (axis_facts.axes_of(plan.model, family),)
        for key in family.members.values()
    }


def _formulas(forms: Sequence[LinearForm], names: Mapping[int, str]) -> str:
    """What alike tensors compute; where layers differ in it, the first and the last.

    Those of zero-initialised layers are counted.
    """
    others = [form for form in forms if not graph.is_zero(form)]
    n_zero = len(forms) - len(others)
    if not others:
        return formula(forms[0], names)
    first, last = formula(others[0], names), formula(others[-1], names)
    words = first if first == last else f"{first} ... {last}"
    return f"{words}; {n_zero} of {len(forms)} zero-initialised" if n_zero else words


def formula(form: LinearForm, names: Mapping[int, str]) -> str:
    """What a form computes, in words; `names` are its sources' by their identity."""
    if form.copied is not None:
        return "copied"
    blends = [[(c, f) for c, f in term.blend if not graph.is_constant(f)] for term in form.terms]
    terms = [Term(t.maps, tuple(b)) for t, b in zip(form.terms, blends, strict=True) if b]
    if not terms:
        return "constant"
    several = len({id(ref.source) for term in terms for _, ref in term.blend}) > 1
    words = " + ".join(_term_words(term, names if several else {}) for term in terms)
    if any(map(graph.is_constant, form.loads())):
        words += ", of gains that count from 1"
    return f"{words}, as {TORCH_NAMES[form.spec.dtype]}" if _is_cast(form) else words


def _is_cast(form: LinearForm) -> bool:
    """Whether no stored tensor that it is made of has its dtype."""
    stored = {ref.spec.dtype for ref in form.loads() if not graph.is_constant(ref)}
    return bool(stored) and form.spec.dtype not in stored


def _names(sources: Sequence[Checkpoint]) -> Mapping[int, str]:
    """Names that tell sources apart, with as much of their paths as that takes."""
    paths = {id(source): PurePath(source.address).parts for source in sources}
    for n in range(1, max(map(len, paths.values()), default=0) + 1):
        names = {key: "/".join(parts[-n:]) for key, parts in paths.items()}
        if len(set(names.values())) == len(names):
            return names
    return {id(source): f"{source.name} ({i})" for i, source in enumerate(sources, 1)}


def _term_words(term: Term, names: Mapping[int, str]) -> str:
    """One term: "rows: mean of 2, columns: sum of 2, layers: mean of 2".

    Args:
        names: Identity of a source -> its name; empty where there is one only.
    """
    words = [
        f"{_dim_name(d, len(term.maps))}: {m.describe()}"
        for d, m in enumerate(term.maps)
        if m is not None
    ]
    by_source: dict[int, list[float]] = {}
    for coefficient, ref in term.blend:
        if isinstance(ref.source, Derived):
            names = {**names, id(ref.source): ref.source.name}
        by_source.setdefault(id(ref.source), []).append(coefficient)
    parts = []
    for source, coefficients in by_source.items():
        total, n = sum(coefficients), len(coefficients)
        if n > 1:
            equal = all(abs(c * n - total) < 1e-9 for c in coefficients)
            words.append(f"layers: {'mean' if equal else 'weighted mean'} of {n}")
        factor = "" if abs(total - 1) < 1e-9 else f"{total:g} * "
        parts.append(f"{factor}{names[source]}" if names else factor.removesuffix(" * "))
    head = " + ".join(part for part in parts if part)
    detail = ", ".join(dict.fromkeys(words))
    if names:
        return f"{head} ({detail})" if detail else head
    return f"{head} * ({detail})" if head and detail else head or detail or "as it is"


def _dim_name(d: int, rank: int) -> str:
    if rank == 1:
        return "units"
    return ("rows", "columns")[d] if rank == 2 else f"dim {d}"


def _cells(row: PlanRow) -> tuple[str, ...]:
    count = _arrow(row.n_before, row.n_after)
    shape = _arrow(list(row.before), list(row.after))
    return row.pattern, count, shape, row.promise, row.formula


def _arrow(before: object, after: object) -> str:
    return str(after) if before == after else f"{before} -> {after}"
