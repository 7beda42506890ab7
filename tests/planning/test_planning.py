"""What a plan costs: for a model as DeepSeek-V3 is, of up to 100,000 tensors in sparse files."""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from streammap.api import LazyCheckpoint
from streammap.io.checkpoint import Checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot
from streammap.planning import plan
from tests.support import tiny
from tests.support.typed import ok

HIDDEN, MLP, MOE_MLP, VOCAB, HEADS = 7168, 18432, 2048, 129280, 128
Q_LORA, KV_LORA, NOPE_DIM, ROPE_DIM, V_DIM = 1536, 512, 128, 64, 128
N_DENSE = 3
N_SHARDS = 8

_RUN = """
import json, resource, sys
from streammap.cli.main import main
from streammap.output.run import peak_nbytes
main(sys.argv[1:], standalone_mode=False)
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([peak_nbytes(), used.ru_utime + used.ru_stime]), file=sys.stderr)
"""


@dataclass(frozen=True, slots=True)
class Size:
    """How many layers, and how many experts in each that has some; groups of experts are 8."""

    layers: int
    experts: int

    @property
    def n_tensors(self) -> int:
        # Each layer has 9 tensors beside the MLP, a dense MLP 3, a router 2, shared experts 3.
        n_sparse = self.layers - N_DENSE
        return 3 + 9 * self.layers + 3 * N_DENSE + n_sparse * (5 + 3 * self.experts)

    @property
    def config(self) -> dict[str, object]:
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "first_k_dense_replace": N_DENSE,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "kv_lora_rank": KV_LORA,
            "model_type": "deepseek_v3",
            "moe_intermediate_size": MOE_MLP,
            "n_group": 8,
            "n_routed_experts": self.experts,
            "n_shared_experts": 1,
            "num_attention_heads": HEADS,
            "num_experts_per_tok": 8,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": HEADS,
            "num_nextn_predict_layers": 0,
            "q_lora_rank": Q_LORA,
            "qk_nope_head_dim": NOPE_DIM,
            "qk_rope_head_dim": ROPE_DIM,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "topk_group": 4,
            "v_head_dim": V_DIM,
            "vocab_size": VOCAB,
        }

    @property
    def specs(self) -> dict[str, TensorSpec]:
        shapes: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (VOCAB, HIDDEN),
            "model.norm.weight": (HIDDEN,),
            "lm_head.weight": (VOCAB, HIDDEN),
        }
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            shapes |= {
                f"{at}input_layernorm.weight": (HIDDEN,),
                f"{at}post_attention_layernorm.weight": (HIDDEN,),
                f"{at}self_attn.q_a_proj.weight": (Q_LORA, HIDDEN),
                f"{at}self_attn.q_a_layernorm.weight": (Q_LORA,),
                f"{at}self_attn.q_b_proj.weight": (HEADS * (NOPE_DIM + ROPE_DIM), Q_LORA),
                f"{at}self_attn.kv_a_proj_with_mqa.weight": (KV_LORA + ROPE_DIM, HIDDEN),
                f"{at}self_attn.kv_a_layernorm.weight": (KV_LORA,),
                f"{at}self_attn.kv_b_proj.weight": (HEADS * (NOPE_DIM + V_DIM), KV_LORA),
                f"{at}self_attn.o_proj.weight": (HIDDEN, HEADS * V_DIM),
            }
            if layer < N_DENSE:
                shapes |= _mlp(f"{at}mlp.", MLP)
                continue
            shapes[f"{at}mlp.gate.weight"] = (self.experts, HIDDEN)
            shapes[f"{at}mlp.gate.e_score_correction_bias"] = (self.experts,)
            shapes |= _mlp(f"{at}mlp.shared_experts.", MOE_MLP)
            for expert in range(self.experts):
                shapes |= _mlp(f"{at}mlp.experts.{expert}.", MOE_MLP)
        return {key: TensorSpec("BF16", shape) for key, shape in shapes.items()}


SMALL, MEDIUM, LARGE = Size(10, 96), Size(61, 144), Size(61, 576)
MOST_NBYTES, MOST_SECONDS = 500e6, 20.0
"""Peak memory and CPU time of a whole process that plans LARGE; half of both were measured."""


def _mlp(at: str, size: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{at}gate_proj.weight": (size, HIDDEN),
        f"{at}up_proj.weight": (size, HIDDEN),
        f"{at}down_proj.weight": (HIDDEN, size),
    }


