"""Groups of options that commands share."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streammap.engine.options import MEMORY, READERS

if TYPE_CHECKING:
    from streammap.engine.options import EngineOptions

Command = TypeVar("Command", bound=Callable[..., Any])
ERROR_CODE = "streammap.error_code"
"""In click's meta: with what a command ends after an error, where that is not 1."""
GROUPINGS = ("stacked", "adjacent")
RULES = ("exact", "reference")
_PUSH = ("push_to_hub", "branch", "public", "commit_message")
_RUN = (
    "max_shard_size",
    "overwrite",
    "restart",
    "no_fsync",
    "no_ranks",
    "format",
    "nest",
    "quiet",
    "as_json",
    "memory",
    "threads",
    "device",
    "reader",
    *_PUSH,
)
SPACES = {
    "hidden": "The hidden size",
    "heads": "Query heads",
    "kv-heads": "Key and value heads",
    "mlp": "Intermediate sizes",
    "experts": "The number of experts",
    "layers": "The number of layers",
}


def source_options(command: Command) -> Command:
    """Where the source is, and by which spec it is read."""
    command = click.option(
        "--stream",
        is_flag=True,
        help="Read a model of the Hub as needed, instead of through the Hub's cache.",
    )(command)
    command = click.option(
        "--config", metavar="FILE", help="config.json of SRC, where it is not beside the weights."
    )(command)
    return click.option(
        "--arch", metavar="NAME", help="Architecture spec of SRC, where config.json doesn't tell."
    )(command)


def resize_options(command: Command) -> Command:
    """What to resize, and how."""
    for option in reversed(
        (
            click.option("--scheme", metavar="FILE", help="Groups of heads and layers, JSON."),
            click.option("--width", type=int, metavar="K", help="Factor on all widths."),
            click.option("--depth", type=int, metavar="K", help="Factor on the layers."),
            click.option(
                "--grouping",
                type=click.Choice(GROUPINGS),
                default="stacked",
                show_default=True,
                help="Which ones --width and --depth put together: i with i+n/K, or neighbours.",
            ),
            click.option("--map", "map", metavar="FILE", help="Map file saved by an earlier run."),
            click.option(
                "--target", metavar="CONFIG", help="config.json with the sizes of the result."
            ),
            click.option(
                "--rule",
                type=click.Choice(RULES),
                default="exact",
                show_default=True,
                help="reference: the original tools' factor 2 or 0.5 on embeddings.",
            ),
            *(
                click.option(
                    f"--{name}", metavar="R", help=f"{what} alone: a factor, =SIZE or groups."
                )
                for name, what in SPACES.items()
            ),
            click.option(
                "--axis",
                "axes",
                multiple=True,
                metavar="NAME=R",
                help="Any one axis that `inspect` lists: NAME=2, NAME==768 or NAME=[[0,1],...].",
            ),
            click.option(
                "--kv-merge",
                type=click.Choice(("mean", "first")),
                default="mean",
                show_default=True,
                help="What merged kv heads become.",
            ),
            click.option("--untie", is_flag=True, help="Give a tied head a tensor of its own."),
        )
    ):
        command = option(command)
    return command


def growth_options(command: Command) -> Command:
    """What only growth has."""
    command = click.option(
        "--head-dim", type=int, metavar="N", help="New size of a head, where positions are rotary."
    )(command)
    return click.option(
        "--new-layers",
        type=click.Choice(("copy", "zero")),
        default="copy",
        show_default=True,
        help="zero: layers that are added write nothing at first, so nothing changes.",
    )(command)


def blend_options(command: Command) -> Command:
    """What to blend the result with."""
    command = click.option(
        "--alpha", type=float, help="Part of the grown model in the blend. [default: 0.5]"
    )(command)
    return click.option(
        "--blend-with", metavar="BIG", help="Blend the result with this checkpoint."
    )(command)


def ranks_option(command: Command) -> Command:
    """--no-ranks."""
    return click.option(
        "--no-ranks",
        is_flag=True,
        help="Work alone, though torchrun or srun has started several processes.",
    )(command)


