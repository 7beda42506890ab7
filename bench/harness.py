"""What all benchmarks share: processes measured in alternation, medians, tables.

Prints nothing by itself. A benchmark gives titles and commands; every command runs once a round, in
an order drawn anew for each, in a process of its own. Its figures are those of os.wait4, so this
process must stay small: a child begins with its parent's peak (no torch in here).
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from streammap.common.version import VERSION

ROOT = Path(__file__).parents[1]
PYTHON = sys.executable
STREAMMAP = (PYTHON, "-m", "streammap")
PASS = (PYTHON, "-I", "-S", "-c", "pass")
IMPORT = (PYTHON, "-c", "import torch")
_PIECE = bytes(256 * 1024)
_BYTECODE = Path(tempfile.gettempdir()) / f"streammap-bench-{os.getuid()}"


def peer(folder: Path, package: str, program: str) -> Path | None:
    """A program of another project, installed in `folder` where it is not there yet.

    Returns:
        None where it can't be installed; why is printed.
    """
    place = folder / package
    found = place / "bin" / program
    # python is there before the package is: what marks the end of it is pip's own record.
    if found.exists() and any(place.glob(f"lib/*/site-packages/{package.replace('-', '_')}-*")):
        return found
    pip = (place / "bin" / "pip", "install", "--quiet", "-c", ROOT / "constraints.txt")
    try:
        subprocess.run([PYTHON, "-m", "venv", place], check=True, capture_output=True)
        subprocess.run([*pip, package, "torch"], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        told = (error.stderr or b"").decode(errors="replace").strip().splitlines()
        print(f"{package} is left out: {told[-1] if told else error}")
        return None
    return found


@dataclass(frozen=True, slots=True)
class Command:
    """A process to measure."""

    argv: Sequence[object]
    outputs: Sequence[Path] = ()
    """Files and folders that it writes: removed before and after."""
    sources: Sequence[Path] = ()
    """Files that it reads, dropped from the page cache first where runs are cold."""
    writes: int = 0
    """Bytes that it writes. A file of that size is written and removed first: on a virtual machine
    pages cost more when they are touched for the first time in a while. What starts slowly has to
    do so itself (bench.job's "touch")."""
    most_runs: int | None = None
    """Rounds that it takes part in; None for all."""
    code: int = 0
    """The exit code that it must have."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One run of a command."""

    wall: float
    cpu: float
    """User and system seconds, of its children too."""
    peak: int
    """Peak resident bytes (ru_maxrss)."""
    said: str
    """Its standard output."""


@dataclass(frozen=True, slots=True)
class Options:
    """What every benchmark takes."""

    runs: int
    folder: Path
    quick: bool
    given: argparse.Namespace


@dataclass(frozen=True, slots=True)
class Results:
    """The runs of some commands: title -> round -> figures."""

    runs: Mapping[str, Mapping[int, Figures]]

    def wall(self, title: str, less: str | None = None) -> float:
        """Median wall seconds, less those of another command."""
        return self._median(title, "wall", less)

    def cpu(self, title: str, less: str | None = None) -> float:
        """Median CPU seconds, less those of another command."""
        return self._median(title, "cpu", less)

    def peak(self, title: str, less: str | None = None) -> float:
        """Median peak resident bytes, less those of another command."""
        return self._median(title, "peak", less)

    def ratio(
        self,
        title: str,
        other: str,
        *,
        what: str = "wall",
        less: str | None = None,
        other_less: str | None = None,
    ) -> float:
        """Median of the rounds' ratios of one command to another, each less its start."""
        mine, theirs = self.runs[title], self.runs[other]
        own, their = (self._median(name, what, None) for name in (less, other_less))
        found: float = statistics.median(
            (getattr(mine[i], what) - own) / max(getattr(theirs[i], what) - their, 1e-9)
            for i in mine
            if i in theirs
        )
        return found

    def clock_ratio(self, title: str, other: str, other_less: str | None = None) -> float:
        """The same with the seconds that a command printed."""
        mine, theirs = self.runs[title], self.runs[other]
        their = self._median(other_less, "wall", None)
        found: float = statistics.median(
            json.loads(mine[i].said)["seconds"] / max(theirs[i].wall - their, 1e-9) for i in mine
        )
        return found

    def has_clock(self, title: str) -> bool:
        """Whether a command prints its own seconds."""
        return all(run.said.startswith("{") for run in self.runs[title].values())

    def json(self, title: str, key: str) -> float:
        """Median of a number that a command printed as JSON."""
        numbers = [json.loads(run.said)[key] for run in self.runs[title].values()]
        found: float = statistics.median(numbers)
        return found

    def n(self, title: str) -> int:
        """Rounds that a command took part in."""
        return len(self.runs[title])

    def _median(self, title: str | None, what: str, less: str | None) -> float:
        if title is None:
            return 0.0
        found: float = statistics.median(getattr(run, what) for run in self.runs[title].values())
        return found - self._median(less, what, None)


@contextmanager
def options(about: str, *more: Callable[[argparse.ArgumentParser], object]) -> Iterator[Options]:
    """The command line, and a folder that is removed afterwards."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--runs", type=int, help="rounds (default 5; 2 with --quick)")
    parser.add_argument("--folder", type=Path, help="where checkpoints go")
    parser.add_argument("--quick", action="store_true", help="small sizes: to try the script")
    for add in more:
        add(parser)
    given = parser.parse_args()
    runs = given.runs or (2 if given.quick else 5)
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=given.folder) as name:
        yield Options(runs, Path(name).resolve(), given.quick, given)


def job(source: Path, output: Path, **more: object) -> tuple[object, ...]:
    """The command line of bench.job, which says what is asked for there."""
    asked = {"source": str(source), "output": str(output), **more}
    return (PYTHON, "-m", "bench.job", json.dumps(asked, default=str))


def need(folder: Path, nbytes: float) -> None:
    """Stop where the disk has no room."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise SystemExit(f"{folder}: {nbytes / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")


def run(argv: Sequence[object], code: int = 0) -> Figures:
    """Run a command to its end."""
    words = [str(word) for word in argv]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": str(_BYTECODE)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        started = time.perf_counter()
        process = subprocess.Popen(words, stdout=out, stderr=err, cwd=ROOT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != code:
            told = err.read().decode(errors="replace")[-2000:]
            raise SystemExit(f"{' '.join(words)}: exit code {process.returncode}\n{told}")
        said = out.read().decode()
    return Figures(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, said)


def alternate(
    commands: Mapping[str, Command], runs: int, *, cold: bool = False, settle: bool = False
) -> Results:
    """Run all commands once a round, each round in an order of its own.

    Args:
        cold: Whether sources are dropped from the page cache before each run.
        settle: Whether the disk is to have everything before each run.
    """
    figures: dict[str, dict[int, Figures]] = {title: {} for title in commands}
    if not cold:
        for path in {path for command in commands.values() for path in command.sources}:
            _read(path)
    for i in range(runs):
        titles = list(commands)
        random.shuffle(titles)
        for title in titles:
            command = commands[title]
            if command.most_runs is not None and i >= command.most_runs:
                continue
            remove(command.outputs)
            if command.writes:
                touch(command.outputs[0].parent / "touch", command.writes)
            if settle:
                os.sync()
            if cold:
                for path in command.sources:
                    evict(path)
            figures[title][i] = run(command.argv, command.code)
            remove(command.outputs)
        print(f"round {i + 1} of {runs}", file=sys.stderr, flush=True)
    return Results(figures)


def remove(paths: Sequence[Path]) -> None:
    """Remove files and folders that are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def evict(path: Path) -> None:
    """Drop a file from the page cache; it must be on disk already."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        room = bytearray(2**20)
        while file.readinto(room):
            pass


def touch(path: Path, nbytes: int) -> None:
    """Write a file and remove it, so that the memory of its pages is there."""
    with path.open("wb", buffering=0) as file:
        for _ in range(nbytes // len(_PIECE) + 1):
            file.write(_PIECE)
    path.unlink()


def memory_nbytes() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def print_head(title: str, runs: int | None, *about: str) -> None:
    """Where and how the figures of a table were taken; `runs` None where each is of one run."""
    uname, memory = platform.uname(), memory_nbytes()
    print(f"\n{title}")
    print(f"streammap {VERSION}, torch {version('torch')}, Python {platform.python_version()}")
    print(
        f"{len(os.sched_getaffinity(0))} x {_processor()}, {memory / 1e9:.0f} GB, "
        f"{uname.system} {uname.release} {uname.machine}"
    )
    runs_of = (
        "one run of each"
        if runs is None
        else f"medians of {runs} runs in alternation, in random order"
    )
    print(", ".join((runs_of, *about)))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns under their titles: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        first, *rest = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join((first, *rest)).rstrip())


def decimals(value: float | None, digits: int = 2) -> str:
    """A number as a table shows it."""
    return "" if value is None else f"{value:.{digits}f}"


def megabytes(value: float) -> str:
    """Bytes as MB."""
    return f"{value / 1e6:.0f}"


def mebibytes(value: float) -> str:
    """Bytes as MiB."""
    return f"{value / 2**20:.1f}"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
