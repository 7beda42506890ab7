"""Commands as a user types them."""

from click.testing import CliRunner, Result

from streammap.cli.main import main


def run(*arguments: object) -> Result:
    """Run one, in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> str:
    """What a command that must succeed prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout
