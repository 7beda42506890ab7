"""A progress bar over bytes, as a listener."""

import sys
from typing import TYPE_CHECKING, final

from streammap.events import Event, Finished, Listener, Started, Wrote, nobody

if TYPE_CHECKING:
    from tqdm import tqdm


def bar(title: str, *, quiet: bool) -> Listener:
    """A progress bar where somebody looks at it."""
    return nobody if quiet or not sys.stderr.isatty() else ProgressBar(title)


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
                from tqdm import tqdm

                self._bar = tqdm(
                    total=nbytes, initial=resumed, desc=self._title, unit="B", unit_scale=True,
                    leave=False,
                )  # fmt: skip
            case Wrote(_, nbytes):
                if self._bar is not None:
                    self._bar.update(nbytes)
            case Finished():
                self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
