"""A small model of transformers with an optimizer's state, made once."""

from pathlib import Path

import pytest
import torch

from streammap.common import optional
from tests.support import optimized


@pytest.fixture(scope="package")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that made two steps of AdamW, as transformers' Trainer saves it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("optimizer") / "trained"
    torch.manual_seed(0)
    with optional.quiet():
        config = transformers.LlamaConfig(
            vocab_size=31,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            tie_word_embeddings=False,
        )
        model = transformers.LlamaForCausalLM(config)
        decays = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-3)
        x = torch.arange(12).view(2, 6)
        optimized.train(optimizer, lambda: model(input_ids=x, labels=x).loss, 2)
        model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / optimized.FILE)
    return folder
