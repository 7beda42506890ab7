"""Noise in the weights that read copies: copies with different readers get different gradients.

    W' = (copies of W, each with its share) + Z,       Z (copies) = 0

so what a reader computes stays. A reader's columns get it, where they are copies; and of copied
experts, whose outputs are added up with equal gates, what writes them. A tied embedding is to stay
copies, as it makes what all others read; but as a head it reads through the norm before it, whose
gains then differ from copy to copy, and add up to what they were:

    sum over copies i of E (g / k + z_i) x  =  E g x,       sum of z_i = 0

Who else reads that norm has equal columns too. What decides by rank (routers, whose near ties
rounding would decide anew) is left without.

Source: Samragh et al., HyperCloning, 2024, arXiv:2409.12903; here for any number of copies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import final

from streammap.architectures import axis_facts
from streammap.architectures.expression import Name
from streammap.architectures.model import Family, Model, TiedHead
from streammap.architectures.schema import DimSpec, Role
from streammap.errors import some
from streammap.planning import graph, maps
from streammap.planning.copies import zero_sum
from streammap.planning.copies.blocks import Dim
from streammap.planning.derived.noise import Noise, Stream
from streammap.planning.dim_maps import DimMaps
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, BlockMap

_ROLES: tuple[Role, ...] = ("in", "out")
_N_SHOWN = 3


@final
@dataclass(frozen=True, slots=True)
class NoiseRequest:
    """What is asked for, and what is known of the axes that grow."""

    decibels: float
    """Signal to noise: of a weight to what is added to it."""
    seed: int
    twins: Mapping[str, str] = field(default_factory=dict)
    """Axis -> its units in words, where training could not tell copies apart without noise."""
    sums: frozenset[str] = frozenset()
    """Expert axes: a token takes all copies of the experts that it takes, with equal gates."""


@final
@dataclass(frozen=True, slots=True)
class Grown:
    """A tensor of the result, with what it was grown from."""

    family: Family
    target: tuple[int, ...]
    """Its indices in the result."""
    before: LinearForm
    """What its dimensions were mapped from."""
    dims: Sequence[AxisMap | None]
    """The map of each dimension."""
    factor: float
    offset: float = 0.0
    """What is taken off at the end: a norm's own part of its gain."""

    @classmethod
    def head(
        cls,
        embedding: Family,
        name: str,
        before: LinearForm,
        dims: Sequence[AxisMap | None],
        factor: float,
    ) -> "Grown":
        """A head that is untied from its embedding: it reads what that one makes."""
        rule = replace(embedding.rule, kind="linear")
        spaces = tuple(replace(d, role="in") if d.role == "out" else d for d in embedding.dims)
        family = replace(embedding, rule=rule, name=name, dims=spaces)
        return cls(family, (0,) * len(embedding.indices), before, dims, factor)

    @property
    def key(self) -> str:
        """Its key."""
        return self.family.key(self.target)


