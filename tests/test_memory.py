"""Peak resident memory (VmHWM, mapped pages included), each run in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from streammap import header
from streammap.spec import TensorSpec

_RUN = """
import json, sys, torch
import streammap
from streammap.executor import peak_nbytes
torch.ones(2) + torch.ones(2)
before = peak_nbytes()
folder, what = sys.argv[1:]
big = streammap.open(folder)
lazy = {
    "copy": lambda: big,
    "coalesce": lambda: big.coalesce(width=2, depth=2),
    "decoalesce": lambda: big.decoalesce(width=2),
    "fill": lambda: big.decoalesce(hidden="=768"),
    "interpolate": lambda: big.interpolate(big.coalesce(width=2).decoalesce(), alpha=0.5),
}[what]()
report = lazy.save(folder + "-" + what, fsync=False)
print(json.dumps([report.peak_nbytes - before, report.planned_nbytes]))
"""


def write_gpt2(folder: Path, *, vocab: int, layers: int = 4, dtype: str = "F32") -> int:
    """A sparse GPT-2 (its bytes are zeros, and take no disk); gives its size in bytes."""
    embed = 512
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab, embed), "wpe.weight": (64, embed)}
    for i in range(layers):
        for name, n_in, n_out in (
            ("attn.c_attn", embed, 3 * embed), ("attn.c_proj", embed, embed),
            ("mlp.c_fc", embed, 4 * embed), ("mlp.c_proj", 4 * embed, embed),
        ):  # fmt: skip
            shapes[f"h.{i}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{i}.{name}.bias"] = (n_out,)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (embed,), f"h.{i}.{norm}.bias": (embed,)}
    shapes |= {"ln_f.weight": (embed,), "ln_f.bias": (embed,)}
    specs = [(key, TensorSpec(dtype, shape)) for key, shape in shapes.items()]
    head = header.encode(specs, {"format": "pt"})
    folder.mkdir()
    size = len(head) + sum(spec.nbytes for _, spec in specs)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(size)
    config = {
        "model_type": "gpt2", "n_embd": embed, "n_head": 8, "n_layer": layers,
        "n_positions": 64, "vocab_size": vocab,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return size


def added(folder: Path, what: str) -> tuple[int, int]:
    """Bytes that a run added to its process, and what the plan said it would at most."""
    said = subprocess.run(
        [sys.executable, "-c", _RUN, str(folder), what], check=True, capture_output=True, text=True
    )
    measured, planned = json.loads(said.stdout)
    return measured, planned


@pytest.mark.parametrize("what", ["copy", "coalesce", "decoalesce", "fill", "interpolate"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_run_needs_no_more_than_its_plan_says(tmp_path: Path, what: str, dtype: str) -> None:
    vocab = 150_000 if dtype == "F32" else 300_000
    size = write_gpt2(tmp_path / "big", vocab=vocab, dtype=dtype)
    assert size > 330e6
    measured, planned = added(tmp_path / "big", what)
    assert measured <= planned < size / 2
