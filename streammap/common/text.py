"""Phrases that reports share."""

from streammap.common.units import format_nbytes


def moved(nbytes: int, seconds: float) -> str:
    """How many bytes were moved, in what time and at what rate."""
    rate = nbytes / 1e6 / max(seconds, 1e-9)
    return f"{format_nbytes(nbytes)} in {seconds:.1f} s ({rate:.0f} MB/s)"


def more(n_shown: int, n: int) -> list[str]:
    """A line with the number of rows that a table leaves out, if any."""
    return [] if n_shown >= n else [f"... and {n - n_shown} more, --limit 0 shows all"]
