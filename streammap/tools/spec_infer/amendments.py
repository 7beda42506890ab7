"""What a proof has shown beyond shapes: further words of an inferred spec."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

NO_RULE = "its growth changed a tiny model's function, and no rule that was tried explains how"
"""Why an axis is not resized by an inferred spec."""
UNSEEN = "a tiny model computed the same with any numbers there, so that nothing was proved of it"

Neutral = Literal["sinusoidal", "alibi"]
POSITIONS: Mapping[Neutral, str] = {
    "sinusoidal": "sinusoidal positions are computed from the width",
    "alibi": "alibi: the slope is a function of the head's number",
}
"""Positions that no tensor holds -> what a change of a size does to them."""
Order = Literal["interleaved", "per_head", "whole", "by_head", "turned"]
"""How the units of a dimension lie, where it is not as usual:

Two halves (gate, up) lie in turns; fused queries, keys and values lie head by head, or not so
though their name says it; a linear makes all that one head has together (queries, keys, values,
gates); the parts of a sum lie the other way round.
"""
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True, slots=True)
class Amendments:
    """What stands in a spec since a proof asked for it. An axis goes by its name in the spec."""

    scale: Mapping[str, str] = field(default_factory=dict)
    """Config.json's factors of the forward pass: a tensor's pattern -> [forward_scale]'s."""
    head_scale: str = ""
    """What the head's input is multiplied by."""
    head_norm: str = ""
    """Key of the norm before the head; "": the last one that the model has."""
    derives: bool = True
    """Whether the rules of lists that the class derives are written."""
    single: bool = False
    """Whether a token takes one expert whatever their number."""
    post: bool | None = None
    """Whether norms stand after the residual addition; None: as the order of modules says."""
    posts: tuple[str, ...] = ()
    """Depth axes: norms stand after the residual addition in their layers."""
    numbered: Mapping[str, object] = field(default_factory=dict)
    """Depth axis -> how many of its leading layers compute by their number."""
    ones: tuple[str, ...] = ()
    """Patterns of what is 1 in a layer that gives its input."""
    orders: Mapping[str, Order] = field(default_factory=dict)
    """Axis -> how the units lie in dimensions that it is a factor or a part of."""
    gates: str = ""
    """What the gates of experts add up to."""
    unsigned: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why its units keep their signs."""
    frozen: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why it is not resized."""
    inexact: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why its change promises nothing."""
    neutral: Neutral | None = None
    """Positions that a size makes other, so that the tiny model is proved without them."""
    caveats: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why a change of it can't keep the function, though it is resized."""
    untested: tuple[str, ...] = ()
    """Axes that the tiny model is proved without."""

    def ordered(self, axes: Sequence[str], order: Order) -> "Amendments":
        """The same, but with one word on how the units of some axes lie."""
        return replace(self, orders={**self.orders, **dict.fromkeys(axes, order)})
