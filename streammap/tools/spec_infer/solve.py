"""Which dimension of which tensor is what, found by changing one config field after the other.

A dimension that moves with some fields is a polynomial in them: it is fitted through the models in
which every subset of these fields is changed. The exponents -1 and 2 are tried where whole
coefficients come of it: `kv*hidden/heads` is `kv_heads*head_dim`. A number in a key whose count
moves with a field is an index. What shapes can't show: where the heads lie in a dimension of
hidden_size (attention that does not know head_dim). There the names q, k, v and o decide.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from streammap.tools.spec_infer.module_roles import ModelStructure
from streammap.tools.spec_infer.probe import Field, Snapshot, Workbench, template

Monomial = tuple[tuple[str, int], ...]
"""(symbol, exponent), sorted. A symbol is a field, or "a/b" of two: a part of a head axis."""
Polynomial = Mapping[Monomial, int]
Explained = tuple[Polynomial | None, ...]
"""What each dimension of a tensor is; None where no field explains it."""
Dims = Mapping[str, Explained]

_MAX_FIELDS = 6
_HEADS = re.compile(r"head")
_WIDTH = re.compile(r"^(hidden_size|d_model|n_embd|embed_dim|dim)$")
_ASIDE = re.compile(r"proj|embedding")
_KV = re.compile(r"kv|key_value|key_heads")
_STATE_GROUPS = re.compile(r"n_?groups$")
"""In state-space models (Mamba 2): how many sets of B and C the heads share."""
_MIXERS = re.compile(r"mamba|ssm|linear|conv|lightning|index")
_LENGTH = re.compile(r"position|ctx|max_|seq|length|vocab")
_ATTENTION = re.compile(r"atten|attn|mixer", re.IGNORECASE)
_QUERY = re.compile(r"^(w?(q|k|v|qk|kv|qkv)|query|key|value|c_attn|in_proj|query_key_value)$")
_QUERY_WORDS = {"pos", "q", "k", "v", "kv", "qkv", "query", "key", "value", "wqkv"}
_OUTPUT_WORDS = {"o", "out", "output", "dense", "proj", "projection", "wo"}


@dataclass(frozen=True, slots=True)
class Solution:
    """What is known of a model's tensors."""

    dims: Dims
    """By on-disk key."""
    counts: Mapping[str, Polynomial]
    """Template of a key's beginning, up to an index -> how many there are of it."""
    same: Mapping[str, str]
    """Field -> the one that it must equal: else the model has other tensors."""
    unresolved: Mapping[tuple[str, int], tuple[str, ...]]
    """(template, dimension) that no polynomial fits -> the fields that move it."""
    head_sizes: Mapping[str, tuple[str, str]]
    """Symbol -> (hidden field, heads field) of a head size that no field holds."""
    groups: Mapping[str, tuple[str, str]]
    """Symbol -> (heads field, kv heads field) of the query heads per kv head."""


@dataclass(frozen=True, slots=True)
class Probed:
    """The model and its one-field variations."""

    base: Snapshot
    fields: Mapping[str, Field]
    """Those that change anything."""
    steps: Mapping[str, int]
    """Field -> the other value that it was given."""
    singles: Mapping[str, Snapshot]


def solve(bench: Workbench, anatomy: ModelStructure) -> Solution:
    """Explain every dimension and every index."""
    probed = _probe(bench)
    fitter = _Fitter(bench, probed)
    dims: dict[str, Explained] = {}
    unresolved = {}
    for key, shape in probed.base.shapes.items():
        explained = []
        for i, size in enumerate(shape):
            read = partial(_size, key, i)
            moved = fitter.moving(read, size)
            fitted = fitter.fit(read, size, moved)
            if fitted is None:
                unresolved[template(key), i] = tuple(moved)
            explained.append(fitted)
        dims[key] = tuple(explained)
    counts = {}
    for start, n in probed.base.counts.items():
        counted = partial(_count, start)
        moved = fitter.moving(counted, n)
        fitted = fitter.fit(counted, n, moved) if moved else None
        if fitted is not None:
            counts[start] = fitted
    dims, head_sizes = _with_heads(dims, anatomy, probed)
    groups = _groups(dims, probed)
    for symbol, (heads, kv) in groups.items():
        new: Monomial = ((kv, 1), (symbol, 1))
        dims = _everywhere(dims, ((heads, 1),), new)
        counts = {k: _replaced(p, ((heads, 1),), new) for k, p in counts.items()}
    same = _structural(bench, probed)
    for field, other in same.items():
        dims = _everywhere(dims, ((field, 1),), ((other, 1),))
    return Solution(dims, counts, same, unresolved, head_sizes, groups)


