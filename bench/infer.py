"""How often `spec infer` finds a spec that passes its proof, by model type.

    python -m bench.infer [TYPE ...] [--types 40] [--seed 17] [--more 24] [--more-seed 4711]
                          [--seconds 30] [--json FILE]

Two samples are drawn from the types of transformers' mappings, or types are named. The first is the
one that faults are looked for in; the second one shows whether the mends are general. Each type is
inferred from the default config.json of its class, as if no spec served it, in a process of its
own that may take so many seconds of processor time. "verified": all of it passed the proof; "in
part": what passed is less than all widths and promises, and the spec says what is left out;
"failed": with the check that fails first.
"""

import argparse
import json
import math
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.harness import print_table
from streammap.analysis.coverage import TASKS
from streammap.architectures import registry
from streammap.common import optional
from streammap.errors import StreammapError
from streammap.tools.spec_infer.infer import infer

_MAX_LETTERS = 110


@dataclass(frozen=True)
class Tried:
    """One model type."""

    model_type: str
    sample: int
    """The first or the second; 0 where it was named."""
    served: bool
    """Whether a spec of this project serves it."""
    verdict: str
    cause: str
    """What is left out, or fails."""
    seconds: float
    """Of processor time."""


def main() -> None:
    """Try the types, print."""
    given = _arguments()
    if given.one:
        limit = math.ceil(given.seconds)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        print(json.dumps(_try(given.one)))
        return
    served, tried = registry.model_types(), list[Tried]()
    for name, sample in _chosen(given):
        before = _children_seconds()
        found = _in_process(name, given.seconds)
        spent = round(_children_seconds() - before, 1)
        row = Tried(name, sample, name in served, *found, spent)
        tried.append(row)
        print(f"{name}: {row.verdict} {row.cause}"[:_MAX_LETTERS], file=sys.stderr, flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(one) for one in tried], indent=1))
    for sample in sorted({t.sample for t in tried}):
        _print([t for t in tried if t.sample == sample])


def _chosen(given: argparse.Namespace) -> list[tuple[str, int]]:
    if given.types_named:
        return [(name, 0) for name in given.types_named]
    first = drawn(given.types, given.seed)
    others = [name for name in drawn(None, given.more_seed) if name not in first]
    return [*((name, 1) for name in first), *((name, 2) for name in others[: given.more])]


def _print(tried: Sequence[Tried]) -> None:
    rows = [
        (t.model_type, "yes" if t.served else "no", t.verdict, t.cause[:_MAX_LETTERS], t.seconds)
        for t in tried
    ]
    print_table(("type", "has a spec", "verdict", "left out, or fails", "CPU s"), rows)
    for verdict, n in Counter(t.verdict for t in tried).most_common():
        print(f"{verdict}: {n} of {len(tried)} ({n / len(tried):.0%})")


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def drawn(n: int | None, seed: int) -> list[str]:
    """Some model types of transformers' mappings, or all of them, by chance."""
    auto = optional.library("transformers.models.auto.modeling_auto")
    mappings: Sequence[Mapping[str, object]] = [getattr(auto, name) for name in TASKS.values()]
    types = sorted({model_type for mapping in mappings for model_type in mapping})
    random.Random(seed).shuffle(types)
    return types[:n]


def _try(model_type: str) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = infer({"model_type": model_type}, name=model_type, scratch=Path(folder))
        except StreammapError as error:
            return "failed", str(error)
    assert found.report is not None
    failed = next((check for check in found.report.checks if not check.passed), None)
    if failed is not None:
        return "failed", f"{failed.name}: {failed.message or failed.error}"
    left_out = ", ".join(found.left_out or ())
    return ("in part", left_out) if left_out else ("verified", "")


def _in_process(model_type: str, seconds: float) -> tuple[str, str]:
    command = [sys.executable, "-m", "bench.infer", "--one", model_type, f"--seconds={seconds}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == -signal.SIGXCPU:
        return "failed", f"more than {seconds:.0f} s"
    if done.returncode:
        return "failed", (done.stderr.splitlines() or ["no reason given"])[-1]
    verdict, cause = json.loads(done.stdout.splitlines()[-1])
    return verdict, cause


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("types_named", metavar="TYPE", nargs="*")
    parser.add_argument("--types", type=int, default=40)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--more", type=int, default=24)
    parser.add_argument("--more-seed", type=int, default=4711)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
