"""A file, or a part of one, as a Python file that fetches only the pages that are read.

For headers, and for what zipfile reads of a torch file: its directory, its pickle, and a few bytes
before each tensor. Pages are kept.
"""

import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, final

from streammap.io.storage.base import OpenFile

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PAGE_NBYTES = 512


@final
class RangeReader(io.RawIOBase):
    """Reads an OpenFile, and remembers what it read."""

    def __init__(self, file: OpenFile, nbytes: int, *, start: int = 0, n_at_once: int = 1) -> None:
        """Fetch nothing yet.

        Args:
            file: What is read.
            nbytes: How many bytes of it there are for this reader.
            start: The first of them.
            n_at_once: How many reads `fetch` does together.
        """
        super().__init__()
        self._file, self._nbytes, self._n_at_once = file, nbytes, n_at_once
        self._start = start
        self._pages: dict[int, bytes] = {}
        self._offset = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move; nothing is fetched."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._nbytes}[whence]
        self._offset = max(0, base + offset)
        return self._offset

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill `buffer` from here on, as far as the file goes."""
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self._nbytes - self._offset))
        first, last = self._offset // PAGE_NBYTES, -(-(self._offset + n) // PAGE_NBYTES)
        self._fetch_run(first, last)
        whole = b"".join(self._pages[i] for i in range(first, last))
        start = self._offset - first * PAGE_NBYTES
        view[:n] = whole[start : start + n]
        self._offset += n
        return n

    def fetch(self, offsets: Iterable[int]) -> None:
        """Fetch the pages around some offsets, several at once."""
        wanted = {
            i for offset in offsets for i in (offset // PAGE_NBYTES, (offset + 64) // PAGE_NBYTES)
        }
        last = (self._nbytes - 1) // PAGE_NBYTES
        missing = sorted(i for i in wanted if i <= last and i not in self._pages)
        with ThreadPoolExecutor(self._n_at_once) as pool:
            for _ in pool.map(lambda run: self._fetch_run(*run), _runs(missing)):
                pass

    def _fetch_run(self, first: int, last: int) -> None:
        """Make sure that pages `first` to `last` are there."""
        missing = [i for i in range(first, last) if i not in self._pages]
        for start, end in _runs(missing):
            offset = start * PAGE_NBYTES
            content = bytearray(min(end * PAGE_NBYTES, self._nbytes) - offset)
            self._file.read_into(self._start + offset, memoryview(content))
            for i in range(start, end):
                self._pages[i] = bytes(
                    content[i * PAGE_NBYTES - offset : (i + 1) * PAGE_NBYTES - offset]
                )


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """Neighbours together: [1, 2, 5] -> [(1, 3), (5, 6)]."""
    runs: list[tuple[int, int]] = []
    for i in numbers:
        if runs and runs[-1][1] == i:
            runs[-1] = (runs[-1][0], i + 1)
        else:
            runs.append((i, i + 1))
    return runs
