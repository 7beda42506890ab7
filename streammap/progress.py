"""Listeners that show a run's progress: a bar on stderr, or lines of a logger.

A listener is any function that takes the events of events.py. Those here stay silent in all
processes but the first, so that a launcher's ranks do not write over each other.
"""

import logging
import sys
import time
from typing import TYPE_CHECKING, final

from streammap.common.events import Event, Finished, Listener, Started, Wrote, nobody
from streammap.common.ranks import rank
from streammap.common.units import format_nbytes

if TYPE_CHECKING:
    from tqdm import tqdm

_LOGGED_SECONDS = 10.0


def bar(title: str, *, quiet: bool) -> Listener:
    """A progress bar where somebody looks at it."""
    return nobody if quiet or not sys.stderr.isatty() else ProgressBar(title)


def to_logger(
    logger: logging.Logger, *, level: int = logging.INFO, seconds: float = _LOGGED_SECONDS
) -> Listener:
    """A listener that writes to a logger: the beginning, the end, and a line now and then between.

    Args:
        seconds: Time between two lines.
    """
    return nobody if rank() else _Logged(logger, level, seconds)


@final
class _Logged:
    """Counts bytes, and says how many."""

    def __init__(self, logger: logging.Logger, level: int, seconds: float) -> None:
        self._logger, self._level, self._seconds = logger, level, seconds
        self._total = self._done = 0
        self._began = self._told = 0.0

    def __call__(self, event: Event) -> None:
        """Log one event, if it is time."""
        now = time.monotonic()
        match event:
            case Started(n_tensors, nbytes, resumed):
                self._total, self._done = nbytes, resumed
                self._began = self._told = now
                self._logger.log(
                    self._level, "streammap: %d tensors, %s", n_tensors, format_nbytes(nbytes)
                )
            case Wrote(key, nbytes):
                self._done += nbytes
                if now - self._told >= self._seconds:
                    self._told = now
                    percent = 100 * self._done / max(self._total, 1)
                    self._logger.log(
                        self._level,
                        "streammap: %.0f %%, %s, %s",
                        percent,
                        format_nbytes(self._done),
                        key,
                    )
            case Finished():
                self._logger.log(
                    self._level,
                    "streammap: done in %.1f s (%.0f MB/s)",
                    now - self._began,
                    self._total / 1e6 / max(now - self._began, 1e-9),
                )


@final
class ProgressBar:
    """Shows a run's events on stderr; closes itself when the run is done."""

    def __init__(self, title: str) -> None:
        """`title` stands before the bar."""
        self._title = title
        self._bar: tqdm[None] | None = None

    def __call__(self, event: Event) -> None:
        """Show one event."""
        match event:
            case Started(_, nbytes, resumed):
                if rank():
                    return
                from tqdm import tqdm

                _open.add(self)
                self._bar = tqdm(
                    total=nbytes,
                    initial=resumed,
                    desc=self._title,
                    unit="B",
                    unit_scale=True,
                    leave=False,
                )
            case Wrote(_, nbytes):
                if self._bar is not None:
                    self._bar.update(nbytes)
            case Finished():
                self.close()

    def close(self) -> None:
        """Remove the bar."""
        _open.discard(self)
        if self._bar is not None:
            self._bar.close()
            self._bar = None


_open: set[ProgressBar] = set()


def close_bars() -> None:
    """Remove the bars of runs that ended in an error, so that a message begins a line."""
    for shown in tuple(_open):
        shown.close()
