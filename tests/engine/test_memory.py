"""Peak resident memory (VmHWM, mapped pages included), each run in a process of its own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from streammap.io.dtypes import TensorSpec
from streammap.io.formats import safetensors_header
from streammap.testing.hubserver import HubServer

_RUN = """
import json, os, sys, time, torch
import streammap
from streammap.output.run import peak_nbytes
before = peak_nbytes()
folder, what, options, slow = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
if slow:
    write = os.pwrite
    os.pwrite = lambda *args: (time.sleep(float(slow)), write(*args))[1]
big = streammap.open(folder)
lazy = {
    "copy": lambda: big,
    "coalesce": lambda: big.coalesce(width=2, depth=2),
    "decoalesce": lambda: big.decoalesce(width=2),
    "layers": lambda: big.decoalesce(layers=4),
    "fill": lambda: big.decoalesce(hidden="=768"),
    "interpolate": lambda: big.interpolate(big.coalesce(width=2).decoalesce(), alpha=0.5),
}[what]()
report = lazy.save(folder + "-" + what, fsync=False, overwrite=True, **options)
print(json.dumps([report.peak_nbytes - before, report.planned_nbytes, report.peak_nbytes]))
"""
MIB = 2**20
OPERATIONS = ("copy", "coalesce", "decoalesce", "layers", "fill", "interpolate")


def write_gpt2(folder: Path, *, vocab: int, layers: int = 4, dtype: str = "F32") -> int:
    """A sparse GPT-2 (its bytes are zeros, and take no disk); gives its size in bytes."""
    embed = 512
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocab, embed), "wpe.weight": (64, embed)}
    for i in range(layers):
        for name, n_in, n_out in (
            ("attn.c_attn", embed, 3 * embed),
            ("attn.c_proj", embed, embed),
            ("mlp.c_fc", embed, 4 * embed),
            ("mlp.c_proj", 4 * embed, embed),
        ):
            shapes[f"h.{i}.{name}.weight"] = (n_in, n_out)
            shapes[f"h.{i}.{name}.bias"] = (n_out,)
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{norm}.weight": (embed,), f"h.{i}.{norm}.bias": (embed,)}
    shapes |= {"ln_f.weight": (embed,), "ln_f.bias": (embed,)}
    specs = [(key, TensorSpec(dtype, shape)) for key, shape in shapes.items()]
    head = safetensors_header.encode(specs, {"format": "pt"})
    folder.mkdir()
    size = len(head) + sum(spec.nbytes for _, spec in specs)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(head)
        file.truncate(size)
    config = {
        "model_type": "gpt2",
        "n_embd": embed,
        "n_head": 8,
        "n_layer": layers,
        "n_positions": 64,
        "vocab_size": vocab,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return size


def run(folder: Path, what: str, *, slow: str = "", **options: object) -> tuple[int, int, int]:
    """Bytes that opening, planning and the run added to a process with torch imported, what the
    plan said it would at most, and the process' peak.
    """
    said = subprocess.run(
        [sys.executable, "-c", _RUN, str(folder), what, json.dumps(options), slow],
        check=True,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(f"{folder}-{what}")
    added, planned, peak = json.loads(said.stdout)
    return added, planned, peak


@pytest.mark.parametrize("what", OPERATIONS)
@pytest.mark.parametrize(("memory", "most"), [("256MiB", 64), ("32MiB", 32)])
def test_a_run_stays_in_its_budget(tmp_path: Path, what: str, memory: str, most: int) -> None:
    size = write_gpt2(tmp_path / "big", vocab=150_000, dtype="BF16")
    assert size > 2 * most * MIB
    added, planned, _ = run(tmp_path / "big", what, memory=memory)
    assert added <= planned
    assert added < most * MIB
    assert planned <= 256 * MIB if memory == "256MiB" else 32 * MIB


def test_mapped_pages_count_too(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=100_000)
    added, planned, _ = run(tmp_path / "big", "coalesce", reader="mmap")
    assert added <= planned
    assert added < 64 * MIB


def test_a_slow_disk_takes_no_memory(tmp_path: Path) -> None:
    write_gpt2(tmp_path / "big", vocab=20_000)
    quick, _, _ = run(tmp_path / "big", "decoalesce")
    slow, _, _ = run(tmp_path / "big", "decoalesce", slow="0.01")
    assert abs(slow - quick) < 2 * MIB


@pytest.mark.slow
@pytest.mark.parametrize("what", OPERATIONS)
def test_ten_times_the_model_takes_the_same(tmp_path: Path, what: str) -> None:
    """One tensor of it, and its shard, are ten times as large as well: 0.1 and 1 GB."""
    peaks = []
    for vocab in (100_000, 1_000_000):
        size = write_gpt2(tmp_path / f"{vocab}", vocab=vocab, dtype="BF16")
        added, planned, peak = run(tmp_path / f"{vocab}", what)
        assert added <= planned
        assert added < min(64 * MIB, size)
        peaks.append(peak)
    assert abs(peaks[1] - peaks[0]) < 0.05 * peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "memory"), [(True, "256MiB"), (True, "80MiB"), (False, "256MiB")]
)
def test_a_model_of_the_hub_stays_in_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, memory: str
) -> None:
    """The client and what is fetched ahead count too."""
    write_gpt2(tmp_path / "big", vocab=100_000)
    code = _RUN.replace("streammap.open(folder)", f"streammap.open('org/big', stream={stream})")
    with HubServer() as hub:
        hub.add("org/big", tmp_path / "big")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
        command = [str(tmp_path / "big"), "coalesce", json.dumps({"memory": memory}), ""]
        said = subprocess.run(
            [sys.executable, "-c", code, *command], check=True, capture_output=True, text=True
        )
    added, planned, _ = json.loads(said.stdout)
    assert added <= planned, f"{added / MIB:.1f} MiB, planned {planned / MIB:.1f}"
