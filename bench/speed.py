"""How fast a run is: compared with `cp`, with the least any program does, and with dense products.

    python -m bench.speed [--runs 5] [--folder DIR] [--quick] [--cold] [--size GB] [--dense-runs 1]

Prints wall and CPU seconds and the ratios of wall time to `cp` of the large model and to the floor:
a process that reads the same bytes and writes as many with one buffer (bench/floor.py). A run of
streammap counts from after `import torch` (bench.job); from the others what starts them is
subtracted. "mmap s" and "pread s" are a run's seconds with these readers. Dense is load_file, F W A
in float32, save_file. Then the same with fsync.
"""

import argparse
from pathlib import Path
from typing import Any

from bench import harness, models
from bench.harness import IMPORT, PASS, PYTHON, Command, Options, Results, decimals

_MARKS = {"copy": 1.1, "interpolate": 1.25, "coalesce": 1.5, "decoalesce": 1.25}
_PART = 0.08
"""Of the memory: from a tenth on, the kernel writes back meanwhile, beside whoever it is."""
READERS = ("mmap", "pread")
"""Each run is also timed with these; its own figures are with "auto"."""
FLOOR, DENSE = " floor", "dense F W A"


def commands(folder: Path, dense_runs: int) -> dict[str, Command]:
    """All that is measured without fsync."""
    a, b, small, out = (folder / name for name in ("a", "b", "small", "out"))
    big_file, other, small_file = (models.weights(path)[0] for path in (a, b, small))
    large, little = big_file.stat().st_size, small_file.stat().st_size
    halve, double = (((name, {"width": 2}),) for name in ("coalesce", "decoalesce"))
    runs: dict[str, tuple[Path, dict[str, Any], tuple[Path, ...], int]] = {
        "copy": (a, {"torch": False}, (big_file,), large),
        "interpolate": (a, {"blend": b, "alpha": 0.3}, (big_file, other), large),
        "coalesce": (a, {"steps": halve}, (big_file,), little),
        "decoalesce": (small, {"steps": double}, (small_file,), large),
    }
    made = {
        "python -c pass": Command(PASS),
        "import torch": Command(IMPORT),
        "cp": Command(("cp", big_file, out), (out,), (big_file,), large),
    }
    for title, (source, asked, sources, writes) in runs.items():
        for reader in ("auto", *READERS):
            argv = harness.job(source, out, touch=writes, save={"reader": reader}, **asked)
            made[title if reader == "auto" else f"{title} {reader}"] = Command(
                argv, (out,), sources
            )
        floor = (PYTHON, "-I", "-S", "bench/floor.py", out, writes, *sources)
        made[title + FLOOR] = Command(floor, (out,), sources, writes)
    dense = (PYTHON, "-m", "bench.dense", big_file, out)
    if dense_runs:
        made[DENSE] = Command(dense, (out,), (big_file,), little, most_runs=dense_runs)
    return made


def started(title: str) -> str | None:
    """What is subtracted from a command that has no clock of its own."""
    if title == "cp":
        return None
    return "python -c pass" if title.endswith(FLOOR) else "import torch"


def row(results: Results, title: str) -> tuple[object, ...]:
    """A command's figures."""
    own, less = results.has_clock(title), started(title)
    beside: list[float | None] = []
    for other in ("cp", "coalesce" + FLOOR if title == DENSE else title + FLOOR):
        their = started(other)
        if other not in results.runs:
            beside.append(None)
        elif own:
            beside.append(results.clock_ratio(title, other, their))
        else:
            beside.append(results.ratio(title, other, less=less, other_less=their))
    readers = [f"{title} {reader}" for reader in READERS]
    by_reader = [results.json(r, "seconds") if r in results.runs else None for r in readers]
    once = "" if results.n(title) == results.n("cp") else f"{results.n(title)} run"
    return (
        title,
        decimals(results.json(title, "seconds") if own else results.wall(title, less)),
        decimals(results.json(title, "cpu") if own else results.cpu(title, less)),
        *map(decimals, by_reader),
        *map(decimals, beside),
        (_remark(title, *beside) if own else "") or once,
    )


def _remark(title: str, to_cp: float | None, to_floor: float | None) -> str:
    mark = _MARKS.get(title)
    by_cp = title in ("copy", "interpolate")
    found = to_cp if by_cp else to_floor
    if mark is None or found is None:
        return ""
    return f"{'<=' if found <= mark else 'above'} {mark:g} {'cp' if by_cp else 'floor'}"


def add(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark alone."""
    parser.add_argument("--cold", action="store_true", help="sources are not in the page cache")
    parser.add_argument("--size", type=float, metavar="GB", help="of the large model")
    parser.add_argument("--dense-runs", type=int, default=1, help="rounds with dense products")


def with_fsync(folder: Path, options: Options, *, cold: bool) -> Results:
    """Interpolation beside cp, both until the disk has it."""
    a, b, out = folder / "a", folder / "b", folder / "out"
    sources = [models.weights(path)[0] for path in (a, b)]
    large = sources[0].stat().st_size
    blend = harness.job(a, out, blend=b, alpha=0.3, touch=large, save={"fsync": True})
    copy = ("sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", sources[0], out)
    return harness.alternate(
        {
            "cp": Command(copy, (out,), sources[:1], large),
            "interpolate": Command(blend, (out,), sources),
        },
        options.runs,
        cold=cold,
        settle=True,
    )


def main(options: Options) -> None:
    """Make, run, print."""
    cold, folder = options.given.cold, options.folder
    harness.need(folder, 13e9)
    size = 0.2e9 if options.quick else min(2.7e9, _PART * harness.memory_nbytes())
    if options.given.size is not None:
        size = options.given.size * 1e9
    big = models.llama_of(size, largest=size / 12)
    small = models.Llama(big.hidden // 2, big.mlp // 2, big.layers, big.vocab)
    for name, model, seed in (("a", big, 0), ("b", big, 1), ("small", small, 2)):
        models.make(folder / name, model, seed=seed)
    results = harness.alternate(commands(folder, options.given.dense_runs), options.runs, cold=cold)
    synced = with_fsync(folder, options, cold=cold)
    cache = "cold cache" if cold else "warm cache"
    about = f"large model {models.nbytes(big) / 1e9:.2f} GB, small {models.nbytes(small) / 1e9:.2f}"
    harness.print_head(f"Speed, bf16 Llama: {about} GB", options.runs, cache, "no fsync")
    columns = ("", "wall s", "CPU s", *(f"{reader} s" for reader in READERS), "/ cp", "/ floor", "")
    hidden = ("python -c pass", "import torch")
    titles = [t for t in results.runs if t not in hidden and not t.endswith(READERS)]
    harness.print_table(columns, [row(results, title) for title in titles])
    harness.print_head(f"Speed with fsync: {about} GB", options.runs, cache, "fsync by both")
    ratio, clock = synced.clock_ratio("interpolate", "cp"), synced.json("interpolate", "seconds")
    rows = [
        ("cp", decimals(synced.wall("cp")), ""),
        ("interpolate", decimals(clock), decimals(ratio)),
    ]
    harness.print_table(("", "wall s", "/ cp"), rows)


if __name__ == "__main__":
    with harness.options(__doc__, add) as given:
        main(given)
