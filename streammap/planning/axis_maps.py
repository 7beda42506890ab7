"""The request on one axis -> its merging map F (small x large).

F always leads from the large model to the small one, whichever of the two is given: shrinking
applies F, growing applies its transpose, and one saved map serves both ways.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from streammap.architectures import axis_facts, axis_words
from streammap.architectures.limits import MAX_LAYERS, MAX_SIZE
from streammap.architectures.model import Model
from streammap.architectures.schema import Architecture
from streammap.errors import PlanError, SchemeError, some
from streammap.planning import maps, requests
from streammap.planning.maps import BlockMap
from streammap.planning.plan import STAY_ZERO
from streammap.planning.requests import MAX_PARTS, AxisRequest, Grouping

KvMerge = Literal["mean", "first"]


@dataclass(frozen=True, slots=True)
class ResizeRequest:
    """What a user asks for."""

    axes: Mapping[str, AxisRequest]
    """Axis -> its request."""
    width: AxisRequest | None
    """The request on all widths together: a factor, or groups of heads."""
    grouping: Grouping | None
    """What was asked for; None for the usual one."""
    kv_merge: KvMerge
    known: Mapping[str, int]
    """Axis -> size of the large model that this one was made from, for groups that leave out its
    last units."""
    wanted: Mapping[str, int]
    """Axis -> size that the result must have; empty without a target."""

    @property
    def usual(self) -> Grouping:
        """The grouping of factors and widths."""
        return self.grouping or "stacked"


def check_parts(spec: Architecture, axis: str, n: int, most: int) -> None:
    """Refuse a map that could not be planned: each of its parts is an object in memory.

    Raises:
        PlanError: naming the axis.
    """
    if n > most:
        units = axis_words.units_of(spec, axis)
        raise PlanError(
            f"{n} {units}: at most {most} can be planned this way", hint="ask for fewer"
        )


class AxisRequests:
    """Maps of single axes of one model."""

    def __init__(
        self, model: Model, asked: ResizeRequest, notes: list[str], *, grows: bool
    ) -> None:
        self._model, self._asked, self._grows, self.notes = model, asked, grows, notes
        self._spec, self._own = model.architecture, model.sizes

    def units(self, axis: str) -> str:
        """What one counts along an axis, for messages."""
        return axis_words.units_of(self._spec, axis)

    def map(self, axis: str, request: AxisRequest) -> BlockMap | None:
        """F of an axis; None where nothing changes.

        Raises:
            SchemeError, PlanError: the request does not fit the model.
        """
        own = self._own[axis]
        if self._spec.axes[axis].kind == "depth":
            size = own * request.factor if request.factor is not None else request.size or 0
            check_parts(self._spec, axis, size if self._grows else own, MAX_LAYERS)
        if request.factor is not None:
            grouping = request.grouping or self._asked.usual
            large = own * request.factor if self._grows else own
            check_parts(self._spec, axis, large, MAX_SIZE)
            return self._uniform(axis, large, request.factor, grouping)
        if request.size is not None:
            return self.sized(axis, own, request.size, request.grouping)
        assert request.groups is not None
        n_large = self.n_large(axis, request.groups, request.where or axis)
        self.tell_left(axis, request.groups, n_large)
        m = maps.merging(request.groups, n_large, weights=request.weights)
        if self._grows and maps.is_uneven(m):
            self._check_shares(axis)
        return m

    def _check_shares(self, axis: str) -> None:
        """Refuse weights of copies that no weight reads by shares: they would change nothing."""
        if axis_facts.is_read_by_shares(self._spec, axis):
            return
        raise PlanError(
            f"{self.units(axis)}: weights of groups say how those who read the copies share them, "
            f"and no weight reads {self.units(axis)}",
            hint="leave the weights out when growing; MLP neurons, heads and hidden units have "
            "them",
        )

    def n_large(self, axis: str, groups: Sequence[Sequence[int]], where: str) -> int:
        """The large model's size of an axis that groups are given for.

        Raises:
            SchemeError: not one group for each unit of the small model, or a member that the large
                one doesn't have.
        """
        own, wanted = self._own[axis], self._asked.wanted.get(axis)
        n_small = own if self._grows else wanted
        if n_small is not None and len(groups) != n_small:
            raise SchemeError(
                f"{where}: {len(groups)} groups, the small model has {n_small} {self.units(axis)}",
                hint="write the scheme for this pair of models; `streammap scheme` prints one",
            )
        n_large = wanted if self._grows else own
        if n_large is None:
            # Groups name members, not how many there are: units in no group may come after them.
            most = 1 + max(member for group in groups for member in group)
            n_large = max(self._asked.known.get(axis, 0), most)
        requests.check_members(groups, n_large, where)
        check_parts(self._spec, axis, n_large, MAX_PARTS)
        return n_large

    def _uniform(self, axis: str, large: int, factor: int, grouping: Grouping) -> BlockMap | None:
        if factor == 1:
            return None
        units = self.units(axis)
        size = f"a size such as to:{max(1, large // factor)}, or give groups"
        requests.divided(large, factor, units, instead=size)
        parts = self._parts(axis, large, factor, grouping)
        check_parts(self._spec, axis, parts, MAX_PARTS)
        groups = requests.uniform(parts, factor, grouping, units=units)
        return maps.merging(groups, parts, block=large // parts)

    def _parts(self, axis: str, large: int, factor: int, grouping: Grouping) -> int:
        """Into how many equal parts an axis is cut; each part moves as a whole.

        One part a head where that fits, so that a width that is made of heads (heads x head size)
        keeps its heads together whether it is asked for by itself or follows them.
        """
        if self._spec.axes[axis].kind != "width":
            return large
        heads = self._own.get("heads", 0) * (factor if self._grows else 1)
        if heads and large % heads == 0 and heads % factor == 0:
            return heads
        return large if grouping == "adjacent" else factor

    def sized(
        self, axis: str, own: int, size: int, grouping: Grouping | None = None
    ) -> BlockMap | None:
        """F of an axis that gets a new size."""
        if size == own:
            return None
        large, small = (size, own) if self._grows else (own, size)
        if large < small:
            raise PlanError(
                f"{own} {self.units(axis)} can't become {size} this way",
                hint="coalesce makes a model smaller, decoalesce larger",
            )
        is_depth = self._spec.axes[axis].kind == "depth"
        grouping = grouping or self._asked.grouping
        if large % small == 0 and not (is_depth and grouping is None):
            return self._uniform(axis, large, large // small, grouping or self._asked.usual)
        check_parts(self._spec, axis, large, MAX_PARTS)
        if not self._grows or is_depth:
            return maps.merging(requests.near_even(large, small), large)
        if axis in axis_facts.normed_axes(self._model):
            # A norm sees how often each channel is copied: copy all equally, leave the rest zero,
            # and let compensation.py correct the norm's gain and epsilon.
            groups = requests.copies(large, small)
            left = large - small * (large // small)
            told = f"{left} of {large} {self.units(axis)} are new, zero at first"
            self.notes.append(f"{told}; {STAY_ZERO}")
            return maps.merging(groups, large)
        return maps.merging(requests.cyclic(large, small), large)

    def tell_left(self, axis: str, groups: Sequence[Sequence[int]], n_large: int) -> None:
        """Note the units that are in no group, and those in several."""
        used = [member for group in groups for member in group]
        left = sorted(set(range(n_large)) - set(used))
        if left:
            fate = f"zero in the result; {STAY_ZERO}" if self._grows else "dropped"
            self.notes.append(f"{self.units(axis)} {some(left)} of {n_large}: in no group, {fate}")
        twice = sorted({a for a, b in itertools.pairwise(sorted(used)) if a == b})
        if twice:
            self.notes.append(f"{self.units(axis)} {some(twice)}: in more than one group")
