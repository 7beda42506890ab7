"""Wider heads with rotary positions: which frequencies a new theta gives back."""

from pathlib import Path
from typing import Any

import pytest

from streammap import api
from streammap.architectures.schema import TinyModel
from streammap.errors import PlanError
from streammap.tools.spec_proof import comparison, tiny_models

pytest.importorskip("transformers")

TINY: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
DYNAMIC = {**LINEAR, "rope_type": "dynamic"}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def llama(table: dict[str, Any]) -> TinyModel:
    return TinyModel("llama", "LlamaForCausalLM", {**TINY, "rope_parameters": table})


def gemma3(full: dict[str, Any], sliding: dict[str, Any]) -> TinyModel:
    """Each kind of layer has positions of its own."""
    tables = {"full_attention": full, "sliding_attention": sliding}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
    config = {**TINY, **kinds, "rope_parameters": tables}
    return TinyModel("gemma3_text", "Gemma3ForCausalLM", config)


@pytest.mark.parametrize(
    ("model", "allowed"),
    [
        (llama(LINEAR), comparison.TOLERANCE),
        # Its norms over a head share their epsilon.
        (gemma3(LINEAR, PLAIN), 1e-4),
    ],
)
def test_positions_that_are_divided_are_kept(
    tmp_path: Path, model: TinyModel, allowed: float
) -> None:
    tiny_models.build(model, tmp_path / "source")
    grown = api.open(tmp_path / "source").decoalesce(head_dim=16)
    assert grown.promise[0] == ("exact" if allowed == comparison.TOLERANCE else "exact up to eps")
    grown.save(tmp_path / "grown", fsync=False)
    before, after = (tiny_models.outputs(tmp_path / f, model) for f in ("source", "grown"))
    expected = before["logits"]
    error = float((after["logits"] - expected).abs().max() / expected.abs().max())
    assert error < allowed


@pytest.mark.parametrize("model", [llama(DYNAMIC), gemma3(DYNAMIC, PLAIN), gemma3(PLAIN, DYNAMIC)])
def test_frequencies_of_any_kind_of_layer_that_need_more_than_theta_are_refused(
    tmp_path: Path, model: TinyModel
) -> None:
    tiny_models.build(model, tmp_path)
    with pytest.raises(PlanError, match="rope type 'dynamic': its frequencies"):
        api.open(tmp_path).decoalesce(head_dim=16)
