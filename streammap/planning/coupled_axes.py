"""Requests on single axes -> a merging map F (small x large) for every axis that must change.

What is not asked for stays, but for what is coupled: hidden size = heads x head size in BERT, an
intermediate size that is always 4 x hidden size. Such axes follow in proportion. Query and kv heads
are planned together, see attention_heads.py.
"""

from collections.abc import Sequence
from math import gcd

from streammap.architectures import axis_facts, axis_sizes, axis_words
from streammap.architectures import expression as expressions
from streammap.architectures.expression import Expression, Name
from streammap.architectures.model import Model
from streammap.errors import PlanError
from streammap.planning import attention_heads, maps, requests
from streammap.planning.attention_heads import HeadCounts, HeadSharing
from streammap.planning.axis_maps import AxisRequests, ResizeRequest, check_parts
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.requests import MAX_PARTS, AxisRequest, Grouping


def merging_maps(
    model: Model, asked: ResizeRequest, *, grows: bool
) -> tuple[dict[str, BlockMap], list[str]]:
    """Axis -> F for each axis that changes, and what a user might not expect.

    Raises:
        SchemeError: groups that do not fit the model.
        PlanError: a request that this architecture can't follow, with the reason.
    """
    work = _Planning(model, asked, grows)
    work.direct()
    work.follow()
    work.check_heads()
    return {axis: m for axis, m in work.maps.items() if not m.is_identity}, work.notes


