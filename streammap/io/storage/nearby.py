"""What a mistyped path may have meant."""

import contextlib
import difflib
import itertools
from pathlib import Path

_MAX_ENTRIES = 1000


def hint(path: Path, *, instead: str | None = "check the path") -> str | None:
    """A hint for a path that does not exist: the name beside it that is most like it.

    Args:
        instead: The hint where no name is.
    """
    with contextlib.suppress(OSError):
        entries = itertools.islice((entry.name for entry in path.parent.iterdir()), _MAX_ENTRIES)
        near = difflib.get_close_matches(path.name, entries, n=1)
        if near:
            return f"did you mean {path.parent / near[0]}?"
    return instead
