"""The command line: each command a thin skin on one call of the library.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 refused or failed, 2
wrong usage. Nothing heavy is imported before a command runs.
"""

import contextlib
import json
import signal
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from streammap.cli import results, show, specs
from streammap.cli.options import (
    ERROR_CODE,
    GROUPINGS,
    RULES,
    blend_options,
    engine_of,
    engine_options,
    growth_options,
    json_option,
    limit_option,
    moved_of,
    moved_options,
    output_options,
    push_of,
    ranks_option,
    reading_of,
    reading_options,
    resize_of,
    resize_options,
    source_options,
    with_axes,
)
from streammap.common.version import VERSION
from streammap.errors import StreammapError, printable, printable_lines
from streammap.output.ranks.launcher import ALONE, Ranks, is_relayed

if TYPE_CHECKING:
    from streammap.api import LazyCheckpoint
    from streammap.common.events import Listener
    from streammap.output.run import Report


class _Commands(click.Group):
    """Turns the library's errors into one message and exit code 1, or the command's own."""

    def invoke(self, ctx: click.Context) -> Any:
        with contextlib.suppress(ValueError):  # not in the main thread, as in tests
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            return super().invoke(ctx)
        except StreammapError as error:
            if ctx.params.get("show_traceback"):
                import traceback

                traceback.print_exc()
            if not is_relayed(error.message):
                click.echo("\n".join([f"error: {error}", *_notes(error)]), err=True)
            ctx.exit(ctx.meta.get(ERROR_CODE, 1))
        except KeyboardInterrupt as error:
            notes = _notes(error) or ["nothing was written"]
            click.echo(f"interrupted: {'; '.join(notes)}", err=True)
            ctx.exit(130)


def _notes(error: BaseException) -> list[str]:
    """What a run says about what it leaves."""
    return getattr(error, "__notes__", [])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="streammap")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error arose.")
def main(show_traceback: bool) -> None:
    """Resize and blend transformer checkpoints, tensor by tensor.

    \b
    streammap inspect bert-base-uncased/
    streammap plan coalesce bert-base-uncased/ --width 2 --depth 2
    streammap coalesce bert-base-uncased/ small/ --width 2 --depth 2
    streammap decoalesce small/ grown/ --blend-with bert-base-uncased/ --alpha 0.5
    """


def _open(source: str, config: str | None, arch: str | None, *, stream: bool) -> "LazyCheckpoint":
    from streammap import api

    return api.open(source, config=config, arch=arch, stream=stream)


def _coalesced(source: "LazyCheckpoint", options: Mapping[str, Any]) -> "LazyCheckpoint":
    return source.coalesce(**with_axes(options))


def _decoalesced(
    source: "LazyCheckpoint",
    big: "LazyCheckpoint | None",
    alpha: float | None,
    options: Mapping[str, Any],
) -> "LazyCheckpoint":
    if big is None:
        if alpha is not None:
            raise click.UsageError("--alpha needs --blend-with BIG")
        return source.decoalesce(**with_axes(options))
    target = options["target"] or big
    grown = source.decoalesce(**with_axes({**options, "target": target}))
    return grown.interpolate(big, alpha=0.5 if alpha is None else alpha)


def _save(
    lazy: "LazyCheckpoint", title: str, output: str | None, options: Mapping[str, Any]
) -> None:
    here = ALONE if options["no_ranks"] else Ranks.here()
    quiet, as_json = options["quiet"], options["as_json"]
    push = push_of(options, output)
    named = ("max_shard_size", "overwrite", "restart")
    how: dict[str, Any] = {
        **{name: options[name] for name in named},
        "fsync": not options["no_fsync"],
        "progress": listener(title, quiet=quiet or here.rank > 0),
        "ranks": here,
        **engine_of(options),
    }
    if push is not None:
        report = lazy.push_to_hub(**push, **how)
    else:
        assert output is not None
        report = lazy.save(output, format=options["format"], nest=options["nest"], **how)
    print_report(report, lazy.plan.notes, quiet=quiet, as_json=as_json)


def listener(title: str, *, quiet: bool) -> "Listener":
    """A progress bar where somebody looks at it."""
    from streammap import progress

    return progress.bar(title, quiet=quiet)


def print_report(report: "Report", notes: Sequence[str], *, quiet: bool, as_json: bool) -> None:
    """A run's result on stdout; under a launcher the first process's alone."""
    from streammap.progress import rank

    if rank() or report.rank:
        return
    if as_json:
        click.echo(json.dumps({**report.as_json(), "notes": list(notes)}, indent=2))
    elif not quiet:
        for note in notes:
            click.echo(printable(f"note     {note}"))
        if report.n_resumed:
            gigabytes = report.nbytes_resumed / 1e9
            click.echo(f"resumed  {report.n_resumed} tensors, {gigabytes:.3f} GB, were written")
        click.echo(f"promise  {report.promise}: {report.reason}")
        click.echo(f"{report} -> {report.output}")


