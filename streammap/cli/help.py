"""Help screens: options under headings, in the order of what people look for, with examples."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

ERROR_CODE = "streammap.error_code"
"""Key in `ctx.meta`: the command's exit code on error (default 1)."""
SOURCE, OUTPUT, HUB, OTHER = "Source", "Output", "Hub", "Other"
_LAST = (SOURCE, OUTPUT, HUB, "Resources", OTHER)
"""Headings that stand last, in this order; those of an operator's own options stand before."""
_WORDS = re.compile(r"[a-z][a-z0-9_]*(,[a-z][a-z0-9_]*)*")


class Option(click.Option):
    """An option with a heading."""

    def __init__(self, *args: Any, group: str = OTHER, bare: str | None = None, **kwargs: Any):
        """`group` is the heading; `bare` what the option means without a value, if it may."""
        if bare is not None:
            kwargs |= {"is_flag": False, "flag_value": bare}
        super().__init__(*args, **kwargs)
        self.group, self.has_bare_value = group, bare is not None

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

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give options that need no value the one that they mean, where none follows them."""
        bare = {
            name: parameter.flag_value
            for parameter in self.params
            if isinstance(parameter, Option) and parameter.has_bare_value
            for name in parameter.opts
        }
        following = [*args, ""][1:]
        made = [
            f"{arg}={bare[arg]}" if arg in bare and not _is_word(after) else arg
            for arg, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, made)

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


def _is_word(text: str) -> bool:
    """Whether a text is the value of an option that needs none: words, and no file or folder."""
    return _WORDS.fullmatch(text) is not None and not Path(text).exists()


def _place(heading: str) -> int:
    return _LAST.index(heading) if heading in _LAST else -1
