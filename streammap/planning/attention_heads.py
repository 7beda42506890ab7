"""Merging maps of query heads and their kv heads, planned together.

Attention stays meaningful only if each query head of the result comes from heads that read kv heads
from which its own kv head comes:

    for each query head i of the result:  {group of h : h in sources(i)}  is in  sources(group of i)

For growth this is also enough: a plan that keeps it is exact, one that breaks it is not.

Source: Ainslie et al., arXiv:2305.13245 (kv heads of groups, and merging them).
"""

from dataclasses import dataclass

from streammap.errors import PlanError, some
from streammap.planning import maps, requests
from streammap.planning.maps import AxisMap, BlockMap
from streammap.planning.requests import Grouping


@dataclass(frozen=True, slots=True)
class HeadSharing:
    """Query heads and the kv heads that they share."""

    heads: str
    """What the query heads are called in messages."""
    kv: str
    """What the kv heads are called."""
    group: int
    """Query heads of each kv head, in the source."""


@dataclass(frozen=True, slots=True)
class HeadCounts:
    """How many there are in one model."""

    heads: int
    kv: int


def merging(
    names: HeadSharing, large: HeadCounts, small: HeadCounts, grouping: Grouping, *, grows: bool
) -> tuple[BlockMap, BlockMap]:
    """F of query heads and F of kv heads, from a large model's counts to a small one's.

    Raises:
        PlanError: no plan keeps each query head with its own kv head.
    """
    for counts in (large, small):
        if counts.heads % counts.kv:
            raise PlanError(
                f"{counts.heads} {names.heads} can't share {counts.kv} {names.kv} evenly: "
                f"{counts.heads} does not divide by {counts.kv}",
                hint=f"take {names.kv} that divide {names.heads}",
            )
    if large.kv < small.kv or large.heads < small.heads:
        raise PlanError(f"{names.heads} and {names.kv} can't change in opposite directions at once")
    group, small_group = large.heads // large.kv, small.heads // small.kv
    if large.heads == small.heads:
        return maps.identity(large.heads), _neighbours(names.kv, large.kv, small.kv)
    if large.kv == small.kv or group >= small_group:
        # Each kv head with its query heads, and these among themselves.
        of_kv = _alike(large.kv, small.kv, grouping, grows=grows)
        of_heads = maps.kron(of_kv, _alike(group, small_group, grouping, grows=grows))
        assert isinstance(of_heads, BlockMap)
        return of_heads, of_kv
    # Kv heads shrink more than query heads: first both by the same factor, so that each kv head
    # takes its query heads along, then kv heads alone (from multi-head to grouped-query attention).
    between = HeadCounts(small.heads, small.heads // group)
    if small.heads % group or large.kv % between.kv or between.kv % small.kv:
        # No such step between: merge kv heads of neighbours, and then, for each of these, all the
        # query heads that read one of them.
        of_kv = _neighbours(names.kv, large.kv, small.kv)
        inner = _alike(large.heads // small.kv, small_group, grouping, grows=grows)
        of_heads = maps.kron(maps.identity(small.kv), inner)
        assert isinstance(of_heads, BlockMap)
        return of_heads, of_kv
    merged, first = merging(names, large, between, grouping, grows=grows)
    rest = maps.compose(_neighbours(names.kv, between.kv, small.kv), first)
    assert isinstance(rest, BlockMap)
    return merged, rest


def kv_of(names: HeadSharing, of_heads: BlockMap) -> BlockMap:
    """F of kv heads that fits F of query heads, each kv head shared by as many as before.

    Raises:
        PlanError: the number of heads does not divide.
    """
    n_small, n_large, group = of_heads.n_out, of_heads.n_in, names.group
    if n_small % group or n_large % group:
        raise PlanError(
            f"{n_small} {names.heads} do not divide by the {group} of each of the {names.kv}",
            hint=f"give groups for {names.kv} too",
        )
    groups = []
    for i in range(n_small // group):
        members = (j for h in range(group) for j, _ in of_heads.members(i * group + h))
        groups.append(tuple(dict.fromkeys(j // group for j in members)))
    return maps.merging(groups, n_large // group)


def misplaced(names: HeadSharing, of_heads: AxisMap, of_kv: AxisMap) -> str | None:
    """Why a query head of the result would read a foreign kv head; None where none does.

    Args:
        of_heads: The map that is applied: heads of the result from heads of the source.
        of_kv: The same for kv heads.
    """
    n_heads, n_kv = of_heads.n_out, of_kv.n_out
    if n_heads % n_kv:
        return f"{n_heads} {names.heads} can't share {n_kv} {names.kv} evenly"
    after = n_heads // n_kv
    for i in range(n_heads):
        members = [j for j, _ in of_heads.members(i)]
        read = {j // names.group for j in members}
        there = {j for j, _ in of_kv.members(i // after)}
        if not read <= there:
            return (
                f"{names.heads} {i} would come from heads that read {names.kv} "
                f"{some(sorted(read))}, but its own, {i // after}, comes from "
                f"{some(sorted(there)) or 'none'} (it is made of {names.heads} "
                f"{some(members)} of the source, and reads {names.kv} {i // after} of the result)"
            )
    return None


def _neighbours(kv: str, n_large: int, n_small: int) -> BlockMap:
    if n_large % n_small:
        raise PlanError(
            f"{kv}: {n_large} do not divide into {n_small} groups of neighbours, and query heads "
            "must stay with their own kv heads",
            hint=f"take a number that divides {n_large}, or give groups for heads and kv heads",
        )
    return maps.merging(requests.near_even(n_large, n_small), n_large)


def _alike(n_large: int, n_small: int, grouping: Grouping, *, grows: bool) -> BlockMap:
    if n_large == n_small:
        return maps.identity(n_large)
    even = n_large % n_small == 0
    if (even and grouping == "stacked") or (not even and grows):
        return maps.merging(requests.cyclic(n_large, n_small), n_large)
    return maps.merging(requests.near_even(n_large, n_small), n_large)
