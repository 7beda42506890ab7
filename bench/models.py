"""Checkpoints that the benchmarks measure on: Llama, GPT-2 and DeepSeek-V3 by their layout.

    python -m bench.models FOLDER KIND NAME=NUMBER...    makes one, prints its tensors and bytes

KIND is llama, gpt2 or moe; NAME=NUMBER are the fields of its class below. With shards=N the files
have real headers and holes for bytes (they read as zeros and take no disk), else random values. It
is run in a process of its own: values take as much memory as the model.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench import harness
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header

Shapes = dict[str, tuple[int, ...]]


class Kind(Protocol):
    """A model by its sizes."""

    @property
    def dtype(self) -> str: ...

    @property
    def shapes(self) -> Shapes: ...

    @property
    def config(self) -> dict[str, object]: ...


@dataclass(frozen=True, slots=True)
class Llama:
    """A decoder laid out like Llama's, in bfloat16; heads of 64."""

    hidden: int
    mlp: int
    layers: int
    vocab: int

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def shapes(self) -> Shapes:
        embed, mlp = self.hidden, self.mlp
        shapes: Shapes = {
            "model.embed_tokens.weight": (self.vocab, embed),
            "model.norm.weight": (embed,),
            "lm_head.weight": (self.vocab, embed),
        }
        for i in range(self.layers):
            at = f"model.layers.{i}."
            shapes |= {
                f"{at}input_layernorm.weight": (embed,),
                f"{at}post_attention_layernorm.weight": (embed,),
                f"{at}mlp.gate_proj.weight": (mlp, embed),
                f"{at}mlp.up_proj.weight": (mlp, embed),
                f"{at}mlp.down_proj.weight": (embed, mlp),
            }
            shapes |= {f"{at}self_attn.{p}_proj.weight": (embed, embed) for p in "qkvo"}
        return shapes

    @property
    def config(self) -> dict[str, object]:
        heads = self.hidden // 64
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "head_dim": 64,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "rope_theta": 1e4,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
        }


@dataclass(frozen=True, slots=True)
class GPT2:
    """A GPT-2 in float32; heads of 64."""

    layers: int
    heads: int

    @property
    def dtype(self) -> str:
        return "F32"

    @property
    def shapes(self) -> Shapes:
        embed = 64 * self.heads
        shapes: Shapes = {"wte.weight": (50257, embed), "wpe.weight": (1024, embed)}
        for norm in ("ln_f", *(f"h.{i}.{n}" for i in range(self.layers) for n in ("ln_1", "ln_2"))):
            shapes |= {f"{norm}.weight": (embed,), f"{norm}.bias": (embed,)}
        for i in range(self.layers):
            for name, n_in, n_out in (
                ("attn.c_attn", embed, 3 * embed),
                ("attn.c_proj", embed, embed),
                ("mlp.c_fc", embed, 4 * embed),
                ("mlp.c_proj", 4 * embed, embed),
            ):
                shapes[f"h.{i}.{name}.weight"] = (n_in, n_out)
                shapes[f"h.{i}.{name}.bias"] = (n_out,)
        return {f"transformer.{key}": shape for key, shape in shapes.items()}

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "n_inner": None,
            "n_embd": 64 * self.heads,
            "n_head": self.heads,
            "n_layer": self.layers,
            "n_positions": 1024,
            "vocab_size": 50257,
        }


@dataclass(frozen=True, slots=True)
class Moe:
    """A mixture of experts laid out like DeepSeek-V3's, in bfloat16; dense in its first layers."""

    hidden: int
    mlp: int
    moe_mlp: int
    vocab: int
    heads: int
    q_lora: int
    kv_lora: int
    head: int
    """Size of a head's values and of its part without positions; that with has half of it."""
    layers: int
    experts: int
    dense: int = 3

    @property
    def dtype(self) -> str:
        return "BF16"

    @property
    def shapes(self) -> Shapes:
        embed, rope = self.hidden, self.head // 2
        shapes: Shapes = {
            "model.embed_tokens.weight": (self.vocab, embed),
            "model.norm.weight": (embed,),
            "lm_head.weight": (self.vocab, embed),
        }
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes |= {
                f"{at}input_layernorm.weight": (embed,),
                f"{at}post_attention_layernorm.weight": (embed,),
                f"{at}self_attn.q_a_proj.weight": (self.q_lora, embed),
                f"{at}self_attn.q_a_layernorm.weight": (self.q_lora,),
                f"{at}self_attn.q_b_proj.weight": (self.heads * (self.head + rope), self.q_lora),
                f"{at}self_attn.kv_a_proj_with_mqa.weight": (self.kv_lora + rope, embed),
                f"{at}self_attn.kv_a_layernorm.weight": (self.kv_lora,),
                f"{at}self_attn.kv_b_proj.weight": (self.heads * 2 * self.head, self.kv_lora),
                f"{at}self_attn.o_proj.weight": (embed, self.heads * self.head),
            }
            if layer < self.dense:
                shapes |= self._mlp(f"{at}mlp.", self.mlp)
                continue
            shapes[f"{at}mlp.gate.weight"] = (self.experts, embed)
            shapes[f"{at}mlp.gate.e_score_correction_bias"] = (self.experts,)
            shapes |= self._mlp(f"{at}mlp.shared_experts.", self.moe_mlp)
            for expert in range(self.experts):
                shapes |= self._mlp(f"{at}mlp.experts.{expert}.", self.moe_mlp)
        return shapes

    def _mlp(self, at: str, size: int) -> Shapes:
        return {
            f"{at}gate_proj.weight": (size, self.hidden),
            f"{at}up_proj.weight": (size, self.hidden),
            f"{at}down_proj.weight": (self.hidden, size),
        }

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "first_k_dense_replace": self.dense,
            "hidden_size": self.hidden,
            "intermediate_size": self.mlp,
            "kv_lora_rank": self.kv_lora,
            "moe_intermediate_size": self.moe_mlp,
            "n_group": 8,
            "n_shared_experts": 1,
            "n_routed_experts": self.experts,
            "num_attention_heads": self.heads,
            "num_experts_per_tok": 8,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": self.q_lora,
            "qk_nope_head_dim": self.head,
            "qk_rope_head_dim": self.head // 2,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "topk_group": 4,
            "v_head_dim": self.head,
            "vocab_size": self.vocab,
        }


