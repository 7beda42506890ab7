"""Which hidden units are a model's output, and what plans say of it."""

from pathlib import Path

import pytest

import streammap
from streammap.architectures import axis_facts
from streammap.tools.spec_proof import tiny_models
from tests.support import tiny, truth

SIZES = tiny.Sizes(heads=4, layers=2, head_dim=3, mlp_per_head=5)


def told(lazy: streammap.LazyCheckpoint) -> list[str]:
    return [note for note in lazy.plan.notes if note.startswith("no head reads the hidden units")]


def test_a_model_without_a_head_gives_its_hidden_units(tmp_path: Path) -> None:
    tiny.write(tmp_path / "in", tiny.bert(SIZES), tiny.bert_config(SIZES))
    source = streammap.open(tmp_path / "in")
    assert axis_facts.output_axes(source.plan.model) == ("embed",)
    assert told(source.decoalesce(width=2))
    assert told(source.permute(only=("embed",)))
    for other in (source.permute(only=("mlp",)), source.decoalesce(depth=2)):
        assert not told(other)
    # Its function is not kept, and nothing is promised of its output.
    assert not told(source.coalesce(width=2))


@pytest.mark.parametrize(
    ("arch", "name", "axes"),
    [
        ("llama", "llama", ()),
        ("llama", "llama_tied", ()),
        ("t5", "t5", ()),
        ("mobilebert", "mobilebert", ()),
        ("llava", "llava", ()),
        ("mpnet", "mpnet_pooled", ("embed",)),
    ],
)
def test_heads_are_found(tmp_path: Path, arch: str, name: str, axes: tuple[str, ...]) -> None:
    tiny_models.build(truth.named(arch, name), tmp_path / "in")
    model = streammap.open(tmp_path / "in", arch=arch).plan.model
    assert axis_facts.output_axes(model) == axes
