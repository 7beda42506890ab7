"""`map`: the original map tools' command line, flag by flag. `scheme`: their groups."""

from typing import Any

import click

from streammap.cli.help import Command
from streammap.cli.operators import listener, print_report
from streammap.cli.options import (
    PATH,
    adds,
    as_json,
    no_ranks,
    option,
    parameters,
    quiet,
    values_of,
)
from streammap.engine.options import Engine
from streammap.output.save_options import SaveOptions

_RULES = ("exact", "reference")
_GROUPINGS = ("stacked", "adjacent")


@click.command(cls=Command, examples=("scheme --heads 12 --layers 12 > L6-H6.json",))
@option("--heads", type=int, metavar="N", help="Heads of the large model.")
@option("--layers", type=int, metavar="N", help="Layers of the large model.")
@option("--width", type=int, default=2, show_default=True, metavar="K", help="Heads per group.")
@option("--depth", type=int, default=2, show_default=True, metavar="K", help="Layers per group.")
@option(
    "--grouping",
    type=click.Choice(_GROUPINGS),
    default="stacked",
    show_default=True,
    help="Members of a group: i with i + n/K (stacked), or neighbours (adjacent).",
)
def scheme(heads: int | None, layers: int | None, width: int, depth: int, grouping: str) -> None:
    """Print a scheme for given sizes."""
    from streammap.planning import requests
    from streammap.planning.scheme import Scheme

    if heads is None and layers is None:
        raise click.UsageError("give --heads N, --layers N or both")
    known: requests.Grouping = "adjacent" if grouping == "adjacent" else "stacked"
    made = Scheme(
        None if heads is None else requests.uniform(heads, width, known, units="heads"),
        None if layers is None else requests.uniform(layers, depth, known, units="layers"),
    )
    click.echo(made.as_text())


@click.command(
    "map",
    cls=Command,
    examples=("map --arch bert --opt C --src-dir big --config L6-H6.json --save-dir small",),
)
@option("--arch", type=click.Choice(("bert", "gpt2", "deit")), required=True, help="Model family.")
@option(
    "--opt",
    type=click.Choice(("C", "D", "IP")),
    required=True,
    help="Coalesce, decoalesce or interpolate.",
)
@option("--src-dir", type=PATH, required=True, metavar="DIR", help="Folder of the source.")
@option("--tgt-dir", type=PATH, metavar="DIR", help="Folder of the target.")
@option("--save-dir", type=PATH, required=True, metavar="DIR", help="Folder of the result.")
@option("--config", type=PATH, metavar="FILE", help="The scheme, JSON.")
@option(
    "--alpha", type=float, default=0.0, show_default=True, help="Weight of the source in the blend."
)
@option("--src-arch", metavar="LxHy", help="DeiT: sizes of the source, L12-H12.")
@option("--tgt-arch", metavar="LxHy", help="DeiT: sizes of the target.")
@option("--src-ckp", metavar="NAME", help="DeiT: file of the source, in --src-dir.")
@option("--tgt-ckp", metavar="NAME", help="DeiT: file of the target, in --tgt-dir.")
@option(
    "--save-ckp",
    metavar="NAME",
    help="DeiT: file of the result, .safetensors (recommended) or .pth.",
)
@option(
    "--rule",
    type=click.Choice(_RULES),
    default="reference",
    show_default=True,
    help="exact: keep the function instead of the original's numbers.",
)
@adds(
    *parameters(SaveOptions, only=("restart",)),
    *parameters(Engine),
    no_ranks(),
    quiet(),
    as_json(),
)
def map_(restart: bool, no_ranks: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Run the original map tools' command line, flag by flag."""
    from streammap.common.ranks import ALONE, Ranks
    from streammap.tools.original import mappers

    limits = values_of(Engine, options)
    made = mappers.from_flags(**{k: v for k, v in options.items() if k not in limits})
    here = ALONE if no_ranks else Ranks.here()
    shows = listener("map", quiet=quiet or here.rank > 0)
    report = made.save(restart=restart, progress=shows, ranks=here, **limits)
    print_report(report, quiet=quiet, as_json=as_json)