def _print_plan(lazy: "LazyCheckpoint", options: Mapping[str, Any]) -> None:
    summary = lazy.summary(**engine_of(options))
    as_json = options["as_json"]
    click.echo(
        json.dumps(summary.as_json(), indent=2) if as_json else printable_lines(str(summary))
    )


@main.command()
@click.argument("source", metavar="SRC")
@source_options
@click.option("--health", is_flag=True, help="Read all numbers: NaN, Inf, ranges, dead rows.")
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
    """Say what a checkpoint is: its architecture, sizes, files, and tensors.

    \b
    Example:
        streammap inspect bert-base-uncased/
        streammap inspect bert-base-uncased/ --health
    """
    from streammap.analysis import inspection

    lazy = _open(source, config, arch, stream=stream)
    if health:
        looked = lazy.health(progress=listener("health", quiet=False), **reading_of(options))
        told = looked.text(limit=limit or None)
        click.echo(json.dumps(looked.as_json(), indent=2) if as_json else printable_lines(told))
        return
    found = inspection.inspect(lazy)
    click.echo(json.dumps(found.as_json(), indent=2) if as_json else printable_lines(str(found)))


@main.command()
@click.argument("source", metavar="SRC")
@click.argument("output", metavar="[OUT]", required=False)
@resize_options
@source_options
@output_options
def coalesce(
    source: str,
    output: str | None,
    config: str | None,
    arch: str | None,
    stream: bool,
    **options: Any,
) -> None:
    """Make a smaller model: heads and layers of a group become their mean.

    \b
    Example:
        streammap coalesce bert-L12-H12/ bert-L6-H6/ --scheme schemes/L6-H6.json
    """
    push_of(options, output)  # wrong usage is told before anything is opened
    lazy = _coalesced(_open(source, config, arch, stream=stream), resize_of(options))
    _save(lazy, "coalesce", output, options)


@main.command()
@click.argument("source", metavar="SRC")
@click.argument("output", metavar="[OUT]", required=False)
@resize_options
@growth_options
@blend_options
@source_options
@output_options
def decoalesce(
    source: str,
    output: str | None,
    config: str | None,
    arch: str | None,
    blend_with: str | None,
    alpha: float | None,
    stream: bool,
    **options: Any,
) -> None:
    """Make a larger model: heads and layers are copied to their group.

    Without a scheme, the map saved when SRC was made is used.

    \b
    Example:
        streammap decoalesce small/ grown/ --blend-with big/ --alpha 0.5
    """
    push_of(options, output)
    small = _open(source, config, arch, stream=stream)
    big = None if blend_with is None else _open(blend_with, None, None, stream=stream)
    lazy = _decoalesced(small, big, alpha, resize_of(options))
    _save(lazy, "decoalesce", output, options)


@main.command()
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="TGT")
@click.argument("output", metavar="[OUT]", required=False)
@click.option("--alpha", type=float, required=True, help="Part of SRC in the result, 0 to 1.")
@source_options
@output_options
def interpolate(
    source: str,
    target: str,
    output: str | None,
    alpha: float,
    config: str | None,
    arch: str | None,
    stream: bool,
    **options: Any,
) -> None:
    """Blend two checkpoints of one model: (1 - alpha) * TGT + alpha * SRC.

    \b
    Example:
        streammap interpolate grown/ big/ out/ --alpha 0.5
    """
    push_of(options, output)
    other = _open(target, None, None, stream=stream)
    lazy = _open(source, config, arch, stream=stream).interpolate(other, alpha=alpha)
    _save(lazy, "interpolate", output, options)


@main.command()
@click.argument("request", metavar="REQUEST")
@click.argument("output", metavar="[OUT]", required=False)
@moved_options
@output_options
def apply(request: str, output: str, sources: tuple[str, ...], **options: Any) -> None:
    """Run a request from a file: a chain of operators, or what made an earlier result.

    REQUEST is a JSON file (docs/verify.md has the form), a result's streammap.json, or a result.

    \b
    Example:
        streammap apply small/streammap.json again/
    """
    from streammap.tools import replay

    _save(replay.open(request, sources=moved_of(sources)), "apply", output, options)


@main.group()
def plan() -> None:
    """Say what a command would do, without doing it.

    \b
    Example:
        streammap plan coalesce bert-base-uncased/ --width 2 --depth 2
    """


@plan.command("coalesce")
@click.argument("source", metavar="SRC")
@click.argument("output", metavar="[OUT]", required=False)
@resize_options
@source_options
@engine_options
@json_option
def plan_coalesce(
    source: str,
    output: str | None,
    config: str | None,
    arch: str | None,
    stream: bool,
    **options: Any,
) -> None:
    """What `coalesce` would do.

    \b
    Example:
        streammap plan coalesce bert-L12-H12/ --width 2 --depth 2
    """
    _print_plan(_coalesced(_open(source, config, arch, stream=stream), resize_of(options)), options)


