"""Retries of network requests, with longer waits each time."""

import threading
from collections.abc import Callable
from typing import TypeVar, final

from streammap.errors import CheckpointError

WAITS_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 8.0)
"""How long to wait after each failure in a row without progress."""
MAX_ASKED_SECONDS = 120.0
"""A server may ask for a longer wait, up to this."""


_Result = TypeVar("_Result")


class TransientError(Exception):
    """A failure that a retry may mend."""

    def __init__(self, reason: str, *, seconds: float = 0.0) -> None:
        """Keep the reason, and how long the server asks to wait."""
        super().__init__(reason)
        self.reason, self.seconds = reason, seconds


@final
class RetryPolicy:
    """Counts failures of one request in a row, and waits after each."""

    def __init__(self, where: str, cancelled: threading.Event) -> None:
        """No failures yet.

        Args:
            where: What is requested, for messages.
            cancelled: Ends all waiting when set.
        """
        self._where, self._cancelled = where, cancelled
        self._n_failed = 0

    def progress(self) -> None:
        """Bytes arrived: start counting again."""
        self._n_failed = 0

    def wait(self, error: TransientError, at: str = "") -> None:
        """Wait after a failure.

        Raises:
            CheckpointError: too many failures in a row, or cancelled.
        """
        if self._n_failed >= len(WAITS_SECONDS):
            raise CheckpointError(
                f"{self._where}: {error.reason}{at}, {self._n_failed + 1} times in a row",
                hint="check the network and try again; what has arrived is not fetched again",
            ) from error
        seconds = max(WAITS_SECONDS[self._n_failed], min(error.seconds, MAX_ASKED_SECONDS))
        self._n_failed += 1
        if self._cancelled.wait(seconds):
            raise CheckpointError(f"{self._where}: cancelled") from error


def patiently(
    ask: Callable[[], _Result],
    explain: Callable[[Exception], CheckpointError | TransientError],
    *,
    where: str,
    cancelled: threading.Event,
) -> _Result:
    """The result of `ask`, retried while its errors are transient.

    Args:
        ask: Makes the request.
        explain: What an error of a client or driver means.
        where: What is requested, for messages.
        cancelled: Ends all waiting when set.

    Raises:
        CheckpointError: it failed for good, or too often in a row.
    """
    policy = RetryPolicy(where, cancelled)
    while True:
        try:
            return ask()
        except CheckpointError:
            raise
        except Exception as error:  # clients and drivers raise all kinds of errors
            failure = error if isinstance(error, TransientError) else explain(error)
            if isinstance(failure, CheckpointError):
                raise failure from error
        policy.wait(failure)
