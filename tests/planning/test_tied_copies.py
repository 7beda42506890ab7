"""A head that is tied to its embedding, and stored beside it all the same: as older files do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import streammap
from streammap.architectures import registry
from streammap.architectures.key_pattern import sample
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.tools.spec_proof import tiny_models
from tests.support import truth

pytest.importorskip("transformers")

QUICK = ("gemma2_tied", "llama_tied", "opt", "bart", "biogpt", "gpt2")


def cases() -> list[object]:
    return [
        pytest.param(model, id=model.name, marks=() if model.name in QUICK else pytest.mark.slow)
        for arch in registry.names()
        for model in registry.tiny_models(arch)
        if not model.shapes_only and not model.class_name.startswith("timm:")
    ]


@pytest.mark.parametrize("model", cases())
def test_a_tied_head_may_have_a_copy(tmp_path: Path, model: TinyModel) -> None:
    tiny_models.build(model, tmp_path / "tied")
    opened = streammap.open(tmp_path / "tied").plan
    state = load_file(tmp_path / "tied" / "model.safetensors")
    copies = {}
    for tied in opened.model.tied_heads:
        # A model around another has the other's keys behind a prefix that is not read.
        wrapped, name = next(
            (key[: -len(name)], name)
            for key in state
            for name in (key, key.removeprefix("model."))
            if tied.is_embedding(name)
        )
        if tied.head.head and not any(map(tied.is_head, state)):
            head = sample(tied.head.head[0])
            named = head if wrapped and head.startswith(wrapped) else wrapped + head
            copies[named] = state[wrapped + name].clone()
    if not copies:
        pytest.skip("no tied head, or one that has a copy already")
    expected = truth.outputs(tmp_path / "tied", model)
    save_file(state | copies, tmp_path / "tied" / "model.safetensors", metadata={"format": "pt"})
    try:
        found = truth.outputs(tmp_path / "tied", model)
    except PlanError:
        pytest.skip("its class takes no copy")
    assert truth.difference(found, expected) < 1e-12
    lazy = streammap.open(tmp_path / "tied")
    for n, untie in enumerate((False, True)):
        try:
            grown = lazy.decoalesce(width=2, untie=untie)
        except PlanError:
            assert untie or lazy.plan.model.tied
            continue
        grown.save(tmp_path / f"out{n}", fsync=False)
        error = truth.difference(truth.outputs(tmp_path / f"out{n}", model), expected)
        exact = grown.promise[0] in {"exact", "bit-exact"}
        # Without the positions that a width changes, what is not promised may hold.
        assert (error < 1e-9) == exact or (error < 1e-9 and model.neutral), (untie, error)
        if not untie:
            written = load_file(tmp_path / f"out{n}" / "model.safetensors")
            for name, x in copies.items():
                (like,) = [k for k, y in state.items() if y.equal(x)][:1]
                # A wrapper's prefix is not written.
                pair = [k if k in written else k.removeprefix("model.") for k in (name, like)]
                assert torch.equal(written[pair[0]], written[pair[1]])
