"""The tensors of two models side by side, as stacks of matrices whose sides are axes.

A tensor is a matrix: its first dimension, and all others. Experts make a stack of them, whether
each has a key of its own or all are one tensor. An axis may lie along the rows, the columns, or
the stack; where it does, each position belongs to one of its units, or to none.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import final

from streammap.architectures import axis_facts
from streammap.architectures.axis_facts import Layer
from streammap.architectures.expression import Expression, Name
from streammap.architectures.model import Family, Model
from streammap.io.dtypes import DTYPE_BITS
from streammap.planning.dim_maps import DimMaps
from streammap.planning.graph import LinearForm
from streammap.planning.maps import BlockMap, MapPair
from streammap.planning.matching import pairing
from streammap.planning.ordering.units import Movable
from streammap.planning.plan import Plan

_SKIPPED = ("buffer", "drop")
Side = tuple[tuple[Expression | None, int], ...]
"""The dimensions along a side of a matrix: what each is made of, and its size."""


@final
@dataclass(frozen=True, slots=True)
class Sheet:
    """A matrix of one model, and the same of the other."""

    mine: LinearForm
    other: LinearForm
    start: int = 0
    """Element of the tensors at which it begins."""


@final
@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices of one shape."""

    family: Family
    layer: Layer | None
    axes: frozenset[str]
    """All that it is made of."""
    sheets: tuple[Sheet, ...]
    outer: str | None
    """The axis along the stack."""
    rows: Side
    columns: Side

    @cached_property
    def n_rows(self) -> int:
        """Rows of each matrix."""
        return prod(n for _, n in self.rows)

    @cached_property
    def n_columns(self) -> int:
        """Columns of each matrix."""
        return prod(n for _, n in self.columns)

    @property
    def n_elements(self) -> int:
        """Numbers of all its matrices."""
        return len(self.sheets) * self.n_rows * self.n_columns

    @property
    def nbytes(self) -> int:
        """Bytes of both models' matrices."""
        bits = sum(
            DTYPE_BITS[form.spec.dtype]
            for sheet in self.sheets[:1]
            for form in (sheet.mine, sheet.other)
        )
        return self.n_elements * bits // 8

    @property
    def is_gain(self) -> bool:
        """Whether it is a norm's, which takes no sign."""
        return self.family.rule.norm is not None


def pair_up(source: Plan, like: Plan) -> tuple[Stack, ...]:
    """All float tensors that both have, of the order's model first (`mine`) and of `source`."""
    model, pairs = source.model, pairing.pair(source, like)
    found: list[Stack] = []
    for family in model.families:
        if family.rule.kind in _SKIPPED:
            continue
        axes = axis_facts.axes_of(model, family)
        outer = _outer_index(model, family)
        groups: dict[tuple[int, ...], list[str]] = {}
        for values, key in sorted(family.members.items()):
            rest = values if outer is None else (*values[:outer], *values[outer + 1 :])
            groups.setdefault(rest, []).append(key)
        for rest, keys in groups.items():
            names = [i for n, i in enumerate(family.indices) if n != outer]
            layer = _layer(model, names, rest)
            sheets = [_sheet(source, like, key, pairs.other(key)) for key in keys]
            whole = tuple(sheet for sheet in sheets if sheet is not None)
            if len(whole) == len(keys):
                index = None if outer is None else family.index_expression(family.indices[outer])
                axis = index.name if isinstance(index, Name) else None
                found.append(_stack(model, family, layer, axes, whole, axis))
    return tuple(found)


def _outer_index(model: Model, family: Family) -> int | None:
    """Which index of the keys counts experts."""
    for at, index in enumerate(family.indices):
        expression = family.index_expression(index)
        if isinstance(expression, Name) and axis_facts.is_expert(
            model.architecture, expression.name
        ):
            return at
    return None


def _layer(model: Model, names: Sequence[str], values: Sequence[int]) -> Layer | None:
    depths = model.architecture.depth_axes
    return next((at for at in zip(names, values, strict=True) if at[0] in depths), None)


def _sheet(source: Plan, like: Plan, key: str, other: str) -> Sheet | None:
    form, partner = source.targets[key], like.targets.get(other)
    if partner is None or partner.spec.shape != form.spec.shape:
        return None
    if not form.spec.is_float or not partner.spec.is_float or not form.spec.n_elements:
        return None
    return Sheet(partner, form)


def _stack(
    model: Model,
    family: Family,
    layer: Layer | None,
    axes: frozenset[str],
    sheets: tuple[Sheet, ...],
    outer: str | None,
) -> Stack:
    shape = sheets[0].mine.spec.shape
    sides = [(dim.expression, n) for dim, n in zip(family.dims, shape, strict=True)]
    first = sides[0][0] if sides else None
    is_stack = isinstance(first, Name) and axis_facts.is_expert(model.architecture, first.name)
    if outer is None and is_stack and len(sides) > 2 and isinstance(first, Name):
        outer, n = first.name, prod(shape[1:])
        sheets = tuple(Sheet(s.mine, s.other, e * n) for s in sheets for e in range(shape[0]))
        sides = sides[1:]
    return Stack(family, layer, axes, sheets, outer, tuple(sides[:1]), tuple(sides[1:]))


@final
class Labels:
    """Which unit of what is put in order each position of a dimension belongs to."""

    def __init__(self, model: Model, movable: Movable) -> None:
        # Each unit of the axis gets a factor of its own, those of groups negative ones: a
        # dimension's map then has them wherever these units lie, and 1 elsewhere.
        pairs = {movable.axis: _numbered(movable.n, 1)}
        pairs |= {axis: _numbered(movable.n_groups, -1) for axis in movable.kv}
        self._maps = DimMaps(model.architecture, pairs, model.sizes, model.sizes)
        self._known: dict[Side, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def of(self, side: Side) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(unit, group) of each position along a side, -1 where it belongs to none."""
        if side not in self._known:
            numbers = [1]
            for expression, n in side:
                own = [1] * n if expression is None else self._along(expression, n)
                numbers = [a * b for a in numbers for b in own]
            units = tuple(int(v) - 2 if v > 1 else -1 for v in numbers)
            groups = tuple(int(-v) - 2 if v < -1 else -1 for v in numbers)
            self._known[side] = units, groups
        return self._known[side]

    def _along(self, expression: Expression, n: int) -> list[int]:
        m = self._maps.of(expression, "out")
        if m is None:
            return [1] * n
        assert isinstance(m, BlockMap)
        return [int(row[0][1]) for row in m.rows for _ in range(m.block)]


def _numbered(n: int, sign: int) -> MapPair:
    m = BlockMap(tuple(((i, float(sign * (i + 2))),) for i in range(n)), n)
    return MapPair(m, m)


def by_movable(
    stacks: Sequence[Stack], movables: Sequence[Movable]
) -> Mapping[Movable, tuple[Stack, ...]]:
    """What is put in order -> the stacks that have its units."""
    return {one: tuple(_having(stacks, one)) for one in movables}


def _having(stacks: Sequence[Stack], movable: Movable) -> Iterator[Stack]:
    for stack in stacks:
        here = movable.layer is None or stack.layer == movable.layer
        if here and not stack.axes.isdisjoint(movable.axes):
            yield stack
