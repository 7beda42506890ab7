"""The result's tensors, family by family: maps on dimensions, roles, and what keeps the function.

Layers and experts that stand in a key are dimensions like others: their maps choose source tensors.
An axis may have maps of its own in each layer of the result: a tensor's layer says which are taken.
Compensations: the norm before a tied head takes the reader's map, factors of the forward pass are
undone, norms over axes with zero units are corrected, zero-initialised layers add nothing.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammap.architectures import axis_facts
from streammap.architectures.axis_facts import Layer
from streammap.architectures.expression import Name
from streammap.architectures.key_pattern import first_match, sample
from streammap.architectures.model import Family, Model, TiedHead
from streammap.architectures.schema import Depth, DimSpec, Factor, Role
from streammap.errors import ArchitectureError, PlanError, some
from streammap.planning import graph, maps
from streammap.planning.copies.apart import Apart, ApartRequest
from streammap.planning.copies.noising import Grown
from streammap.planning.derived import mean_along
from streammap.planning.dim_maps import DimMaps
from streammap.planning.graph import LinearForm
from streammap.planning.maps import AxisMap, MapPair
from streammap.planning.plan import Plan
from streammap.planning.tensor_maps.axis_change import (
    AxisChange,
    LayerChange,
    NormCompensation,
    of_gradients,
)


def value_of(factor: Factor, model: Model, sizes: Mapping[str, int]) -> float:
    """The number that a factor of a spec stands for, for given sizes."""
    base = model.architecture.size(factor.expression, sizes)
    return float(base**factor.exponent) if base else 1.0


@dataclass(frozen=True, slots=True)
class _Here:
    """The maps that hold in one layer, or outside of layers."""

    maps: DimMaps
    fills: Mapping[str, NormCompensation]


class Remapping:
    """One remap: the maps of each (dimension, role), worked out once."""

    def __init__(
        self, plan: Plan, model: Model, change: AxisChange, sizes: Mapping[str, int]
    ) -> None:
        self._moment = None if plan.moment is None else plan.moment.of_gradients
        if self._moment is not None:
            change = of_gradients(change, self._moment, model.architecture)
        self._plan, self._model, self._change, self._sizes = plan, model, change, sizes
        stacked = {
            name: _stacked(m, change.silent.get(name, frozenset()))
            for name, m in change.layers.items()
        }
        pairs = {**stacked, **change.pairs}
        self._maps = DimMaps(model.architecture, pairs, model.sizes, sizes)
        self._everywhere = _Here(self._maps, change.fills)
        self._by_change: dict[LayerChange, _Here] = {}
        self._tied = () if change.untie else model.tied_heads
        self._last = {
            axis: sizes[axis] - 1 for axis in model.architecture.depth_axes if axis in sizes
        }
        self._hidden = axis_facts.names_of(model, model.architecture.spaces.get("hidden", ()))
        self._inverted: dict[int, tuple[AxisMap, list[list[tuple[int, float]]]]] = {}
        """By identity; the map is kept, so that no other one gets its id."""
        self._sizes_of: dict[int, tuple[AxisMap, AxisMap]] = {}
        """The same for maps without their signs."""
        # Noise and parts that add up are of weights: neither gradients nor steps follow them.
        apart = change.apart if plan.moment is None else ApartRequest()
        self.apart = Apart(model, apart, self._hidden, self._tied)
        self.n_after = 0
        """Tensors of layers after the stack (multi-token prediction), which a new depth drops."""

    def count(self, family: Family) -> int:
        """About how many tensors of the result come from a family."""
        n = len(family.members)
        here = self._here(self._layer(family, min(family.members)))
        for index in family.indices:
            m = self._index_map(family, index, here)
            if m is not None:
                n = -(-n * m.n_out // max(1, m.n_in))
        return n

    def family(self, family: Family) -> dict[str, LinearForm]:
        """The result's tensors of one family."""
        # Walk the source, not the result: a family need not have all layers, and only its members
        # can give anything. Each is sent to every result whose row of the maps has it, with the
        # product of the coefficients of all its indices (layer, expert).
        parts: dict[tuple[int, ...], list[tuple[float, str]]] = {}
        # In order, so that sums don't depend on how the source is sharded.
        for values, key in sorted(family.members.items()):
            if self._is_tail(family, values):
                self.n_after += 1
                continue
            for target, coefficient in self._places(family, values):
                parts.setdefault(target, []).append((coefficient, key))
        self._check_first(family)
        made: dict[str, LinearForm] = {}
        for target, row in parts.items():
            whole = self._whole(family, target, row)
            if whole:
                key = family.key(target)
                silent = self._is_silent(family, target)
                made[key] = self._tensor(family, target, whole, silent=silent)
                if self._is_one(family, target, key):
                    made[key] = graph.shift(graph.scale(made[key], 0.0), 1.0)
        return made

    def _places(
        self, family: Family, values: tuple[int, ...]
    ) -> list[tuple[tuple[int, ...], float]]:
        """Where a source tensor goes: indices of the result, each with a coefficient."""
        after: list[Sequence[tuple[int, float]]] = []
        for at, (index, value) in enumerate(zip(family.indices, values, strict=True)):
            m = self._layers(family).get(index)
            if m is None:
                after.append(((value, 1.0),))
            elif self._is_of_first(family, at):
                # What is first in the result takes it, though layer 0 itself may be dropped.
                after.append(((0, 1.0),))
            else:
                after.append(self._columns(m)[value])
        found: list[tuple[tuple[int, ...], float]] = []
        # Layers come first: which experts there are may differ from one to another.
        for row in itertools.product(*after):
            here = self._here(self._layer(family, tuple(i for i, _ in row)))
            places: list[tuple[tuple[int, ...], float]] = [((), 1.0)]
            for index, (i, coefficient) in zip(family.indices, row, strict=True):
                m = self._index_map(family, index, here)
                options: Sequence[tuple[int, float]] = ((i, coefficient),)
                if m is not None and index not in self._change.layers:
                    options = self._columns(m)[i]
                places = [((*t, j), c * d) for t, c in places for j, d in options]
            found += places
        return found

    def _layers(self, family: Family) -> Mapping[str, AxisMap]:
        """Depth axis -> the map of a family's layers."""
        own = self._change.families.get(family.name)
        return self._change.layers if own is None else {**self._change.layers, **own}

    def _is_of_first(self, family: Family, at: int) -> bool:
        """Whether a family is in the first layer alone, where that is of another kind."""
        depth = self._model.architecture.depth.get(family.indices[at], Depth())
        return depth.first and all(values[at] == 0 for values in family.members)

    def _layer(self, family: Family, target: tuple[int, ...]) -> Layer | None:
        """The layer of the result that a tensor is in."""
        depths = self._model.architecture.depth_axes
        return next(
            (at for at in zip(family.indices, target, strict=True) if at[0] in depths), None
        )

    def _here(self, layer: Layer | None) -> _Here:
        """The maps of a layer of the result."""
        change = None if layer is None else self._change.by_layer.get(layer)
        if change is None:
            return self._everywhere
        if change not in self._by_change:
            fills = {**self._change.fills, **change.fills}
            self._by_change[change] = _Here(self._maps.of_layer(change.pairs), fills)
        return self._by_change[change]

    def _check_first(self, family: Family) -> None:
        """Refuse copies of a first layer that lacks what the others have.

        ModernBERT's layer 0 has no norm before its attention: only as layer 0 does it work.
        """
        for at, index in enumerate(family.indices):
            m = self._layers(family).get(index)
            depth = self._model.architecture.depth.get(index, Depth())
            if m is None or not depth.first or any(values[at] == 0 for values in family.members):
                continue
            for i in range(1, m.n_out):
                if any(j == 0 for j, _ in m.members(i)):
                    raise PlanError(
                        f"{index} {i} would come from layer 0, which has no {family.name}: the "
                        "first layer is of another kind",
                        hint="give groups in which layer 0 stands alone, and is the first",
                    )

    def untied(self, targets: Mapping[str, LinearForm]) -> dict[str, LinearForm]:
        """A tensor of its own for each tied head: the embedding as its reader sees it."""
        made: dict[str, LinearForm] = {}
        for tied in self._model.tied_heads:
            for family in self._model.families:
                for key in family.members.values():
                    if not tied.is_embedding(key):
                        continue
                    form = self._plan.targets[key]
                    dims = [
                        None
                        if d.expression is None or d.role == "keep"
                        else self._maps.of(d.expression, "in")
                        for d in family.dims
                    ]
                    name = sample(tied.head.head[0])
                    mapped = graph.map_dims(form, dims)
                    if name not in self._plan.targets:
                        factor = self._head_factor(tied)
                        factor = self._moment.factor(factor) if self._moment else factor
                        grown = Grown.head(family, name, form, dims, factor)
                        made[name] = self.apart.made(graph.scale(mapped, factor), grown, self._maps)
                    break
            made |= self._copies(tied, targets)
        return made

    def _copies(self, tied: TiedHead, targets: Mapping[str, LinearForm]) -> dict[str, LinearForm]:
        """Tensors that other parts shared, and look for under their own names once untied."""
        return {
            key.removesuffix(end) + name: form
            for name, end in tied.head.copies.items()
            for key, form in targets.items()
            if key.endswith(end) and key.removesuffix(end) + name not in targets
        }

    def _index_map(self, family: Family, index: str, here: _Here) -> AxisMap | None:
        if index in self._change.layers:
            return self._layers(family)[index]
        expression = family.index_expression(index)
        if isinstance(expression, Name) and expression.name not in self._model.sizes:
            return None
        return here.maps.of(expression, "out")

    def _columns(self, m: AxisMap) -> list[list[tuple[int, float]]]:
        """Source index -> (result index, coefficient).

        A result that nothing maps to takes 0 times the first source: its tensors must be there.
        """
        if id(m) not in self._inverted:
            columns: list[list[tuple[int, float]]] = [[] for _ in range(m.n_in)]
            for i in range(m.n_out):
                for j, coefficient in m.members(i) or ((0, 0.0),):
                    columns[j].append((i, coefficient))
            self._inverted[id(m)] = m, columns
        return self._inverted[id(m)][1]

    def _is_tail(self, family: Family, values: tuple[int, ...]) -> bool:
        return any(
            index in self._change.layers and value >= self._model.sizes[index]
            for index, value in zip(family.indices, values, strict=True)
        )

    def _is_silent(self, family: Family, target: tuple[int, ...]) -> bool:
        is_new = bool(self._silent_axes(family, target))
        # Nothing behind a zero has a gradient: of a moment all that is in a new layer is 0.
        return is_new and (self._moment is not None or axis_facts.writes(family, self._hidden))

    def _is_one(self, family: Family, target: tuple[int, ...], key: str) -> bool:
        """Whether a tensor of a zero-initialised layer is to be 1."""
        depths = self._model.architecture.depth
        return self._moment is None and any(
            axis in depths and first_match(depths[axis].ones, key) is not None
            for axis in self._silent_axes(family, target)
        )

    def _silent_axes(self, family: Family, target: tuple[int, ...]) -> list[str]:
        """Depth axes by which a tensor of the result is in a zero-initialised layer."""
        return [
            index
            for index, value in zip(family.indices, target, strict=True)
            if value in self._change.silent.get(index, ())
        ]

    def _whole(
        self, family: Family, target: tuple[int, ...], row: list[tuple[float, str]]
    ) -> tuple[tuple[float, str], ...]:
        """The row of one result tensor, if the layers that it mixes all have it."""
        # Fewer parts than the maps have members: some of the layers lack the tensor, and a mean of
        # the others would be of another kind of layer.
        here, expected = self._here(self._layer(family, target)), 1
        for index, i in zip(family.indices, target, strict=True):
            m = self._index_map(family, index, here)
            expected *= 1 if m is None else max(1, len(m.members(i)))
        for at, index in enumerate(family.indices):
            depth = self._model.architecture.depth.get(index, Depth())
            if depth.first and index in self._change.layers:
                if self._is_of_first(family, at):
                    return tuple(row)
                if target[at] == 0 and not any(values[at] == 0 for values in family.members):
                    return ()
        if len(row) == expected:
            return tuple(row)
        have = [key for _, key in row]
        raise PlanError(
            f"{family.key(target)} would mix {expected} layers, of which {len(row)} have it "
            f"({some(have)}): layers of different kinds can't be mixed",
            hint="give groups of layers of one kind, as `streammap inspect` lists them",
        )

    def _tensor(
        self,
        family: Family,
        target: tuple[int, ...],
        row: tuple[tuple[float, str], ...],
        *,
        silent: bool = False,
    ) -> LinearForm:
        key, here = family.key(target), self._here(self._layer(family, target))
        fill = self._fill(family, here)
        forms = [(value, self._plan.targets[key]) for value, key in row]
        if family.rule.kind == "buffer":
            return forms[0][1]
        if silent:
            forms = [(0.0, forms[0][1])]
        blended = forms[0][1] if forms[0][0] == 1.0 and len(forms) == 1 else graph.combine(forms)
        dims = [self._map(family, dim, key, here) for dim in family.dims]
        factor = self._factor(family, row[0][1], key, fill)
        factor = self._moment.factor(factor) if self._moment else factor
        changes = any(m is not None for m in dims) or blended is not forms[0][1] or factor != 1.0
        if changes and not blended.spec.is_float:
            raise PlanError(
                f"{row[0][1]}: dtype {blended.spec.dtype} can't be averaged or scaled",
                hint="dequantise the checkpoint, or save it in a float dtype",
            )
        offset = self._offset(family, key)
        is_compensated = factor != 1.0 or self._feeds(key) is not None or fill is not None
        # The gain of the norm is offset + weight (gemma: 1 + weight). What compensates it is meant
        # for the gain, so add the offset first and take it off the result. A plain mean or copy of
        # weights commutes with that, and is left alone: it can stay a copy of bytes.
        offset = offset if is_compensated else 0.0
        whole = graph.shift(blended, offset) if offset else blended
        made = graph.scale(self._mapped(family, key, whole, dims, here), factor)
        grown = Grown(family, target, whole, dims, factor, offset)
        made = made if silent else self.apart.made(made, grown, here.maps)
        return graph.shift(made, -offset) if offset else made

    def _mapped(
        self,
        family: Family,
        key: str,
        form: LinearForm,
        dims: Sequence[AxisMap | None],
        here: _Here,
    ) -> LinearForm:
        """A form with its dimensions mapped; new units hold the mean of the others where asked."""
        mapped, spec = graph.map_dims(form, dims), self._model.architecture
        for d, dim in enumerate(family.dims if family.rule.norm is None else ()):
            fill = here.fills.get(spec.plain(dim.expression) or "")
            if fill is not None and fill.means and self._role(dim.role, key) == "out":
                new = mean_along.spread(form, d, dims, fill.map)
                mapped = graph.combine([(1.0, mapped), (1.0, new)])
        return mapped

    def _offset(self, family: Family, key: str) -> float:
        """What a norm adds to its gain before it multiplies by it; gradients have no such part."""
        norm = family.rule.norm if self._moment is None else None
        return norm.offset if norm is not None and is_gain(key) else 0.0

    def _feeds(self, key: str) -> TiedHead | None:
        """The tied head that reads what the tensor `key` of the result makes."""
        return next((tied for tied in self._tied if tied.feeds(key, self._last)), None)

    def _fill(self, family: Family, here: _Here) -> NormCompensation | None:
        """How a norm is compensated for zero units."""
        if family.rule.norm is None or len(family.dims) != 1:
            return None
        expression = family.dims[0].expression
        return here.fills.get(expression.name) if isinstance(expression, Name) else None

    def _factor(
        self, family: Family, source: str, key: str, fill: NormCompensation | None
    ) -> float:
        """Factor on a tensor of the result, for what the maps alone would change."""
        if self._change.rule == "reference":
            if not self._change.pairs and not self._change.by_layer:
                return 1.0
            shares = any(tied.is_head(key) for tied in self._tied)
            is_embedding = family.rule.kind == "embedding" or shares
            return self._change.embedding_factor if is_embedding else 1.0
        product = 1.0
        for pattern, factor in self._model.architecture.forward_scale:
            if pattern.match(source) is not None:
                product *= self._ratio(factor)
        for patterns, extra in self._change.factors:
            if first_match(patterns, source) is not None:
                product *= extra
        if fill is not None and is_gain(key):
            product *= fill.gain
        for head in self._model.tied_heads:
            if head.is_head(source):  # a copy of the embedding, which stays one unless untied
                by = self._head_factor if self._change.untie else self._embedding_factor
                product *= by(head)
        tied = self._feeds(key)
        if tied is not None:
            # The head reads the embedding's tensor, which got the factor of the forward pass above;
            # the norm before the head takes it back, and undoes the head's own.
            product *= self._head_factor(tied) / self._embedding_factor(tied)
        return product

    def _ratio(self, factor: Factor) -> float:
        """What undoes the change of a factor that the model applies."""
        before = value_of(factor, self._model, self._model.sizes)
        return before / value_of(factor, self._model, self._sizes)

    def _head_factor(self, tied: TiedHead) -> float:
        return 1.0 if tied.head.scale is None else self._ratio(tied.head.scale)

    def _embedding_factor(self, tied: TiedHead) -> float:
        product = 1.0
        for pattern, factor in self._model.architecture.forward_scale:
            if any(
                tied.is_embedding(key) and pattern.match(key) is not None
                for family in self._model.families
                if family.rule.kind == "embedding"
                for key in family.members.values()
            ):
                product *= self._ratio(factor)
        return product

    def _map(self, family: Family, dim: DimSpec, key: str, here: _Here) -> AxisMap | None:
        if dim.expression is None:
            return None
        fill = self._fill(family, here)
        role = self._role(dim.role, key)
        if fill is not None and (role == "out" or fill.both):
            return fill.map
        m = here.maps.of(dim.expression, role)
        if m is not None and self._change.signed and family.rule.norm is not None:
            m = self._unsigned(m)
        if m is not None and role == "keep" and not self._is_stack(dim):
            raise ArchitectureError(
                f"{family.name}: {dim.text} is resized, but its dimension has no role in the spec"
            )
        return m

    def _unsigned(self, m: AxisMap) -> AxisMap:
        if id(m) not in self._sizes_of:
            self._sizes_of[id(m)] = m, maps.without_signs(m)
        return self._sizes_of[id(m)][1]

    def _is_stack(self, dim: DimSpec) -> bool:
        """Whether a dimension without a role is a stack of layers or experts."""
        axes = self._model.architecture.axes
        names = [dim.expression.name] if isinstance(dim.expression, Name) else []
        return any(axes[name].kind == "expert" for name in names if name in axes)

    def _role(self, role: Role, key: str) -> Role:
        """The role of a dimension; with a tied head, the norm before it and its readers swap.

        The head is the embedding's tensor, so its columns carry copies (role out), not the shares
        that a reader has (role in). The norm before it makes up for that: it takes the reader's
        map. And what else reads that norm must then read copies as well.
        """
        for tied in self._tied:
            if role == "in" and tied.is_head(key):
                return "out"
            if self._change.rule == "reference":
                continue
            if role == "in" and tied.reads(key):
                return "out"
            if role == "out" and tied.feeds(key, self._last):
                return "in"
        return role


def _stacked(m: AxisMap, silent: frozenset[int]) -> MapPair:
    """The maps of a dimension that counts layers. Who reads it reads no zero-initialised ones."""
    if not silent:
        return maps.pair_of(m)
    kept = (() if i in silent else m.members(i) for i in range(m.n_out))
    return MapPair(maps.without_zeros(m), maps.BlockMap(tuple(kept), m.n_in))


def is_gain(key: str) -> bool:
    """Whether a norm's tensor is its gain, not its bias."""
    return key.endswith((".weight", ".gamma"))
