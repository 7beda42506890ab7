"""What a change of axes does to gradients, and to the means of them that an optimizer keeps.

A result computes what its source does, so that the gradient of one says what that of the other is.
Where units are copied (out) and readers take a share of each copy (into), with into^T out = I,

    x' = out x,  dL/dx' = into dL/dx,  W' = out W into^T    ->    dL/dW' = into (dL/dW) out^T

so that gradients take the maps of the weights with the two roles exchanged, and 1 / c where a
weight takes a factor c that the forward pass undoes. The copies of a gradient add up to the old
one: with even shares each gets an even part. On the way down the exchange is the chain rule.

    exp_avg      a mean of gradients: the exchanged maps
    exp_avg_sq   a mean of their squares: the exchanged maps, each coefficient squared

Kv heads are read whole, by query heads: a copy's gradient is the share that these have of it. Where
readers have unequal shares in hidden units (a split, noise) a norm before them sends back a part
that is even, and noise one that no mean knows: copies then have parts that add up to the gradient,
and may differ each from its own.

Where several gradients are added up, their squares add up as if they were independent. Layers are
not read one by another as units are: a copy of a layer gets a copy of its state, a mean of layers
the mean of theirs, and a zero-initialised layer begins at 0, as its gradients do.

Source: the chain rule; squares, Shen et al., arXiv:2203.06211; resets, SPARKLING, arXiv:2602.02472.
"""

from collections.abc import Mapping, Sequence
from math import gcd
from types import MappingProxyType
from typing import TYPE_CHECKING

from streammap.architectures.schema import Architecture
from streammap.errors import PlanError
from streammap.planning import maps
from streammap.planning.maps import AxisMap, BlockMap, MapPair

if TYPE_CHECKING:
    from streammap.planning.plan import Moment


def exchanged(
    pairs: Mapping[str, MapPair],
    moment: "Moment",
    spec: Architecture,
    beside: Mapping[str, MapPair] = MappingProxyType({}),
) -> dict[str, MapPair]:
    """The maps of gradients that go with maps of weights, axis by axis.

    Args:
        beside: Maps of further axes that hold in the same layers.

    Raises:
        PlanError: new units that can't be told from old ones are to begin at 0.
    """
    read = dict(pairs)
    for shared in spec.shared_heads:
        kv, heads = pairs.get(shared.kv), {**beside, **pairs}.get(shared.heads)
        if kv is not None and heads is not None:
            read[shared.kv] = MapPair(kv.out, _shares_of_kv(kv.into, heads.into))
    return {axis: _pair(axis, pair, moment) for axis, pair in read.items()}


def _shares_of_kv(kv: AxisMap, heads: AxisMap) -> AxisMap:
    """The shares of copied kv heads: those of the query heads that read each, on average."""
    if not isinstance(kv, BlockMap) or not isinstance(heads, BlockMap):
        return kv
    kv, heads = maps.reblocked(kv, 1), maps.reblocked(heads, 1)
    if kv.longest != 1 or heads.longest != 1:
        return kv  # merged heads
    group, source_group = heads.n_out // kv.n_out, heads.n_in // kv.n_in
    rows = []
    for i, row in enumerate(kv.rows):
        readers = heads.rows[i * group : (i + 1) * group]
        share = sum(value for reader in readers for _, value in reader) / source_group
        rows.append(tuple((j, share) for j, _ in row))
    return BlockMap(tuple(rows), kv.n_in)


def repeated(layers: AxisMap) -> frozenset[int]:
    """Layers of the result that have nothing but what layers before them have."""
    return _later([{j for j, _ in layers.members(i)} for i in range(layers.n_out)])


def _pair(axis: str, pair: MapPair, moment: "Moment") -> MapPair:
    out, into = pair.into, pair.out
    if moment.resets:
        new = _new_units(axis, pair.out)
        out, into = _emptied(out, new), _emptied(into, new)
    if moment.power == 2:
        out, into = maps.squared(out), maps.squared(into)
    return MapPair(out, into)


def _new_units(axis: str, out: AxisMap) -> tuple[frozenset[int], int]:
    """Blocks of the result that are further copies of one, or made of nothing; and their size."""
    if not isinstance(out, BlockMap):
        if out.n_out <= out.n_in:
            return frozenset(), 1
        raise PlanError(
            f"{axis}: --new-state zero, but a dense matrix mixes its units: none is new",
            hint="give --new-state copy",
        )
    return _later([{j for j, _ in row} for row in out.rows]), out.block


def _emptied(m: AxisMap, new: tuple[frozenset[int], int]) -> AxisMap:
    """The map with nothing in the rows of new blocks."""
    blocks, size = new
    if not isinstance(m, BlockMap) or not blocks:
        return m
    fine = maps.reblocked(m, gcd(m.block, size))
    rows = (() if i * fine.block // size in blocks else row for i, row in enumerate(fine.rows))
    return BlockMap(tuple(rows), fine.n_in_blocks, fine.block)


def _later(sources: Sequence[set[int]]) -> frozenset[int]:
    """Places of those that have nothing that was not there before them."""
    seen: set[int] = set()
    new = set()
    for i, one in enumerate(sources):
        if one <= seen:
            new.add(i)
        seen |= one
    return frozenset(new)
