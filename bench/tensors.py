"""What each tensor costs: time and memory of plans and runs over the number of tensors.

    python -m bench.tensors [--runs 5] [--folder DIR] [--quick]

Prints, for mixtures of experts of 1,000 to 100,000 small tensors (sparse files), whole processes of
`plan coalesce --width 2` and of coalescing so, and what they take for each tensor: a plan, which
imports no torch, beside an interpreter; a run beside torch (bench/job.py). Then the plan of a
DeepSeek-V3-like checkpoint of 1 TB, and the beginning of its run.
"""

from bench import harness, models
from bench.harness import IMPORT, STREAMMAP, Command, Options, decimals, megabytes

SMALL = {"hidden": 64, "mlp": 128, "moe_mlp": 32, "vocab": 1024, "heads": 4}
LORA = {"q_lora": 32, "kv_lora": 16, "head": 16}
SIZES = ((10, 40), (25, 144), (61, 568))
"""Layers and experts: about 1,000, 10,000 and 100,000 tensors."""
LARGE = models.Moe(7168, 18432, 768, 129280, 128, 1536, 512, 128, 61, 512)
SLICE_NBYTES = 4e9
PLAN, RUN = "plan coalesce --width 2", "coalesce --width 2"
_START = "python -c pass"


def main(options: Options) -> None:
    """Make, run, print."""
    harness.need(options.folder, 2e9)
    commands = {"import torch": Command(IMPORT), _START: Command(harness.PASS)}
    counts: dict[str, int] = {}
    out = options.folder / "out"
    folder = options.folder
    for layers, experts in SIZES[: 1 if options.quick else None]:
        model = models.Moe(**SMALL, **LORA, layers=layers, experts=experts)
        # Counted by the process that makes it: keys of 100,000 tensors would swell this one.
        source = folder / f"{layers}-{experts}"
        n, _ = models.made(source, model, shards=8)
        plan, run = f"{PLAN}, {n:,}", f"{RUN}, {n:,}"
        counts |= {plan: n, run: n}
        commands[plan] = Command((*STREAMMAP, "plan", "coalesce", source, "--width", 2, "--json"))
        steps = (("coalesce", {"width": 2}),)
        commands[run] = Command(harness.job(source, out, steps=steps), (out,))
    large = models.Moe(**SMALL, **LORA, layers=10, experts=40) if options.quick else LARGE
    source = folder / "large"
    n, nbytes = models.made(source, large, shards=160)
    title = f"{PLAN}, {nbytes / 1e12:.1f} TB, {n:,}"
    counts[title] = n
    commands[title] = Command((*STREAMMAP, "plan", "coalesce", source, "--width", 2, "--json"))
    # The first gigabytes of its run: the plan of all of it is held, as it would be.
    rehearsed = f"{RUN}, first {SLICE_NBYTES / 1e9:.0f} GB of it"
    counts[rehearsed] = n
    steps = (("coalesce", {"width": 2}),)
    asked = harness.job(source, out, steps=steps, first=SLICE_NBYTES, save={"memory": "1GiB"})
    commands[rehearsed] = Command(asked, (out,), (), int(SLICE_NBYTES), most_runs=2)
    results = harness.alternate(commands, options.runs)
    harness.print_head(
        "Cost of a tensor: MoE like DeepSeek-V3, sparse files, bf16",
        options.runs,
        "warm cache",
        "no fsync",
    )
    rows = []
    for title, n in counts.items():
        if title.startswith(PLAN):
            wall, cpu = results.wall(title, _START), results.cpu(title, _START)
            added, planned = results.peak(title, _START), ""
        else:
            wall, cpu, added = (results.json(title, key) for key in ("seconds", "cpu", "added"))
            planned = megabytes(results.json(title, "planned"))
        rows.append(
            (
                title if title == rehearsed else f"{title} tensors",
                decimals(results.wall(title)),
                decimals(results.cpu(title)),
                megabytes(results.peak(title)),
                decimals(1e6 * wall / n, 0),
                decimals(1e6 * cpu / n, 0),
                f"{added / 1e3 / n:.1f}",
                megabytes(added),
                planned,
            )
        )
    rows += [
        (
            title,
            decimals(results.wall(title)),
            decimals(results.cpu(title)),
            megabytes(results.peak(title)),
            "",
            "",
            "",
            "",
            "",
        )
        for title in ("import torch", _START)
    ]
    columns = (
        "",
        "wall s",
        "CPU s",
        "peak MB",
        "wall us/tensor",
        "CPU us/tensor",
        "kB/tensor",
        "added MB",
        "planned MB",
    )
    harness.print_table(columns, rows)


if __name__ == "__main__":
    with harness.options(__doc__) as given:
        main(given)
