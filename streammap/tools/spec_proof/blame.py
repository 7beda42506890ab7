"""Which axes go wrong where a change of all of them does: each is changed alone."""

from collections.abc import Callable, Iterator, Sequence

from streammap.api import LazyCheckpoint
from streammap.errors import StreammapError
from streammap.tools.spec_proof import comparison

Changed = Callable[[tuple[str, ...]], LazyCheckpoint]
"""The model with some axes changed."""


def by_axis(
    changed: Changed,
    error_of: Callable[[LazyCheckpoint], float | None],
    axes: Sequence[str],
    suspects: Sequence[str],
) -> tuple[str, tuple[str, ...]]:
    """What a change of each axis alone gives, in words, and those that go wrong.

    Args:
        changed: Makes the model.
        error_of: How far its outputs are from the source's.
        axes: All that are changed together.
        suspects: Those of them to be tried; where it is none of them, each is.
    """
    faults, refused = [], list[str]()
    wrong: tuple[list[str], list[str]] = [], []  # alone, and with another
    for axis in [axis for axis in axes if axis in suspects] or axes:
        failure: Exception | None = None
        for some in _with_partner(axis, axes):
            try:
                lazy = changed(some)
            except StreammapError as found:
                # Alone it can't be: 6 heads can't share 4 kv heads. That is no fault of its own.
                failure = failure or found
                continue
            name = " with ".join(some)
            try:
                error = error_of(lazy)
            except Exception as found:
                faults.append(f"{name}: {told(found)}")
                wrong[len(some) - 1].append(axis)
            else:
                faults.append(f"{name}: {'not run' if error is None else f'{error:.1e}'}")
                if error is not None and not error < comparison.TOLERANCE:
                    wrong[len(some) - 1].append(axis)
            break
        else:
            faults.append(f"{axis}: {told(failure)}")
            refused.append(axis)
    return f"each axis alone: {', '.join(faults)}", tuple(wrong[0] or wrong[1] or refused)


def _with_partner(axis: str, axes: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """An axis alone; or with another one, as kv heads with the heads that share them."""
    yield (axis,)
    yield from ((axis, other) for other in axes if other != axis)


def told(failure: Exception | None) -> str:
    """The first line of what is wrong; a second one that it leads up to."""
    first, *more = str(failure).splitlines() or [type(failure).__name__]
    return f"{first} {more[0].strip()}" if more and first.endswith(":") else first
