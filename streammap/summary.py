"""What a plan would do, for people and as JSON: shapes, formulas in words, bytes, memory."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from streammap import executor
from streammap.graph import Form
from streammap.plan import Plan

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Row:
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


@dataclass(frozen=True, slots=True)
class Summary:
    """A plan in figures."""

    rows: tuple[Row, ...]
    sizes: Mapping[str, tuple[int, int]]
    """Axis -> size before and after, for each that changes."""
    n_tensors: int
    n_parameters: int
    nbytes_read: int
    nbytes_written: int
    peak_nbytes: int
    """Memory that the run adds to the process, at most."""
    promise: str
    reason: str
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, object]:
        """All fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [_line(row, self.rows) for row in self.rows]
        if self.sizes:
            told = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in self.sizes.items())
            lines += ["", f"sizes    {told}"]
        lines += [
            f"result   {self.n_tensors} tensors, {self.n_parameters / 1e6:.1f} M parameters",
            f"reads    {self.nbytes_read / 1e9:.3f} GB, writes {self.nbytes_written / 1e9:.3f} GB",
            f"memory   at most {self.peak_nbytes / 1e6:.0f} MB beside torch itself",
            f"promise  {self.promise}: {self.reason}",
        ]
        lines += [f"note     {note}" for note in self.notes]
        return "\n".join(lines)


def summarize(plan: Plan) -> Summary:
    """The figures of a plan."""
    before: dict[str, set[str]] = {}
    after: dict[str, list[Form]] = {}
    for source in plan.sources[:1]:
        for key in source.slots:
            before.setdefault(_INDEX.sub("*", key), set()).add(key)
    for key, form in plan.targets.items():
        after.setdefault(_INDEX.sub("*", key), []).append(form)
    rows = []
    for pattern, forms in after.items():
        form = forms[0]
        source_spec = form.terms[0].blend[0][1].spec
        rows.append(
            Row(
                pattern,
                len(before.get(pattern, ())),
                len(forms),
                form.spec.dtype,
                source_spec.shape,
                form.spec.shape,
                formula(form),
            )
        )
    promise, reason = plan.promise
    return Summary(
        rows=tuple(rows),
        sizes={name: pair for name, pair in plan.sized.items() if pair[0] != pair[1]},
        n_tensors=len(plan.targets),
        n_parameters=sum(form.spec.n_elements for form in plan.targets.values()),
        nbytes_read=executor.read_nbytes(plan),
        nbytes_written=plan.nbytes,
        peak_nbytes=executor.planned_nbytes(plan),
        promise=promise,
        reason=reason,
        notes=tuple(note for step in plan.steps for note in step.notes),
    )


def formula(form: Form) -> str:
    """What a form computes, in words."""
    if form.copied is not None:
        return "copied"
    parts = []
    for term in form.terms:
        words = _blend_words([c for c, _ in term.blend])
        for d, m in enumerate(term.maps):
            if m is not None:
                words.append(f"{_dim_name(d, len(term.maps))}: {m.describe()}")
        parts.append(", ".join(words) or "as it is")
    text = " + ".join(parts)
    return f"{text} + {form.offset:g}" if form.offset else text


def _blend_words(coefficients: list[float]) -> list[str]:
    n = len(coefficients)
    if n == 1:
        return [] if coefficients[0] == 1.0 else [f"{coefficients[0]:g} x"]
    if all(c == coefficients[0] for c in coefficients):
        scale = coefficients[0] * n
        return [f"mean of {n}" if abs(scale - 1) < 1e-9 else f"{scale:g} x mean of {n}"]
    return [" + ".join(f"{c:g} x" for c in coefficients[:4])]


def _dim_name(d: int, rank: int) -> str:
    if rank == 1:
        return "units"
    return ("rows", "columns")[d] if rank == 2 else f"dim {d}"


def _line(row: Row, rows: tuple[Row, ...]) -> str:
    width = max(len(other.pattern) for other in rows)
    count = (
        f"{row.n_before:>4} -> {row.n_after:<4}"
        if row.n_before != row.n_after
        else (f"{row.n_after:>4}        ")
    )
    shape = str(list(row.after))
    if row.before != row.after:
        shape = f"{list(row.before)} -> {shape}"
    return f"{row.pattern:<{width}}  {count}  {shape:<30}  {row.formula}"
