"""What axes, and their units, are called in messages.

A user asks for --hidden, --mlp or --kv-heads; a spec may call these axes embed, moe_mlp or
g_kv_heads.
"""

from streammap.architectures.schema import Architecture

_UNITS = {
    "hidden": "hidden units",
    "heads": "heads",
    "kv_heads": "kv heads",
    "mlp": "MLP neurons",
    "experts": "experts",
    "layers": "layers",
}


def shown(spec: Architecture, axis: str) -> str:
    """An axis by the user's word for it: "hidden (embed)"."""
    return f"hidden ({axis})" if axis in spec.spaces.get("hidden", ()) else axis


def units_of(spec: Architecture, axis: str) -> str:
    """What one counts along an axis: "MLP neurons", "heads (dec_heads)", "units of state"."""
    for space, members in {**spec.spaces, "layers": spec.depth_axes}.items():
        if axis in members:
            return _UNITS[space] if len(members) == 1 else f"{_UNITS[space]} ({axis})"
    return f"units of {axis}"


def axis_named(spec: Architecture, name: str) -> str:
    """The axis that a user means: its own name, or "hidden" for a model's only hidden axis."""
    members = spec.spaces.get("hidden", ())
    return members[0] if name == "hidden" and name not in spec.axes and len(members) == 1 else name


def layer_named(spec: Architecture, layer: tuple[str, int]) -> str:
    """A layer by the user's word for it: "layer 3", or "dec_layer 3" where there are several."""
    axis, number = layer
    return f"{axis if len(spec.depth_axes) > 1 else 'layer'} {number}"
