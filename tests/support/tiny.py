"""Tiny checkpoints with the key names of real ones, as plain torch tensors, and ways to write them.

A state is {key: tensor}, a config the dict of a config.json. Both come from one Sizes.
"""

import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import streammap

State = dict[str, Tensor]
Config = dict[str, object]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a tiny model."""

    heads: int = 4
    layers: int = 4
    head_dim: int = 2
    mlp_per_head: int = 3
    vocab: int = 11
    positions: int = 7

    @property
    def embed(self) -> int:
        return self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        return self.heads * self.mlp_per_head


def cut(x: Tensor, dim: int, n: int) -> Tensor:
    """A dimension as `n` parts, one behind the other [..., n, size / n, ...]."""
    return x.reshape(*x.shape[:dim], n, -1, *x.shape[dim + 1 :])


def random(shapes: Mapping[str, Sequence[int]], *, seed: int = 0) -> State:
    """Normal float32 tensors of these shapes."""
    source = torch.Generator().manual_seed(seed)
    return {key: torch.randn(tuple(shape), generator=source) for key, shape in shapes.items()}


def bert(sizes: Sizes, *, seed: int = 0, base: str = "") -> State:
    """BERT without a head, under the names that transformers gives."""
    e, m = sizes.embed, sizes.mlp
    shapes: dict[str, tuple[int, ...]] = {
        f"{base}embeddings.word_embeddings.weight": (sizes.vocab, e),
        f"{base}embeddings.position_embeddings.weight": (sizes.positions, e),
        f"{base}embeddings.token_type_embeddings.weight": (2, e),
        f"{base}embeddings.LayerNorm.weight": (e,),
        f"{base}embeddings.LayerNorm.bias": (e,),
    }
    for i in range(sizes.layers):
        at = f"{base}encoder.layer.{i}."
        for name in ("query", "key", "value"):
            shapes |= _linear(f"{at}attention.self.{name}", e, e)
        shapes |= _linear(f"{at}attention.output.dense", e, e)
        shapes |= _norm(f"{at}attention.output.LayerNorm", e)
        shapes |= _linear(f"{at}intermediate.dense", e, m)
        shapes |= _linear(f"{at}output.dense", m, e)
        shapes |= _norm(f"{at}output.LayerNorm", e)
    shapes |= _linear(f"{base}pooler.dense", e, e)
    return random(shapes, seed=seed)


def bert_config(sizes: Sizes) -> Config:
    return {
        "architectures": ["BertModel"],
        "hidden_size": sizes.embed,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": sizes.positions,
        "model_type": "bert",
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "type_vocab_size": 2,
        "vocab_size": sizes.vocab,
    }


def gpt2(sizes: Sizes, *, seed: int = 0, base: str = "", masks: bool = False) -> State:
    """GPT-2 with a tied head; `masks` adds the attn.bias buffers of hub-era files."""
    e, m = sizes.embed, sizes.mlp
    shapes: dict[str, tuple[int, ...]] = {
        f"{base}wte.weight": (sizes.vocab, e),
        f"{base}wpe.weight": (sizes.positions, e),
    }
    for i in range(sizes.layers):
        at = f"{base}h.{i}."
        shapes |= _norm(f"{at}ln_1", e) | _norm(f"{at}ln_2", e)
        for name, reads, makes in (
            ("attn.c_attn", e, 3 * e),
            ("attn.c_proj", e, e),
            ("mlp.c_fc", e, m),
            ("mlp.c_proj", m, e),
        ):
            shapes |= {f"{at}{name}.weight": (reads, makes), f"{at}{name}.bias": (makes,)}
    shapes |= _norm(f"{base}ln_f", e)
    state = random(shapes, seed=seed)
    if masks:
        n = sizes.positions
        for i in range(sizes.layers):
            state[f"{base}h.{i}.attn.bias"] = torch.ones(n, n).tril().view(1, 1, n, n)
    return state


def gpt2_config(sizes: Sizes) -> Config:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_embd": sizes.embed,
        "n_head": sizes.heads,
        "n_inner": sizes.mlp,
        "n_layer": sizes.layers,
        "n_positions": sizes.positions,
        "vocab_size": sizes.vocab,
    }


def timm_deit(sizes: Sizes, *, seed: int = 0, distilled: bool = True) -> State:
    """DeiT under the names of timm, distilled with dist_token and head_dist."""
    e, m, patches = sizes.embed, sizes.mlp, 4
    extra = 2 if distilled else 1
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, e),
        "pos_embed": (1, patches + extra, e),
        "patch_embed.proj.weight": (e, 3, 2, 2),
        "patch_embed.proj.bias": (e,),
    }
    if distilled:
        shapes["dist_token"] = (1, 1, e)
    for i in range(sizes.layers):
        at = f"blocks.{i}."
        shapes |= _norm(f"{at}norm1", e) | _norm(f"{at}norm2", e)
        shapes |= _linear(f"{at}attn.qkv", e, 3 * e) | _linear(f"{at}attn.proj", e, e)
        shapes |= _linear(f"{at}mlp.fc1", e, m) | _linear(f"{at}mlp.fc2", m, e)
    shapes |= _norm("norm", e) | _linear("head", e, 5)
    if distilled:
        shapes |= _linear("head_dist", e, 5)
    return random(shapes, seed=seed)


def timm_config(sizes: Sizes) -> Config:
    """What a timm file needs beside its shapes: the number of heads."""
    return {"model_args": {"num_heads": sizes.heads}}


def file(path: Path, content: bytes | str) -> Path:
    """A file with this content."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write(folder: Path, state: State, config: Config | None, *, n_shards: int = 1) -> Path:
    """A checkpoint folder, written by the safetensors library."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if n_shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, object] = {}
    for n in range(n_shards):
        name = f"model-{n + 1:05d}-of-{n_shards:05d}.safetensors"
        keys = list(state)[n::n_shards]
        save_file({key: state[key] for key in keys}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    write_index(folder, weight_map)
    return folder


def write_index(folder: Path, weight_map: Mapping[str, object], name: str = INDEX) -> None:
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / name).write_text(json.dumps(content))


def rezipped(
    source: Path, target: Path, change: Callable[[str, bytes], bytes | None], compression: int = 0
) -> Path:
    """A zip file with its entries changed, or left out where `change` gives None."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            content = change(entry.filename, old.read(entry.filename))
            if content is not None:
                new.writestr(entry.filename, content)
    return target


