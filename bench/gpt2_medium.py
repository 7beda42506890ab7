"""Coalesce a GPT-2 medium (24 layers, 16 heads, 1.4 GB in float32), halved both ways.

    python -m bench.gpt2_medium

Makes the checkpoint on the spot, runs the drop-in front in a process of its own, and prints wall
and CPU seconds and the peak resident memory (VmHWM, mapped pages included), beside those of a
process that only imports torch and of `cp` of the source. Medians of five runs in alternation.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from streammap.version import VERSION

Figures = tuple[float, float, int]
"""Wall seconds, CPU seconds, peak resident bytes."""


def make_gpt2(folder: Path, *, layers: int, heads: int) -> None:
    """A GPT-2 with random weights, norms and biases too."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(layers)
    embed = 64 * heads
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (50257, embed),
        "wpe.weight": (1024, embed),
    }
    for norm in ("ln_f", *(f"h.{i}.{n}" for i in range(layers) for n in ("ln_1", "ln_2"))):
        shapes |= {f"{norm}.weight": (embed,), f"{norm}.bias": (embed,)}
    for i in range(layers):
        for name, n_in, n_out in (
            ("attn.c_attn", embed, 3 * embed),
            ("attn.c_proj", embed, embed),
            ("mlp.c_fc", embed, 4 * embed),
            ("mlp.c_proj", 4 * embed, embed),
        ):
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
    folder.mkdir(parents=True)
    tensors = {f"transformer.{key}": torch.randn(shape) for key, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    write_config(folder, layers=layers, heads=heads)


def write_config(folder: Path, *, layers: int, heads: int) -> None:
    """The config.json of a GPT-2."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64 * heads,
        "n_head": heads, "n_layer": layers, "n_positions": 1024, "vocab_size": 50257,
        "n_inner": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


def measure(command: list[str]) -> Figures:
    """Run a command to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Make, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make is not None:
        make_gpt2(options.make, layers=24, heads=16)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        # In a process of its own: a child begins with its parent's peak.
        made = [sys.executable, "-m", "bench.gpt2_medium", "--make", str(folder / "big")]
        subprocess.run(made, check=True)
        write_config(folder / "small", layers=12, heads=8)
        scheme = subprocess.run(
            [sys.executable, "-m", "streammap", "scheme", "--heads", "16", "--layers", "24"],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        (folder / "scheme.json").write_text(scheme)
        weights = str(folder / "big" / "model.safetensors")
        commands = {
            "import torch": [sys.executable, "-c", "import torch"],
            "cp of the source": ["cp", weights, str(folder / "copy")],
            "streammap map --opt C": [
                sys.executable, "-m", "streammap", "map", "--arch", "gpt2", "--opt", "C",
                "--src-dir", str(folder / "big"), "--tgt-dir", str(folder / "small"),
                "--config", str(folder / "scheme.json"), "--save-dir", str(folder / "out"),
            ],
        }  # fmt: skip
        figures: dict[str, list[Figures]] = {title: [] for title in commands}
        for _ in range(options.runs):
            for title, command in commands.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                figures[title].append(measure(command))
    about = f"streammap {VERSION}, torch {version('torch')}, Python {platform.python_version()}"
    print(f"{about}, {os.cpu_count()} x {platform.machine()}")
    print(f"medians of {options.runs} runs in alternation, warm cache, fsync by streammap only")
    print(f"{'':24}{'wall s':>8}{'CPU s':>8}{'peak MB':>9}")
    for title, runs in figures.items():
        wall, seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{title:24}{wall:8.2f}{seconds:8.2f}{peak / 1e6:9.0f}")


if __name__ == "__main__":
    main()
