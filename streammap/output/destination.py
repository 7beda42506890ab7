"""Where a result goes: a folder or file of this machine, a URL, or a repository of the Hub."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from streammap.common.events import Listener
from streammap.engine.options import Engine
from streammap.engine.searching import settle
from streammap.errors import CheckpointError, OutputError
from streammap.io import filenames
from streammap.io.storage import hub_name, resolve
from streammap.io.storage.base import Sink
from streammap.io.storage.resolve import PathLike
from streammap.output import place, run, side_files, transaction, work_folder
from streammap.output.loading import class_check
from streammap.output.options import OutputOptions
from streammap.output.run import Report
from streammap.output.save_options import PushOptions, SaveOptions
from streammap.planning.plan import Plan

if TYPE_CHECKING:
    from streammap.io.storage.hub_sink import Push

Card = Callable[[Plan, Engine, str], str]
"""Makes the model card of a plan's result, for a repository of this name."""


def save(plan: Plan, output: PathLike, options: SaveOptions, *, card: Card) -> Report:
    """Compute and write a plan's result to a path or URL.

    Raises:
        OutputError: the output exists or can't be written, or the memory is too little.
        PlanError: a result that its class in transformers or timm would not load.
    """
    _check_name(output)
    class_check.check(plan, options.class_check)
    where = OutputOptions(resolve.local_path(output), options)
    if resolve.is_url(output):
        plan = settle.settled(plan, options)
        return _send(plan, _sink(plan, str(output), where, card), where, options.progress)
    with _settled(plan, where) as found:
        return run.run(found, where, options.progress)


def check(plan: Plan, output: PathLike | None) -> None:
    """Refuse what a run would refuse of the result's class and of the files beside the weights.

    Args:
        output: Where the result would go; None for a folder that is not chosen yet.

    Raises:
        PlanError: a result that its class in transformers or timm would not load.
        CheckpointError, OutputError: see `side_files.collect`; a folder in the place of a file.
    """
    class_check.check(plan, "auto")
    where = OutputOptions(resolve.local_path(output or ""), SaveOptions())
    names = [file.name for file in side_files.collect(plan, single=where.single)]
    if output and not resolve.is_url(output):
        place.check_names(where.folder, names)


def push(plan: Plan, repo: str, options: PushOptions, *, card: Card) -> Report:
    """Compute a plan's result and push it to a repository of the Hub.

    Raises:
        OutputError: no token, no right to write; a branch with a model, without `overwrite`.
        PlanError: a result that its class in transformers or timm would not load.
    """
    class_check.check(plan, options.class_check)
    where = OutputOptions(Path(), options)
    plan = settle.settled(plan, options)
    from streammap.io.storage.hub_sink import MESSAGE, Push

    to = Push(repo, options.branch, options.private, options.message or MESSAGE)
    return _send(plan, _hub(plan, to, where, card), where, options.progress)


@contextlib.contextmanager
def _settled(plan: Plan, where: OutputOptions) -> Iterator[Plan]:
    """The plan with what has to be found; it is kept in the work folder while that is there."""
    if plan.pending is None:
        yield plan
        return
    folder = work_folder.path_for(where.path, is_file=where.is_file)
    transaction.check_place(plan, where)
    run.fit(plan, where.save, where.ranks)
    if where.save.restart:
        for path in folder.glob(work_folder.FOUND):
            path.unlink(missing_ok=True)
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    try:
        yield settle.settled(plan, where.save, folder=folder)
    except BaseException:
        for path in missing:
            with contextlib.suppress(OSError):  # of a run that can be resumed
                path.rmdir()
        raise


def _check_name(output: PathLike) -> None:
    try:
        resolve.check_name(os.fspath(output))
    except CheckpointError as error:
        raise OutputError(error.message, hint=error.hint) from error


def _sink(plan: Plan, url: str, where: OutputOptions, card: Card) -> Sink:
    """Where a URL leads."""
    if where.save.format != "safetensors" and not url.endswith(filenames.WEIGHTS):
        raise OutputError(
            f"{url}: a folder of format {where.save.format} is written on this machine only",
            hint="write it to a folder, and copy that",
        )
    if url.startswith("hf://"):
        from streammap.io.storage.hub_sink import Push

        name = hub_name.parse(url)
        return _hub(plan, Push(name.repo, name.revision), where, card)
    from streammap.io.storage.remote_sink import RemoteSink

    return RemoteSink(url)


def _hub(plan: Plan, to: "Push", where: OutputOptions, card: Card) -> Sink:
    from streammap.io.storage.hub_sink import HubSink

    return HubSink(to, partial(card, plan, where.save, to.repo))


def _send(plan: Plan, sink: Sink, where: OutputOptions, progress: Listener) -> Report:
    if where.ranks.world_size > 1:
        raise OutputError(
            f"{sink.label}: {where.ranks.world_size} processes, expected 1: they share a "
            "folder on a file system",
            hint="write to a folder, or run it in one process (--no-ranks)",
        )
    from streammap.output import upload

    where = replace(where, path=upload.spool_for(sink.label))
    return run.run(plan, where, progress, sink=sink)
