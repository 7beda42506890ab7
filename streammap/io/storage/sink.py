"""Where a result goes that is not kept on this machine. To add one, write a class like these:
remote_sink.py (any URL that fsspec knows) and hub_sink.py (a repository of the Hub).
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol


class Sink(Protocol):
    """A folder elsewhere, or a file, that is written to. All errors are OutputErrors."""

    @property
    def label(self) -> str:
        """What messages call it, and what tells it from others."""
        ...

    @property
    def file(self) -> str | None:
        """The name of the file that it is; None for a folder."""
        ...

    def names(self) -> Mapping[str, str]:
        """Each file that is there, and what tells its content."""
        ...

    def is_harmless(self, name: str) -> bool:
        """Whether a file that is there is no reason to refuse."""
        ...

    def put(self, name: str, path: Path) -> str:
        """Send a file; it appears when it is whole. Gives what `names` will say of it."""
        ...

    def put_all(self, contents: Mapping[str, bytes]) -> None:
        """Send small files; the last ones make the result whole."""
        ...

    def remove(self, names: Sequence[str]) -> None:
        """Remove files, in this order."""
        ...

    def extras(self) -> Iterable[tuple[str, bytes]]:
        """Files that only this kind of place has."""
        ...
