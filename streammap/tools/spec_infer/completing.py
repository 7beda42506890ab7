"""What a configuration lacks so that a model can be built of it, found by trying.

The defaults of many classes are no model: sizes are null that every published config.json has
(head_dim), and parts with defaults of their own do not fit together.
"""

import itertools
import re
from collections.abc import Iterator

from streammap.tools.spec_infer import config_changes
from streammap.tools.spec_infer.config_changes import Changes
from streammap.tools.spec_infer.naming import plain_name
from streammap.tools.spec_infer.probe import Workbench

_SIZE = re.compile(r"dim|size|inner|heads|rank|width|ratio|budget|layers|experts|top_?k|num_|_num")
_WIDTH = re.compile(r"(hidden_size|dim|d_model|width)$")
_HEAD_SIZE, _FEW, _MANY = 16, 4, 64


def complete(bench: Workbench) -> None:
    """Change fields until a model can be built, where the configuration itself makes none."""
    if bench.outline({}) is not None:
        return
    for changes in (*_filled(bench), *_equal(bench)):
        if bench.adopt(changes):
            _without_needless(bench, changes)
            return


def _filled(bench: Workbench) -> Iterator[Changes]:
    """Sizes that are null, with values that are usual."""
    null = [
        name
        for name, value in config_changes.leaves(bench.fields)
        if value is None and _SIZE.search(name.rpartition(".")[2])
    ]
    usual = {name: _usual(bench, name) for name in null}
    yield from ({name: value} for name, value in usual.items())
    if usual:
        yield usual


def _usual(bench: Workbench, name: str) -> int:
    scope, _, leaf = name.rpartition(".")
    beside = {plain_name(f.name): f.value for f in bench.numbers() if f.scope == scope}
    if plain_name(name) == "head_dim" and {"embed", "heads"} <= beside.keys():
        return beside["embed"] // beside["heads"]
    if "heads" in leaf:
        return 1 if "kv" in leaf else _FEW
    if "head_dim" in leaf and "head_dim" in beside:
        return beside["head_dim"]
    return _HEAD_SIZE if "head" in leaf else _FEW if re.search("ratio|layers", leaf) else _MANY


def _equal(bench: Workbench) -> Iterator[Changes]:
    """A width that is as large as one of another part."""
    widths = [f for f in bench.numbers() if _WIDTH.search(f.leaf)]
    for field, other in itertools.permutations(widths, 2):
        if field.value != other.value and field.scope != other.scope:
            yield {field.name: other.value}


def _without_needless(bench: Workbench, changes: Changes) -> None:
    """Take back each change that the model can be built without."""
    for name in changes if len(changes) > 1 else ():
        bench.adopt({name: None})
