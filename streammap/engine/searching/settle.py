"""Plans that need a search first: it is made here, within the memory of a run.

What is found may be kept in a folder, under the digest of what it was sought for: a run that is
resumed finds it there instead of searching again.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import final

from streammap.engine.memory import BASE_NBYTES
from streammap.engine.options import Engine
from streammap.errors import OutputError, StreammapError
from streammap.planning import map_file
from streammap.planning.map_file import MapLevel
from streammap.planning.ordering.search import OrderSearch
from streammap.planning.plan import Plan, Search

SUFFIX = f".found{map_file.SUFFIX}"
"""End of a file's name that holds what a search found."""
_READING_NBYTES = 8 * 2**20
"""A worker that reads, and what it reads into."""


def settled(plan: Plan, options: Engine, *, folder: Path | None = None) -> Plan:
    """The plan with all that has to be found; the plan itself where nothing has to.

    Args:
        folder: Where it is looked for, and kept; it is made when needed.

    Raises:
        OutputError: the memory is too little for a search.
        PlanError: a library is missing.
        CheckpointError: a source can't be read.
    """
    if plan.pending is None:
        return plan
    for search in plan.pending.searches:
        check(search, options)
    return plan.pending.settled(_Finder(options, folder).find)


def peak_nbytes(search: Search) -> int:
    """Memory that a search adds to a process that has imported torch, at most."""
    return BASE_NBYTES + _READING_NBYTES + search.peak_nbytes


def check(search: Search, options: Engine) -> None:
    """Refuse a search that takes more memory than was given; by default it gets what it takes.

    Raises:
        OutputError: naming what is enough.
    """
    needed, budget = -(-peak_nbytes(search) // 2**20), options.memory_nbytes
    if budget is not None and needed * 2**20 > budget:
        raise OutputError(
            f"memory {budget / 2**20:.0f} MiB: aligning takes at least {needed} MiB "
            f"on top of torch itself ({search.largest})",
            hint=f"pass --memory {needed}MiB, or more; or align fewer axes",
        )


@final
class _Finder:
    """Finds what is asked for, once."""

    def __init__(self, options: Engine, folder: Path | None) -> None:
        self._options, self._folder = options, folder

    def find(self, search: Search) -> MapLevel:
        """What a search finds, or found before."""
        check(search, self._options)
        assert isinstance(search, OrderSearch)
        from streammap.engine.searching import descent

        name = f"{_digest(search)[:32]}{SUFFIX}"
        known = self._kept(search, name)
        if known is not None:
            return known
        level = descent.find(search, reader=self._options.reader)
        self._keep(level, name)
        return level

    def _kept(self, search: OrderSearch, name: str) -> MapLevel | None:
        """What is in the folder; None where that is nothing that could have been found."""
        if self._folder is None or not (self._folder / name).is_file():
            return None
        with contextlib.suppress(StreammapError, OSError):
            levels = map_file.load(self._folder / name)
            if len(levels) == 1:
                search.check(levels[0])
                return levels[0]
        return None

    def _keep(self, level: MapLevel, name: str) -> None:
        """Write it whole, or not: what can't be kept is found again."""
        if self._folder is None:
            return
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                file.write(map_file.encode((level,)))
            os.replace(file.name, self._folder / name)  # noqa: PTH105 (a name, not a path)


def _digest(search: OrderSearch) -> str:
    """sha256 of all that decides what is found: both models' files and steps, and the axes."""
    content = [
        [
            [s.address, [[f.name, f.nbytes, f.mtime_ns, f.header_digest] for f in s.files]]
            for plan in (search.source, search.like)
            for s in plan.sources
        ],
        [
            [step.operator, dict(step.options)]
            for plan in (search.source, search.like)
            for step in plan.steps
        ],
        [repr(one) for one in search.movables],
        search.n_passes,
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
