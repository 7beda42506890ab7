"""Commands and options as a user types them."""

from typing import Any

import click
from click.testing import CliRunner, Result

from streammap.cli.main import main

Options = dict[str, Any]
"""Options of a Python call, by name."""


def command(*words: str) -> tuple[click.Command, list[str]]:
    """The command that some words begin with, and the words behind it."""
    found: click.Command = main
    for n, word in enumerate(words):
        if not isinstance(found, click.Group):
            return found, list(words[n:])
        inner = found.get_command(click.Context(found), word)
        assert inner is not None, f"{word}: no command"
        found = inner
    return found, []


def run(*arguments: object) -> Result:
    """Run one, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    """What a command that must succeed prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
