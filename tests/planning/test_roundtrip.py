"""Growing and merging back through files gives the same bits, for groups of any power of two."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import streammap
from streammap.planning import graph
from streammap.planning.maps import BlockMap
from streammap.planning.requests import Grouping
from tests.support import tiny

SIZES = tiny.Sizes(heads=2, layers=2, head_dim=4, mlp_per_head=6)
Maker = Callable[[tiny.Sizes], tiny.State]
Configer = Callable[[tiny.Sizes], tiny.Config]


@pytest.mark.parametrize(("width", "depth"), [(2, 2), (4, 4), (8, None), (16, 2), (None, 8)])
@pytest.mark.parametrize("grouping", ["stacked", "adjacent"])
@pytest.mark.parametrize(
    ("make", "config"), [(tiny.bert, tiny.bert_config), (tiny.gpt2, tiny.gpt2_config)]
)
def test_up_and_down_again_gives_the_same_bits(
    tmp_path: Path,
    make: Maker,
    config: Configer,
    grouping: Grouping,
    width: int | None,
    depth: int | None,
) -> None:
    state = make(SIZES)
    tiny.write(tmp_path / "small", state, config(SIZES))
    streammap.decoalesce(
        tmp_path / "small", tmp_path / "big", width=width, depth=depth, grouping=grouping
    )
    streammap.coalesce(tmp_path / "big", tmp_path / "again")
    tiny.assert_same(tiny.written(tmp_path / "again"), state)


def test_long_sums_are_kept_in_float64(tmp_path: Path) -> None:
    tiny.write(tmp_path / "x", {"a": torch.ones(8, 8), "b": torch.ones(8, 8).half()}, None)
    source = streammap.open(tmp_path / "x").plan.targets
    four, eight = (BlockMap((tuple((j, 1.0) for j in range(n)),), 8) for n in (4, 8))
    assert graph.map_dims(source["a"], [four, four]).accumulator == "F32"
    assert graph.map_dims(source["a"], [eight, None]).accumulator == "F64"
    assert graph.map_dims(source["a"], [None, eight]).accumulator == "F64"
    assert graph.map_dims(source["b"], [eight, eight]).accumulator == "F32"
