"""Commands that read results again: `verify`, `diff`."""

import json
from pathlib import Path
from typing import Any

import click

from streammap.cli.options import (
    ERROR_CODE,
    json_option,
    limit_option,
    moved_of,
    moved_options,
    reading_of,
    reading_options,
)
from streammap.errors import printable_lines


@click.command()
@click.argument("output", metavar="OUT")
@moved_options
@click.option(
    "--recompute",
    "n_tiles",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    metavar="N",
    help="Random tiles to compute again from the sources.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Which tiles these are.")
@click.option("--quiet", "-q", is_flag=True, help="Only the exit code.")
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
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Read a result again: is it what was planned and written?

    Exit code 0: nothing is wrong, 1: something is. All that is wrong is listed.

    \b
    Example:
        streammap verify small/ --recompute 100
    """
    from streammap import progress
    from streammap.analysis import verification

    found = verification.verify(
        output,
        sources=moved_of(sources),
        recompute=n_tiles,
        seed=seed,
        progress=progress.bar("verify", quiet=quiet),
        **reading_of(options),
    )
    if not quiet:
        click.echo(
            json.dumps(found.as_json(), indent=2) if as_json else printable_lines(str(found))
        )
    ctx.exit(0 if found.ok else 1)


@click.command()
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--plot", metavar="FILE.svg", help="Draw the relative differences.")
@click.option("--quiet", "-q", is_flag=True, help="Only the exit code.")
@limit_option
@reading_options
@json_option
@click.pass_context
def diff(
    ctx: click.Context,
    /,
    a: str,
    b: str,
    plot: str | None,
    quiet: bool,
    limit: int,
    as_json: bool,
    **options: Any,
) -> None:
    r"""Say how two checkpoints differ, tensor by tensor, worst first.

    relative is ||a - b|| / ||a||. Exit code 0: all is bit by bit the same, 1: something differs,
    2: one of them could not be read, as of diff(1).

    \b
    Example:
        streammap diff big/ blended/ --plot blended.svg
    """
    from streammap import progress
    from streammap.analysis import difference, heatmap

    ctx.meta[ERROR_CODE] = 2
    found = difference.diff(a, b, progress=progress.bar("diff", quiet=quiet), **reading_of(options))
    if plot is not None:
        heatmap.save(found, Path(plot))
    if not quiet:
        told = printable_lines(found.text(limit=limit or None))
        click.echo(json.dumps(found.as_json(), indent=2) if as_json else told)
    ctx.exit(0 if found.is_equal else 1)
