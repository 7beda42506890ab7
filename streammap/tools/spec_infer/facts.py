"""[proved] of an inferred spec: the switches of the model that it was tested on.

Shapes do not show what a switch does: at n_group 1 a router has no groups, whatever the spec says
of them. A checkpoint with another switch is read by the spec, and promised nothing.
"""

from collections.abc import Iterator

from streammap.planning.matching import config_difference
from streammap.tools.spec_infer import config_changes
from streammap.tools.spec_infer.config_changes import Fields
from streammap.tools.spec_infer.naming import AxisNaming
from streammap.tools.spec_infer.words import toml_key, toml_value

_OTHER = ("model_type", "is_encoder_decoder", "add_cross_attention", "vocab_size")


def proved(naming: AxisNaming, fields: Fields) -> str:
    """The table, one field of the tiny model's config a line; sizes are no switches."""
    lines = [f"{toml_key(name)} = {toml_value(value)}" for name, value in _switches(naming, fields)]
    return "\n".join(["[proved]", *lines, ""])


def _switches(naming: AxisNaming, fields: Fields) -> Iterator[tuple[str, object]]:
    sizes = {field.name for symbol, field in naming.fields.items() if symbol in naming.names}
    for name, value in config_changes.leaves(fields):
        if name in sizes or name.rpartition(".")[2] in _OTHER or config_difference.is_silent(name):
            continue
        if isinstance(value, bool | int | str) and "_token" not in name:
            yield name, value