def output_options(command: Command) -> Command:
    """How the result is written."""
    for option in reversed(
        (
            click.option(
                "--max-shard-size",
                default="5GB",
                show_default=True,
                metavar="SIZE",
                help="Largest file: 5GB is 5*10^9 bytes, 5GiB is 5*2^30.",
            ),
            click.option("--overwrite", is_flag=True, help="Replace an output that is there."),
            click.option(
                "--push-to-hub",
                metavar="ORG/NAME",
                help="Push the result to the Hub, shard by shard, instead of writing OUT.",
            ),
            click.option("--branch", metavar="NAME", help="Of --push-to-hub.  [default: main]"),
            click.option(
                "--public", is_flag=True, help="Make the repository public, where it is made."
            ),
            click.option("--commit-message", metavar="TEXT", help="Of --push-to-hub's commits."),
            click.option(
                "--restart",
                is_flag=True,
                help="Begin anew where an earlier run was stopped, instead of going on.",
            ),
            click.option("--no-fsync", is_flag=True, help="Do not wait until the disk has it."),
            ranks_option,
            click.option(
                "--format",
                type=click.Choice(("safetensors", "dcp")),
                default="safetensors",
                show_default=True,
                help="dcp: a folder of torch.distributed.checkpoint.",
            ),
            click.option(
                "--nest",
                metavar="NAME",
                help="Top-level entry of a dcp result's tensors.  [default: the source's]",
            ),
            click.option("--quiet", "-q", is_flag=True, help="No progress bar, no report."),
        )
    ):
        command = option(command)
    return json_option(engine_options(command))


def push_of(options: Mapping[str, Any], output: str | None) -> dict[str, Any] | None:
    """How to push; None where the output is not a repository of the Hub."""
    repo = options["push_to_hub"]
    if repo is not None and output is not None:
        raise click.UsageError("give OUT or --push-to-hub, not both")
    if repo is None and output is None:
        raise click.UsageError("give OUT, or --push-to-hub ORG/NAME")
    if repo is None and output is not None and output.startswith("hf://"):
        repo = output.removeprefix("hf://")
    if repo is None:
        given = [name for name in _PUSH if options[name]]
        if given:
            raise click.UsageError(f"--{given[0].replace('_', '-')} goes with --push-to-hub")
        return None
    repo, _, branch = repo.partition("@")
    found = {"branch": options["branch"] or branch, "message": options["commit_message"]}
    given_ones = {name: value for name, value in found.items() if value}
    return {"repo": repo, "private": not options["public"], **given_ones}


def reading_options(command: Command) -> Command:
    """What a pass that only reads may use."""
    for option in reversed(
        (
            click.option(
                "--memory",
                default=MEMORY,
                show_default=True,
                metavar="SIZE",
                help="What the pass may add to the process, beside torch itself.",
            ),
            click.option(
                "--threads",
                type=click.IntRange(min=1),
                metavar="N",
                help="Threads that read and compute.  [default: one a processor]",
            ),
        )
    ):
        command = option(command)
    return command


def reading_of(options: Mapping[str, Any]) -> "EngineOptions":
    """The options that `reading_options` gives."""
    return {"memory": options["memory"], "threads": options["threads"]}


def limit_option(command: Command) -> Command:
    """--limit."""
    return click.option(
        "--limit",
        type=click.IntRange(min=0),
        default=20,
        show_default=True,
        metavar="N",
        help="Tensors to print, worst first; 0 for all.",
    )(command)


def engine_options(command: Command) -> Command:
    """What a run may use."""
    for option in reversed(
        (
            click.option(
                "--memory",
                default=MEMORY,
                show_default=True,
                metavar="SIZE",
                help="What a run may add to the process, beside torch itself.",
            ),
            click.option(
                "--threads",
                type=click.IntRange(min=1),
                metavar="N",
                help="Threads that read, compute and write.  [default: one a processor]",
            ),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                metavar="NAME",
                help="auto, cpu, cuda or cuda:1; auto takes a GPU where the plan gains by it.",
            ),
            click.option(
                "--reader",
                type=click.Choice(READERS),
                default=READERS[0],
                show_default=True,
                help="How sources are read.",
            ),
        )
    ):
        command = option(command)
    return command


def moved_options(command: Command) -> Command:
    """Where sources are now."""
    return click.option(
        "--source",
        "sources",
        multiple=True,
        metavar="[OLD=]NEW",
        help="Where a source is now: NEW where there is one only, else OLD=NEW.",
    )(command)


def moved_of(sources: Sequence[str]) -> dict[str, str] | str | None:
    """The sources that `moved_options` gives."""
    if len(sources) == 1 and "=" not in sources[0]:
        return sources[0]
    found = {}
    for text in sources:
        old, equals, new = text.partition("=")
        if not equals or not old or not new:
            raise click.UsageError(f"--source {text}: expected OLD=NEW")
        found[old] = new
    return found or None


def engine_of(options: Mapping[str, Any]) -> "EngineOptions":
    """The options that `engine_options` gives."""
    return {
        "memory": options["memory"],
        "threads": options["threads"],
        "device": options["device"],
        "reader": options["reader"],
    }


def resize_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """All other options: what to resize, and how."""
    return {name: value for name, value in options.items() if name not in _RUN}


def with_axes(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with each --axis NAME=R taken apart."""
    axes = {}
    for text in options["axes"]:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise click.UsageError(f"--axis {text}: expected NAME=R, such as moe_mlp=2")
        axes[name] = value
    return {**options, "axes": axes}


def json_option(command: Command) -> Command:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)
