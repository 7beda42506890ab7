"""Progress events of a run, and the listeners that get them."""

from collections.abc import Callable
from dataclasses import dataclass


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
