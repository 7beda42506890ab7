"""What specs say of config.json's missing per-layer fields is what transformers makes of them.

Each tiny model's config.json is varied: its number of layers, the numbers that lists are derived
from, the switches beside them. The lists themselves are taken out; the config object that
transformers builds must have the entries that the spec derives.
"""

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest

from streammap.architectures import config_fields, layer_rules, registry
from streammap.architectures.schema import Architecture, Depth, Numbers, TinyModel

transformers = pytest.importorskip("transformers")

N_DRAWS = 25
N_LAYERS = (1, 2, 3, 4, 6, 7, 12, 24, 30)
NUMBERS = (1, 2, 3, 4, 5, 9, 40)
OFFSETS = (0, 1, 2)
ABSENT = object()
SWITCHES: Mapping[str, Sequence[object]] = {
    "use_sliding_window": (ABSENT, True, True, False),
    "sliding_window": (ABSENT, None, 8),
    "attention_chunk_size": (ABSENT, None, 16),
}
"""Fields that rules are conditioned on; set where the model's config has a list like theirs."""
EMPTY_MEANS_MISSING = {"no_rope_layers"}
"""Lists of which transformers takes [] as if they weren't there; others are refused so."""
BUILT = {"attention_types": "attention_layers"}
"""What transformers writes a pattern's entries to, one by one."""
KNOWN = {
    "stage_names": "deleted when layers change, and built again",
    "_out_features": "from stage_names",
    "_out_indices": "from stage_names",
    "layers_block_type": "a property, from periods",
    "_heterogeneity_spec": "from per_layer_config, which is a table of the spec",
    "full_attn_idxs": "made where it is missing, and read for layer_types only",
    "moe_layer_end_index": "-1 is the last layer, before and after",
    "final_w_init_variance_scale": "for models that are trained from scratch",
    "attention_layers": "always built from attention_types",
}
"""What changes with the number of layers without being a list of the spec."""


QUICK = ("gemma3", "gemma4", "qwen3_vl", "qwen3_5", "minimax_m3_vl")
"""Of models in several parts those whose lists are in a part; the other parts are tried alone."""


def models() -> Iterator[object]:
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    for arch in registry.names():
        for model in registry.tiny_models(arch):
            in_parts = any(isinstance(part, Mapping) for part in model.config.values())
            marks = (pytest.mark.slow,) if in_parts and model.name not in QUICK else ()
            if model.model_type in mapping:
                yield pytest.param(model, id=model.name, marks=marks)


def config_of(raw: Mapping[str, object]) -> Any:
    """transformers' config object of a config.json; None where it refuses it."""
    mapping = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    fields = {k: copy.deepcopy(v) for k, v in raw.items() if k != "model_type"}
    try:
        return mapping[raw["model_type"]](**fields)
    # It is validated by whatever wrote it: not every draw is a model.
    except Exception:
        return None


def attribute(config: Any, path: str) -> Any:
    for part in path.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return list(config) if isinstance(config, tuple) else config


def spec_of(raw: Mapping[str, object]) -> Architecture:
    spec = registry.for_model_type(str(raw["model_type"]), raw)
    assert spec is not None
    return spec


def draws(model: TinyModel) -> Iterator[tuple[dict[str, object], dict[str, int], Architecture]]:
    """Variants of a config.json, the layers of each depth axis, and the spec for it."""
    rng = random.Random(model.name)
    for i in range(N_DRAWS):
        raw: dict[str, object] = {"model_type": model.model_type, **copy.deepcopy(model.config)}
        spec = spec_of(raw)
        n_layers: dict[str, int] = {}
        for axis in spec.depth_axes:
            n_layers[axis] = N_LAYERS[(i + len(n_layers)) % len(N_LAYERS)]
            config_fields.set_field(raw, spec.axes[axis].fields[0], n_layers[axis])
            depth = spec.depth.get(axis, Depth())
            for rule in depth.derived:
                vary(raw, rule.list, rng)
            leave_out(raw, depth, n_layers[axis])
            offsets = [period[1] for period in depth.periods if len(period) > 1]
            for sources in numbers_of(depth):
                values = OFFSETS if sources in offsets else NUMBERS
                put(raw, layer_rules.field_of(sources, raw), rng.choice((ABSENT, *values)))
        yield raw, n_layers, spec_of(raw)


