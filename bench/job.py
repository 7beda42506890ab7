"""One run of streammap, in a process of its own: prints what it added to the process, as JSON.

    python -m bench.job '{"source": DIR, "steps": [["coalesce", {"width": 2}]], "save": {...}}'

"blend" and "alpha" blend the result with a checkpoint; "first" writes only its first tensors, up to
so many bytes, as a rehearsal of a result too large for the disk. torch is imported first (but with
"torch": false) and the peak is set back to what is resident then, so that "added" is all that the
run took: streammap's modules, torch's kernels that are loaded when they are first used, buffers,
bookkeeping. "seconds" and "cpu" begin there, too; "touch" writes and removes a file of so many
bytes right before, as the harness does for commands that begin at once.
"""

import itertools
import json
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bench import harness

if TYPE_CHECKING:
    from streammap.planning.plan import Plan


def main() -> None:
    """Run, print."""
    asked = json.loads(sys.argv[1])
    if asked.get("torch", True):
        import torch  # noqa: F401  what a run takes beside it is measured
    if "touch" in asked:
        harness.touch(Path(asked["output"]).parent / "touch", asked["touch"])
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before, started, cpu = peak(), time.perf_counter(), time.process_time()
    import streammap

    lazy = streammap.open(asked["source"])
    for name, options in asked.get("steps", []):
        lazy = getattr(lazy, name)(**options)
    if "blend" in asked:
        lazy = lazy.interpolate(asked["blend"], alpha=asked["alpha"])
    if "first" in asked:
        lazy = streammap.LazyCheckpoint(first(lazy.plan, asked["first"]))
    report = lazy.save(asked["output"], **{"fsync": False, **asked.get("save", {})})
    print(
        json.dumps(
            {
                "added": peak() - before,
                "planned": report.planned_nbytes,
                "written": report.nbytes_written,
                "read": report.nbytes_read,
                "seconds": time.perf_counter() - started,
                "cpu": time.process_time() - cpu,
            }
        )
    )


def first(plan: "Plan", nbytes: float) -> "Plan":
    """A plan of the first tensors."""
    ends = itertools.accumulate(form.spec.nbytes for form in plan.targets.values())
    kept = {
        key: plan.targets[key] for key, end in zip(plan.targets, ends, strict=True) if end <= nbytes
    }
    return replace(plan, targets=kept)


def peak() -> int:
    """VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("no VmHWM in /proc/self/status")


if __name__ == "__main__":
    main()
