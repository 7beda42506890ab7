"""Progress events of a run, and the listeners that get them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from streammap.errors import StreammapError


@dataclass(frozen=True, slots=True)
class Started:
    """The plan is accepted; nothing is written yet."""

    n_tensors: int
    nbytes: int
    """Bytes of all tensors of the result."""
    resumed_nbytes: int = 0
    """Bytes that an earlier, interrupted run has written."""


@dataclass(frozen=True, slots=True)
class Wrote:
    """A part of a tensor is written."""

    key: str
    """Empty if another process wrote it."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The result is complete."""


Event = Started | Wrote | Finished
Listener = Callable[[Event], None]


def nobody(event: Event) -> None:
    """A listener that does nothing."""


class _HeardError(Exception):
    """Carries what a listener raised past everyone who would take it for an error of a disk."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.error = error


@contextmanager
def as_raised(listener: Listener) -> Iterator[Listener]:
    """The listener; what it raises leaves this context as it is, whatever handlers are inside."""

    def hear(event: Event) -> None:
        try:
            listener(event)
        except StreammapError:  # nobody takes these for another's
            raise
        except Exception as error:
            raise _HeardError(error) from error

    try:
        yield hear
    except _HeardError as carried:
        for note in getattr(carried, "__notes__", ()):
            carried.error.add_note(note)
        raise carried.error from carried.error.__cause__
