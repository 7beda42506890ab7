"""Quantised checkpoints beside the libraries that read them, and as models that run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import streammap
from tests.support import quantised, tiny, truth
from tests.support.quantised import Quantised
from tests.support.typed import Options

pytestmark = pytest.mark.slow
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


def written(
    folder: Path, made: Quantised, config: tiny.Config, table: object, *, n_shards: int = 2
) -> Path:
    """folder/in, quantised in shards, and folder/plain, what it means."""
    folder.mkdir()
    tiny.write(
        folder / "in", made.stored, {**config, "quantization_config": table}, n_shards=n_shards
    )
    tiny.write(folder / "plain", made.meant, config)
    return folder


def deepseek(tmp_path: Path) -> Path:
    """A tiny DeepSeek-V3 whose linear layers and experts are fp8 in blocks of 8 x 8, in shards."""
    source = truth.Bench(tmp_path).source(truth.named("deepseek", "deepseek_v3"))

    def is_linear(key: str) -> bool:
        return "layers" in key and key.endswith("proj.weight")

    made = quantised.fp8_blocks(truth.state_of(source), is_linear, size=8)
    assert sum(key.endswith("_scale_inv") for key in made.stored) > 10
    config = {**truth.config_of(source), "torch_dtype": "bfloat16", "dtype": "bfloat16"}
    return written(tmp_path / "both", made, config, {**BLOCKS, "weight_block_size": [8, 8]})


def gpt_oss(tmp_path: Path) -> Path:
    """A tiny gpt-oss whose experts are MXFP4."""
    from transformers import GptOssConfig, GptOssForCausalLM

    cls: Any = GptOssForCausalLM
    config = GptOssConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        vocab_size=64, max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = cls(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "made")
    state = truth.state_of(tmp_path / "made")

    def is_expert(key: str) -> bool:
        return "experts" in key and key.endswith("_proj")

    made = quantised.mxfp4(state, is_expert)
    assert sum(key.endswith("_blocks") for key in made.stored) == 8
    table = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return written(tmp_path / "both", made, truth.config_of(tmp_path / "made"), table)


def logits(folder: Path) -> torch.Tensor:
    import transformers

    cls: Any = transformers.AutoModelForCausalLM
    model, info = cls.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, experts_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    found: torch.Tensor = model.eval()(torch.arange(1, 9)[None]).logits
    return found


@pytest.mark.parametrize("make", [deepseek, gpt_oss])
def test_a_quantised_model_is_made_small_loaded_and_run(tmp_path: Path, make: object) -> None:
    both = make(tmp_path)  # type: ignore[operator]
    for name in ("in", "plain"):
        lazy = streammap.open(both / name)
        lazy.save(both / f"{name}-copy", class_check="always")
        options: Options = {"width": 2, "depth": 2} if make is gpt_oss else {"mlp": 2}
        lazy.coalesce(**options).save(both / f"{name}-small", class_check="always")
    for end in ("copy", "small"):
        found, expected = both / f"in-{end}", both / f"plain-{end}"
        tiny.assert_same(tiny.written(found), tiny.written(expected))
        config = json.loads((found / "config.json").read_text())
        assert "quantization_config" not in config
        assert torch.equal(logits(found), logits(expected))


def blocks_128(tmp_path: Path, *sizes: int, n_shards: int) -> tuple[Path, Quantised]:
    """Two linear layers in blocks of 128 x 128."""
    a, b, c, d = sizes
    state = tiny.random({"a.weight": (a, b), "b.weight": (c, d), "norm.weight": (64,)})
    made = quantised.fp8_blocks(state, lambda key: "norm" not in key)
    config: tiny.Config = {"model_type": "none", "architectures": ["None"]}
    return written(tmp_path / "both", made, config, BLOCKS, n_shards=n_shards), made


def test_compressed_tensors_converts_fp8_blocks_alike(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert import FP8BlockDequantizer, convert_checkpoint

    # It can't save what it makes of partial blocks (they are not contiguous), but it makes it.
    converter = FP8BlockDequantizer(targets=[r"re:[ab]$"])
    folder, made = blocks_128(tmp_path, 256, 128, 128, 384, n_shards=1)
    convert_checkpoint(str(folder / "in"), str(folder / "theirs"), converter)
    streammap.open(folder / "in").save(folder / "mine")
    mine = tiny.written(folder / "mine")
    tiny.assert_same(mine, made.meant)
    tiny.assert_same(mine, tiny.written(folder / "theirs"))
    (tmp_path / "partial").mkdir()
    folder, made = blocks_128(tmp_path / "partial", 300, 260, 128, 384, n_shards=2)
    tiny.assert_same(tiny.opened(folder / "in"), converter.process(dict(made.stored)))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_fp8_blocks_alike(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    folder, made = blocks_128(tmp_path, 300, 260, 128, 384, n_shards=2)
    state = {key: torch.empty_like(tensor) for key, tensor in made.meant.items()}
    reader = QuantizedHuggingFaceStorageReader(
        str(folder / "in"), target_dtype=torch.bfloat16, block_size=128
    )
    load(state, storage_reader=reader, no_dist=True)
    tiny.assert_same(tiny.opened(folder / "in"), state)


def test_transformers_decodes_mxfp4_alike(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    both = gpt_oss(tmp_path)
    stored, found = tiny.written(both / "in"), tiny.opened(both / "in")
    names = [key.removesuffix("_blocks") for key in stored if key.endswith("_blocks")]
    for name in names:
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert tiny.bits(found[name]) == tiny.bits(expected), name