@plan.command("decoalesce")
@click.argument("source", metavar="SRC")
@click.argument("output", metavar="[OUT]", required=False)
@resize_options
@growth_options
@blend_options
@source_options
@engine_options
@json_option
def plan_decoalesce(
    source: str,
    output: str | None,
    config: str | None,
    arch: str | None,
    blend_with: str | None,
    alpha: float | None,
    stream: bool,
    **options: Any,
) -> None:
    """What `decoalesce` would do.

    \b
    Example:
        streammap plan decoalesce small/ --blend-with big/ --alpha 0.5
    """
    small = _open(source, config, arch, stream=stream)
    big = None if blend_with is None else _open(blend_with, None, None, stream=stream)
    lazy = _decoalesced(small, big, alpha, resize_of(options))
    _print_plan(lazy, options)


@plan.command("interpolate")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="TGT")
@click.argument("output", metavar="[OUT]", required=False)
@click.option("--alpha", type=float, required=True, help="Part of SRC in the result, 0 to 1.")
@source_options
@engine_options
@json_option
def plan_interpolate(
    source: str,
    target: str,
    output: str | None,
    alpha: float,
    config: str | None,
    arch: str | None,
    stream: bool,
    **options: Any,
) -> None:
    """What `interpolate` would do.

    \b
    Example:
        streammap plan interpolate grown/ big/ --alpha 0.5
    """
    other = _open(target, None, None, stream=stream)
    lazy = _open(source, config, arch, stream=stream).interpolate(other, alpha=alpha)
    _print_plan(lazy, options)


@main.command()
@click.option("--heads", type=int, metavar="N", help="Heads of the large model.")
@click.option("--layers", type=int, metavar="N", help="Layers of the large model.")
@click.option("--width", type=int, default=2, show_default=True, metavar="K", help="Heads a group.")
@click.option(
    "--depth", type=int, default=2, show_default=True, metavar="K", help="Layers a group."
)
@click.option(
    "--grouping",
    type=click.Choice(GROUPINGS),
    default="stacked",
    show_default=True,
    help="i with i+n/K, or neighbours.",
)
def scheme(heads: int | None, layers: int | None, width: int, depth: int, grouping: str) -> None:
    """Print a scheme for given sizes.

    \b
    Example:
        streammap scheme --heads 12 --layers 12 > L6-H6.json
    """
    from streammap.planning import scheme as schemes

    if heads is None and layers is None:
        raise click.UsageError("give --heads N, --layers N or both")
    known: schemes.Grouping = "adjacent" if grouping == "adjacent" else "stacked"
    made = schemes.Scheme(
        None if heads is None else schemes.uniform(heads, width, known, what="heads"),
        None if layers is None else schemes.uniform(layers, depth, known, what="layers"),
    )
    click.echo(made.as_text())


@main.command("map")
@click.option(
    "--arch", type=click.Choice(("bert", "gpt2", "deit")), required=True, help="Which front."
)
@click.option(
    "--opt",
    type=click.Choice(("C", "D", "IP")),
    required=True,
    help="Coalesce, decoalesce or interpolate.",
)
@click.option("--src-dir", required=True, metavar="DIR", help="Folder of the source.")
@click.option("--tgt-dir", metavar="DIR", help="Folder of the target.")
@click.option("--save-dir", required=True, metavar="DIR", help="Where the result goes.")
@click.option("--config", metavar="FILE", help="The scheme, JSON.")
@click.option("--alpha", type=float, default=0.0, show_default=True, help="Part of the source.")
@click.option("--src-arch", metavar="LxHy", help="DeiT: sizes of the source, L12-H12.")
@click.option("--tgt-arch", metavar="LxHy", help="DeiT: sizes of the target.")
@click.option("--src-ckp", metavar="NAME", help="DeiT: file of the source, in --src-dir.")
@click.option("--tgt-ckp", metavar="NAME", help="DeiT: file of the target, in --tgt-dir.")
@click.option(
    "--save-ckp",
    metavar="NAME",
    help="DeiT: file of the result, .safetensors (recommended) or .pth.",
)
@click.option(
    "--rule",
    type=click.Choice(RULES),
    default="reference",
    show_default=True,
    help="exact: keep the function instead of the original's numbers.",
)
@click.option("--restart", is_flag=True, help="Begin anew where an earlier run was stopped.")
@ranks_option
@click.option("--quiet", "-q", is_flag=True, help="No progress bar, no report.")
@engine_options
@json_option
def map_(restart: bool, no_ranks: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """The original map tools' command line, flag by flag.

    \b
    Example:
        streammap map --arch bert --opt C --src-dir bert-L12-E768 --tgt-dir bert-L6-E384 \\
            --config schemes/L6-H6.json --save-dir bert-L6-E384
    """
    from streammap.tools.original import mappers

    limits = engine_of(options)
    made = mappers.from_flags(**{k: v for k, v in options.items() if k not in limits})
    here = ALONE if no_ranks else Ranks.here()
    shown = listener("map", quiet=quiet or here.rank > 0)
    report = made.save(restart=restart, progress=shown, ranks=here, **limits)
    print_report(report, made.result.plan.notes, quiet=quiet, as_json=as_json)


main.add_command(specs.architectures)
main.add_command(specs.spec)
main.add_command(results.verify)
main.add_command(results.diff)
main.add_command(show.testbench)
main.add_command(show.demo)
