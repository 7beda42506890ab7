"""Commands that read results again: `verify`, `diff`."""

import json
from typing import Any

import click

from streammap.clioptions import json_option, moved_of, moved_options, reading_of, reading_options


@click.command()
@click.argument("output", metavar="OUT")
@moved_options
@click.option("--recompute", "n_tiles", type=click.IntRange(min=0), default=0, show_default=True,
              metavar="N", help="Random tiles to compute again from the sources.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Which tiles these are.")
@click.option("--quiet", "-q", is_flag=True, help="Only the exit code.")
@reading_options
@json_option
@click.pass_context
def verify(
    ctx: click.Context, /, output: str, sources: tuple[str, ...], n_tiles: int, seed: int,
    quiet: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    r"""Read a result again: is it what was planned and written?

    Exit code 0: nothing is wrong, 1: something is. All that is wrong is listed.

    \b
    Example:
        streammap verify small/ --recompute 100
    """
    from streammap import progress, verification

    found = verification.verify(
        output, sources=moved_of(sources), recompute=n_tiles, seed=seed,
        progress=progress.bar("verify", quiet=quiet), **reading_of(options),
    )  # fmt: skip
    if not quiet:
        click.echo(json.dumps(found.as_json(), indent=2) if as_json else str(found))
    ctx.exit(0 if found.ok else 1)
