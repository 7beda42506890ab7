"""`streammap architectures` says what plans say: every row, against plans for a tiny model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import streammap
from streammap.analysis import architectures_table
from streammap.analysis.architectures_table import ArchitectureRow
from streammap.api import LazyCheckpoint
from streammap.architectures import registry
from streammap.architectures.schema import TinyModel
from streammap.errors import StreammapError
from streammap.tools.spec_proof import layer_ways, tiny_models
from streammap.tools.spec_proof.layer_ways import Way
from tests.architectures.test_labels import UNPROVED

pytest.importorskip("transformers")

QUICK = ("llama", "falcon", "phimoe", "olmo", "persimmon", "mixtral", "clip", "gemma3", "bert")
EXACT = ("bit-exact", "exact", "exact up to eps")


def rows() -> Iterator[object]:
    """Each row that has a tiny model of its own."""
    for row in architectures_table.listing().rows:
        models = [m for m in registry.tiny_models(row.spec) if m.model_type == row.model_type]
        if models and not models[0].class_name.startswith("timm:"):
            marks = () if row.model_type in QUICK else (pytest.mark.slow,)
            yield pytest.param(row, models[0], id=row.model_type, marks=marks)


def promised(lazy: LazyCheckpoint, **options: Any) -> str:
    try:
        return lazy.decoalesce(**options).promise[0]
    except StreammapError:
        return "refused"


def any_of(lazy: LazyCheckpoint, requests: list[dict[str, Any]]) -> bool:
    """Whether one of these requests is exact."""
    return any(promised(lazy, **options) in EXACT for options in requests)


def layers(lazy: LazyCheckpoint, way: Way) -> dict[str, Any]:
    """More layers of each stack, in one of several orders."""
    depths = lazy.plan.model.architecture.depth_axes
    return {axis: way(n) for axis in depths if (n := lazy.sizes.get(axis))}


@pytest.mark.parametrize(("row", "model"), list(rows()))
def test_a_row_says_what_plans_say(tmp_path: Path, row: ArchitectureRow, model: TinyModel) -> None:
    tiny_models.build(model, tmp_path)
    lazy = streammap.open(tmp_path)
    spec, sizes = lazy.plan.model.architecture, lazy.sizes
    hidden = [axis for axis in spec.spaces.get("hidden", ()) if sizes.get(axis)]
    to_any = [
        {"axes": {axis: f"={int(sizes[axis] * factor)}"}}
        for axis in hidden
        for factor in (3 / 2, 4 / 3, 6 / 5, 7 / 6)
    ]
    assert any_of(lazy, to_any) == row.any_size
    exact = set()
    for space, axes in spec.spaces.items():
        there = {axis: 2 for axis in axes if sizes.get(axis)}
        if there and any_of(lazy, [{"axes": there}]):
            exact.add(space.replace("_", " "))
    assert exact == set(row.exact)
    deeper = [{"axes": layers(lazy, way), "new_layers": "zero"} for way in layer_ways.DEEPER]
    assert any_of(lazy, deeper) == row.silent_layers
    wider = [{"head_dim": 2 * sizes[axis]} for axis in spec.rope if "." not in axis]
    assert any_of(lazy, wider) == row.head_size


def test_each_type_but_few_has_a_model() -> None:
    """Others are image encoders inside models, and timm's."""
    types = {row.model_type for row in architectures_table.listing().rows}
    tried = {param.id for param in rows()}  # type: ignore[attr-defined]
    assert types - tried <= UNPROVED | {"timm:vision_transformer"}
    assert set(QUICK) <= tried