KINDS: Mapping[str, type[Llama | GPT2 | Moe]] = {"llama": Llama, "gpt2": GPT2, "moe": Moe}


def specs(model: Kind) -> list[tuple[str, TensorSpec]]:
    """The tensors of a model, in the order of their bytes."""
    return [(key, TensorSpec(model.dtype, shape)) for key, shape in model.shapes.items()]


def nbytes(model: Kind) -> int:
    """Bytes of a model's tensors."""
    return sum(spec.nbytes for _, spec in specs(model))


def llama_of(size: float, *, hidden: int = 2048, largest: float = 0.1e9) -> Llama:
    """A Llama of about `size` bytes, whose embedding and head have `largest` each."""
    vocab = round(largest / 2 / hidden / 64) * 64
    mlp = hidden * 11 // 4
    each = 2 * (4 * hidden * hidden + 3 * hidden * mlp)
    layers = round((size - 2 * largest) / each / 2) * 2
    return Llama(hidden, mlp, max(layers, 2), vocab)


def make(folder: Path, model: Llama | GPT2 | Moe, *, seed: int = 0, shards: int = 0) -> Path:
    """Make a checkpoint in a process of its own, sparse where `shards` is not 0; its folder."""
    made(folder, model, seed=seed, shards=shards)
    return folder


def made(
    folder: Path, model: Llama | GPT2 | Moe, *, seed: int = 0, shards: int = 0
) -> tuple[int, int]:
    """The same; gives the number of tensors and their bytes."""
    kind = next(name for name, known in KINDS.items() if isinstance(model, known))
    fields = [f"{name}={getattr(model, name)}" for name in model.__dataclass_fields__]
    argv = (harness.PYTHON, "-m", "bench.models", folder, kind, *fields)
    said = harness.run((*argv, f"seed={seed}", f"shards={shards}")).said
    n, size = (int(word) for word in said.split())
    return n, size


def weights(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights."""
    return sorted(folder.glob("*.safetensors"))


def write_config(folder: Path, model: Kind) -> Path:
    """The config.json of a model, by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.config))
    return folder


def _write_random(folder: Path, model: Kind, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(seed)
    dtype = torch.bfloat16 if model.dtype == "BF16" else torch.float32
    tensors = {key: torch.randn(shape, dtype=dtype) for key, shape in model.shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _write_sparse(folder: Path, model: Kind, shards: int) -> None:
    every = specs(model)
    n_each = -(-len(every) // shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        part = every[i * n_each : (i + 1) * n_each]
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        if shards == 1:
            name = "model.safetensors"
        head = safetensors_header.encode(part, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(spec.nbytes for _, spec in part))
        weight_map |= dict.fromkeys((key for key, _ in part), name)
    if shards > 1:
        index = {"metadata": {"total_size": nbytes(model)}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    """Make the checkpoint that the command line asks for."""
    folder, kind, *fields = sys.argv[1:]
    numbers = {name: int(number) for name, _, number in (f.partition("=") for f in fields)}
    seed, shards = numbers.pop("seed", 0), numbers.pop("shards", 0)
    model = KINDS[kind](**numbers)
    write_config(Path(folder), model)
    if shards:
        _write_sparse(Path(folder), model, shards)
    else:
        _write_random(Path(folder), model, seed)
    print(len(model.shapes), nbytes(model))


if __name__ == "__main__":
    main()
