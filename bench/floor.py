"""The floor under a run's time: read the same bytes, write as many, with one buffer of 1 MiB.

    python -I -S bench/floor.py OUT NBYTES SOURCE...    writes OUT, prints nothing

Sources are read whole, 1 MiB at a time, and what was read last is written in pieces of 256 KiB, so
that both end together. No torch, no streammap. The buffer begins at a page: where it stands a few
bytes before or behind the bytes of a page of the file, processors copy at a quarter of the speed.
"""

import mmap
import os
import sys
from pathlib import Path

BUFFER_NBYTES, PIECE_NBYTES = 2**20, 2**18


def main() -> None:
    """Read and write."""
    out, nbytes, *sources = sys.argv[1:]
    to_write, to_read = int(nbytes), sum(Path(source).stat().st_size for source in sources)
    buffer = memoryview(mmap.mmap(-1, BUFFER_NBYTES))
    target = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    n_read = n_written = 0
    for source in sources:
        descriptor = os.open(source, os.O_RDONLY)
        while n := os.readv(descriptor, [buffer]):
            n_read += n
            until = to_write * n_read // to_read
            while n_written < until:
                n_written += os.write(target, buffer[: min(PIECE_NBYTES, until - n_written)])
        os.close(descriptor)
    os.close(target)


if __name__ == "__main__":
    main()
