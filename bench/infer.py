"""How often `spec infer` finds a spec that passes its proof, by model type.

    python -m bench.infer [TYPE ...] [--types 40] [--seed 17] [--seconds 150] [--json FILE]

The types are drawn from those of transformers' mappings, or named. Each is inferred from the
default config.json of its class, as if no spec served it, in a process of its own. "verified": all
of it passed the proof; "in part": what passed is less than all widths and promises, and the spec
says what is left out; "failed": with the check that fails first.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
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
    served: bool
    """Whether a spec of this project serves it."""
    verdict: str
    cause: str
    """What is left out, or fails."""
    seconds: float


def main() -> None:
    """Try the types, print."""
    given = _arguments()
    if given.one:
        print(json.dumps(_try(given.one)))
        return
    served = registry.model_types()
    tried = []
    for name in given.types_named or drawn(given.types, given.seed):
        start = time.perf_counter()
        found = _in_process(name, given.seconds)
        row = Tried(name, name in served, *found, round(time.perf_counter() - start, 1))
        tried.append(row)
        print(f"{name}: {row.verdict} {row.cause}"[:_MAX_LETTERS], file=sys.stderr, flush=True)
        if given.json is not None:
            given.json.write_text(json.dumps([asdict(one) for one in tried], indent=1))
    rows = [
        (t.model_type, "yes" if t.served else "no", t.verdict, t.cause[:_MAX_LETTERS], t.seconds)
        for t in tried
    ]
    print_table(("type", "has a spec", "verdict", "left out, or fails", "s"), rows)
    for verdict, n in Counter(t.verdict for t in tried).most_common():
        print(f"{verdict}: {n} of {len(tried)} ({n / len(tried):.0%})")


def drawn(n: int, seed: int) -> list[str]:
    """Some model types of transformers' mappings, by chance."""
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
    command = [sys.executable, "-m", "bench.infer", "--one", model_type]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except subprocess.TimeoutExpired:
        return "failed", f"more than {seconds:.0f} s"
    except subprocess.CalledProcessError as error:
        return "failed", (error.stderr.splitlines() or ["no reason given"])[-1]
    verdict, cause = json.loads(done.stdout.splitlines()[-1])
    return verdict, cause


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("types_named", metavar="TYPE", nargs="*")
    parser.add_argument("--types", type=int, default=40)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
