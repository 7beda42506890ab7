"""Which axes a proof calls wrong where a change of all of them does not keep the function."""

from collections.abc import Collection
from typing import cast

import pytest

from streammap.api import LazyCheckpoint
from streammap.errors import PlanError
from streammap.tools.spec_proof import blame

AXES = ("embed", "heads", "kv_heads")


def blamed(
    bad: Collection[str], *, refused: Collection[str] = (), suspects: tuple[str, ...] = ()
) -> tuple[str, tuple[str, ...]]:
    """Of a model that goes wrong where a bad axis changes, or two that are named as "a b"."""

    def changed(axes: tuple[str, ...]) -> LazyCheckpoint:
        if " ".join(axes) in refused:
            raise PlanError(f"{axes[0]} can't change so")
        return cast("LazyCheckpoint", axes)

    def error_of(lazy: LazyCheckpoint) -> float:
        axes = cast("tuple[str, ...]", lazy)
        return 0.5 if {*axes, " ".join(axes)} & {*bad} else 0.0

    return blame.by_axis(changed, error_of, AXES, suspects)


def test_each_axis_is_changed_alone() -> None:
    told, wrong = blamed({"heads"})
    assert wrong == ("heads",)
    assert told == "each axis alone: embed: 0.0e+00, heads: 5.0e-01, kv_heads: 0.0e+00"


def test_only_suspects_are_tried_where_there_are_some() -> None:
    assert blamed({"embed", "heads"}, suspects=("heads",))[1] == ("heads",)


def test_an_axis_that_can_not_change_alone_is_changed_with_another() -> None:
    told, wrong = blamed({"kv_heads heads"}, refused={"kv_heads", "kv_heads embed"})
    assert wrong == ("kv_heads",)
    assert "kv_heads with heads: 5.0e-01" in told


def test_what_goes_wrong_alone_is_named_before_what_does_with_another() -> None:
    assert blamed({"heads"}, refused={"kv_heads", "kv_heads embed"})[1] == ("heads",)


@pytest.mark.parametrize("bad", [(), ("heads",)])
def test_what_can_not_change_at_all_is_named_where_nothing_else_is_wrong(
    bad: tuple[str, ...],
) -> None:
    refused = {"kv_heads", "kv_heads embed", "kv_heads heads"}
    assert blamed(bad, refused=refused)[1] == (bad or ("kv_heads",))
