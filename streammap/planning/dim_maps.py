"""The map of a dimension, from the maps of the axes that make it up.

Products of axes are Kronecker products, sums stand side by side. One thing is not a product: query
heads of grouped-query attention. They lie as kv_heads * q_group, but any map of heads that keeps
to the groups is allowed, so that pair counts as the axis heads. Where something stands between the
two, as in kv_heads*(q_group+2), the sum is taken apart first and put together again after:

    map of a*(b+c)  =  (put back)  .  [map of a*b, map of a*c]  .  (take apart)
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from streammap.architectures import expression as expressions
from streammap.architectures.expression import Expression, Name, Number, Operation
from streammap.architectures.schema import Architecture, Role
from streammap.errors import ArchitectureError
from streammap.planning import maps
from streammap.planning.by_layer.shared_rows import SharedRows
from streammap.planning.maps import AxisMap, BlockMap, MapPair


class DimMaps:
    """Maps of dimension expressions for given maps of axes; each is worked out once."""

    def __init__(
        self,
        spec: Architecture,
        pairs: Mapping[str, MapPair],
        before: Mapping[str, int],
        after: Mapping[str, int],
    ) -> None:
        self._spec, self._pairs, self._before, self._after = spec, pairs, before, after
        self._joint: dict[str, dict[str, str]] = {}
        for shared in spec.shared_heads:
            self._joint.setdefault(shared.kv, {})[shared.group] = shared.heads
        self._known: dict[tuple[Expression, bool], AxisMap | None] = {}
        self._named: dict[Expression, frozenset[str]] = {}
        self._rows = SharedRows()
        self._elsewhere: DimMaps | None = None
        self._own: frozenset[str] = frozenset()

    def of_layer(self, pairs: Mapping[str, MapPair]) -> "DimMaps":
        """These maps with those of one layer; what is made of no axis of these is shared."""
        layer = DimMaps(self._spec, {**self._pairs, **pairs}, self._before, self._after)
        layer._elsewhere, layer._own = self, frozenset(pairs)
        layer._named, layer._rows = self._named, self._rows
        return layer

    def of(self, expression: Expression, role: Role) -> AxisMap | None:
        """The map of a dimension; None where it stays."""
        if self._elsewhere is not None and self._own.isdisjoint(self.axes(expression)):
            return self._elsewhere.of(expression, role)
        reads = role == "in"
        place = (expression, reads)
        if place not in self._known:
            m = None
            if any(self._changes(name) for name in self.axes(expression)):
                m = self._map(expression, reads)
            if m is not None and self._elsewhere is not None:
                m = self._rows.of(m)
            self._known[place] = None if m is None or m.is_identity else m
        return self._known[place]

    def axes(self, expression: Expression) -> frozenset[str]:
        """Axes and aliases that an expression is made of, query heads for their kv heads too."""
        if expression not in self._named:
            found: set[str] = set()
            waiting = list(expressions.names(expression))
            while waiting:
                name = waiting.pop()
                found.add(name)
                if name in self._spec.aliases:
                    waiting += expressions.names(self._spec.aliases[name])
            for kv, groups in self._joint.items():
                if kv in found:
                    found |= {heads for group, heads in groups.items() if group in found}
            self._named[expression] = frozenset(found)
        return self._named[expression]

    def _changes(self, name: str) -> bool:
        return name in self._pairs or self._before.get(name) != self._after.get(name)

    def _map(self, expression: Expression, reads: bool) -> AxisMap:
        match expression:
            case Name(name) if name in self._pairs:
                return self._pairs[name].into if reads else self._pairs[name].out
            case Name(name) if name in self._spec.aliases:
                return self._map(self._spec.aliases[name], reads)
            case Name(name):
                if self._before[name] != self._after[name]:
                    raise ArchitectureError(f"{name} changes its size, but has no map")
                return BlockMap((((0, 1.0),),), 1, self._before[name])
            case Number(value):
                return maps.identity(value)
            case Operation("+"):
                return maps.concatenated(
                    [self._map(t, reads) for t in self._split("+", expression)]
                )
            case Operation("*"):
                return self._product(self._split("*", expression), reads)
            case _:
                raise ArchitectureError(f"{expression}: a dimension is a sum of products")

    def _product(self, factors: Sequence[Expression], reads: bool) -> AxisMap:
        # A kv axis with its group behind it is one axis, the query heads: their map need not be a
        # product of the two. With a sum in between ("kv_heads*(q_group+2)"), take the sum apart.
        for i, factor in enumerate(factors[:-1]):
            groups = self._joint.get(factor.name, {}) if isinstance(factor, Name) else {}
            following = factors[i + 1]
            if isinstance(following, Name) and following.name in groups:
                joined = Name(groups[following.name])
                return self._product([*factors[:i], joined, *factors[i + 2 :]], reads)
            later = (name for f in factors[i + 1 :] for name in expressions.names(f))
            if any(name in groups for name in later):
                return self._taken_apart(factors, i + 1, reads)
        product = self._map(factors[0], reads)
        for factor in factors[1:]:
            product = maps.kron(product, self._map(factor, reads))
        return product

    def _taken_apart(self, factors: Sequence[Expression], at: int, reads: bool) -> AxisMap:
        """The map of a product whose factor `at` is a sum.

        a*(b+c) is, for each a, a row of b and a row of c. Taken apart, all a*b stand first and all
        a*c after them: there a*b can be the query heads. Source and result are rearranged by their
        own sizes.
        """
        first, rest = list(factors[:at]), list(factors[at + 1 :])
        terms = self._split("+", factors[at])
        if isinstance(factors[at], Number):  # 3 is 1 + 1 + 1
            terms = [Number(1)] * factors[at].value  # type: ignore[union-attr]
        if len(terms) < 2:
            raise ArchitectureError(f"{factors[at]} stands between kv heads and their group")
        parts = [self._map(_as_product([*first, term, *rest]), reads) for term in terms]
        whole = maps.concatenated(parts)
        # A permutation's transpose is its inverse.
        apart = self._rearranged(first, terms, rest, self._before)
        back = maps.transposed(self._rearranged(first, terms, rest, self._after))
        return maps.compose(back, maps.compose(whole, apart))

    def _rearranged(
        self,
        first: Sequence[Expression],
        terms: Sequence[Expression],
        rest: Sequence[Expression],
        sizes: Mapping[str, int],
    ) -> AxisMap:
        """The permutation from first*(sum of terms)*rest to the sum of first*term*rest."""
        n_first, block = (
            self._spec.size(_as_product(first), sizes),
            self._spec.size(_as_product(rest), sizes),
        )
        lengths = [self._spec.size(term, sizes) for term in terms]
        rows = []
        offset, total = 0, sum(lengths)
        for length in lengths:
            for i in range(n_first):
                start = i * total + offset
                rows += [((start + j, 1.0),) for j in range(length)]
            offset += length
        return BlockMap(tuple(rows), n_first * total, block)

    def _split(self, operator: Literal["*", "+"], expression: Expression) -> list[Expression]:
        """The factors of a product, or the terms of a sum, aliases taken apart."""
        match expression:
            case Operation(same, left, right) if same == operator:
                return [*self._split(operator, left), *self._split(operator, right)]
            case Name(name) if name not in self._pairs and name in self._spec.aliases:
                return self._split(operator, self._spec.aliases[name])
            case _:
                return [expression]


def _as_product(factors: Sequence[Expression]) -> Expression:
    kept = [factor for factor in factors if factor != Number(1)]
    product: Expression = kept[0] if kept else Number(1)
    for factor in kept[1:]:
        product = Operation("*", product, factor)
    return product
