"""Try again what a network did not do, a little later each time."""

import threading
from typing import final

from streammap.errors import CheckpointError

WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
"""How long to wait after each failure that follows another one without progress."""
MAX_ASKED_SECONDS = 120.0
"""A server may ask for a longer wait than ours, but for no longer one than this."""


class TransientError(Exception):
    """Something that may go well the next time."""

    def __init__(self, reason: str, *, seconds: float = 0.0) -> None:
        """Say what happened; `seconds` is what the server asked to wait for."""
        super().__init__(reason)
        self.reason, self.seconds = reason, seconds


@final
class RetryPolicy:
    """Counts failures in a row, and waits after each. One for each thing that is done."""

    def __init__(self, where: str, cancelled: threading.Event) -> None:
        """Name what is done, for the message in the end."""
        self._where, self._cancelled = where, cancelled
        self._n_failed = 0

    def progress(self) -> None:
        """Something went well: begin to count anew."""
        self._n_failed = 0

    def wait(self, error: TransientError, at: str = "") -> None:
        """Wait after a failure.

        Raises:
            CheckpointError: there were too many, or nobody waits any more.
        """
        if self._n_failed >= len(WAITS_SECONDS):
            raise CheckpointError(
                f"{self._where}: {error.reason}{at}, {self._n_failed + 1} times in a row",
                hint="check the network and try again; what is there already is not fetched again",
            ) from error
        seconds = max(WAITS_SECONDS[self._n_failed], min(error.seconds, MAX_ASKED_SECONDS))
        self._n_failed += 1
        if self._cancelled.wait(seconds):
            raise CheckpointError(f"{self._where}: cancelled") from error