def joined(solution: Solution, field: str, other: str) -> Solution:
    """The same, where one field must be as large as another, though the shapes don't say so."""
    dims = _everywhere(solution.dims, ((field, 1),), ((other, 1),))
    return replace(solution, dims=dims, same={**solution.same, field: other})


def value_of(polynomial: Polynomial, sizes: Callable[[str], Fraction]) -> Fraction:
    """The size that a polynomial stands for."""
    total = Fraction(0)
    for monomial, factor in polynomial.items():
        product = Fraction(factor)
        for symbol, exponent in monomial:
            product *= sizes(symbol) ** exponent
        total += product
    return total


def sole(polynomial: Polynomial | None) -> tuple[str, int] | None:
    """(symbol, factor) of a polynomial that is a multiple of one symbol."""
    if polynomial is None or len(polynomial) != 1:
        return None
    ((monomial, factor),) = polynomial.items()
    return (monomial[0][0], factor) if len(monomial) == 1 and monomial[0][1] == 1 else None


def _probe(bench: Workbench) -> Probed:
    base = bench.base()
    fields, steps, singles = {}, {}, {}
    taken = {field.value for field in bench.numbers()}
    for field in bench.numbers():
        # A size that another field has may leave tensors out, as projections between the two.
        # Three times the heads would not divide most hidden sizes.
        free = [n * field.value for n in (2, 4, 3) if n * field.value not in taken]
        for value in (*free[:1], 2 * field.value, field.value + 1, 3 * field.value):
            snapshot = bench.snapshot({field.name: value})
            if snapshot is not None:
                if snapshot != base:
                    fields[field.name], steps[field.name] = field, value
                    singles[field.name] = snapshot
                break
    return Probed(base, fields, steps, singles)


def _count(start: str, snapshot: Snapshot) -> int | None:
    return snapshot.counts.get(start)


def _size(key: str, dim: int, snapshot: Snapshot) -> int | None:
    shape = snapshot.shapes.get(key)
    return shape[dim] if shape is not None and dim < len(shape) else None


class _Fitter:
    """Fits polynomials, each kind of response once."""

    def __init__(self, bench: Workbench, probed: Probed) -> None:
        self._bench, self._probed = bench, probed
        self._cache: dict[tuple[object, ...], Polynomial | None] = {}

    def moving(self, read: Callable[[Snapshot], int | None], size: int) -> dict[str, int]:
        """The fields that change a size, and to what."""
        values = {}
        for field, snapshot in self._probed.singles.items():
            other = read(snapshot)
            if other is not None and other != size:
                values[field] = other
        return values

    def fit(
        self, read: Callable[[Snapshot], int | None], size: int, moved: Mapping[str, int]
    ) -> Polynomial | None:
        """A polynomial with whole, positive factors, or None."""
        key = (size, *sorted(moved.items()))
        if key not in self._cache:
            self._cache[key] = self._fit(read, size, tuple(moved))
        return self._cache[key]

    def _fit(
        self, read: Callable[[Snapshot], int | None], size: int, moved: tuple[str, ...]
    ) -> Polynomial | None:
        if not moved:
            return {(): size}
        if len(moved) > _MAX_FIELDS:
            return None
        fields = self._probed.fields
        # Where 2 leaves a rest (a head size of 9), 3 may not.
        for steps in (self._probed.steps, {f: 3 * fields[f].value for f in moved}):
            values: dict[frozenset[str], Fraction] = {}
            for chosen in _subsets(moved):
                snapshot = self._bench.snapshot({f: steps[f] for f in sorted(chosen)})
                value = None if snapshot is None else read(snapshot)
                if value is not None:
                    values[chosen] = Fraction(value)
            tried = sorted(itertools.product((1, -1, 2), repeat=len(moved)), key=_oddity)
            for exponents in tried if len(values) == 2 ** len(moved) else ():
                polynomial = self._through(values, dict(zip(moved, exponents, strict=True)), steps)
                if polynomial is not None:
                    return polynomial
        return None

    def _through(
        self,
        values: Mapping[frozenset[str], Fraction],
        exponents: Mapping[str, int],
        steps: Mapping[str, int],
    ) -> Polynomial | None:
        factors = dict(values)
        for field, exponent in exponents.items():
            low = Fraction(self._probed.fields[field].value) ** exponent
            high = Fraction(steps[field]) ** exponent
            for chosen in [c for c in factors if field not in c]:
                slope = (factors[chosen | {field}] - factors[chosen]) / (high - low)
                factors[chosen | {field}] = slope
                factors[chosen] -= slope * low
        polynomial = {}
        for chosen, factor in factors.items():
            if factor.denominator != 1 or factor < 0:
                return None
            if factor:
                polynomial[tuple(sorted((f, exponents[f]) for f in chosen))] = int(factor)
        return polynomial


