"""What a proof has shown beyond shapes: further words of an inferred spec."""

from collections.abc import Mapping
from dataclasses import dataclass, field

NO_RULE = "its growth changed a tiny model's function, and no rule that was tried explains how"
"""Why an axis is not resized by an inferred spec."""
UNSEEN = "a tiny model computed the same with any numbers there, so that nothing was proved of it"


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
    per_head: bool | None = None
    """Whether fused queries, keys and values lie head by head; None: as names say."""
    by_head: bool = False
    """Whether a linear makes all that one head has together: queries, keys, values, gates."""
    interleaved: bool = False
    """Whether two halves of one dimension (gate, up) lie in turns."""
    turned: bool = False
    """Whether the parts of a sum lie the other way round."""
    gates: str = ""
    """What the gates of experts add up to."""
    unsigned: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why its units keep their signs."""
    frozen: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why it is not resized."""
    inexact: Mapping[str, str] = field(default_factory=dict)
    """Axis -> why its change promises nothing."""
    untested: tuple[str, ...] = ()
    """Axes that the tiny model is proved without."""
