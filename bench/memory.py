"""What a run adds to its process on top of torch, and what its plan says: by size and operation.

    python -m bench.memory [--runs 5] [--folder DIR] [--quick] [--all] [--large-runs N] [--plot F]

Prints, for each run, VmHWM above `import torch` and the planned peak, in MiB. One thing is changed
at a time: the operation, the memory asked for, the reader, the checkpoint's size (of source and
result the larger one), its largest tensor, the size of shards; --all takes every combination of
the others. Sources are sparse files; results are real, 10 GB at a time, and removed after each run.
--large-runs 1 runs the cases of 3 GB and more once, and says so.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import harness, models, plot
from bench.harness import Command, Options, mebibytes

OPERATIONS = (
    "copy",
    "coalesce width 2",
    "coalesce width 2 depth 2",
    "decoalesce width 2",
    "decoalesce depth 2",
    "interpolate",
    "decoalesce and blend",
    "hidden =SIZE",
)
DEFAULT = "default"
MEMORIES = (DEFAULT, "32MiB")
MARKS = {DEFAULT: 64, "32MiB": 48}
"""MiB above torch that a run should stay below."""
LARGE = 3.0
_SHRUNK = {"decoalesce width 2": 1024, "decoalesce and blend": 1024, "hidden =SIZE": 1536}
"""Hidden size of the source, where the result is the larger one; 2048 is that of the others."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row."""

    operation: str
    size: float = 1.0
    largest: float = 0.1
    shard: float = 5.0
    memory: str = DEFAULT
    reader: str = "auto"

    @property
    def title(self) -> str:
        """All settings."""
        return (
            f"{self.operation}|{self.size}|{self.largest}|{self.shard}|{self.memory}|{self.reader}"
        )


def cases(*, every: bool) -> Iterator[Case]:
    """What is measured."""
    if every:
        for operation in OPERATIONS:
            for size, largest in ((1.0, 0.1), (10.0, 0.1), (3.0, 1.0), (10.0, 1.0)):
                for shard in (0.5, 5.0):
                    for memory in MEMORIES:
                        yield Case(operation, size, largest, shard, memory)
        return
    for memory in MEMORIES:
        for operation in OPERATIONS:
            yield Case(operation, memory=memory)
    for operation in ("copy", "coalesce width 2", "decoalesce width 2", "interpolate"):
        yield Case(operation, shard=0.5)
    for operation in ("coalesce width 2", "decoalesce width 2", "interpolate"):
        for memory in MEMORIES:
            yield Case(operation, size=3.0, largest=1.0, memory=memory)
    for operation in ("copy", "coalesce width 2", "interpolate"):
        yield Case(operation, size=10.0)
    yield Case("coalesce width 2 depth 2", size=10.0, memory="32MiB")
    for reader in ("mmap", "pread"):
        for operation in ("copy", "coalesce width 2", "decoalesce width 2", "interpolate"):
            yield Case(operation, reader=reader)


def source_of(case: Case, scale: float, folder: Path) -> Path:
    """The sparse checkpoint that a case reads, made on first use."""
    big = models.llama_of(case.size * 1e9 * scale, largest=case.largest * 1e9 * scale)
    hidden = _SHRUNK.get(case.operation, big.hidden)
    layers = big.layers // 2 if case.operation == "decoalesce depth 2" else big.layers
    mlp = big.mlp if hidden == 1536 else big.mlp * hidden // big.hidden
    return made(folder, models.Llama(hidden, mlp, layers, big.vocab))


def made(folder: Path, model: models.Llama) -> Path:
    """A sparse checkpoint."""
    name = f"{model.hidden}-{model.mlp}-{model.layers}-{model.vocab}"
    path = folder / name
    return path if path.exists() else models.make(path, model, shards=1)


def command(case: Case, scale: float, folder: Path, large_runs: int | None) -> Command:
    """The process of a case."""
    source = source_of(case, scale, folder)
    whole = source_of(Case("copy", case.size, case.largest), scale, folder)
    steps: dict[str, list[tuple[str, dict[str, object]]]] = {
        "copy": [],
        "coalesce width 2": [("coalesce", {"width": 2})],
        "coalesce width 2 depth 2": [("coalesce", {"width": 2, "depth": 2})],
        "decoalesce width 2": [("decoalesce", {"width": 2})],
        "decoalesce depth 2": [("decoalesce", {"depth": 2})],
        "interpolate": [],
        "decoalesce and blend": [("decoalesce", {"width": 2})],
        "hidden =SIZE": [("decoalesce", {"hidden": "=1920"})],
    }
    save: dict[str, object] = {"max_shard_size": int(case.shard * 1e9 * scale)}
    save["reader"] = case.reader
    if case.memory != DEFAULT:
        save["memory"] = case.memory
    output = folder / "out"
    more: dict[str, object] = {}
    if case.operation in ("interpolate", "decoalesce and blend"):
        more = {"blend": whole, "alpha": 0.3}
    argv = harness.job(source, output, steps=steps[case.operation], save=save, **more)
    most = large_runs if case.size >= LARGE else None
    return Command(argv, (output,), most_runs=most)


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--all", action="store_true", help="every combination")
    parser.add_argument(
        "--plot", type=plot.svg_path, metavar="FILE.svg", help="draw the table, too"
    )
    parser.add_argument("--large-runs", type=int, metavar="N", help="runs of cases of 3 GB or more")


def main(options: Options) -> None:
    """Run, print, draw."""
    scale = 0.05 if options.quick else 1.0
    harness.need(options.folder, 12e9 * scale)
    chosen = list(cases(every=options.given.all))
    large = options.given.large_runs
    commands = {case.title: command(case, scale, options.folder, large) for case in chosen}
    results = harness.alternate(commands, options.runs)
    harness.print_head(
        "Memory of a run beside torch: VmHWM above `import torch`, MiB",
        options.runs,
        "warm cache, no fsync",
        "sparse sources, bf16",
        "largest run in brackets",
    )
    rows, bars = [], []
    for case in chosen:
        added, planned = (results.json(case.title, key) for key in ("added", "planned"))
        runs = results.runs[case.title].values()
        most = max(json.loads(run.said)["added"] for run in runs)
        written = results.json(case.title, "written")
        rows.append(
            (
                case.operation,
                f"{case.size * scale:.3g}",
                f"{case.largest * scale:.3g}",
                f"{case.shard * scale:.3g}",
                f"{written / 1e9:.2f}",
                case.memory,
                case.reader,
                f"{mebibytes(added)} ({mebibytes(most)})",
                mebibytes(planned),
                "" if len(runs) == options.runs else f"{len(runs)} run",
                "above plan" if most > planned else "",
                f"above {MARKS[case.memory]}" if most > MARKS[case.memory] * 2**20 else "",
            )
        )
        name = f"{case.operation}, {case.size * scale:.3g} GB, {case.memory}"
        bars.append(plot.Bar(name, added / 2**20, planned / 2**20))
    columns = (
        "operation",
        "size GB",
        "largest tensor GB",
        "shard GB",
        "written GB",
        "memory",
        "reader",
        "measured MiB",
        "planned MiB",
        "",
        "",
        "",
    )
    harness.print_table(columns, rows)
    if options.given.plot is not None:
        title = "Memory of a run beside torch, MiB: measured (bar) and planned (line)"
        options.given.plot.write_text(plot.svg(title, bars))


if __name__ == "__main__":
    with harness.options(__doc__, add) as given:
        main(given)