def _subsets(fields: Sequence[str]) -> Iterator[frozenset[str]]:
    for n in range(len(fields) + 1):
        yield from map(frozenset, itertools.combinations(fields, n))


def _oddity(exponents: tuple[int, ...]) -> tuple[int, int]:
    return sum(e != 1 for e in exponents), sum(e == 2 for e in exponents)


def _structural(bench: Workbench, probed: Probed) -> dict[str, str]:
    """Fields that change which tensors there are, but not together with another of their value."""
    base, odd = probed.base.templates, []
    for field, snapshot in probed.singles.items():
        if snapshot.templates != base and any(
            snapshot.shapes[k] != x for k, x in probed.base.shapes.items() if k in snapshot.shapes
        ):
            odd.append(field)
    structural: dict[str, str] = {}
    for a, b in itertools.combinations(odd, 2):
        if probed.fields[a].value == probed.fields[b].value and probed.steps[a] == probed.steps[b]:
            both = bench.snapshot({a: probed.steps[a], b: probed.steps[b]})
            if both is not None and both.templates == base:
                first, other = (a, b) if _ASIDE.search(a) else (b, a)
                structural[first] = other
    return structural


def _with_heads(
    dims: Dims, anatomy: ModelStructure, probed: Probed
) -> tuple[dict[str, Explained], dict[str, tuple[str, str]]]:
    """Hidden sizes that are heads x head size inside attention, and hidden/heads as one symbol."""
    regions = _regions(anatomy, probed)
    changed: dict[str, Explained] = {}
    used: dict[str, tuple[str, str]] = {}
    for key, polynomials in dims.items():
        part = anatomy.parts.get(key)
        fresh = list(polynomials)
        inside = (
            next((regions[p] for p in _ancestors(part.path) if p in regions), {}) if part else {}
        )
        at = () if part is None else _headed(part.kind, f"{part.path}.{part.parameter}", len(fresh))
        for i, polynomial in enumerate(fresh):
            if polynomial is None:
                continue
            multiple = sole(polynomial)
            if i in at and multiple is not None and multiple[0] in inside:
                hidden, heads = multiple[0], inside[multiple[0]]
                fresh[i] = {_product((heads, 1), (f"{hidden}/{heads}", 1)): multiple[1]}
                used[f"{hidden}/{heads}"] = hidden, heads
            else:
                fresh[i], more = _divided(polynomial)
                used |= more
        changed[key] = tuple(fresh)
    return changed, used


def _divided(polynomial: Polynomial) -> tuple[Polynomial, dict[str, tuple[str, str]]]:
    """`hidden*kv/heads + hidden` as `kv*(hidden/heads) + heads*(hidden/heads)`."""
    used: dict[str, tuple[str, str]] = {}
    for monomial in polynomial:
        below = [s for s, e in monomial if e == -1 and _HEADS.search(s.rpartition(".")[2])]
        above = [s for s, e in monomial if e == 1 and not _HEADS.search(s.rpartition(".")[2])]
        if len(below) == 1 and len(above) == 1:
            used[f"{above[0]}/{below[0]}"] = above[0], below[0]
    for symbol, (hidden, heads) in used.items():
        polynomial = _replaced(polynomial, ((heads, -1), (hidden, 1)), ((symbol, 1),))
        polynomial = _replaced(polynomial, ((hidden, 1),), ((heads, 1), (symbol, 1)))
    return polynomial, used


def _regions(anatomy: ModelStructure, probed: Probed) -> dict[str, dict[str, str]]:
    """Attention module -> {hidden field: heads field}.

    An attribute of it is hidden/heads; or it has both, each as an attribute of its own.
    """
    fields, steps, found = probed.fields, probed.steps, dict[str, dict[str, str]]()
    ratio = {f: Fraction(steps[f], fields[f].value) for f in fields}
    alone: dict[str, dict[bool, set[str]]] = {}
    for (path, name), value in probed.base.attributes.items():
        if path not in anatomy.classes:
            continue
        moved = {
            f: s.attributes[path, name]
            for f, s in probed.singles.items()
            if s.attributes.get((path, name), value) != value
        }
        heads = [f for f, n in moved.items() if n == int(value / ratio[f])]
        hidden = [f for f, n in moved.items() if n == value * ratio[f]]
        if len(heads) == 1 and len(hidden) == 1:
            found.setdefault(_region(path, anatomy), {})[hidden[0]] = heads[0]
        elif (
            len(moved) == len(hidden) == 1
            and fields[hidden[0]].value == value
            and not _LENGTH.search(hidden[0])
        ):
            counts_heads = bool(_HEADS.search(hidden[0].rpartition(".")[2]))
            alone.setdefault(path, {}).setdefault(counts_heads, set()).add(hidden[0])
    for path, both in alone.items():
        region = _region(path, anatomy)
        named = f"{path.rpartition('.')[2]}.{anatomy.classes[path]}"
        if region in found or not _ATTENTION.search(named):
            continue
        if len(both) == 2 and all(len(names) == 1 for names in both.values()):
            found[region] = {next(iter(both[False])): next(iter(both[True]))}
        elif len(both.get(True, ())) == 1:
            # It has no attribute of its width: that is what the part calls so.
            counted = fields[next(iter(both[True]))]
            beside = [f for f in fields.values() if f.scope == counted.scope]
            wide = [f for f in beside if _WIDTH.search(f.leaf) and f.value % counted.value == 0]
            found[region] = dict.fromkeys((f.name for f in wide), counted.name)
    return found