def written(folder: Path) -> State:
    """All tensors of a folder, read by the safetensors library."""
    found: State = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= load_file(file)
    return found


def opened(source: Path) -> State:
    """All tensors of a folder or file, read by streammap."""
    return dict(streammap.open(source).tensors())


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same keys, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype, key
        assert found[key].shape == tensor.shape, key
        assert bits(found[key]) == bits(tensor), key


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Same keys and shapes, and the same numbers up to float32's rounding."""
    torch.testing.assert_close(
        {key: tensor.double() for key, tensor in found.items()},
        {key: tensor.double() for key, tensor in expected.items()},
        rtol=2e-5,
        atol=2e-6,
    )


def bits(tensor: Tensor) -> bytes:
    """A tensor's bytes, row by row."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def tree(folder: Path) -> dict[str, bytes]:
    """Relative name -> bytes of each file under a folder, hidden ones too."""
    return {
        os.path.relpath(file, folder): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def _linear(name: str, reads: int, makes: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (makes, reads), f"{name}.bias": (makes,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def adapter(folder: Path, state: State, **config: object) -> Path:
    """A LoRA adapter as peft saves it; `config` is the rest of adapter_config.json."""
    folder.mkdir(parents=True)
    save_file(
        {key: x.contiguous() for key, x in state.items()}, folder / "adapter_model.safetensors"
    )
    content = {"peft_type": "LORA", "base_model_name_or_path": None, **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder
