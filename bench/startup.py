"""How long commands take that compute nothing: help, a wrong argument, a plan.

    python -m bench.startup [--runs 5] [--folder DIR] [--quick]

Prints wall and CPU seconds and peak memory beside those of an interpreter that does nothing and of
`import torch`; nothing is subtracted.
"""

from bench import harness, models
from bench.harness import IMPORT, PYTHON, STREAMMAP, Command, Options, decimals, megabytes


def main(options: Options) -> None:
    """Make, run, print."""
    model = models.llama_of(0.2e9 if options.quick else 14e9, hidden=4096, largest=0.05e9)
    source = models.make(options.folder / "model", model, shards=3)
    plan = (*STREAMMAP, "plan", "coalesce", source)
    commands = {
        "python -c pass": Command((PYTHON, "-c", "pass")),
        "import torch": Command(IMPORT),
        "streammap --help": Command((*STREAMMAP, "--help")),
        "streammap coalesce (no SRC)": Command((*STREAMMAP, "coalesce"), code=2),
        "streammap plan coalesce --widht 2": Command((*plan, "--widht", 2), code=2),
        "streammap plan coalesce --width 2": Command((*plan, "--width", 2)),
        "streammap plan coalesce, no such SRC": Command(
            (*STREAMMAP, "plan", "coalesce", options.folder / "none", "--width", 2), code=1
        ),
    }
    results = harness.alternate(commands, options.runs)
    size = models.nbytes(model) / 1e9
    about = f"a Llama of {size:.1f} GB in 3 shards, {len(model.shapes)} tensors"
    harness.print_head(f"Start: plans are of {about}", options.runs, "warm cache")
    rows = [
        (
            title,
            decimals(results.wall(title)),
            decimals(results.cpu(title)),
            megabytes(results.peak(title)),
        )
        for title in commands
    ]
    harness.print_table(("", "wall s", "CPU s", "peak MB"), rows)


if __name__ == "__main__":
    with harness.options(__doc__) as given:
        main(given)
