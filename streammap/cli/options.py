"""Options of commands: those that are declared, and those that only a command line has."""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import MISSING
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from streammap.cli.help import HUB, SOURCE, Option
from streammap.common.declare import Declared, flag_of, options_of
from streammap.common.kinds import Kind, Whole
from streammap.engine.options import Engine
from streammap.errors import StreammapError, redacted
from streammap.operators.declare import Input

Command = TypeVar("Command", bound=Callable[..., Any])
_READING = ("memory", "threads")
_PUSH = ("push_to_hub", "branch", "public", "commit_message")
_TYPES: dict[str, Any] = {"text": str, "many": str, "int": int, "float": float}


class _Path(click.Path):
    """Text that may be a file or folder here, which shells complete; nothing is checked."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text as it is: what opens it says what is wrong."""
        return value


PATH = _Path()


class _ArchName(click.ParamType[str]):
    """A spec: one of those that are known, or a file."""

    name = "arch"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Names that begin so, then files."""
        from streammap.architectures import registry

        known = [name for name in registry.names() if name.startswith(incomplete)]
        return [*map(CompletionItem, known), CompletionItem(incomplete, type="file")]


ARCH = _ArchName()


class _Typed(_Path):
    """A text that its kind looks at: what can be no value of it is wrong usage."""

    def __init__(self, kind: Kind, option: str) -> None:
        """`option` is the option's name."""
        super().__init__()
        self._kind, self._option = kind, option

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text as it stands."""
        try:
            self._kind.check_typed(value, self._option)
        except StreammapError as error:
            self.fail(str(error), param, ctx)
        return value


def parameters(
    cls: Callable[..., object], *, prefix: str = "", only: Container[str] | None = None
) -> list[click.Parameter]:
    """Arguments and options of a declaration.

    Args:
        prefix: Keeps their names apart from others.
        only: Names of those that are wanted; None for all.
    """
    made = [
        _parameter(one, prefix)
        for one in options_of(cls)
        if one.kind.form != "object" and (only is None or one.name in only)
    ]
    return sorted(made, key=lambda parameter: isinstance(parameter, click.Option))


def values_of(
    cls: Callable[..., object], values: Mapping[str, Any], *, prefix: str = ""
) -> dict[str, Any]:
    """What was typed for a declaration, by name; None where nothing was."""
    typed = {}
    for one in options_of(cls):
        value = values.get(prefix + one.name)
        if one.kind.form == "flag" and one.default is True and value is not None:
            value = not value  # typed as --no-NAME
        typed[one.name] = None if value == () else value
    return typed


def _parameter(one: Declared, prefix: str) -> click.Parameter:
    about, form = one.about, one.kind.form
    if about.positional:
        return click.Argument(
            [prefix + one.name],
            metavar=about.metavar or one.name.upper(),
            required=one.is_required,
            nargs=-1 if form == "many" else 1,
            type=PATH if _is_path(one.kind) else None,
        )
    names, help_ = [flag_of(one), prefix + one.name], about.off or about.help
    if form == "flag":
        return Option(names, is_flag=True, help=help_, group=about.group)
    typed = click.Choice(one.kind.choices) if form == "choice" else _TYPES[form]
    if _is_path(one.kind):
        typed = PATH
    if type(one.kind).check_typed is not Kind.check_typed:
        typed = _Typed(one.kind, one.name)
    if isinstance(one.kind, Whole):
        typed = click.IntRange(min=one.kind.least)
    has_default = one.default not in (MISSING, None, ())
    return Option(
        names,
        type=typed,
        bare=one.kind.bare,
        **({"default": one.default, "show_default": True} if has_default else {}),
        required=one.is_required,
        multiple=form == "many",
        metavar=about.metavar or None,
        help=help_,
        group=about.group,
    )


def _is_path(kind: Kind) -> bool:
    """Whether a value may be a file or folder, whose name shells complete."""
    return kind.from_file or isinstance(kind, Input)


def option(*args: Any, group: str = "Other", **kwargs: Any) -> Callable[[Command], Command]:
    """click.option with a heading."""
    return click.option(*args, cls=Option, group=group, **kwargs)


def adds(*more: click.Parameter) -> Callable[[Command], Command]:
    """A decorator that adds parameters to a command's function, before those that it has."""

    def decorate(command: Command) -> Command:
        own: list[click.Parameter] = command.__dict__.setdefault("__click_params__", [])
        own.extend(reversed(more))  # click takes them from the last to the first
        return command

    return decorate


