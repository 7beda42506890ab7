"""Experts one by one, as published, and stacked, as transformers has them in memory: one model.

Each tiny model with experts is saved in both layouts and grown; the class loads both results, and
must get the same numbers. Experts are made square where they are stacked (gate and up together as
wide as the hidden size), so that no shape tells how they lie: the keys do.
"""

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import streammap
from streammap.architectures import axis_facts, registry
from streammap.architectures.schema import TinyModel
from streammap.tools.spec_proof import tiny_models
from tests.support import typed

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

QUICK = ("mixtral", "deepseek_v32", "minimax_m2", "lfm2_moe")
WIDTHS = ("moe_intermediate_size", "intermediate_size")
"""Fields of the width of an expert: the first that a model has."""


def models() -> Iterator[Any]:
    """One tiny model of each type that has experts."""
    seen: set[str] = set()
    for arch in registry.names():
        for model in registry.tiny_models(arch):
            spec = registry.load(arch, {"model_type": model.model_type, **model.config})
            if spec.experts and model.model_type not in seen and not spec.unserved:
                seen.add(model.model_type)
                marks = () if model.name in QUICK else (pytest.mark.slow,)
                yield pytest.param(arch, model, id=model.name, marks=marks)


def square(model: TinyModel) -> TinyModel:
    """The model with experts whose gate and up together are as wide as the hidden size."""
    hidden = model.config.get("hidden_size")
    field = next((name for name in WIDTHS if name in model.config), None)
    if not isinstance(hidden, int) or field is None:
        return model
    return replace(model, config={**model.config, field: hidden // 2})


def save_both(model: TinyModel, folder: Path) -> None:
    """The model as `save_pretrained` writes it, and as it lies in memory."""
    tiny_models.build(model, folder / "published")
    net = load(model, folder / "published")
    net.save_pretrained(folder / "memory", save_original_format=False)


def load(model: TinyModel, folder: Path) -> Any:
    kind = getattr(importlib.import_module("transformers"), model.class_name)
    net, found = kind.from_pretrained(folder, dtype=torch.float64, output_loading_info=True)
    assert not any(found.values()), found
    return net


@pytest.mark.parametrize(("arch", "model"), list(models()))
def test_both_layouts_of_experts_are_one_model(tmp_path: Path, arch: str, model: TinyModel) -> None:
    tiny = square(model)
    save_both(tiny, tmp_path)
    states = []
    for name in ("published", "memory"):
        source = streammap.open(tmp_path / name, arch=arch)
        grown = source.decoalesce(width=2, grouping="stacked")
        grown.save(tmp_path / f"{name}-2", fsync=False)
        states.append(load(tiny, tmp_path / f"{name}-2").state_dict())
    first, second = states
    assert first.keys() == second.keys()
    assert [key for key, x in first.items() if not torch.equal(x, second[key])] == []


def test_inspect_says_which_layout_was_found(tmp_path: Path) -> None:
    (model,) = (one for one in registry.tiny_models("mixtral") if one.name == "mixtral")
    save_both(model, tmp_path)
    for name, layout in (("published", "one by one"), ("memory", "stacked")):
        found = streammap.open(tmp_path / name).plan.model
        assert axis_facts.expert_layout(found, "expert") == layout
        told = typed.ok("inspect", tmp_path / name)
        assert f"expert {found.sizes['expert']} ({layout})" in told
