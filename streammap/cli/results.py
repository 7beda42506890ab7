"""Commands that read checkpoints and results: `inspect`, `verify`, `diff`."""

import json
from pathlib import Path
from typing import Any

import click

from streammap.cli.help import ERROR_CODE, Command
from streammap.cli.options import (
    PATH,
    json_option,
    limit_option,
    moved_of,
    moved_options,
    option,
    reading_of,
    reading_options,
    source_options,
)
from streammap.errors import printable_lines


@click.command(
    cls=Command,
    examples=("inspect bert-base-uncased/", "inspect bert-base-uncased/ --health"),
)
@click.argument("source", metavar="SRC", type=PATH)
@source_options
@option("--health", is_flag=True, help="Read all values: NaN, Inf, ranges, dead rows.")
@limit_option
@reading_options
@json_option
def inspect(
    source: str,
    config: str | None,
    arch: str | None,
    stream: bool,
    health: bool,
    limit: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Describe a checkpoint: its architecture, sizes, files and tensors."""
    from streammap import api, progress
    from streammap.analysis import inspection

    lazy = api.open(source, config=config, arch=arch, stream=stream)
    if health:
        report = lazy.health(progress=progress.bar("health", quiet=False), **reading_of(options))
        text = report.text(limit=limit or None)
        click.echo(json.dumps(report.as_json(), indent=2) if as_json else text)
        return
    description = inspection.inspect(lazy.plan)
    text = str(description)
    click.echo(json.dumps(description.as_json(), indent=2) if as_json else text)


@click.command(cls=Command, examples=("verify small/ --recompute 100",))
@click.argument("output", metavar="OUT", type=PATH)
@moved_options
@option(
    "--recompute",
    "n_tiles",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Random tiles to compute again from the sources.",
)
@option("--seed", type=int, default=0, show_default=True, help="Which tiles these are.")
@option(
    "--no-class-check",
    is_flag=True,
    help="Do not ask the class in transformers or timm if it would load the result.",
)
@option(
    "--edited",
    multiple=True,
    metavar="NAME",
    help="A file that was changed on purpose, such as README.md: no error.",
)
@option("--quiet", "-q", is_flag=True, help="Only the exit code.")
@reading_options
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    output: str,
    sources: tuple[str, ...],
    n_tiles: int,
    seed: int,
    no_class_check: bool,
    edited: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Check a result: is it what was planned and written?

    Lists everything that is wrong. Exit code 0: nothing is wrong, 1: something is.
    """
    from streammap import progress
    from streammap.analysis import verification

    report = verification.verify(
        output,
        sources=moved_of(sources),
        recompute=n_tiles,
        seed=seed,
        class_check=not no_class_check,
        edited=edited,
        progress=progress.bar("verify", quiet=quiet),
        **reading_of(options),
    )
    if not quiet:
        click.echo(
            json.dumps(report.as_json(), indent=2) if as_json else printable_lines(str(report))
        )
    ctx.exit(0 if report.ok else 1)


@click.command(cls=Command, examples=("diff big/ blended/ --plot blended.svg",))
@click.argument("a", metavar="A", type=PATH)
@click.argument("b", metavar="B", type=PATH)
@option("--layers", is_flag=True, help="Print a line for each layer, not for each tensor.")
@option("--plot", metavar="FILE.svg", type=PATH, help="Draw the relative differences.")
@option("--overwrite", is_flag=True, help="Replace a picture that already exists.")
@option("--quiet", "-q", is_flag=True, help="Only the exit code.")
@limit_option
@reading_options
@json_option
@click.pass_context
def diff(
    ctx: click.Context,
    /,
    a: str,
    b: str,
    layers: bool,
    plot: str | None,
    overwrite: bool,
    quiet: bool,
    limit: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare two checkpoints tensor by tensor, worst first.

    relative is ||a - b|| / ||a||. Exit code 0: all bits are equal, 1: something differs, 2: one of
    them could not be read, as for diff(1).
    """
    from streammap import api, progress
    from streammap.analysis import heatmap

    ctx.meta[ERROR_CODE] = 2
    if plot is not None:
        heatmap.check_path(Path(plot), overwrite=overwrite)
    report = api.diff(a, b, progress=progress.bar("diff", quiet=quiet), **reading_of(options))
    if plot is not None:
        heatmap.save(report, Path(plot))
    if not quiet:
        text = report.text(limit=limit or None, by_layer=layers)
        click.echo(json.dumps(report.as_json(), indent=2) if as_json else text)
    ctx.exit(0 if report.is_equal else 1)
