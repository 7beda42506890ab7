"""Keep the inputs of a fuzzer's corpus that reach lines which smaller ones don't.

    python -m tests.fuzz.keep header CORPUS

They are copied to tests/fuzz/corpus/PARSER/, smallest first, up to --nbytes in all.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
from pathlib import Path
from types import FrameType

from tests.fuzz.run import CORPUS
from tests.fuzz.targets import TARGETS, Target


def lines_of(target: Target, data: bytes, work: Path) -> set[tuple[str, int]]:
    """The lines of the package that an input reaches."""
    found: set[tuple[str, int]] = set()

    def inside(frame: FrameType, event: str, argument: object) -> object:
        del argument
        if event == "line":
            found.add((frame.f_code.co_filename, frame.f_lineno))
        return inside

    def called(frame: FrameType, event: str, argument: object) -> object:
        del event, argument
        return inside if "/streammap/" in frame.f_code.co_filename else None

    sys.settrace(called)  # type: ignore[arg-type]
    try:
        target.run(data, work)
    finally:
        sys.settrace(None)
    return found


def main() -> None:
    """Pick and copy."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target", choices=sorted(TARGETS))
    options.add_argument("corpus", type=Path, nargs="+")
    options.add_argument("--nbytes", type=int, default=15_000)
    given = options.parse_args()
    target = TARGETS[given.target]
    work = Path(tempfile.mkdtemp())
    reached: set[tuple[str, int]] = set()
    for seed in target.seeds():  # the tests run these anyway
        target.run(seed, work / "x")
        reached |= lines_of(target, seed, work / "x")
    room = given.nbytes
    (CORPUS / given.target).mkdir(parents=True, exist_ok=True)
    paths = [path for folder in given.corpus for path in folder.glob("*")]
    for path in sorted(paths, key=lambda path: (path.stat().st_size, path.name)):
        data = path.read_bytes()
        found = lines_of(target, data, work / "x")
        if not found <= reached and len(data) <= room:
            reached |= found
            room -= len(data)
            (CORPUS / given.target / hashlib.sha256(data).hexdigest()[:12]).write_bytes(data)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
