"""A model's config.json without the per-layer lists that loaders derive, or with empty ones."""

import copy
from collections.abc import Iterator

from streammap.api import LazyCheckpoint
from streammap.architectures import config_fields, layer_rules
from streammap.architectures.layer_rules import Config
from streammap.architectures.model import Model

WITHOUT = "without lists"
"""The variant that each library must take; empty lists are refused by most."""


def variants(source: LazyCheckpoint) -> Iterator[tuple[str, dict[str, object]]]:
    """Name and config.json of each variant that says the same of the model's layers."""
    model = source.plan.model
    depths = model.architecture.depth
    there = [
        (axis, rule.list)
        for axis, depth in depths.items()
        for rule in depth.derived
        if rule.when and config_fields.field_value(model.config, rule.list) is not None
    ]
    empty = [field for axis, field in there if field in depths[axis].lists]
    for name in (WITHOUT, *(f"empty {field}" for field in empty)) if there else ():
        config = copy.deepcopy(dict(model.config))
        for _, field in there:
            config_fields.delete_field(config, field)
            if name == f"empty {field}":
                config_fields.set_field(config, field, [])
        # A model's lists may be others than loaders would derive.
        if all(_read(model, model.config, *one) == _read(model, config, *one) for one in there):
            yield name, config


def _read(model: Model, config: Config, axis: str, field: str) -> object:
    depth, n_layers = model.architecture.depth[axis], model.sizes[axis]
    by_number = field in (*depth.index_lists, *depth.marks)
    read = layer_rules.numbers if by_number else layer_rules.entries
    return read(depth, config, field, n_layers)
