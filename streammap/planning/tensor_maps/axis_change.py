"""What is asked of a remap: the maps of a model's axes, and what goes with them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from streammap.architectures.axis_facts import Layer
from streammap.architectures.key_pattern import KeyPattern
from streammap.architectures.schema import Architecture
from streammap.planning.copies.apart import ApartRequest
from streammap.planning.maps import AxisMap, MapPair
from streammap.planning.optimizer import dual
from streammap.planning.plan import Moment

Rule = Literal["exact", "reference"]
RULES: tuple[Rule, ...] = ("exact", "reference")


@dataclass(frozen=True, slots=True)
class NormCompensation:
    """Correction of the norms over an axis that grows by zero units (see compensation.py)."""

    map: AxisMap
    """Map of the norms' gains and biases: those of new units are 0."""
    gain: float
    """Factor on the gains."""
    means: bool = False
    """Whether new units of what makes the axis hold the mean of the others, instead of 0."""
    both: bool = False
    """Whether readers have the producers' map, so that the norm before a tied head is no other."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange:
    """The maps that axes have in one layer of the result, or in several that are alike."""

    pairs: Mapping[str, MapPair]
    fills: Mapping[str, NormCompensation] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class AxisChange:
    """The maps of a model's axes, and what goes with them."""

    pairs: Mapping[str, MapPair]
    """Width or expert axis, or alias -> its maps; others stay."""
    layers: Mapping[str, AxisMap]
    """Depth axis -> R or G; others stay."""
    sizes: Mapping[str, int]
    """Axis -> new size, for each axis that changes."""
    rule: Rule
    embedding_factor: float
    """Factor of the rule "reference" on embeddings."""
    fills: Mapping[str, NormCompensation] = field(default_factory=dict)
    """Axis -> how its norms are compensated, where it grows by zero units."""
    silent: Mapping[str, frozenset[int]] = field(default_factory=dict)
    """Depth axis -> zero-initialised layers of the result: what they add to the stream is 0."""
    factors: tuple[tuple[tuple[KeyPattern, ...], float], ...] = ()
    """Further factors on tensors."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """config.json fields to set."""
    untie: bool = False
    """Whether a tied head gets a tensor of its own."""
    by_layer: Mapping[Layer, LayerChange] = field(default_factory=dict)
    """Layer of the result -> the maps of axes that have others in each; they are not in `pairs`."""
    families: Mapping[str, Mapping[str, AxisMap]] = field(default_factory=dict)
    """Family -> depth axis -> R or G of its tensors, where it is another one than in `layers`."""
    signed: bool = False
    """Whether maps negate units. A norm is odd in each, so that its gain takes no sign."""
    apart: ApartRequest = field(default_factory=ApartRequest)
    """What tells copies apart."""


def of_gradients(change: AxisChange, moment: Moment, spec: Architecture) -> AxisChange:
    """The change of gradients that goes with one of weights; factors are told by the moment."""
    silent = {
        axis: change.silent.get(axis, frozenset())
        | (dual.repeated(m) if moment.resets else frozenset())
        for axis, m in change.layers.items()
    }
    known = {
        id(one): replace(one, pairs=dual.exchanged(one.pairs, moment, spec, change.pairs))
        for one in dict.fromkeys(change.by_layer.values())
    }
    return replace(
        change,
        pairs=dual.exchanged(change.pairs, moment, spec),
        silent={axis: layers for axis, layers in silent.items() if layers},
        # Nothing reads a unit that holds the mean of the others: its gradient is 0.
        fills={axis: replace(fill, means=False) for axis, fill in change.fills.items()},
        by_layer={layer: known[id(one)] for layer, one in change.by_layer.items()},
    )
