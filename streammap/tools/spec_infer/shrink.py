"""Fewer layers and experts before the probing: that is what building a model takes time for."""

import json
import re
from collections import Counter

from streammap.tools.spec_infer import probe
from streammap.tools.spec_infer.probe import Snapshot, Workbench, template
from streammap.tools.spec_infer.words import INDEX_LIST, grows_with_experts


def shorten(bench: Workbench) -> None:
    """Few layers and experts, of every kind that there is: that is what building takes time for."""
    numbers = [f for f in bench.numbers() if f.value > 2]
    most = max((f.value for f in numbers if "experts" in f.leaf), default=0)
    chosen = [f for f in numbers if grows_with_experts(f.leaf, f.value, most)]
    least = _choosing_few(bench, chosen)
    for field in numbers:
        value = field.value
        if "experts" in field.leaf and field not in chosen:
            while value % 2 == 0 and value // 2 >= max(8, 2 * least):
                value //= 2
            if value < field.value:
                bench.adopt({field.name: value})
    for field in numbers:
        named = re.search(r"layer|depth|block|group", field.leaf)
        if field in chosen:
            continue  # groups of experts
        if not named or field.leaf.endswith(("_period", "_offset", "_index")) or field.value <= 4:
            continue
        full = bench.outline({})
        for n in (2, 3, 4, 6, 8, 12, 16, 24, 32):
            changes = _stack(bench, field, n)
            short = None if n >= field.value or changes is None else bench.outline(changes)
            if short and full and _kinds(short) == _kinds(full):
                assert changes is not None
                # Where layers differ, two of them show too little of the order that they have.
                deeper = _stack(bench, field, n + 2) if _differ(short, n) else None
                if deeper is None or not bench.adopt(deeper):
                    bench.adopt(changes)
                break


def _choosing_few(bench: Workbench, chosen: list[probe.Field]) -> int:
    """Few experts a token, and few groups of them, but two; the largest number that is left."""
    groups = [f for f in chosen if "group" in f.leaf]
    divisor = min((f.value // 2 for f in groups), default=1)
    if all(f.value % divisor == 0 for f in groups):
        bench.adopt({f.name: f.value // divisor for f in groups})
    bench.adopt({f.name: 2 for f in chosen if f not in groups})
    left = {f.name: f.value for f in bench.numbers()}
    return max((left[f.name] for f in chosen), default=1)


def _stack(bench: Workbench, field: probe.Field, n: int) -> dict[str, object] | None:
    """The changes that leave `n` layers, or None where a kind of layer would be lost."""
    changes: dict[str, object] = {field.name: n}
    for other in bench.numbers():
        # The number of the last layer, as in moe_layer_end_index.
        is_last = other.leaf.endswith("layer_end_index") and other.value == field.value - 1
        changes |= {other.name: n - 1} if is_last and other.scope == field.scope else {}
    for leaf, entries in bench.lists(field.scope).items():
        name = f"{field.scope}.{leaf}".lstrip(".")
        if INDEX_LIST.search(leaf) and entries == list(range(field.value)):
            changes[name] = entries[:n]
        elif len(entries) == field.value:
            if {json.dumps(e) for e in entries[:n]} != {json.dumps(e) for e in entries}:
                return None
            changes[name] = entries[:n]
        elif INDEX_LIST.search(leaf) and all(type(e) is int for e in entries):
            left = [e for e in entries if isinstance(e, int) and e < n]
            if len(left) < 2 <= len(entries) and bench.is_counted(name):
                # One of several would not show that their order counts.
                left = [0, n - 1]
            changes[name] = left
    return changes


def _differ(snapshot: Snapshot, n_layers: int) -> bool:
    """Whether some tensors of a stack are not in each of its layers."""
    stacks = [start for start, n in snapshot.counts.items() if n == n_layers]
    found = Counter(template(key) for key in snapshot.shapes)
    return any(
        n % n_layers for key, n in found.items() if any(key.startswith(start) for start in stacks)
    )


def _kinds(snapshot: Snapshot) -> set[tuple[str, tuple[int, ...]]]:
    """Keys without their numbers, and shapes; outside layers a dimension may count the layers."""
    kinds = set()
    for key, shape in snapshot.shapes.items():
        name = template(key)
        kinds.add((name, shape if name != key else ()))
    return kinds
