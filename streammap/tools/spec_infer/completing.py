"""What a configuration lacks so that a model can be built of it, found by trying.

The defaults of many classes are no model: sizes are null that every published config.json has
(head_dim), and parts with defaults of their own do not fit together.
"""

import itertools
import re
from collections.abc import Iterator

from streammap.architectures import config_fields
from streammap.common import optional
from streammap.tools.spec_infer import config_changes
from streammap.tools.spec_infer.config_changes import Changes
from streammap.tools.spec_infer.naming import plain_name
from streammap.tools.spec_infer.probe import Field, Workbench

_SIZE = re.compile(r"dim|size|inner|heads|rank|width|ratio|budget|layers|experts|top_?k|num_|_num")
_WIDTH = re.compile(r"(hidden_size|dim|d_model|width)$")
_TAKEN = re.compile(r"experts_per_tok|moe_top_?k$|top_k_experts")
_OWN_WIDTH = re.compile("hidden_size|hidden_dim|d_model|embed_dim")
_ENCODER = re.compile("encoder|vision|audio")
_LAYERS = re.compile(r"^(num_)?(hidden_)?layers$|^n_layers?$")
_TAKES = 2
_HEAD_SIZE, _FEW, _MANY = 16, 4, 64
_ROPE_THETA = 10000.0
_KINDS = {"layer_types": "full_attention", "mlp_layer_types": "dense"}
"""Lists of kinds, one a layer -> the kind that a class need not name: what others are not."""


def complete(bench: Workbench) -> None:
    """Change fields until a model can be built, where the configuration itself makes none."""
    if bench.outline({}) is None:
        lists = (*_layer_kinds(bench), *_rotary_kinds(bench))
        for changes in (*lists, *_named(bench), *_filled(bench), *_dividing(bench), *_equal(bench)):
            if bench.adopt(changes):
                _without_needless(bench, changes)
                break
    for changes in (*_made_again(bench), *_whole_heads(bench), *_taken(bench), *_as_wide(bench)):
        bench.adopt(changes)


def _named(bench: Workbench) -> Iterator[Changes]:
    """What the model asks for by name, and the configuration does not have in that part."""
    asked = re.search(r"no attribute '(\w+)'", bench.why())
    if asked is None:
        return
    whole = dict(config_changes.leaves(bench.fields))
    scopes = dict.fromkeys(name.rpartition(".")[0] for name in whole)
    value = next((v for k, v in whole.items() if k.rpartition(".")[2] == asked[1]), None)
    for scope in scopes:
        name = config_changes.joined(scope, asked[1])
        usual = _ROPE_THETA if asked[1] == "rope_theta" else _usual(bench, name)
        yield {name: usual if value is None else value}


def _layer_kinds(bench: Workbench) -> Iterator[Changes]:
    """A list of kinds, one a layer, that is null: all that the class knows, in turn, or one."""
    for name, value in config_changes.leaves(bench.fields):
        scope, _, leaf = name.rpartition(".")
        if value is not None or leaf not in _KINDS:
            continue
        known = (k for k in _allowed(leaf) if bench.mentions(f'"{k}"'))
        kinds = list(dict.fromkeys((_KINDS[leaf], *known)))
        counts = [f.value for f in bench.numbers() if f.scope == scope and _LAYERS.search(f.leaf)]
        for some in (kinds, *([kind] for kind in kinds)):
            yield from ({name: [some[i % len(some)] for i in range(n)]} for n in counts)


def _rotary_kinds(bench: Workbench) -> Iterator[Changes]:
    """Rotary positions of each kind of layer, where the class has those of one kind for all."""
    for scope in dict.fromkeys(f.scope for f in bench.numbers()):
        kinds = {str(kind) for kind in bench.lists(scope).get("layer_types", ())}
        name = config_changes.joined(scope, "rope_parameters")
        one = config_fields.field_value(bench.fields, name)
        if kinds and isinstance(one, dict) and one.keys().isdisjoint(kinds):
            usual = {"rope_type": "default", "rope_theta": _ROPE_THETA, **one}
            yield {name: dict.fromkeys(sorted(kinds), usual)}


def _allowed(leaf: str) -> tuple[str, ...]:
    """The kinds of layers that transformers has."""
    library = optional.library("transformers.configuration_utils")
    name = f"ALLOWED_{'MLP' if leaf.startswith('mlp') else 'ATTN'}_LAYER_TYPES"
    return tuple(getattr(library, name, ()))


def _made_again(bench: Workbench) -> Iterator[Changes]:
    """Tables by layer numbers that the class makes of other fields: of a tiny model others."""
    for scope in dict.fromkeys(field.scope for field in bench.numbers()):
        name = config_changes.joined(scope, "per_layer_config")
        there = config_fields.field_value(bench.fields, name) is not None
        if there and bench.outline({name: None}) == bench.outline({}):
            yield {name: None}


def _whole_heads(bench: Workbench) -> Iterator[Changes]:
    """A head size where the hidden size is no multiple of the heads: it would be cut off."""
    for scope, width, heads in _cut_heads(bench):
        name = config_changes.joined(scope, "head_dim")
        n = width.value // heads.value
        # A class that does not read the field is left as it is.
        if n and bench.outline({name: n + 1}) != bench.outline({}):
            yield {name: n + n % 2}


def _dividing(bench: Workbench) -> Iterator[Changes]:
    """A number of heads that divides the hidden size, where the class's own does not."""
    for _, width, heads in _cut_heads(bench):
        if config_fields.field_value(bench.given, heads.name) is None:
            more = range(heads.value, width.value + 1)
            yield {heads.name: next(n for n in more if width.value % n == 0)}


def _cut_heads(bench: Workbench) -> Iterator[tuple[str, Field, Field]]:
    """Parts whose hidden size is no multiple of their heads: with these two fields."""
    parts: dict[str, dict[str, Field]] = {}
    for field in bench.numbers():
        parts.setdefault(field.scope, {})[plain_name(field.name)] = field
    for scope, sizes in parts.items():
        if {"embed", "heads"} <= sizes.keys() and "head_dim" not in sizes:
            width, heads = sizes["embed"], sizes["heads"]
            if heads.value < width.value and width.value % heads.value:
                yield scope, width, heads


def _as_wide(bench: Workbench) -> Iterator[Changes]:
    """An encoder as wide as the part that reads it expects, where no part is so by default."""
    widths = {field.name: field.value for field in bench.numbers()}
    for name, own in read_widths(bench):
        others = (n for other, n in widths.items() if _OWN_WIDTH.fullmatch(other.split(".")[-1]))
        if widths[name] not in others:
            yield {name: widths[own]}


def read_widths(bench: Workbench) -> Iterator[tuple[str, str]]:
    """Fields that say how wide an encoder is which another part reads, and that encoder's own."""
    for field, other in itertools.permutations(bench.numbers(), 2):
        seen = field.scope and _ENCODER.search(other.scope) and field.scope != other.scope
        if seen and field.leaf == "encoder_hidden_size" and _OWN_WIDTH.fullmatch(other.leaf):
            yield field.name, other.name


def _taken(bench: Workbench) -> Iterator[Changes]:
    """How many experts a token takes, where that is null: no shape needs it, each run does."""
    for name, value in config_changes.leaves(bench.fields):
        if value is None and _TAKEN.search(name.rpartition(".")[2]):
            yield {name: _TAKES}


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
    if _TAKEN.search(leaf):
        return _TAKES
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
        if not _TAKEN.search(name):
            bench.adopt({name: None})