def leave_out(raw: dict[str, object], depth: Depth, n_layers: int) -> None:
    """Take out what is listed for another number of layers, and not derived."""
    derived = {rule.list for rule in depth.derived}
    for field in (*depth.lists, *depth.index_lists):
        listed = config_fields.field_value(raw, field)
        if field not in derived and isinstance(listed, list):
            fits = (
                len(listed) == n_layers
                if field in depth.lists
                else max(listed, default=-1) < n_layers
            )
            if not fits:
                config_fields.delete_field(raw, field)


def vary(raw: dict[str, object], field: str, rng: random.Random) -> None:
    """Take a list out, or leave nothing in it, and turn the switches beside it."""
    above, dot, last = field.rpartition(".")
    empty: tuple[object, ...] = ([],) if last in EMPTY_MEANS_MISSING else ()
    put(raw, field, rng.choice((ABSENT, None, *empty)))
    for switch, values in SWITCHES.items():
        put(raw, above + dot + switch, rng.choice(values))


def put(raw: dict[str, object], field: str | None, value: object) -> None:
    if field is None:
        return
    if value is ABSENT:
        config_fields.delete_field(raw, field)
    else:
        config_fields.set_field(raw, field, value)


def numbers_of(depth: Depth) -> list[Numbers]:
    """All numbers that a table's kinds of layers depend on."""
    rules = [n for rule in depth.derived if rule.when for n in (rule.every, rule.before)]
    return [
        *rules,
        *depth.prefix_counts,
        *(n for period in depth.periods for n in period),
        depth.runs,
    ]


@pytest.mark.parametrize("model", list(models()))
def test_missing_lists_and_numbers_are_what_transformers_makes_of_them(model: TinyModel) -> None:
    n_compared = 0
    for raw, n_layers, spec in draws(model):
        config = config_of(raw)
        for axis, depth in spec.depth.items() if config is not None else ():
            n = n_layers[axis]
            for rule in depth.derived:
                if rule.when:
                    found = attribute(config, BUILT.get(rule.list, rule.list))
                    assert derived(depth, raw, rule.list, n) == found, (rule.list, raw)
            counts = [*depth.prefix_counts, *(n for p in depth.periods for n in p), depth.runs]
            for sources in counts:
                field = layer_rules.field_of(sources, raw)
                if field is not None:
                    assert layer_rules.number(sources, raw) == attribute(config, field), field
        n_compared += config is not None
    assert n_compared >= 2, "transformers refuses nearly all of them"


def derived(depth: Depth, raw: Mapping[str, object], field: str, n: int) -> object:
    if field in (*depth.index_lists, *depth.marks):
        return layer_rules.numbers(depth, raw, field, n)
    return layer_rules.entries(depth, raw, field, n)


@pytest.mark.parametrize("model", list(models()))
def test_what_changes_with_the_number_of_layers_is_in_the_spec(model: TinyModel) -> None:
    """A list that transformers derives, and no spec knows of, would be left to chance."""
    raw: dict[str, object] = {"model_type": model.model_type, **copy.deepcopy(model.config)}
    spec = spec_of(raw)
    for axis in spec.depth_axes:
        depth = spec.depth.get(axis, Depth())
        lists = (*depth.lists, *depth.index_lists, *depth.marks, *depth.patterns)
        for field in lists:
            config_fields.delete_field(raw, field)
        fields = spec.axes[axis].fields
        there = (field for field in fields if config_fields.field_value(raw, field) is not None)
        count = next(there, fields[0])
        above, dot, own = count.rpartition(".")
        if isinstance(config_fields.field_value(raw, above) if above else None, list):
            above, dot, own = above.rpartition(".")  # A list of counts, one for each stage.
        found = []
        for n in (4, 7, 12):
            config_fields.set_field(raw, count, n)
            config = config_of(raw)
            if config is not None:
                found.append(facts(attribute(config, above) if above else config))
        names = set().union(*found) - {own, "transformers_version"}
        moved = {k for k in names if len({repr(one.get(k)) for one in found}) > 1}
        # Some layer counts are those of a second stack, where nothing is said of it.
        others = {field for other in spec.axes.values() for field in other.fields}
        steps = (s for period in depth.periods for s, *_ in period if isinstance(s, str))
        known = {*lists, *steps, *others}
        unknown = {k for k in moved if above + dot + k not in known and k not in KNOWN}
        assert unknown == set()


def facts(config: Any) -> dict[str, object]:
    """A config object's fields and lists that are properties."""
    kind = type(config)
    lists = ("layer_types", "mlp_layer_types", "layers_block_type", "layers_num_experts")
    made = {
        k: getattr(config, k, None)
        for k in lists
        if not isinstance(getattr(kind, k, None), property)
    }
    return {**vars(config), **made}
