"""Sizes of tiny models: found from what is known of the fields, and by trying.

A class couples more of its sizes than shapes tell: a projector that reshapes what an encoder gives,
parts that must be equally wide. So there are several proposals, from sizes that all differ to the
proportions of the given model; the first that runs is taken.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction

from streammap.tools.spec_infer import config_changes, probe, solve
from streammap.tools.spec_infer.naming import HEAD_SIZE, AxisNaming, is_heads, plain_name
from streammap.tools.spec_infer.probe import Field, Workbench, template

_N_WORDS = 97
"""Size of a vocabulary."""
_SMALL = 160
"""A hidden size up to this may be that of a tiny model already."""
_MAX_ELEMENTS = 2_000_000
"""A model of more numbers is not tiny: each check of a proof would take seconds."""
_N_SPECIAL = 10
"""Tokens below this number are no text in tiny models."""
_TOKEN = re.compile(r"token_(id|index)$|patch_id$")
_MARK = re.compile(r"(image|video|audio)_(token|patch)")
_MERGES = re.compile(r"scale_factor$|merge_size$|merge$|pool|kernel|downsample")
"""Fields that say how many patches of a row become one."""
_PER_IMAGE = re.compile(r"tokens_per_image$")
_TINY_WIDTHS = (92, 76, 44, 38, 28, 26, 22, 34, 46, 52, 58, 62, 68, 74)
_TINY_EMBEDS = (48, 40, 56, 64)
_HEAD_SIZES = (8, 12, 16, 20, 24, 28, 32)
_MAX_RATIO = 8


def proposals(m: AxisNaming, *, different: bool = False) -> Iterator[dict[str, object]]:
    """Sizes that may make a tiny model: all different, or in the proportions of the given ones.

    Args:
        m: What is known of the model.
        different: Whether only those that all differ are wanted.
    """
    hidden = m.fields.get(m.residual())
    if (hidden is None or hidden.value <= _SMALL) and m.bench.base().n_elements <= _MAX_ELEMENTS:
        yield {}
        return
    ways = (_all_different,) if different else (_all_different, _by_value, _in_proportion)
    proposed = tuple(way(m) for way in ways)
    first: dict[str, object] | None = None
    # Images as they are come last: a class may ask for their size, but they take long.
    for smaller in [True, False] if _small_images(m.bench, {}) else [False]:
        for one in proposed:
            sizes = _reduced(m.bench, one | (_small_images(m.bench, one) if smaller else {}))
            if sizes is not None:
                first = first or sizes
                yield sizes
    # Last, for a forward pass that compares ids with marks that are null.
    null = [k for k, n in config_changes.leaves(m.bench.fields) if n is None and _TOKEN.search(k)]
    if null and first is not None:
        yield {**dict.fromkeys(null, 1), **first}


def _small_images(bench: Workbench, sizes: Mapping[str, object]) -> dict[str, object]:
    """Images of a few patches a side, as many as what merges patches divides."""
    small: dict[str, object] = {}
    given = dict(config_changes.leaves(bench.fields)) | dict(sizes)
    merged = (n for k, n in given.items() if _MERGES.search(k) and type(n) is int and 0 < n <= 8)
    n_patches = 2 * math.lcm(2, *merged)
    for name, value in given.items():
        scope, _, leaf = name.rpartition(".")
        patch = given.get(config_changes.joined(scope, "patch_size"))
        patch = patch[0] if isinstance(patch, list) and patch else patch
        if leaf == "image_size" and type(patch) is int:
            for n in value if isinstance(value, list) else [value]:
                if type(n) is int and n > n_patches * patch:
                    side = n_patches * patch
                    small[name] = [side] * len(value) if isinstance(value, list) else side
    # Patches are pooled to a square of so many.
    pooled = (k for k, n in given.items() if _PER_IMAGE.search(k) and type(n) is int)
    return small | dict.fromkeys(pooled, (n_patches // 2) ** 2)


def _reduced(bench: Workbench, sizes: Mapping[str, object]) -> dict[str, object] | None:
    """Sizes, halved until the model is tiny; None where it can't be built or stays large."""
    found, model = dict(sizes), bench.snapshot(sizes)
    while model is not None and model.n_elements > _MAX_ELEMENTS:
        before = model.n_elements
        for value, names in sorted(_equal_fields(bench, found).items(), reverse=True):
            halved = found | dict.fromkeys(names, value[0] // 2)
            smaller = bench.snapshot(halved) if value[0] >= 4 and value[0] % 2 == 0 else None
            if (
                smaller is not None
                and smaller.shapes.keys() == model.shapes.keys()
                and smaller.n_elements < 0.95 * model.n_elements
            ):
                found, model = halved, smaller
        if model.n_elements == before:
            return None
    return None if model is None else _accepted(bench, found)


def _equal_fields(
    bench: Workbench, sizes: Mapping[str, object]
) -> dict[tuple[int, int], list[str]]:
    """(tiny value, given value) -> the fields that have them: models couple some of these."""
    found: dict[tuple[int, int], list[str]] = defaultdict(list)
    given = {field.name: field.value for field in bench.numbers()}
    for name, entries in config_changes.leaves(bench.fields):
        # One size a stage; the last of a short list is a number already.
        if isinstance(entries, list) and probe.LIST_SIZE.search(name.rpartition(".")[2]):
            known = f"{name}.-1" in given
            given |= {f"{name}.{i}": n for i, n in enumerate(entries[: -1 if known else None])}
    for name, before in given.items():
        value = sizes.get(name, before)
        if type(value) is int:
            found[value, before].append(name)
    return found


def _accepted(bench: Workbench, sizes: dict[str, object]) -> dict[str, object] | None:
    """Sizes that the configuration class accepts: where it does not, without some of them."""
    some = (sizes, *({k: v for k, v in sizes.items() if k != name} for name in sizes))
    for found in some:
        model = bench.with_changes(found).snapshot({})
        if model is not None and model.n_elements <= _MAX_ELEMENTS:
            return found
    return None


def prove_sizes(m: AxisNaming, sizes: Mapping[str, object]) -> tuple[Workbench, tuple[str, ...]]:
    """Build a model whose sizes all differ from the probed ones.

    Args:
        m: What is known of the model.
        sizes: Those of the tiny model; empty where the probed one is tiny already.

    Returns:
        The tiny model, which is that one or the probed one where that is tiny already; and what
        the sizes contradict, one line each.
    """
    tiny = sizes or {
        s: 3 * m.fields[s].value
        for s, name in m.names.items()
        if s in m.fields and m.kinds[name] != "depth"
    }
    snapshot = m.bench.snapshot(tiny)
    if snapshot is None:
        return m.bench, ("the model that checks all sizes at once can't be built",)

    def size(symbol: str) -> Fraction:
        for table in (m.solution.head_sizes, m.solution.groups):
            if symbol in table:
                above, below = table[symbol]
                return size(above) / size(below)
        return Fraction(int(str(tiny.get(symbol, m.fields[symbol].value))))

    wrong: dict[str, None] = {}
    for key, dims in m.solution.dims.items():
        for polynomial, size_there in zip(dims, snapshot.shapes.get(key, ()), strict=False):
            if polynomial is not None and solve.value_of(polynomial, size) != size_there:
                wrong[template(key)] = None
    lines = tuple(f"{key}: its sizes differ in the model that checks them" for key in wrong)
    return m.bench.with_changes(tiny) if sizes else m.bench, lines


def _all_different(m: AxisNaming) -> dict[str, object]:
    """Small sizes in the proportions that constructors ask for."""
    sizes: dict[str, object] = {}
    widths, embeds = iter(_TINY_WIDTHS * 9), iter(_TINY_EMBEDS * 9)
    groups = {kv: heads for heads, kv in m.solution.groups.values()}
    least = min((f.value for s, f in m.fields.items() if HEAD_SIZE.search(f.leaf)), default=1)
    for symbol, name in m.names.items():
        field = m.fields.get(symbol)
        kind = m.kinds[name]
        if field is None or kind == "depth" or symbol in sizes:
            continue
        leaf = field.leaf
        if "vocab" in leaf:
            sizes[symbol] = _N_WORDS if "type" not in leaf else field.value
        elif symbol in groups:
            n = min(field.value, 2)
            times = min(3, m.fields[groups[symbol]].value // field.value)
            sizes |= {symbol: n, groups[symbol]: n * times}
        elif is_heads(symbol) and kind == "width":
            sizes[symbol] = min(field.value, 6)
        elif HEAD_SIZE.search(leaf):
            # One may be a part of another: the rotary part of a head is less than all of it.
            sizes[symbol] = min(field.value, 8 * min(3, field.value // least))
        elif kind == "frozen" or kind == "expert":
            sizes[symbol] = min(field.value, 61)
        elif name.endswith("embed"):
            sizes[symbol] = next(embeds)
        else:
            sizes[symbol] = min(field.value, next(widths))
    for heads, kv in m.solution.groups.values():
        sizes[heads] = int(str(sizes[kv])) * min(3, m.fields[heads].value // m.fields[kv].value)
    wholes = sorted({h for h, _ in m.solution.head_sizes.values()} | {m.residual()})
    taken = {n for s, n in sizes.items() if m.names[s].endswith("embed") and s not in wholes}
    for hidden in wholes:
        scope = hidden.rpartition(".")[0]
        counts = [
            int(str(n))
            for s, n in sizes.items()
            if plain_name(s) == "heads" and s.rpartition(".")[0] == scope
        ]
        # Two parts are not equally wide by chance: nothing would say that they must be.
        n_heads = math.lcm(*counts, 1)
        sizes[hidden] = next(n_heads * n for n in _HEAD_SIZES if n_heads * n not in taken)
        taken.add(sizes[hidden])
    return sizes | _following(m, sizes) | _tokens(m.bench)


def _following(m: AxisNaming, sizes: Mapping[str, object]) -> dict[str, object]:
    """Fields that equal others: widths, and counts of kv heads that make no dimension."""
    heads = {s.rpartition(".")[0]: n for s, n in sizes.items() if plain_name(s) == "heads"}
    equal: dict[str, object] = {a: sizes[b] for a, b in m.solution.same.items() if b in sizes}
    for name, value in config_changes.leaves(m.bench.fields):
        if name.endswith("mrope_section") and isinstance(value, list):
            equal[name] = _sections(m, sizes, len(value))
        elif re.search(r"(^|\.)(unpadded_)?vocab_size$", name) and type(value) is int:
            # A vocabulary is padded up to its size, not down; a wrapper may repeat its text's.
            equal[name] = min(value, _N_WORDS)
    if m.bench.mentions("mrope_section") and not any("mrope_section" in name for name in equal):
        # The class has a default, which is that of large heads.
        for name, _ in config_changes.leaves(m.bench.fields):
            scope, leaf = name.rpartition(".")[::2]
            if leaf == "rope_theta" and "vision" not in scope:
                equal[config_changes.joined(scope, "mrope_section")] = _sections(m, sizes, 3)
    equal |= _head_sizes(m, sizes)
    return equal | {
        field.name: heads[field.scope]
        for field in m.fields.values()
        if field.leaf == "num_key_value_heads" and field.name not in sizes and field.scope in heads
    }


def _head_sizes(m: AxisNaming, sizes: Mapping[str, object]) -> dict[str, int]:
    """Head sizes that no tensor has, and rotary positions read: as large as what they equal."""
    tiny: dict[tuple[str, int], int] = {}
    for name, size in sizes.items():
        field = m.fields.get(name)
        if field is not None and HEAD_SIZE.search(field.leaf) and type(size) is int:
            tiny[field.scope, field.value] = size
    for hidden, n_heads in m.solution.head_sizes.values():
        if {hidden, n_heads} <= sizes.keys():
            whole, n = m.fields[hidden], m.fields[n_heads].value
            width, n_tiny = (int(str(sizes[name])) for name in (hidden, n_heads))
            tiny[whole.scope, whole.value // n] = width // n_tiny
    for scope in {name.rpartition(".")[0] for name in sizes}:
        beside = {plain_name(f.name): f for f in m.fields.values() if f.scope == scope}
        hidden_size, n_all = beside.get("embed"), beside.get("heads")
        if hidden_size is None or n_all is None or hidden_size.value % n_all.value:
            continue
        # A head size may be read by the forward pass alone.
        width = int(str(sizes.get(hidden_size.name, hidden_size.value)))
        n_tiny = int(str(sizes.get(n_all.name, n_all.value)))
        tiny.setdefault((scope, hidden_size.value // n_all.value), width // n_tiny)
    return {
        field.name: tiny[field.scope, field.value]
        for field in m.bench.numbers()
        if plain_name(field.name) == "head_dim"
        and field.name not in sizes
        and (field.scope, field.value) in tiny
    }


def _sections(m: AxisNaming, sizes: Mapping[str, object], n: int) -> list[int]:
    """Parts of half a head, which turn by time, row and column."""
    field = next((s for s in sizes if plain_name(s) == "head_dim"), "")
    head = int(str(sizes.get(field, 0)))
    for hidden, heads in m.solution.head_sizes.values():
        if not head and "vision" not in hidden:
            head = int(str(sizes[hidden])) // int(str(sizes[heads]))
    turned = [
        value
        for name, value in config_changes.leaves(m.bench.fields)
        if name.endswith("partial_rotary_factor") and "vision" not in name
    ]
    share = turned[0] if turned and isinstance(turned[0], float) else 1.0
    half = int((head or 8) * share) // 2
    part = max(half // (n + 1), min(1, half // (n - 1)))
    return [*[part] * (n - 1), half - part * (n - 1)]


def _by_value(m: AxisNaming) -> dict[str, object]:
    """Fields of one value keep one value, and small multiples stay multiples."""
    fields = [m.fields[s] for s, n in m.names.items() if s in m.fields and m.kinds[n] != "depth"]
    heads = {f.name: f.value for f in fields if is_heads(f.name)}
    head_sizes = {f.name: f.value for f in fields if HEAD_SIZE.search(f.leaf)}
    shared = math.gcd(*heads.values()) if heads else 1
    few = {n: n // shared * min(2, shared) for n in heads.values()}
    least = min(head_sizes.values(), default=1)
    sizes: dict[str, object] = {name: few[n] for name, n in heads.items()}
    sizes |= {name: 8 * min(3, n // least) for name, n in head_sizes.items()}
    of_value = _wide_as_heads(m, few)
    unit, n_units = 8 * math.lcm(*few.values()) if math.lcm(*few.values()) <= 24 else 48, 1
    widths = [f for f in fields if f.name not in sizes and m.kinds[m.names[f.name]] == "width"]
    for value in sorted({f.value for f in widths} - of_value.keys()):
        below = [n for n in of_value if value % n == 0 and value // n <= _MAX_RATIO]
        if below:
            of_value[value] = of_value[max(below)] * (value // max(below))
            continue
        while n_units * unit in of_value.values():
            n_units += 1
        of_value[value] = min(value, n_units * unit)
    # Lengths, numbers of places and the like: powers of two, which strides divide.
    kept = [f for f in fields if m.kinds[m.names[f.name]] == "frozen" and f.name not in sizes]
    sizes |= {f.name: _kept(f, of_value) for f in kept}
    every = [f for f in m.bench.numbers() if f.name not in sizes and f.value in of_value]
    sizes |= {f.name: of_value[f.value] for f in every if f in widths or "size" in f.leaf}
    sizes |= {f.name: _N_WORDS for f in fields if "vocab" in f.leaf and "type" not in f.leaf}
    return sizes | _following(m, sizes) | _tokens(m.bench)


def _kept(field: Field, of_value: Mapping[int, int]) -> int:
    """A size that is never resized: as a width that it equals or is a multiple of, or small."""
    below = [n for n in of_value if 1 <= field.value / n <= _MAX_RATIO and field.value % n == 0]
    if re.search(r"(dim|size)$", field.leaf) and below:
        return of_value[max(below)] * (field.value // max(below))
    return min(field.value, 64)


def _wide_as_heads(m: AxisNaming, few: Mapping[int, int]) -> dict[int, int]:
    """Hidden sizes that are heads times head size -> that size of the tiny model."""
    return {
        m.fields[hidden].value: 8 * few[m.fields[heads].value]
        for hidden, heads in m.solution.head_sizes.values()
        if m.fields[heads].value in few
    }


def _in_proportion(m: AxisNaming) -> dict[str, object]:
    """All widths divided by one number, and heads by another, as far as they can be."""
    chosen = {s: m.fields[s] for s in m.names if s in m.fields and m.kinds[m.names[s]] != "depth"}
    several = {s for s in m.shared() if s in chosen and chosen[s].value > 1}
    heads = {s: f.value for s, f in chosen.items() if is_heads(s) or s in several}
    head_sizes = {s: f.value for s, f in chosen.items() if HEAD_SIZE.search(f.leaf)}
    widths = {
        s: f.value
        for s, f in chosen.items()
        if s not in heads and s not in head_sizes and m.kinds[m.names[s]] == "width"
    }
    fewer = _halvings(heads.values(), 2)
    smaller = _halvings(head_sizes.values(), 8)
    narrower = _halvings(widths.values(), 8)
    pairs = m.solution.head_sizes.values()
    derived = [m.fields[hidden].value // m.fields[n].value for hidden, n in pairs]
    narrower = min(narrower, fewer * (_halvings(derived, 8) if derived else smaller))
    sizes: dict[str, object] = {s: n // fewer for s, n in heads.items()}
    sizes |= {s: n // smaller for s, n in head_sizes.items()}
    sizes |= {s: n // narrower for s, n in widths.items()}
    sizes |= {s: _N_WORDS for s, f in chosen.items() if "vocab" in f.leaf and "type" not in f.leaf}
    return sizes | _following(m, sizes) | _tokens(m.bench)


def _halvings(sizes: Iterable[int], least: int) -> int:
    """The largest power of two that divides all of some sizes, so that none gets below `least`."""
    known, divisor = tuple(sizes), 1
    while known and all(n % (2 * divisor) == 0 and n // (2 * divisor) >= least for n in known):
        divisor *= 2
    return divisor


def _tokens(bench: Workbench) -> dict[str, object]:
    """Numbers of tokens that the tiny vocabulary has, below those that text is drawn from."""
    given = dict(config_changes.leaves(bench.fields))
    # A class whose marks are null by default reads no images or sounds without them.
    unnamed = [k for k, n in given.items() if n is None and _MARK.search(k) and _TOKEN.search(k)]
    fields: dict[str, int] = {
        name: value for name, value in given.items() if _TOKEN.search(name) and type(value) is int
    }
    unused = _N_SPECIAL + max(fields.values(), default=0)
    fields |= {name: unused + i for i, name in enumerate(unnamed)}
    marks = sorted({n for n in fields.values() if n >= _N_SPECIAL})
    taken = {n for n in fields.values() if n < _N_SPECIAL}
    free = [n for n in range(1, _N_SPECIAL) if n not in taken] or [_N_SPECIAL - 1]
    # Those that stand for images and sounds first: where numbers are few, others share one.
    marks.sort(key=lambda n: not any(_MARK.search(k) for k, v in fields.items() if v == n))
    number = {n: free[min(i, len(free) - 1)] for i, n in enumerate(marks)}
    return {name: number[n] for name, n in fields.items() if n in number}


def proof_config(bench: Workbench) -> dict[str, object]:
    """The tiny model's config.json, without what its class has by itself."""
    usual = bench.defaults()
    config = _different(bench.fields, usual)
    config.pop("model_type", None)
    # A part that is named takes the defaults of its own class, not those that the whole has for it.
    made = bench.made_of(config)
    for name, part in bench.fields.items():
        if isinstance(part, dict) and name in config and made.get(name) != part:
            config[name] = _different(part, {})
    return config


def _different(fields: Mapping[str, object], usual: Mapping[str, object]) -> dict[str, object]:
    """The entries that a class does not have by itself; TOML has no null."""
    kept_entries: dict[str, object] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            inside = usual.get(name)
            kept = _different(value, inside if isinstance(inside, dict) else {})
            if kept and value != inside:
                kept_entries[name] = kept if isinstance(inside, dict) else _different(value, {})
        elif value is not None and value != usual.get(name):
            kept_entries[name] = value
    return kept_entries
