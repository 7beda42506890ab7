"""Requests on single axes -> a merging map F (small x large) for every axis that must change.

What is not asked for stays, but for what is coupled: hidden size = heads x head size in BERT, an
intermediate size that is always 4 x hidden size. Such axes follow in proportion. Query and kv heads
are planned together, see attention_heads.py.
"""

from collections.abc import Sequence
from math import gcd

from streammap.architectures import axis_facts, axis_sizes
from streammap.architectures import expression as expressions
from streammap.architectures.expression import Expression, Name
from streammap.architectures.model import Model
from streammap.errors import PlanError
from streammap.planning import attention_heads, config_json, maps, requests
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
    return {axis: m for axis, m in work.found.items() if not m.is_identity}, work.notes


class _Planning:
    def __init__(self, model: Model, asked: ResizeRequest, grows: bool) -> None:
        self._model, self._asked, self._grows = model, asked, grows
        self._spec, self._own = model.architecture, model.sizes
        for name in {"heads", *(n for s in self._spec.shared_heads for n in (s.kv, s.heads))}:
            # Of tensors without elements, even a small file can have 10^12 heads.
            check_parts(name, self._own.get(name, 0), MAX_PARTS)
        self._joint = [
            (shared.kv, shared.group, shared.heads)
            for shared in self._spec.shared_heads
            if shared.kv in self._own and shared.heads in self._own
        ]
        self.found: dict[str, BlockMap] = {}
        self.notes: list[str] = []
        self._one = AxisRequests(model, asked, self.notes, grows=grows)

    def direct(self) -> None:
        """Maps of the axes that were asked for."""
        for kv, _, heads in self._joint:
            self._heads(heads, kv)
        for axis, request in self._asked.axes.items():
            if axis not in self.found:
                self._check_axis(axis)
                self._put(axis, self._one.map(axis, request))
        if self._asked.width is not None:
            first = self._spec.spaces.get("heads", ())
            for axis in sorted(self._widths(), key=lambda axis: axis not in first):
                if axis not in self.found:
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
                told = ", ".join(f"{name} {self._size(name)}" for name in names)
                raise PlanError(
                    f"{self._spec.name}: {text} would not hold ({told})",
                    hint="ask for sizes that keep it, or leave one of them out: it follows",
                )

    def check_heads(self) -> None:
        """Refuse a map of query heads that breaks the groups of their kv heads."""
        for kv, _, heads in self._joint:
            if kv in self.found or heads in self.found:
                self._check_joint(heads, kv)

    # One axis.

    def _put(self, axis: str, m: BlockMap | None) -> None:
        if m is not None:
            self.found[axis] = m

    def _check_axis(self, axis: str) -> None:
        kind = self._spec.axes[axis].kind
        if kind in ("width", "depth", "expert"):
            return
        why = "it follows the heads" if kind == "group" else "its order means something"
        raise PlanError(
            f"{axis} can't be resized in {self._spec.name}: {why}",
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
            self.notes.append(f"{axis}: {self._own[axis]} does not divide by {factor}, it stays")
            return None
        return self._one.map(axis, request)

    def _proportional(self, axis: str, groups: Sequence[Sequence[int]]) -> BlockMap:
        """Groups of heads, applied to as many equal parts of another axis."""
        heads = self._own["heads"]
        if self._own[axis] % heads:
            raise PlanError(
                f"{axis}: {self._own[axis]} does not divide into {heads} parts, one for each head",
                hint="this model's widths can't follow its heads; ask for each by itself",
            )
        n_large = self._one.n_large("heads", groups, "width_scheme")
        if axis == "heads":
            self._one.tell_left(axis, groups, n_large)
        return maps.merging(groups, n_large, block=self._own[axis] // heads)

    # Query heads and kv heads.

    def _heads(self, heads: str, kv: str) -> None:
        asked, width = self._asked.axes, self._asked.width
        wanted, wanted_kv = asked.get(heads), asked.get(kv)
        automatic = False
        if wanted is None and wanted_kv is None and width is not None:
            if width.groups is not None:
                wanted = width
            else:
                wanted, automatic = width, True
        if wanted is None and wanted_kv is None:
            return
        if heads in self.found and wanted_kv is None:
            self._again(heads, kv)
            return
        explicit = any(r is not None and r.groups is not None for r in (wanted, wanted_kv))
        if explicit:
            self._explicit_heads(heads, kv, wanted, wanted_kv)
            return
        own_kv = self._own[kv]
        a = self._target(heads, wanted)
        alone = wanted_kv is None and not automatic
        if automatic or (alone and (self._follows(kv, heads) or a % own_kv)):
            b = self._kv_for(heads, kv, a)
        else:
            b = self._target(kv, wanted_kv)
        grouping = next(
            (r.grouping for r in (wanted, wanted_kv) if r is not None and r.grouping),
            self._asked.grouping,
        )
        self._put_counts(heads, kv, HeadCounts(a, b), grouping)

    def _put_counts(self, heads: str, kv: str, result: HeadCounts, grouping: Grouping) -> None:
        own = HeadCounts(self._own[heads], self._own[kv])
        large, small = (result, own) if self._grows else (own, result)
        names = self._sharing(heads, kv)
        found, found_kv = attention_heads.merging(names, large, small, grouping, grows=self._grows)
        self._put_heads(heads, kv, found, found_kv)

    def _again(self, heads: str, kv: str) -> None:
        """Kv heads of another kind of layers, whose query heads are planned already."""
        others = [self.found[other] for other, _, of in self._joint if of == heads and other != kv]
        alike = [m for m in others if self._own[kv] == (m.n_out if self._grows else m.n_in)]
        origin = axis_sizes.axis_origin(self._spec.axes[kv], self._model.config)
        same = maps.identity(self._own[kv])
        for m in (same, *alike) if isinstance(origin, str) else (*alike, same):
            self.found[kv] = m
            if self._misplaced(heads, kv) is None:
                return
        self.found[kv] = attention_heads.kv_of(self._sharing(heads, kv), self.found[heads])

    def _put_heads(self, heads: str, kv: str, found: BlockMap, found_kv: BlockMap) -> None:
        if self._asked.kv_merge == "first" and not self._grows:
            found_kv = maps.first_of(found_kv)
        self.found[heads], self.found[kv] = found, found_kv

    def _target(self, axis: str, request: AxisRequest | None) -> int:
        own = self._own[axis]
        if request is None:
            return own
        if request.size is not None:
            if (request.size < own) == self._grows and request.size != own:
                raise PlanError(
                    f"{axis}: can't go from {own} to {request.size} this way",
                    hint="coalesce makes a model smaller, decoalesce larger",
                )
            check_parts(axis, request.size, MAX_PARTS)
            return request.size
        factor = request.factor or 1
        if self._grows:
            check_parts(axis, own * factor, MAX_PARTS)
            return own * factor
        return requests.divided(own, factor, self._one.word(axis))

    def _follows(self, kv: str, heads: str) -> bool:
        """Whether config.json has no kv heads, so that there are as many as heads."""
        if self._own[kv] != self._own[heads]:
            return False
        origin = axis_sizes.axis_origin(self._spec.axes[kv], self._model.config)
        tied = (
            {left, right} == {Name(kv), Name(heads)} for _, left, right in self._spec.constraints
        )
        return not isinstance(origin, str) or any(tied)

    def _kv_for(self, heads: str, kv: str, n_heads: int) -> int:
        """How many kv heads go with a new number of heads, where all widths change alike."""
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
        found = maps.identity(self._own[heads])
        if wanted is not None:
            found = self._one.map(heads, wanted) or found
        if wanted_kv is not None:
            found_kv = self._one.map(kv, wanted_kv) or maps.identity(self._own[kv])
        elif wanted is self._asked.width or self._follows(kv, heads):
            found_kv = attention_heads.kv_of(self._sharing(heads, kv), found)
        else:
            found_kv = maps.identity(self._own[kv])
        self._put_heads(heads, kv, found, found_kv)

    def _sharing(self, heads: str, kv: str) -> HeadSharing:
        return HeadSharing(heads, kv, self._own[heads] // self._own[kv])

    def _misplaced(self, heads: str, kv: str) -> str | None:
        names = self._sharing(heads, kv)
        return attention_heads.misplaced(names, self._applied(heads), self._applied(kv))

    def _check_joint(self, heads: str, kv: str) -> None:
        problem = self._misplaced(heads, kv)
        if problem is not None:
            raise PlanError(
                problem,
                hint=f"group heads so that each keeps to its {kv}, or give groups for {kv} too",
            )

    def _applied(self, axis: str) -> AxisMap:
        m = self.found.get(axis)
        if m is None:
            return maps.identity(self._own[axis])
        return maps.growing(m) if self._grows else m

    # What follows.

    def _size(self, axis: str) -> int:
        m = self.found.get(axis)
        if m is None:
            return self._own[axis]
        return m.n_in if self._grows else m.n_out

    def _value(self, expression: Expression) -> int | None:
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
        for text, left, right in self._spec.constraints:
            if "%" in text or self._value(left) == self._value(right):
                continue
            names = [*self._names(left), *self._names(right)]
            changed = [n for n in names if self._size(n) != self._own[n]]
            free = [
                n
                for n in names
                if n not in self.found
                and n not in self._asked.axes
                and self._spec.axes[n].kind == "width"
            ]
            if changed and len(free) == 1:
                self._follow(free[0], changed[0])
                return True
        return False

    def _follow_expressions(self) -> bool:
        for axis in self._spec.axes.values():
            if axis.kind != "width" or axis.name in self.found or not self._own.get(axis.name):
                continue
            if not axis_facts.must_follow(self._model, axis.name):
                continue
            origin = axis_sizes.axis_origin(axis, self._model.config)
            if origin is None or isinstance(origin, str) or config_json.is_measured(origin):
                continue
            changed = [n for n in self._names(origin) if self._size(n) != self._own[n]]
            wanted = self._value(origin)
            if changed and wanted is not None and wanted != self._own[axis.name]:
                self._follow(axis.name, changed[0], wanted)
                return True
        return False

    def _follow(self, axis: str, leader: str, wanted: int | None = None) -> None:
        """Give `axis` the map of `leader`, in proportion."""
        kv = next((k for k, _, h in self._joint if h == axis and k not in self._asked.axes), None)
        ratio = self._size(leader) / self._own[leader]
        if kv is not None and kv not in self.found and (self._own[axis] * ratio).is_integer():
            n_heads = round(self._own[axis] * ratio)
            counts = HeadCounts(n_heads, self._kv_for(axis, kv, n_heads))
            self._put_counts(axis, kv, counts, self._asked.grouping)
            self.notes.append(f"{axis} follows {leader}: {self._own[axis]} -> {n_heads}")
            return
        m, own = self.found[leader], self._own[axis]
        before, after = self._own[leader], self._size(leader)
        size = own * after // before if wanted is None else wanted
        large, small = (size, own) if self._grows else (own, size)
        n_large, n_small = m.n_in_blocks, len(m.rows)
        in_blocks = large % n_large == 0 and small % n_small == 0
        even = len({len(row) for row in m.rows}) == 1 or axis not in axis_facts.normed_axes(
            self._model
        )
        if in_blocks and large // n_large == small // n_small and (even or not self._grows):
            self.found[axis] = BlockMap(m.rows, n_large, large // n_large)
        else:
            exact = own * after % before == 0
            self._put(
                axis, self._one.sized(axis, own, size) if exact or wanted is not None else None
            )
        if axis in self.found:
            self.notes.append(f"{axis} follows {leader}: {own} -> {size}")
            for kv, _, heads in self._joint:
                if heads == axis and kv not in self.found and self._follows(kv, heads):
                    self.found[kv] = self.found[axis]
