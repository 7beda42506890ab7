"""Models that several processes hold together, started by torchrun."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import streammap
from streammap.common import optional
from tests.support import launched

ROOT = Path(__file__).parents[2]
_TINY = {
    "hidden_size": 36,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "vocab_size": 101,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "tie_word_embeddings": True,
}
_LARGE = {
    "hidden_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "vocab_size": 16001,
    "num_key_value_heads": 8,
    "intermediate_size": 1408,
    "tie_word_embeddings": False,
}


def _source(folder: Path, fields: dict[str, Any]) -> streammap.LazyCheckpoint:
    torch.manual_seed(0)
    with optional.quiet():
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
        model.save_pretrained(folder / "source")
    return streammap.open(folder / "source")


def _launch(what: str, folder: Path, n: int) -> list[dict[str, Any]]:
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"]
    done = subprocess.run(
        [sys.executable, *words, "-m", "tests.support.launched", what, str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{what}-{rank}.json").read_text()) for rank in range(n)]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [_TINY, _LARGE], ids=["tiny", "400MB"])
def test_each_process_computes_its_own_shards(tmp_path: Path, fields: dict[str, Any]) -> None:
    source = _source(tmp_path, fields)
    source.decoalesce(width=2).save(tmp_path / "out")
    for found in _launch("fill", tmp_path, 2):
        assert found["same"]
        assert found["nbytes"] <= found["total"] / 2 + 2**20
        assert found["grown"] <= found["total"] / 2 + launched.MEMORY


@pytest.mark.slow
def test_fsdp_over_tensor_parallelism_is_filled(tmp_path: Path) -> None:
    _source(tmp_path, {**_TINY, "tie_word_embeddings": False})
    for found in _launch("mesh", tmp_path, 4):
        assert found["same"]
        assert found["placements"] == "(_StridedShard(dim=0, sf=2), Shard(dim=0))"


@pytest.mark.slow
def test_what_fsdp_saved_is_resized_and_loaded_by_it(tmp_path: Path) -> None:
    _source(tmp_path, _TINY)
    for found in _launch("checkpoints", tmp_path, 2):
        assert found == {"same": True, "files": 2}


@pytest.mark.slow
def test_what_fsdp_saved_of_an_optimizer_is_resized_and_goes_on(tmp_path: Path) -> None:
    _source(tmp_path, {**_TINY, "tie_word_embeddings": False})
    for found in _launch("optimizer", tmp_path, 2):
        assert found["same"]
        assert found["lr"] == [1e-3, 1e-3]
        assert found["loss"] == pytest.approx(found["before"], rel=1e-5)
