"""Commands about files of learned maps: `maps template`, `maps check`."""

import json
import re
from pathlib import Path

import click

from streammap.cli.help import Group
from streammap.cli.options import PATH, json_option, option
from streammap.errors import SchemeError


@click.group(cls=Group, examples=("maps check ligo.safetensors bert-small/",))
def maps() -> None:
    """Write and check files of learned maps, which remap applies."""


@maps.command(examples=("maps template bert-small/ ligo.safetensors --size hidden=768",))
@click.argument("source", metavar="SRC", type=PATH)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False))
@option("--size", "sizes", multiple=True, metavar="AXIS=N", help="New size of an axis.")
def template(source: str, file: Path, sizes: tuple[str, ...]) -> None:
    """Write a file with the names and shapes of a model's maps: identity on top, zeros below."""
    from streammap import api
    from streammap.planning.learned import template as templates

    asked = {}
    for text in sizes:
        found = re.fullmatch(r"([\w.]+)=([1-9][0-9]{0,6})", text)
        if found is None:
            raise SchemeError(f"--size {text}: expected AXIS=N", hint="give --size hidden=768")
        asked[found[1]] = int(found[2])
    if file.exists():
        raise SchemeError(f"{file}: is there already", hint="name a new file")
    if file.suffix != ".safetensors":
        raise SchemeError(f"{file}: expected a name ending in .safetensors", hint="rename it")
    with api.open(source) as opened:
        made = templates.template(opened.plan.model, asked)
    templates.write(file, made)
    for name, shape in made.items():
        click.echo(f"{name}  {list(shape)}")


@maps.command(examples=("maps check ligo.safetensors bert-small/",))
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.argument("source", metavar="SRC", type=PATH)
@json_option
def check(file: Path, source: str, as_json: bool) -> None:
    """Say whether a file's names and shapes fit a model, and what its maps keep of the function."""
    from streammap import api

    with api.open(source) as opened:
        step = opened.remap(maps=file).plan.steps[-1]
    if as_json:
        kept = {axis: list(one) for axis, one in step.axes.items()}
        about = {"guarantee": step.promise, "reason": step.reason, "axes": kept}
        click.echo(json.dumps(about | dict(step.options), indent=2))
        return
    shapes = step.options["maps"]
    assert isinstance(shapes, dict)
    for axis, (n_old, n_new, what) in shapes.items():
        promise, reason = step.axes.get(axis, ("bit-exact", "nothing changes"))
        click.echo(f"{axis}  {n_old} -> {n_new}  {what}  {promise}: {reason}")
    click.echo(f"guarantee  {step.promise}: {step.reason}")