@final
class Noising:
    """Adds noise to tensors of one result, and knows which axes it reached."""

    def __init__(
        self, model: Model, asked: NoiseRequest, hidden: Sequence[str], tied: Sequence[TiedHead]
    ) -> None:
        """Nothing is reached yet.

        Args:
            hidden: Names of the residual stream's width.
            tied: Heads that stay tied.
        """
        self._model, self._asked, self._hidden, self._tied = model, asked, hidden, tied
        self._reached: set[str] = set()
        self._routers: dict[str, None] = {}
        self._n = 0
        self._placed: dict[tuple[int, int], tuple[object, BlockMap | None]] = {}
        """By identities; the maps are kept, so that no other ones get their ids."""

    def added(self, form: LinearForm, grown: Grown, here: DimMaps) -> LinearForm:
        """The tensor with noise, if it reads copies.

        Args:
            form: The tensor without.
            here: The maps of its layer.
        """
        if any(tied.is_head(grown.key) or tied.reads(grown.key) for tied in self._tied):
            return form
        noise = self._along_a_dim(grown, here) or self._over_experts(grown, here)
        if noise is None:
            return form
        self._n += 1
        return graph.combine([(1.0, form), (1.0, noise)], dtype=form.spec.dtype, wide=form.wide)

    def notes(self) -> list[str]:
        """What a user might not expect."""
        asked = self._asked
        where = f"noise {asked.decibels:g} dB below the weights that read copies"
        notes = [f"{where} (seed {asked.seed}), adding up to 0 over these: {self._n} tensors"]
        if self._routers:
            shown = some(list(self._routers), limit=_N_SHOWN)
            notes.append(f"{shown}: no noise, rounding would choose other experts")
        hidden = self._model.architecture.spaces.get("hidden", ())
        if self._tied and any(axis in asked.twins for axis in hidden):
            notes.append(
                "the tied head: its noise is in the norm before it, as an embedding it is to stay "
                "copies"
            )
        left = [units for axis, units in asked.twins.items() if axis not in self._reached]
        if left:
            notes.append(
                f"copies ({', '.join(left)}) have equal gradients: no weight that reads them could "
                "take noise, so they stay equal in training until a blend or dropout"
            )
        return notes

    @property
    def is_in_vain(self) -> bool:
        """Whether no tensor got any."""
        return self._n == 0

    def _along_a_dim(self, grown: Grown, here: DimMaps) -> LinearForm | None:
        """Noise over the copies that a dimension reads."""
        found = [
            (d, m, place)
            for d in self._reading(grown, here)
            if isinstance(m := grown.dims[d], BlockMap)
            if (place := self._place(grown, d, m, here)) is not None
        ]
        if not found:
            return None
        if self._is_router(grown.family):
            self._routers[grown.family.name] = None
            return None
        for d, *_ in found:
            expression = grown.family.dims[d].expression
            self._reached |= frozenset() if expression is None else here.axes(expression)
        # Along one of several: what adds up to 0 there does so over the copies of all.
        d, m, place = max(found, key=lambda one: one[2].n_in)
        dims = list(self._dims(grown))
        dims[d] = Dim("fields", place.n_in, m.n_in, m)
        return self._mapped(grown, dims, d, place)

    def _reading(self, grown: Grown, here: DimMaps) -> list[int]:
        """The dimensions that read copies by shares."""
        dims = grown.family.dims
        if grown.family.rule.kind != "norm":
            return [d for d, dim in enumerate(dims) if dim.role == "in"]
        # The norm before a tied head has the shares that the head can't have, and its noise too.
        (*_, last) = dims
        if last.expression is None or not self._tied:
            return []
        reads, makes = (here.of(last.expression, role) for role in _ROLES)
        return [len(dims) - 1] if reads is not makes and grown.dims[-1] is reads else []

    def _place(self, grown: Grown, d: int, m: BlockMap, here: DimMaps) -> BlockMap | None:
        """Where the fields of a dimension go; None where it reads no copies."""
        expression = grown.family.dims[d].expression
        assert expression is not None
        reads, makes = (here.of(expression, role) for role in _ROLES)
        stands = makes if m is reads else reads
        known = id(m), id(stands)
        if known not in self._placed:
            self._placed[known] = (m, stands), zero_sum.placed(m, stands)
        return self._placed[known][1]

    def _over_experts(self, grown: Grown, here: DimMaps) -> LinearForm | None:
        """Noise over the copies of an expert, in what writes to the residual stream."""
        family = grown.family
        makes = [dim.expression for dim in family.dims if dim.role == "out"]
        reads = any(dim.role == "in" for dim in family.dims)
        if not reads or not any(isinstance(e, Name) and e.name in self._hidden for e in makes):
            return None
        for d, dim in enumerate(family.dims):
            axis = dim.expression.name if isinstance(dim.expression, Name) else ""
            m = grown.dims[d]
            if axis in self._asked.sums and dim.role == "keep" and isinstance(m, BlockMap):
                self._reached.add(axis)
                return self._in_a_stack(grown, d, m)
        for at, index in enumerate(family.indices):
            expression = family.index_expression(index)
            axis = expression.name if isinstance(expression, Name) else ""
            if axis in self._asked.sums:
                m = here.of(expression, "out")
                if isinstance(m, BlockMap):
                    self._reached.add(axis)
                    return self._one_by_one(grown, at, m)
        return None

    def _in_a_stack(self, grown: Grown, d: int, m: BlockMap) -> LinearForm | None:
        """Of a tensor that holds all experts."""
        fine = maps.reblocked(m, 1)
        place = zero_sum.placed(fine, None)
        if place is None:
            return None
        dims = list(self._dims(grown))
        dims[d] = Dim("each field", place.n_in, fine.n_in, fine)
        return self._mapped(grown, dims, d, place)

    def _mapped(self, grown: Grown, dims: Sequence[Dim], d: int, place: BlockMap) -> LinearForm:
        """Noise whose fields are along dimension `d`, at their places."""
        noise = self._noise(grown, dims, Stream(self._asked.seed, grown.key))
        return graph.map_dims(noise, [place if i == d else None for i in range(len(dims))])

    def _one_by_one(self, grown: Grown, at: int, m: BlockMap) -> LinearForm | None:
        """Of one expert's tensor: each field is a tensor of its own, which the copies share."""
        fine, i = maps.reblocked(m, 1), grown.target[at]
        if len(fine.rows[i]) != 1:
            return None
        group = zero_sum.copies(fine)[fine.rows[i][0][0]]
        fields = zero_sum.rows(len(group))[group.index(i)]
        if not fields:
            return None
        first = (*grown.target[:at], group[0], *grown.target[at + 1 :])
        of_copies = grown.family.key(first)
        parts = []
        for number, coefficient in fields:
            follows = zero_sum.follows(len(group), number)
            partner = f"{of_copies} {number - 1}" if follows else ""
            stream = Stream(self._asked.seed, f"{of_copies} {number}", partner)
            parts.append((coefficient, self._noise(grown, self._dims(grown), stream)))
        return graph.combine(parts)

    def _noise(self, grown: Grown, dims: Sequence[Dim], stream: Stream) -> LinearForm:
        decibels, factor = self._asked.decibels, grown.factor
        return graph.derive(Noise(grown.before, dims, stream, decibels=decibels, factor=factor))

    def _dims(self, grown: Grown) -> Sequence[Dim]:
        """How noise is cut along the dimensions that are not its copies'."""
        shape = grown.before.spec.shape
        return [
            self._dim(about, n, m)
            for about, n, m in zip(grown.family.dims, shape, grown.dims, strict=True)
        ]

    def _dim(self, about: DimSpec, before: int, m: AxisMap | None) -> Dim:
        size = before if m is None else m.n_out
        blocks = m if isinstance(m, BlockMap) else None
        if self._is_stack(about):
            return Dim("each", size, before, blocks)
        is_copied = about.role == "out" and blocks is not None
        return Dim("copies" if is_copied else "whole", size, before, blocks)

    def _is_stack(self, about: DimSpec) -> bool:
        """Whether a dimension counts experts, whose weights have levels of their own."""
        spec, e = self._model.architecture, about.expression
        return about.role == "keep" and isinstance(e, Name) and axis_facts.is_expert(spec, e.name)

    def _is_router(self, family: Family) -> bool:
        """Whether a family's outputs are scores of experts."""
        spec = self._model.architecture
        return any(
            axis_facts.is_expert(spec, axis)
            for dim in family.dims
            if dim.role == "out" and dim.expression is not None
            for axis in spec.axes_in(dim.expression)
        )
