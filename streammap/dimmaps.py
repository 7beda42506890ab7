"""The map of a dimension, from the maps of the axes that make it up.

Products of axes are Kronecker products, sums stand side by side. One thing is not a product: query
heads of grouped-query attention. They lie as kv_heads * q_group, but any map of heads that keeps
to the groups is allowed, so that pair counts as the axis heads. Where something stands between the
two, as in kv_heads*(q_group+2), the sum is taken apart first and put together again after:

    map of a*(b+c)  =  (put back)  .  [map of a*b, map of a*c]  .  (take apart)
"""

from collections.abc import Mapping, Sequence

from streammap import expression as expressions
from streammap import maps
from streammap.architecture import Architecture, Role
from streammap.errors import ArchitectureError
from streammap.expression import Expression, Name, Number, Operation
from streammap.maps import AxisMap, BlockMap, MapPair


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
        self._joint = joint_axes(spec)
        self._known: dict[tuple[Expression, bool], AxisMap | None] = {}

    def of(self, expression: Expression, role: Role) -> AxisMap | None:
        """The map of a dimension; None where it stays."""
        reads = role == "in"
        place = (expression, reads)
        if place not in self._known:
            found = None
            if any(self._changes(name) for name in expressions.names(expression)):
                found = self._map(expression, reads)
            self._known[place] = None if found is None or found.is_identity else found
        return self._known[place]

    def _changes(self, name: str) -> bool:
        if name in self._pairs or self._before.get(name) != self._after.get(name):
            return True
        alias = self._spec.aliases.get(name)
        return alias is not None and any(self._changes(n) for n in expressions.names(alias))

    def _map(self, expression: Expression, reads: bool) -> AxisMap:
        match expression:
            case Name(name) if name in self._pairs:
                return self._pairs[name].into if reads else self._pairs[name].out
            case Name(name) if name in self._spec.aliases:
                return self._map(self._spec.aliases[name], reads)
            case Name(name):
                if self._before[name] != self._after[name]:
                    raise ArchitectureError(f"{name} changes its size, and nothing says how")
                return BlockMap((((0, 1.0),),), 1, self._before[name])
            case Number(value):
                return maps.identity(value)
            case Operation("+"):
                return maps.concatenated([self._map(t, reads) for t in self._terms(expression)])
            case Operation("*"):
                return self._product(self._factors(expression), reads)
            case _:
                raise ArchitectureError(f"{expression}: a dimension is a sum of products")

    def _product(self, factors: Sequence[Expression], reads: bool) -> AxisMap:
        for i, factor in enumerate(factors[:-1]):
            groups = self._joint.get(factor.name, {}) if isinstance(factor, Name) else {}
            following = factors[i + 1]
            if isinstance(following, Name) and following.name in groups:
                joined = Name(groups[following.name])
                return self._product([*factors[:i], joined, *factors[i + 2 :]], reads)
            later = (name for f in factors[i + 1 :] for name in expressions.names(f))
            if any(name in groups for name in later):
                return self._taken_apart(factors, i + 1, reads)
        found = self._map(factors[0], reads)
        for factor in factors[1:]:
            found = maps.kron(found, self._map(factor, reads))
        return found

    def _taken_apart(self, factors: Sequence[Expression], at: int, reads: bool) -> AxisMap:
        """The map of a product whose factor `at` is a sum."""
        first, rest = list(factors[:at]), list(factors[at + 1 :])
        terms = self._terms(factors[at])
        if isinstance(factors[at], Number):
            terms = [Number(1)] * factors[at].value  # type: ignore[union-attr]
        if len(terms) < 2:
            raise ArchitectureError(f"{factors[at]} stands between kv heads and their group")
        parts = [self._map(_as_product([*first, term, *rest]), reads) for term in terms]
        whole = maps.concatenated(parts)
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
        n_first, block = self._size(_as_product(first), sizes), self._size(_as_product(rest), sizes)
        lengths = [self._size(term, sizes) for term in terms]
        rows = []
        offset, total = 0, sum(lengths)
        for length in lengths:
            for i in range(n_first):
                at = i * total + offset
                rows += [((at + j, 1.0),) for j in range(length)]
            offset += length
        return BlockMap(tuple(rows), n_first * total, block)

    def _size(self, expression: Expression, sizes: Mapping[str, int]) -> int:
        def value_of(name: str) -> int:
            alias = self._spec.aliases.get(name)
            return self._size(alias, sizes) if alias is not None else sizes[name]

        return expressions.evaluate(expression, value_of, _no_call)

    def _factors(self, expression: Expression) -> list[Expression]:
        match expression:
            case Operation("*", left, right):
                return [*self._factors(left), *self._factors(right)]
            case Name(name) if name not in self._pairs and name in self._spec.aliases:
                return self._factors(self._spec.aliases[name])
            case _:
                return [expression]

    def _terms(self, expression: Expression) -> list[Expression]:
        match expression:
            case Operation("+", left, right):
                return [*self._terms(left), *self._terms(right)]
            case Name(name) if name not in self._pairs and name in self._spec.aliases:
                return self._terms(self._spec.aliases[name])
            case _:
                return [expression]


def joint_axes(spec: Architecture) -> dict[str, dict[str, str]]:
    """Kv heads axis -> {group axis: query heads axis}."""
    found: dict[str, dict[str, str]] = {}
    for axis in spec.axes.values():
        if axis.kind != "group":
            continue
        match axis.sources:
            case (Operation("/", Name(heads), Name(kv_heads)),):
                found.setdefault(kv_heads, {})[axis.name] = heads
            case _:
                raise ArchitectureError(
                    f"{spec.name}.toml: {axis.name} is a group, expected '=heads/kv_heads'"
                )
    return found


def _as_product(factors: Sequence[Expression]) -> Expression:
    kept = [factor for factor in factors if factor != Number(1)]
    found: Expression = kept[0] if kept else Number(1)
    for factor in kept[1:]:
        found = Operation("*", found, factor)
    return found


def _no_call(function: str, arguments: tuple[str, ...]) -> int:
    raise ArchitectureError(f"{function}({', '.join(arguments)}) can't stand in a dimension")
