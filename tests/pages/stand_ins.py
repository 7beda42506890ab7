"""What the pages name and this machine lacks: models of the Hub, a bucket, a launcher."""

import contextlib
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from streammap.common import optional
from streammap.testing.hubserver import HubServer
from tests.support import optimized, tiny

Environment = Mapping[str, str]
_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 97,
}


@contextlib.contextmanager
def nothing(folder: Path) -> Iterator[Environment]:
    """A page that makes all that it uses."""
    yield {}


@contextlib.contextmanager
def readme_models(folder: Path) -> Iterator[Environment]:
    """The models of the Hub that the README names, tiny."""
    transformers = optional.library("transformers")
    models = {
        "Qwen/Qwen3-0.6B": transformers.Qwen3Config(**_LLAMA, head_dim=8),
        "HuggingFaceTB/SmolLM2-135M": transformers.LlamaConfig(**_LLAMA),
        "openai-community/gpt2": transformers.GPT2Config(
            n_embd=16, n_layer=12, n_head=4, vocab_size=97, bos_token_id=1, eos_token_id=2
        ),
        "mistralai/Mixtral-8x7B-v0.1": transformers.MixtralConfig(
            **_LLAMA, num_local_experts=8, num_experts_per_tok=2
        ),
        "deepseek-ai/DeepSeek-V2-Lite": transformers.DeepseekV2Config(
            **{**_LLAMA, "num_key_value_heads": 8},
            first_k_dense_replace=1,
            kv_lora_rank=16,
            q_lora_rank=None,
            moe_intermediate_size=24,
            n_routed_experts=8,
            n_shared_experts=2,
            num_experts_per_tok=2,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
    }
    with HubServer() as server, optional.quiet():
        for name, config in models.items():
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.save_pretrained(folder / name)
            server.add(name, folder / name)
        yield {"HF_ENDPOINT": server.url}


@contextlib.contextmanager
def scheme_models(folder: Path) -> Iterator[Environment]:
    """A BERT and a GPT-2 of the Hub, with so many heads and layers, and 4 numbers a head."""
    sizes = tiny.Sizes(heads=12, layers=12, head_dim=4, mlp_per_head=8)
    with HubServer() as server:
        tiny.write(folder / "bert", tiny.bert(sizes), tiny.bert_config(sizes))
        server.add("google-bert/bert-base-uncased", folder / "bert")
        tiny.write(folder / "gpt2", tiny.gpt2(sizes), tiny.gpt2_config(sizes))
        server.add("openai-community/gpt2", folder / "gpt2")
        yield {"HF_ENDPOINT": server.url}


@contextlib.contextmanager
def hub(folder: Path) -> Iterator[Environment]:
    """A Hub with the page's models, and a token."""
    sizes = tiny.Sizes(heads=4, layers=4)
    small = tiny.Sizes(heads=2, layers=4)
    with HubServer() as server:
        for name, its in (("bert", sizes), ("small", small)):
            tiny.write(folder / name, tiny.bert(its), tiny.bert_config(its), n_shards=2)
            server.add(f"org/{name}", folder / name)
        yield {
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": "hf_test",
            "HF_HUB_DISABLE_XET": "1",
        }
        assert {"tester/bert-half", "tester/bert-flat"} <= server.repos.keys()


@contextlib.contextmanager
def adapters(folder: Path) -> Iterator[Environment]:
    """A Llama of the Hub, and two adapters for it."""
    transformers = optional.library("transformers")
    with HubServer() as server, optional.quiet():
        model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**_LLAMA))
        model.save_pretrained(folder / "llama")
        server.add("org/llama", folder / "llama")
        for name, rank in (("llama-lora", 4), ("other-lora", 2)):
            shapes: dict[str, tuple[int, ...]] = {}
            for key, tensor in model.state_dict().items():
                if key.endswith("_proj.weight"):
                    module = f"base_model.model.{key.removesuffix('.weight')}"
                    shapes[f"{module}.lora_A.weight"] = (rank, tensor.shape[1])
                    shapes[f"{module}.lora_B.weight"] = (tensor.shape[0], rank)
            base = {"base_model_name_or_path": "org/llama"}
            tiny.adapter(folder / name, tiny.random(shapes), r=rank, lora_alpha=8, **base)
            server.add(f"org/{name}", folder / name)
        yield {"HF_ENDPOINT": server.url}


@contextlib.contextmanager
def deit(folder: Path) -> Iterator[Environment]:
    """A checkpoint as DeiT's training script saves them."""
    state = tiny.timm_deit(tiny.Sizes(heads=12, layers=12))
    (folder / "fresh" / "deit").mkdir(parents=True)
    torch.save({"model": state}, folder / "fresh" / "deit" / "checkpoint-130.pth")
    yield {}


@contextlib.contextmanager
def recipe_models(folder: Path) -> Iterator[Environment]:
    """Two models of the Hub with as many layers, heads and experts; one in mid-training."""
    transformers = optional.library("transformers")
    sizes = {**_LLAMA, "hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 8}
    torch.manual_seed(0)
    with HubServer() as server, optional.quiet():
        for name, config in {
            "meta-llama/Llama-2-7b-hf": transformers.LlamaConfig(
                **{**sizes, "num_hidden_layers": 32}
            ),
            "mistralai/Mixtral-8x7B-v0.1": transformers.MixtralConfig(
                **sizes, num_local_experts=8, num_experts_per_tok=2
            ),
        }.items():
            model = transformers.AutoModelForCausalLM.from_config(config)
            model.save_pretrained(folder / name)
            server.add(name, folder / name)
        config = transformers.LlamaConfig(**sizes)
        _train(transformers.LlamaForCausalLM(config), folder / "fresh" / "run")
        yield {"HF_ENDPOINT": server.url}


def _train(model: Any, folder: Path) -> None:
    """Save a model that is being trained, with its optimizer."""
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=1e-3)
    tokens = torch.arange(40).view(2, 20)
    optimized.train(optimizer, lambda: model(input_ids=tokens, labels=tokens).loss, 2)
    model.save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / optimized.FILE)


@contextlib.contextmanager
def bucket(folder: Path) -> Iterator[Environment]:
    """A store that speaks S3, with an empty bucket."""
    pytest.importorskip("s3fs", reason="pip install s3fs")
    pytest.importorskip("moto", reason="pip install 'moto[server]'")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        # All servers of a process share their buckets: forget those of other tests.
        urllib.request.urlopen(f"http://{host}:{port}/moto-api/reset", data=b"").close()
        yield {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
    finally:
        server.stop()


@contextlib.contextmanager
def launched_alone(folder: Path) -> Iterator[Environment]:
    """What torchrun sets, for one process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    yield {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **dict.fromkeys(("RANK", "LOCAL_RANK"), "0"),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1"),
    }


OF_PAGE: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Environment]]] = {
    "README.md": readme_models,
    "docs/hub.md": hub,
    "docs/launchers.md": launched_alone,
    "docs/lora.md": adapters,
    "docs/original.md": deit,
    "docs/recipes.md": recipe_models,
    "schemes/README.md": scheme_models,
    "docs/object-stores.md": bucket,
}
