"""Fewer layers and experts before the probing: that is what building a model takes time for."""

import json
import re
from collections import Counter

from streammap.tools.spec_infer import probe
from streammap.tools.spec_infer.probe import Snapshot, Workbench, template
from streammap.tools.spec_infer.words import INDEX_LIST, PER_TOKEN


def shorten(bench: Workbench) -> None:
    """Few layers and experts, of every kind that there is: that is what building takes time for."""
    numbers = [f for f in bench.numbers() if f.value > 2]
    least = max((f.value for f in numbers if PER_TOKEN.search(f.leaf)), default=1)
    for field in numbers:
        value = field.value
        if "experts" in field.leaf and not PER_TOKEN.search(field.leaf):
            while value % 2 == 0 and value // 2 >= max(8, 2 * least):
                value //= 2
            if value < field.value:
                bench.adopt({field.name: value})
    for field in numbers:
        named = re.search(r"layer|depth|block|group", field.leaf)
        if PER_TOKEN.search(field.leaf):
            continue  # groups of experts
        if not named or field.leaf.endswith(("_period", "_offset")) or field.value <= 4:
            continue
        full = bench.base()
        for n in (2, 3, 4, 6, 8, 12, 16, 24, 32):
            changes = _stack(bench, field, n)
            short = None if n >= field.value or changes is None else bench.snapshot(changes)
            if short is not None and _kinds(short) == _kinds(full):
                assert changes is not None
                # Where layers differ, two of them show too little of the order that they have.
                deeper = _stack(bench, field, n + 2) if _differ(short, n) else None
                if deeper is None or not bench.adopt(deeper):
                    bench.adopt(changes)
                break


def _stack(bench: Workbench, field: probe.Field, n: int) -> dict[str, object] | None:
    """The changes that leave `n` layers, or None where a kind of layer would be lost."""
    changes: dict[str, object] = {field.name: n}
    for leaf, entries in bench.lists(field.scope).items():
        name = f"{field.scope}.{leaf}".lstrip(".")
        if INDEX_LIST.search(leaf) and entries == list(range(field.value)):
            changes[name] = entries[:n]
        elif len(entries) == field.value:
            if {json.dumps(e) for e in entries[:n]} != {json.dumps(e) for e in entries}:
                return None
            changes[name] = entries[:n]
        elif INDEX_LIST.search(leaf) and all(type(e) is int for e in entries):
            changes[name] = [e for e in entries if isinstance(e, int) and e < n]
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
