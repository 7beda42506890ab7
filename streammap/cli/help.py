"""Help screens: options under headings, in the order of what people look for, with examples."""

from collections.abc import Sequence
from typing import Any

import click

ERROR_CODE = "streammap.error_code"
"""Key in `ctx.meta`: the command's exit code on error (default 1)."""
SOURCE, OUTPUT, HUB, OTHER = "Source", "Output", "Hub", "Other"
_LAST = (SOURCE, OUTPUT, HUB, "Resources", OTHER)
"""Headings that stand last, in this order; those of an operator's own options stand before."""


class Option(click.Option):
    """An option with a heading."""

    def __init__(self, *args: Any, group: str = OTHER, **kwargs: Any) -> None:
        """`group` is the heading."""
        super().__init__(*args, **kwargs)
        self.group = group

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Default and "required"; a lower bound of 1 goes without saying."""
        extra = super().get_help_extra(ctx)
        extra.pop("range", None)
        return extra


class Command(click.Command):
    """A command whose help has headings and examples."""

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        """`examples` are command lines without the program's name."""
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, heading by heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                groups.setdefault(getattr(parameter, "group", OTHER), []).append(record)
        for heading in sorted(groups, key=_place):
            with formatter.section(heading):
                formatter.write_dl(groups[heading])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(self.examples, formatter)


class Group(click.Group):
    """A group of such commands."""

    command_class = Command

    def __init__(self, *args: Any, examples: Sequence[str] = (), **kwargs: Any) -> None:
        """`examples` are command lines without the program's name."""
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(self.examples, formatter)


def write_examples(examples: Sequence[str], formatter: click.HelpFormatter) -> None:
    """The section of examples; lines are not wrapped, so that they can be copied."""
    if examples:
        with formatter.section("Examples"):
            for line in examples:
                formatter.write(f"{'':>{formatter.current_indent}}streammap {line}\n")


def _place(heading: str) -> int:
    return _LAST.index(heading) if heading in _LAST else -1
