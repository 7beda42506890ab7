"""The command line: each command a thin skin on one call of the library.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 refused or failed, 2
wrong usage. Nothing heavy is imported before a command runs; operators are imported when their
command is asked for.
"""

import contextlib
import json
import signal
from typing import Any

import click

from streammap.cli import original, results, show, specs
from streammap.cli.help import Group
from streammap.cli.options import (
    ERROR_CODE,
    adds,
    json_option,
    limit_option,
    moved_of,
    moved_options,
    option,
    output_parameters,
    reading_of,
    reading_options,
    source_options,
)
from streammap.common.version import VERSION
from streammap.errors import StreammapError
from streammap.operators import registry

_EXAMPLES = (
    "inspect bert-base-uncased/",
    "plan coalesce bert-base-uncased/ --width 2 --depth 2",
    "coalesce bert-base-uncased/ small/ --width 2 --depth 2",
    "decoalesce small/ grown/ --blend-with bert-base-uncased/ --alpha 0.5",
)


class _Operators(Group):
    """A group that has a command for each operator, made when it is asked for."""

    planning = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Operators first."""
        return [*registry.commands(), *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in registry.commands():
            return super().get_command(ctx, cmd_name)
        from streammap.cli import operators

        make = operators.plan_command if self.planning else operators.command
        return make(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Operators under their own heading; none is imported for it."""
        with formatter.section("Operators"):
            formatter.write_dl(list(registry.commands().items()))
        others = [(n, self.commands[n].get_short_help_str(100)) for n in sorted(self.commands)]
        if others:
            with formatter.section("Commands"):
                formatter.write_dl(others)


class _Main(_Operators):
    """Turns the library's errors into one message and exit code 1, or the command's own."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with contextlib.suppress(ValueError):  # not in the main thread, as in tests
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except StreammapError as error:
            if ctx.params.get("show_traceback"):
                import traceback

                traceback.print_exc()
            from streammap.common.ranks import is_relayed

            if not is_relayed(error.message):
                click.echo("\n".join([f"error: {error}", *_notes(error)]), err=True)
            ctx.exit(ctx.meta.get(ERROR_CODE, 1))
        except KeyboardInterrupt as error:
            notes = _notes(error) or ["nothing was written"]
            click.echo(f"interrupted: {'; '.join(notes)}", err=True)
            ctx.exit(130)


class _Plans(_Operators):
    planning = True


def _notes(error: BaseException) -> list[str]:
    """What a run says about what it leaves."""
    return getattr(error, "__notes__", [])


@click.group(
    cls=_Main, examples=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(VERSION, prog_name="streammap")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error arose.")
def main(show_traceback: bool) -> None:
    """Resize and blend transformer checkpoints, tensor by tensor."""


@main.command(
    examples=("inspect bert-base-uncased/", "inspect bert-base-uncased/ --health"),
)
@click.argument("source", metavar="SRC")
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
    from streammap import api
    from streammap.analysis import inspection
    from streammap.cli.operators import listener

    lazy = api.open(source, config=config, arch=arch, stream=stream)
    if health:
        report = lazy.health(progress=listener("health", quiet=False), **reading_of(options))
        text = report.text(limit=limit or None)
        click.echo(json.dumps(report.as_json(), indent=2) if as_json else text)
        return
    description = inspection.inspect(lazy.plan)
    text = str(description)
    click.echo(json.dumps(description.as_json(), indent=2) if as_json else text)


def _saving(command: Any) -> Any:
    """What a command that writes a result takes, beside its own options."""
    from streammap.cli.options import parameters
    from streammap.output.save_options import SaveOptions

    return adds(*parameters(SaveOptions), *output_parameters())(command)


@main.command(examples=("apply small/streammap.json again/", "apply recipe.json out/"))
@click.argument("request", metavar="REQUEST")
@click.argument("output", metavar="[OUT]", required=False)
@moved_options
@_saving
def apply(request: str, sources: tuple[str, ...], **options: Any) -> None:
    """Run a request from a file: a chain of operators, or what made an earlier result.

    REQUEST is a JSON file, a result's streammap.json, or a result.
    """
    from streammap import api
    from streammap.cli.operators import save

    save(api.open_request(request, sources=moved_of(sources)), "apply", options)


@main.group(cls=_Plans, examples=("plan coalesce bert-base-uncased/ --width 2 --depth 2",))
def plan() -> None:
    """Show what a command would do, without doing it."""


for _command in (
    original.scheme,
    original.map_,
    specs.architectures,
    specs.spec,
    results.verify,
    results.diff,
    show.testbench,
    show.demo,
):
    main.add_command(_command)
