"""What each tensor costs: time and memory of plans and runs over the number of tensors.

    python -m bench.tensors [--runs 5] [--folder DIR] [--quick]

Prints, for mixtures of experts of 1,000 to 100,000 small tensors (sparse files), whole processes of
`plan coalesce --width 2` and `coalesce --width 2`, and what they take for each tensor: seconds less
those of an interpreter (plans import no torch) or of `import torch`, memory likewise. Then the plan
of a DeepSeek-V3-like checkpoint of 1 TB.
"""

from bench import harness, models
from bench.harness import IMPORT, STREAMMAP, Command, Options, decimals, megabytes

SMALL = {"hidden": 64, "mlp": 128, "moe_mlp": 32, "vocab": 1024, "heads": 4}
LORA = {"q_lora": 32, "kv_lora": 16, "head": 16}
SIZES = ((10, 40), (25, 144), (61, 568))
"""Layers and experts: about 1,000, 10,000 and 100,000 tensors."""
LARGE = models.Moe(7168, 18432, 768, 129280, 128, 1536, 512, 128, 61, 512)
PLAN, RUN = "plan coalesce --width 2", "coalesce --width 2"
_START = "python -c pass"


def main(options: Options) -> None:
    """Make, run, print."""
    harness.need(options.folder, 2e9)
    commands = {"import torch": Command(IMPORT), _START: Command(harness.PASS)}
    counts: dict[str, int] = {}
    out = options.folder / "out"
    for layers, experts in SIZES[: 1 if options.quick else None]:
        model = models.Moe(**SMALL, **LORA, layers=layers, experts=experts)
        n = len(model.shapes)
        source = models.make(options.folder / str(n), model, shards=1 if n < 5000 else 8)
        for title, words, outputs in (
            (f"{PLAN}, {n:,}", ("plan", "coalesce", source, "--width", 2), ()),
            (f"{RUN}, {n:,}", ("coalesce", source, out, "--width", 2, "--no-fsync"), (out,)),
        ):
            counts[title] = n
            commands[title] = Command((*STREAMMAP, *words, "--json"), outputs)
    large = models.Moe(**SMALL, **LORA, layers=10, experts=40) if options.quick else LARGE
    source = models.make(options.folder / "large", large, shards=160)
    title = f"{PLAN}, {models.nbytes(large) / 1e12:.1f} TB, {len(large.shapes):,}"
    counts[title] = len(large.shapes)
    commands[title] = Command((*STREAMMAP, "plan", "coalesce", source, "--width", 2, "--json"))
    results = harness.alternate(commands, options.runs)
    harness.print_head(
        "Cost of a tensor: MoE like DeepSeek-V3, sparse files, bf16", options.runs,
        "warm cache", "no fsync",
    )  # fmt: skip
    rows = []
    for title, n in counts.items():
        less = _START if title.startswith(PLAN) else "import torch"
        added = results.peak(title, less)
        planned = "" if less == _START else megabytes(results.json(title, "planned_nbytes"))
        rows.append((
            f"{title} tensors", decimals(results.wall(title)), decimals(results.cpu(title)),
            megabytes(results.peak(title)), decimals(1e6 * results.wall(title, less) / n, 0),
            decimals(1e6 * results.cpu(title, less) / n, 0), f"{added / 1e3 / n:.1f}",
            megabytes(added), planned,
        ))  # fmt: skip
    rows += [
        (title, decimals(results.wall(title)), decimals(results.cpu(title)),
         megabytes(results.peak(title)), "", "", "", "", "")
        for title in ("import torch", _START)
    ]  # fmt: skip
    columns = (
        "", "wall s", "CPU s", "peak MB", "wall us/tensor", "CPU us/tensor", "kB/tensor",
        "added MB", "planned MB",
    )  # fmt: skip
    harness.print_table(columns, rows)


if __name__ == "__main__":
    with harness.options(__doc__) as given:
        main(given)