def write(folder: Path, size: Size) -> Path:
    """The model in shards whose bytes are holes: they take no disk."""
    folder.mkdir()
    specs = list(size.specs.items())
    weight_map: dict[str, object] = {}
    n_each = -(-len(specs) // N_SHARDS)
    for i in range(N_SHARDS):
        part = specs[i * n_each : (i + 1) * n_each]
        name = f"model-{i + 1:05d}-of-{N_SHARDS:05d}.safetensors"
        head = safetensors_header.encode(part, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(spec.nbytes for _, spec in part))
        weight_map |= dict.fromkeys((key for key, _ in part), name)
    tiny.write_index(folder, weight_map)
    (folder / "config.json").write_text(json.dumps(size.config))
    return folder


def planned(folder: Path, *request: str) -> tuple[dict[str, object], int, float]:
    """What `plan coalesce` says, and its process' peak memory in bytes and CPU seconds."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, "plan", "coalesce", str(folder), *request, "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    nbytes, seconds = json.loads(done.stderr.splitlines()[-1])
    return json.loads(done.stdout), nbytes, seconds


def cpu_seconds(size: Size, width: int) -> float:
    """CPU seconds of one plan in this process, its files being opened already."""
    slots = {key: Slot(key, spec, 0) for key, spec in size.specs.items()}
    source = Checkpoint(Path("deepseek"), (), slots, {}, size.config)
    started = time.process_time()
    result = LazyCheckpoint(plan.from_checkpoint(source, ())).coalesce(width=width)
    used = time.process_time() - started
    assert len(result.keys()) == size.n_tensors
    return used


def test_the_model_is_as_large_as_it_says() -> None:
    assert [len(size.specs) for size in (SMALL, MEDIUM, LARGE)] == [
        size.n_tensors for size in (SMALL, MEDIUM, LARGE)
    ]
    assert SMALL.n_tensors > 2_000
    assert MEDIUM.n_tensors > 25_000
    assert LARGE.n_tensors > 100_000


def test_a_model_of_many_tensors_is_planned_without_reading_it(tmp_path: Path) -> None:
    folder = write(tmp_path / "deepseek", SMALL)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == N_SHARDS
    assert sum(file.stat().st_size for file in files) > 50e9
    assert sum(512 * file.stat().st_blocks for file in files) < 10e6

    halved = json.loads(ok("plan", "coalesce", folder, "--width", 2, "--json"))
    assert halved["n_tensors"] == SMALL.n_tensors
    assert halved["sizes"] == {
        "embed": [HIDDEN, HIDDEN // 2],
        "heads": [HEADS, HEADS // 2],
        "mlp": [MLP, MLP // 2],
        "moe_mlp": [MOE_MLP, MOE_MLP // 2],
        "shared_mlp": [MOE_MLP, MOE_MLP // 2],
        "q_lora": [Q_LORA, Q_LORA // 2],
        "kv_lora": [KV_LORA, KV_LORA // 2],
    }
    rows = {row["pattern"]: row for row in halved["rows"]}
    down = rows["model.layers.*.mlp.experts.*.down_proj.weight"]
    assert down["n_before"] == down["n_after"] == 96 * (SMALL.layers - N_DENSE)
    assert (down["before"], down["after"]) == ([HIDDEN, MOE_MLP], [HIDDEN // 2, MOE_MLP // 2])

    fewer = json.loads(ok("plan", "coalesce", folder, "--experts", 2, "--json"))
    assert fewer["n_tensors"] == Size(SMALL.layers, SMALL.experts // 2).n_tensors
    assert fewer["sizes"] == {"expert": [96, 48]}
    down = {row["pattern"]: row for row in fewer["rows"]}[down["pattern"]]
    assert (down["n_before"], down["n_after"]) == (672, 336)


@pytest.mark.slow
def test_100_000_tensors_are_planned_in_seconds_and_little_memory(tmp_path: Path) -> None:
    folder = write(tmp_path / "deepseek", LARGE)
    for request, n_tensors in (
        ("--width", LARGE.n_tensors),
        ("--experts", Size(LARGE.layers, LARGE.experts // 2).n_tensors),
    ):
        found, nbytes, seconds = planned(folder, request, "2")
        assert found["n_tensors"] == n_tensors
        told = f"{request} 2: {nbytes / 1e6:.0f} MB, {seconds:.1f} s CPU"
        print(told)  # noqa: T201  figures, for pytest -s
        assert nbytes < MOST_NBYTES, told
        assert seconds < MOST_SECONDS, told


@pytest.mark.slow
def test_four_times_the_tensors_take_four_times_as_long() -> None:
    few, many = (
        statistics.median(cpu_seconds(size, 2) for _ in range(3)) for size in (MEDIUM, LARGE)
    )
    told = f"{MEDIUM.n_tensors}: {few:.2f} s, {LARGE.n_tensors}: {many:.2f} s"
    print(told)  # noqa: T201  figures, for pytest -s
    assert many < 6 * few, told