def _region(path: str, anatomy: ModelStructure) -> str:
    """The outermost attention module around a module."""
    region = path
    for above in _ancestors(path.rpartition(".")[0]):
        last = above.rpartition(".")[2]
        kind = anatomy.classes.get(above, "")
        if kind.endswith(("Layer", "Block")) or not _ATTENTION.search(f"{last}.{kind}"):
            break
        region = above
    return region


def _ancestors(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _headed(kind: str, path: str, rank: int) -> tuple[int, ...]:
    """Which dimensions of an attention tensor hold the heads."""
    parts = path.lower().split(".")
    if kind in ("stack", "embedding", "buffer"):
        return ()
    leaf = parts[-2] if parts[-1] in ("weight", "bias") else parts[-1]
    leaf = re.sub(r"_(weight|bias)$", "", leaf)
    words = set(leaf.split("_"))
    makes = bool(_QUERY.match(leaf) or words & _QUERY_WORDS)
    if rank == 1 or kind in ("norm", "other"):
        return (rank - 1,) if makes else ()
    if makes:
        return (1,) if kind == "conv1d" else (0,)
    if words & _OUTPUT_WORDS:
        return (0,) if kind == "conv1d" else (1,)
    return ()


def _groups(dims: Dims, probed: Probed) -> dict[str, tuple[str, str]]:
    """Pairs of heads, and of what these share (kv heads), that stand in the dimensions."""
    symbols = {s for ps in dims.values() for p in ps if p for m in p for s, _ in m}
    present = [field for name, field in probed.fields.items() if name in symbols]
    heads = [f for f in present if _HEADS.search(f.leaf) and not re.search("dim|size", f.leaf)]
    pairs = {}
    for shared in present:
        beside = [f for f in heads if f != shared and f.scope == shared.scope]
        others = (_sharing if shared in heads else _of_states)(shared.leaf, beside)
        if len(others) == 1 and others[0].value % shared.value == 0:
            pairs[f"{others[0].name}/{shared.name}"] = others[0].name, shared.name
    return pairs


def _sharing(kv: str, beside: Sequence[Field]) -> list[Field]:
    """The heads that may share kv heads."""
    if not _KV.search(kv):
        return []
    if "key_heads" in kv:
        return [f for f in beside if f.leaf == kv.replace("key", "value", 1)]
    queries = [f for f in beside if not re.search(r"kv|key|value", f.leaf)]
    # Beside those of attention there may be heads of another mixer.
    return [f for f in queries if len(queries) == 1 or not _MIXERS.search(f.leaf)]


def _of_states(groups: str, beside: Sequence[Field]) -> list[Field]:
    """The heads that may share sets of B and C."""
    if not _STATE_GROUPS.search(groups):
        return []
    return [f for f in beside if _MIXERS.search(f.leaf) or len(beside) == 1]


def _everywhere(dims: Dims, old: Monomial, new: Monomial) -> dict[str, Explained]:
    return {
        key: tuple(None if p is None else _replaced(p, old, new) for p in found)
        for key, found in dims.items()
    }


def _replaced(polynomial: Polynomial, old: Monomial, new: Monomial) -> Polynomial:
    replaced: dict[Monomial, int] = {}
    for monomial, factor in polynomial.items():
        if all(pair in monomial for pair in old):
            rest = [pair for pair in monomial if pair not in old]
            monomial = _product(*rest, *new)
        replaced[monomial] = replaced.get(monomial, 0) + factor
    return replaced


def _product(*pairs: tuple[str, int]) -> Monomial:
    powers: dict[str, int] = {}
    for symbol, exponent in pairs:
        powers[symbol] = powers.get(symbol, 0) + exponent
    return tuple(sorted((s, e) for s, e in powers.items() if e))