class _Planning:
    def __init__(self, model: Model, asked: ResizeRequest, grows: bool) -> None:
        self._model, self._asked, self._grows = model, asked, grows
        self._spec, self._own = model.architecture, model.sizes
        for name in {"heads", *(n for s in self._spec.shared_heads for n in (s.kv, s.heads))}:
            # Of tensors without elements, even a small file can have 10^12 heads.
            check_parts(self._spec, name, self._own.get(name, 0), MAX_PARTS)
        self._joint = [
            (shared.kv, shared.group, shared.heads)
            for shared in self._spec.shared_heads
            if shared.kv in self._own and shared.heads in self._own
        ]
        self.maps: dict[str, BlockMap] = {}
        self.notes: list[str] = []
        self._one = AxisRequests(model, asked, self.notes, grows=grows)

    def direct(self) -> None:
        """Maps of the axes that were asked for."""
        for axis in self._asked.axes:
            self._check_axis(axis)
        for kv, _, heads in self._joint:
            self._heads(heads, kv)
        for axis, request in self._asked.axes.items():
            if axis not in self.maps:
                self._put(axis, self._one.map(axis, request))
        if self._asked.width is not None:
            first = self._spec.spaces.get("heads", ())
            for axis in sorted(self._widths(), key=lambda axis: axis not in first):
                if axis not in self.maps:
                    self._put(axis, self._width(axis, self._asked.width))

    def follow(self) -> None:
        """Maps of the axes that are coupled to those."""
        for _ in range(len(self._own) + 1):
            if not (self._follow_constraints() or self._follow_expressions()):
                break
        for text, left, right in self._spec.constraints:
            a, b = self._value(left), self._value(right)
            if a is None or a != b:
                names = dict.fromkeys([*self._names(left), *self._names(right)])
                sizes = ", ".join(
                    f"{axis_words.shown(self._spec, name)} {self._size(name)}" for name in names
                )
                raise PlanError(
                    f"{self._model.name}: {text} would not hold ({sizes})",
                    hint="ask for sizes that keep it, or leave one of them out: it follows",
                )

    def check_heads(self) -> None:
        """Refuse a map of query heads that breaks the groups of their kv heads."""
        for kv, _, heads in self._joint:
            if kv in self.maps or heads in self.maps:
                self._check_joint(heads, kv)

    # One axis.

    def _put(self, axis: str, m: BlockMap | None) -> None:
        if m is not None:
            self.maps[axis] = m

    def _check_axis(self, axis: str) -> None:
        kind = self._spec.axes[axis].kind
        if kind in ("width", "depth", "expert"):
            return
        why = "it follows the heads" if kind == "group" else _why_fixed(axis)
        raise PlanError(
            f"{axis_words.shown(self._spec, axis)} of {self._model.name} can't be resized: {why}",
            hint="`streammap inspect` lists the axes that can",
        )

    # All widths together.

    def _widths(self) -> list[str]:
        return [
            axis.name
            for axis in self._spec.axes.values()
            if axis.kind == "width"
            and self._own.get(axis.name)
            and not axis_facts.must_follow(self._model, axis.name)
        ]

    def _width(self, axis: str, request: AxisRequest) -> BlockMap | None:
        if request.groups is not None:
            return self._proportional(axis, request.groups)
        named = {a for space in self._spec.spaces.values() for a in space}
        factor = request.factor or 1
        if not self._grows and self._own[axis] % factor and axis not in named:
            axis_name = axis_words.shown(self._spec, axis)
            self.notes.append(f"{axis_name} stays: {self._own[axis]} does not divide by {factor}")
            return None
        return self._one.map(axis, request)

    def _proportional(self, axis: str, groups: Sequence[Sequence[int]]) -> BlockMap:
        """Groups of heads, applied to as many equal parts of another axis."""
        heads = self._own["heads"]
        if self._own[axis] % heads:
            raise PlanError(
                f"{axis_words.shown(self._spec, axis)}: {self._own[axis]} does not divide into "
                f"{heads} parts, one for each head",
                hint="this model's widths can't follow its heads; ask for each by itself",
            )
        n_large = self._one.n_large("heads", groups, "width_scheme")
        if axis == "heads":
            self._one.tell_left(axis, groups, n_large)
        return maps.merging(groups, n_large, block=self._own[axis] // heads)

    # Query heads and kv heads.

    def _heads(self, heads: str, kv: str) -> None:
        """Plan query heads and their kv heads, where either is asked for."""
        wanted, wanted_kv = self._asked.axes.get(heads), self._asked.axes.get(kv)
        by_width = wanted is None and wanted_kv is None
        if by_width and self._spec.axes[heads].kind == "width":
            wanted = self._asked.width
        if wanted is None and wanted_kv is None:
            return
        if heads in self.maps and wanted_kv is None:
            # Two kinds of layers may share their query heads (gemma4), each with its own kv heads.
            self._again(heads, kv)
            return
        given = [request for request in (wanted, wanted_kv) if request is not None]
        if any(request.groups is not None for request in given):
            self._explicit_heads(heads, kv, wanted, wanted_kv)
            return
        n_heads = self._target(heads, wanted)
        # Kv heads follow where all widths change alike, where config.json has no field for them,
        # and where the new query heads could not share them evenly. Else they stay as they are:
        # "--heads 2" of a grouped-query model means more queries for each kv head.
        alone = wanted_kv is None and not by_width
        if by_width or (alone and (self._follows(kv, heads) or n_heads % self._own[kv])):
            n_kv = self._kv_for(heads, kv, n_heads)
        else:
            n_kv = self._target(kv, wanted_kv)
        grouping = next((r.grouping for r in given if r.grouping), self._asked.usual)
        self._put_counts(heads, kv, HeadCounts(n_heads, n_kv), grouping)

    def _put_counts(self, heads: str, kv: str, result: HeadCounts, grouping: Grouping) -> None:
        own = HeadCounts(self._own[heads], self._own[kv])
        large, small = (result, own) if self._grows else (own, result)
        names = self._sharing(heads, kv)
        of_heads, of_kv = attention_heads.merging(names, large, small, grouping, grows=self._grows)
        self._put_heads(heads, kv, of_heads, of_kv)

    def _again(self, heads: str, kv: str) -> None:
        """Kv heads of another kind of layers, whose query heads are planned already.

        The first map counts that keeps each query head with its own kv head: no change, the map of
        the first kind's kv heads, or one derived from the query heads.
        """
        others = [self.maps[other] for other, _, of in self._joint if of == heads and other != kv]
        alike = [m for m in others if self._own[kv] == (m.n_out if self._grows else m.n_in)]
        origin = axis_sizes.axis_origin(self._spec.axes[kv], self._model.config)
        unchanged = maps.identity(self._own[kv])
        # With a field of its own in config.json this axis may differ from the first kind's; without
        # one, the same number is read for both, so that both must change alike.
        for m in (unchanged, *alike) if isinstance(origin, str) else (*alike, unchanged):
            self.maps[kv] = m
            if self._misplaced(heads, kv) is None:
                return
        self.maps[kv] = attention_heads.kv_of(self._sharing(heads, kv), self.maps[heads])

    def _put_heads(self, heads: str, kv: str, of_heads: BlockMap, of_kv: BlockMap) -> None:
        if self._asked.kv_merge == "first" and not self._grows:
            of_kv = maps.first_of(of_kv)
        self.maps[heads], self.maps[kv] = of_heads, of_kv

    def _target(self, axis: str, request: AxisRequest | None) -> int:
        own = self._own[axis]
        if request is None:
            return own
        if request.size is not None:
            if (request.size < own) == self._grows and request.size != own:
                raise PlanError(
                    f"{own} {self._one.units(axis)} can't become {request.size} this way",
                    hint="coalesce makes a model smaller, decoalesce larger",
                )
            check_parts(self._spec, axis, request.size, MAX_PARTS)
            return request.size
        factor = request.factor or 1
        if self._grows:
            check_parts(self._spec, axis, own * factor, MAX_PARTS)
            return own * factor
        return requests.divided(own, factor, self._one.units(axis))

    def _follows(self, kv: str, heads: str) -> bool:
        """Whether each query head has a kv head of its own, by config.json or by a constraint."""
        if self._own[kv] != self._own[heads]:
            return False
        origin = axis_sizes.axis_origin(self._spec.axes[kv], self._model.config)
        tied = (
            {left, right} == {Name(kv), Name(heads)} for _, left, right in self._spec.constraints
        )
        return not isinstance(origin, str) or any(tied)

    def _kv_for(self, heads: str, kv: str, n_heads: int) -> int:
        """How many kv heads go with a new number of heads, where all widths change alike.

        The kv heads shrink with the heads as far as they divide: 12 heads with 3 kv heads become 6
        with 3, and 4 with 1.
        """
        if self._follows(kv, heads):
            return n_heads
        own_heads, own_kv = self._own[heads], self._own[kv]
        origin = axis_sizes.axis_origin(self._spec.axes[kv], self._model.config)
        fixed = origin is not None and not isinstance(origin, str) and own_kv != own_heads
        if fixed or self._spec.axes[kv].kind != "width":
            return own_kv
        if self._grows:
            return own_kv * n_heads // own_heads if n_heads % own_heads == 0 else own_kv
        part = gcd(own_kv, own_heads // n_heads) if own_heads % n_heads == 0 else 1
        return own_kv // part

    def _explicit_heads(
        self, heads: str, kv: str, wanted: AxisRequest | None, wanted_kv: AxisRequest | None
    ) -> None:
        of_heads = maps.identity(self._own[heads])
        if wanted is not None:
            of_heads = self._one.map(heads, wanted) or of_heads
        if wanted_kv is not None:
            of_kv = self._one.map(kv, wanted_kv) or maps.identity(self._own[kv])
        elif wanted is self._asked.width or self._follows(kv, heads):
            of_kv = attention_heads.kv_of(self._sharing(heads, kv), of_heads)
        else:
            of_kv = maps.identity(self._own[kv])
        self._put_heads(heads, kv, of_heads, of_kv)

    def _sharing(self, heads: str, kv: str) -> HeadSharing:
        units = self._one.units
        return HeadSharing(units(heads), units(kv), self._own[heads] // self._own[kv])

    def _misplaced(self, heads: str, kv: str) -> str | None:
        names = self._sharing(heads, kv)
        return attention_heads.misplaced(names, self._applied(heads), self._applied(kv))

    def _check_joint(self, heads: str, kv: str) -> None:
        problem = self._misplaced(heads, kv)
        if problem is not None:
            raise PlanError(
                problem,
                hint="group heads so that each keeps to its kv head, or give groups for the "
                f"{self._one.units(kv)} too",
            )

    def _applied(self, axis: str) -> AxisMap:
        m = self.maps.get(axis)
        if m is None:
            return maps.identity(self._own[axis])
        return maps.growing(m) if self._grows else m

    # What follows.

    def _size(self, axis: str) -> int:
        m = self.maps.get(axis)
        if m is None:
            return self._own[axis]
        return m.n_in if self._grows else m.n_out

    def _value(self, expression: Expression) -> int | None:
        """The value of an expression for the new sizes; None where it would not be whole."""
        after = {axis: self._size(axis) for axis in self._own}
        for kv, group, heads in self._joint:
            after[group] = after[heads] // max(1, after[kv])
        try:
            return axis_sizes.evaluate_axis(self._spec, expression, after, {})
        except (expressions.InexactDivisionError, PlanError):
            return None

    def _names(self, expression: Expression) -> list[str]:
        return [name for name in self._spec.axes_in(expression) if name in self._own]

    def _follow_constraints(self) -> bool:
        """Let one axis follow by a constraint that no longer holds; whether one did.

        Only the single axis that is still free can follow: with two, nothing says which.
        """
        for text, left, right in self._spec.constraints:
            if "%" in text or self._value(left) == self._value(right):
                continue
            names = [*self._names(left), *self._names(right)]
            changed = [n for n in names if self._size(n) != self._own[n]]
            free = [
                n
                for n in names
                if n not in self.maps
                and n not in self._asked.axes
                and self._spec.axes[n].kind == "width"
            ]
            if changed and len(free) == 1:
                self._follow(free[0], changed[0])
                return True
        return False

    def _follow_expressions(self) -> bool:
        """Let one axis follow whose size is an expression of others; whether one did."""
        for axis in self._spec.axes.values():
            if axis.kind != "width" or axis.name in self.maps or not self._own.get(axis.name):
                continue
            if not axis_facts.must_follow(self._model, axis.name):
                continue
            origin = axis_sizes.axis_origin(axis, self._model.config)
            if origin is None or isinstance(origin, str) or expressions.is_measured(origin):
                continue
            changed = [n for n in self._names(origin) if self._size(n) != self._own[n]]
            wanted = self._value(origin)
            if changed and wanted is not None and wanted != self._own[axis.name]:
                self._follow(axis.name, changed[0], wanted)
                return True
        return False

    def _follow(self, axis: str, leader: str, wanted: int | None = None) -> None:
        """Give `axis` the map of `leader`, in proportion."""
        own, before, after = self._own[axis], self._own[leader], self._size(leader)
        kv = next((k for k, _, h in self._joint if h == axis and k not in self._asked.axes), None)
        if kv is not None and kv not in self.maps and own * after % before == 0:
            # Query heads never follow alone: their kv heads are planned with them.
            n_heads = own * after // before
            counts = HeadCounts(n_heads, self._kv_for(axis, kv, n_heads))
            self._put_counts(axis, kv, counts, self._asked.usual)
            self._note_following(axis, leader, n_heads)
            return
        m = self.maps[leader]
        size = own * after // before if wanted is None else wanted
        large, small = (size, own) if self._grows else (own, size)
        n_large, n_small = m.n_in_blocks, len(m.rows)
        # The leader's own groups, over blocks of this axis' units, where both sides divide into
        # them alike: then unit i of one goes with unit i of the other. But copies behind a norm
        # must be even; where they are not, only a map of its own, with zero units, can be exact.
        in_blocks = large % n_large == 0 and small % n_small == 0
        even = len({len(row) for row in m.rows}) == 1 or axis not in axis_facts.normed_axes(
            self._model
        )
        if in_blocks and large // n_large == small // n_small and (even or not self._grows):
            self.maps[axis] = BlockMap(m.rows, n_large, large // n_large)
        else:
            exact = own * after % before == 0
            self._put(
                axis, self._one.sized(axis, own, size) if exact or wanted is not None else None
            )
        if axis in self.maps:
            self._note_following(axis, leader, size)
            for kv, _, heads in self._joint:
                if heads == axis and kv not in self.maps and self._follows(kv, heads):
                    self.maps[kv] = self.maps[axis]

    def _note_following(self, axis: str, leader: str, size: int) -> None:
        shown, of = (axis_words.shown(self._spec, name) for name in (axis, leader))
        self.notes.append(f"{shown} follows {of}: {self._own[axis]} -> {size}")


def _why_fixed(axis: str) -> str:
    """Why an axis of kind frozen keeps its size."""
    name = axis.rpartition(".")[2]
    for part, why in (
        ("vocab", "token ids index it"),
        ("pos", "positions index it"),
        ("types", "token types index it"),
        ("head_dim", "a head's channels have fixed places (--head-dim widens them)"),
    ):
        if part in name:
            return why
    return "its units have fixed meanings"