def source_options(command: Command) -> Command:
    """Where the source is, and by which spec it is read."""
    return adds(*source_parameters())(command)


def source_parameters() -> list[click.Parameter]:
    """--arch, --config, --stream."""
    return [
        Option(
            ["--arch"],
            type=ARCH,
            metavar="NAME",
            group=SOURCE,
            help="Architecture spec of SRC (name or .toml file), where config.json is not enough.",
        ),
        Option(
            ["--config"],
            type=PATH,
            metavar="FILE",
            group=SOURCE,
            help="config.json of SRC, where it is not beside the weights.",
        ),
        Option(
            ["--stream"],
            is_flag=True,
            group=SOURCE,
            help="Read a model of the Hub as needed, not through the Hub's cache.",
        ),
    ]


def output_parameters() -> list[click.Parameter]:
    """What every command that writes a result takes beside the declared SaveOptions."""
    return [
        Option(
            ["--push-to-hub"],
            metavar="ORG/NAME",
            group=HUB,
            help="Push the result to the Hub, shard by shard, instead of writing OUT.",
        ),
        Option(["--branch"], metavar="NAME", group=HUB, help="Branch to push to.  [default: main]"),
        Option(
            ["--public"], is_flag=True, group=HUB, help="Make a repository that is created public."
        ),
        Option(["--commit-message"], metavar="TEXT", group=HUB, help="Message of the commits."),
        no_ranks(),
        quiet(),
        as_json(),
    ]


def no_ranks() -> Option:
    """--no-ranks."""
    return Option(
        ["--no-ranks"],
        is_flag=True,
        group="Resources",
        help="Work alone, though torchrun or srun has started several processes.",
    )


def quiet() -> Option:
    """--quiet."""
    return Option(["--quiet", "-q"], is_flag=True, help="No progress bar, no report.")


def as_json() -> Option:
    """--json."""
    return Option(["--json", "as_json"], is_flag=True, help="Print one JSON object, of errors too.")


def push_of(options: Mapping[str, Any], output: str | None) -> dict[str, Any] | None:
    """How to push; None where the output is not a repository of the Hub."""
    repo = options["push_to_hub"]
    if repo is not None and output is not None:
        raise click.UsageError("give OUT or --push-to-hub, not both")
    if repo is None and output is None:
        raise click.UsageError("give OUT (where to write), or --push-to-hub ORG/NAME")
    if repo is None and output is not None and output.startswith("hf://"):
        repo = output.removeprefix("hf://")
    if repo is None:
        given = [name for name in _PUSH if options[name]]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} goes with --push-to-hub")
        return None
    repo, _, branch = repo.partition("@")
    named = {"branch": options["branch"] or branch, "message": options["commit_message"]}
    given_ones = {name: value for name, value in named.items() if value}
    return {"repo": repo, "private": not options["public"], **given_ones}


def reading_options(command: Command) -> Command:
    """What a pass that only reads may use."""
    return adds(*parameters(Engine, only=_READING))(command)


def reading_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that `reading_options` gives."""
    return {name: options[name] for name in _READING}


def limit_option(command: Command) -> Command:
    """--limit."""
    return option(
        "--limit",
        type=click.IntRange(min=0),
        default=20,
        show_default=True,
        metavar="N",
        help="Tensors to print, worst first; 0 for all.",
    )(command)


def moved_options(command: Command) -> Command:
    """Where sources are now."""
    return option(
        "--source",
        "sources",
        multiple=True,
        metavar="[OLD=]NEW",
        group=SOURCE,
        help="Where a source is now: NEW where there is one only, else OLD=NEW.",
    )(command)


def moved_of(sources: Sequence[str]) -> dict[str, str] | str | None:
    """The sources that `moved_options` gives."""
    pairs = [_pair(text) for text in sources]
    if len(pairs) == 1 and not pairs[0][0]:
        return sources[0]
    for (old, new), text in zip(pairs, sources, strict=True):
        if not old or not new:
            raise click.UsageError(f"--source {redacted(text)}: expected OLD=NEW")
    return dict(pairs) or None


def _pair(text: str) -> tuple[str, str]:
    """OLD and NEW; an equals sign in the query of a URL parts nothing."""
    old, equals, new = text.partition("=")
    return (old, new) if equals and "?" not in old else ("", text)


def json_option(command: Command) -> Command:
    """--json."""
    return adds(as_json())(command)
