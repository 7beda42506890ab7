"""Dense maps on a GPU and on the processor: 4096 and 8192 wide, and what the transfers cost.

    python -m bench.gpu [--runs 5] [--folder DIR] [--quick] [--cpu-only]

Prints wall seconds of `coalesce --map` with a dense map of the hidden size, less `import torch`, by
--device cpu and --device cuda, and how fast the GPU takes and gives bytes (pageable and pinned
memory). Where there is no GPU it says so and stops; --cpu-only measures the processor all the same.
"""

import argparse
import json
from pathlib import Path

from bench import harness, models
from bench.harness import IMPORT, PYTHON, STREAMMAP, Command, Options, decimals, megabytes

_HAS = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
_MAP = """
import sys, torch
from pathlib import Path
from streammap.planning import map_file
from streammap.planning.dense.matrix import Held
from streammap.planning.maps import DenseMap
n, out = int(sys.argv[1]), Path(sys.argv[2])
torch.manual_seed(0)
dense = DenseMap(Held(torch.rand(n // 2, n) / n))
out.write_bytes(map_file.encode((map_file.MapLevel({"embed": dense}),)))
"""
_TRANSFERS = """
import json, sys, time, torch
n, found = int(sys.argv[1]), {}
there = torch.empty(n, dtype=torch.uint8, device="cuda")
for name, pinned in (("pageable", False), ("pinned", True)):
    here = torch.empty(n, dtype=torch.uint8, pin_memory=pinned)
    here.fill_(1)
    for way, target, source in ((f"to {name}", there, here), (f"from {name}", here, there)):
        best = []
        for _ in range(5):
            torch.cuda.synchronize()
            started = time.perf_counter()
            target.copy_(source)
            torch.cuda.synchronize()
            best.append(time.perf_counter() - started)
        found[way] = n / sorted(best)[2] / 1e9
print(json.dumps(found))
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--cpu-only", action="store_true", help="measure --device cpu alone")


def commands(folder: Path, hidden: int, devices: tuple[str, ...]) -> dict[str, Command]:
    """Runs of one width."""
    model = models.Llama(hidden, hidden * 11 // 4, 2, 8192)
    source = models.make(folder / str(hidden), model)
    dense, out = folder / f"{hidden}.map.safetensors", folder / "out"
    harness.run((PYTHON, "-c", _MAP, hidden, dense))
    argv = (*STREAMMAP, "coalesce", source, out, "--map", dense, "--no-fsync", "--json")
    return {
        f"{hidden} wide, {device}": Command(
            (*argv, "--device", device), (out,), models.weights(source), models.nbytes(model) // 2
        )
        for device in devices
    }


def main(options: Options) -> None:
    """Look for a GPU, make, run, print."""
    name = harness.run((PYTHON, "-c", _HAS)).said.strip()
    if not name and not options.given.cpu_only:
        print("skipped: torch finds no CUDA device here (torch.cuda.is_available() is false)")
        return
    devices = ("cpu",) if options.given.cpu_only else ("cpu", "cuda")
    widths = (512, 1024) if options.quick else (4096, 8192)
    made = {"import torch": Command(IMPORT)}
    for hidden in widths:
        made |= commands(options.folder, hidden, devices)
    results = harness.alternate(made, options.runs)
    harness.print_head(
        f"Dense maps of the hidden size, bf16 Llama of 2 layers; {name or 'no GPU'}",
        options.runs,
        "warm cache",
        "no fsync",
        "less import torch",
    )
    rows = []
    for title in list(made)[1:]:
        slow = title.rpartition(", ")[0] + ", cpu"
        rows.append(
            (
                title,
                decimals(results.wall(title, "import torch")),
                decimals(results.cpu(title, "import torch")),
                decimals(results.json(title, "seconds")),
                megabytes(results.peak(title, "import torch")),
                megabytes(results.json(title, "planned_nbytes")),
                decimals(
                    results.ratio(title, slow, less="import torch", other_less="import torch")
                ),
            )
        )
    columns = ("", "wall s", "CPU s", "run s", "added MB", "planned MB", "wall / cpu's")
    harness.print_table(columns, rows)
    if "cuda" in devices:
        told = json.loads(harness.run((PYTHON, "-c", _TRANSFERS, 2**28)).said)
        harness.print_table(
            ("256 MiB, one copy", "GB/s"), [(way, decimals(rate, 1)) for way, rate in told.items()]
        )


if __name__ == "__main__":
    with harness.options(__doc__, add) as given:
        main(given)
