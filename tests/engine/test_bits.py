"""Every architecture grown twofold and merged back, through files: the source, bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import streammap
from tests.architectures.test_labels import Case, cases

TORCH = {"float32": torch.float32, "float64": torch.float64}
ROUNDS = {
    # The model multiplies embeddings or logits by sqrt(width): growing scales by sqrt(1/2).
    "bart_scaled",
    "biogpt",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma4_text",
    "pegasus",
    "m2m_100",
    "t5",
    "umt5",
    "xglm",
    "mbart",
    "marian",
}
"""Checkpoints of which a few tensors are scaled by an irrational number, there and back."""


def write(folder: Path, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """A random checkpoint of this kind."""
    source = torch.Generator().manual_seed(len(case.tensors))
    state: dict[str, Tensor] = {}
    for key, tensor in case.tensors.items():
        if tensor.spec.is_float:
            state[key] = torch.randn(tensor.spec.shape, generator=source, dtype=dtype)
        else:
            state[key] = torch.zeros(tensor.spec.shape, dtype=torch.int64)
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(case.config))
    return state


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("name", cases())
def test_grown_on_disk_and_merged_back_is_the_source(name: str, dtype: str, tmp_path: Path) -> None:
    case = cases()[name]
    state = write(tmp_path / "source", case, TORCH[dtype])
    source = streammap.open(tmp_path / "source", arch=case.arch)
    source.decoalesce(width=2).save(tmp_path / "grown", fsync=False)
    back = streammap.open(tmp_path / "grown", arch=case.arch).coalesce()
    different = {key for key, x in back.tensors() if not torch.equal(x, state[key])}
    eps = torch.finfo(TORCH[dtype]).eps
    for key in different:
        # One rounding there, one back; gains count from 1.
        torch.testing.assert_close(back.read(key), state[key], rtol=4 * eps, atol=4 * eps)
    assert not different or name in ROUNDS
