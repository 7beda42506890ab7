"""Commands of operators, made of their declarations; each has a twin under `plan`."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from streammap.cli.help import OUTPUT, Command, Option
from streammap.cli.options import (
    PATH,
    adds,
    as_json,
    moved_of,
    moved_options,
    output_parameters,
    parameters,
    push_of,
    source_parameters,
    values_of,
)
from streammap.common.declare import make
from streammap.common.units import format_nbytes
from streammap.engine.options import Engine
from streammap.errors import OutputError, printable
from streammap.io.storage import resolve
from streammap.operators import registry
from streammap.operators.declare import Operator, inputs_of
from streammap.operators.finish import Finish, following, options_beside
from streammap.output.save_options import SaveOptions

if TYPE_CHECKING:
    from streammap.api import LazyCheckpoint
    from streammap.common.events import Listener
    from streammap.output.run import Report

_PREFIX = "operator_"


def command(name: str) -> Command:
    """The command that runs an operator."""
    cls = registry.load(name)
    own = parameters(cls, prefix=_PREFIX)
    return Command(
        name,
        callback=lambda **values: _run(name, values),
        params=[
            *_places(own),
            *_options(own),
            *source_parameters(),
            *_finish(cls),
            *parameters(SaveOptions),
            *output_parameters(),
        ],
        help=cls.__doc__,
        short_help=registry.commands()[name],
        examples=cls.examples,
    )


def plan_command(name: str) -> Command:
    """The command that prints what an operator would do."""
    cls = registry.load(name)
    own = parameters(cls, prefix=_PREFIX)
    return Command(
        name,
        callback=lambda **values: _plan(name, values),
        params=[
            *_places(own),
            *_options(own),
            *source_parameters(),
            *_finish(cls),
            *parameters(Engine),
            as_json(),
        ],
        help=f"Show what `{name}` would do.\n\n{cls.__doc__}",
        short_help=registry.commands()[name],
        examples=[f"plan {line}" for line in cls.examples],
    )


@click.command(
    cls=Command, examples=("apply small/streammap.json again/", "apply recipe.json out/")
)
@click.argument("request", metavar="REQUEST", type=PATH)
@click.argument("output", metavar="[OUT]", required=False, type=PATH)
@moved_options
@adds(*parameters(Finish), *parameters(SaveOptions), *output_parameters())
def apply(request: str, sources: tuple[str, ...], **options: Any) -> None:
    """Run a request from a file: a chain of operators, or what made an earlier result.

    REQUEST is a JSON file, a result's streammap.json, or a result.
    """
    from streammap import api

    planned = _finished(api.open_request(request, sources=moved_of(sources)), None, options)
    save(planned, "apply", options)


def _places(own: Sequence[click.Parameter]) -> list[click.Parameter]:
    """SRC, further inputs, OUT: by --output where there may be any number of inputs."""
    inputs = [parameter for parameter in own if isinstance(parameter, click.Argument)]
    output: click.Parameter = click.Argument(["output"], metavar="[OUT]", required=False, type=PATH)
    if any(parameter.nargs == -1 for parameter in inputs):
        # The last of many inputs can't be told from OUT, and must not be taken for it.
        output = Option(
            ["--output", "-o"], type=PATH, metavar="OUT", group=OUTPUT, help="Where to write."
        )
    return [click.Argument(["source"], metavar="SRC", type=PATH), *inputs, output]


def _options(own: Sequence[click.Parameter]) -> list[click.Parameter]:
    return [parameter for parameter in own if isinstance(parameter, click.Option)]


def _finish(cls: type[Operator]) -> list[click.Parameter]:
    """What every operator takes for its result, unless it has an option of that name."""
    return parameters(Finish, only=[one.name for one in options_beside(cls)])


def _finished(
    lazy: "LazyCheckpoint", cls: type[Operator] | None, values: dict[str, Any]
) -> "LazyCheckpoint":
    for operator in following(cls, values):
        lazy = lazy.apply(operator)
    return lazy


def _planned(name: str, values: dict[str, Any]) -> "LazyCheckpoint":
    from streammap import api

    cls = registry.load(name)
    operator = make(cls, values_of(cls, values, prefix=_PREFIX), what=name)
    source, stream = values["source"], values["stream"]
    lazy = api.open(source, config=values["config"], arch=values["arch"], stream=stream)
    return _finished(lazy.apply(operator, stream=stream), cls, values)


def _check_output(name: str, output: str | None) -> None:
    """Refuse a checkpoint that stands in OUT's place, behind others that are read.

    Raises:
        OutputError: naming the places.
    """
    cls = registry.load(name)
    places = [one for one in inputs_of(cls) if one.about.positional]
    is_named = any(one.kind.form == "many" for one in places)  # by --output
    if output is None or not places or is_named or resolve.is_elsewhere(output):
        return
    place = resolve.local_path(output)
    if (place / "config.json").is_file() or place.is_file():
        read = " and ".join(("SRC", *(one.about.metavar for one in places)))
        raise OutputError(
            f"{output}: already exists; {name} reads {read}, and writes to OUT, which stands last",
            hint="name another OUT, or pass --overwrite to replace it",
        )


def _plan(name: str, values: dict[str, Any]) -> None:
    output = values["output"]
    _check_output(name, output)
    print_plan(_planned(name, values), values)
    if output is not None and not values["as_json"]:
        exists = not resolve.is_elsewhere(output) and resolve.local_path(output).exists()
        told = f"{output}: already exists, a run needs --overwrite" if exists else output
        click.echo(printable(f"output     {told}"))


def _run(name: str, values: dict[str, Any]) -> None:
    # Wrong usage ends it before anything is opened.
    push_of(values, values["output"])
    if not values["overwrite"]:
        _check_output(name, values["output"])
    make(SaveOptions, values_of(SaveOptions, values))
    save(_planned(name, values), name, values)


def save(lazy: "LazyCheckpoint", title: str, values: dict[str, Any]) -> None:
    """Write a planned checkpoint as the options say, and print the report."""
    from streammap.common.ranks import ALONE, Ranks

    here = ALONE if values["no_ranks"] else Ranks.here()
    shows = listener(title, quiet=values["quiet"] or here.rank > 0)
    how = values_of(SaveOptions, values) | {"progress": shows, "ranks": here}
    push = push_of(values, values["output"])
    if push is None:
        report = lazy.save(values["output"], **how)
    else:
        report = lazy.push_to_hub(push.pop("repo"), **push, **how)
    print_report(report, quiet=values["quiet"], as_json=values["as_json"])


def listener(title: str, *, quiet: bool) -> "Listener":
    """A progress bar where somebody looks at it."""
    from streammap import progress

    return progress.bar(title, quiet=quiet)


def print_report(report: "Report", *, quiet: bool, as_json: bool) -> None:
    """A run's result on stdout; under a launcher the first process's alone."""
    from streammap.common.ranks import rank

    if rank():
        return
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    elif not quiet:
        for note in report.notes:
            click.echo(printable(f"note       {note}"))
        if report.n_resumed:
            size = format_nbytes(report.nbytes_resumed)
            click.echo(f"resumed    {report.n_resumed} tensors, {size}, were written")
        click.echo(f"guarantee  {report.promise}: {report.reason}")
        click.echo(f"{report} -> {report.output}")


def print_plan(lazy: "LazyCheckpoint", values: dict[str, Any]) -> None:
    """What a run would do; it is refused where the run would be."""
    from streammap.output import destination

    destination.check(lazy.plan, values["output"])
    summary = lazy.summary(**values_of(Engine, values))
    content = json.dumps(summary.as_json(), indent=2) if values["as_json"] else str(summary)
    click.echo(content)
