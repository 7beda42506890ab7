"""Fuzz one parser for a while.

    python -m tests.fuzz.run header --seconds 600

Needs the extra `fuzz`. What is found is written to --found (a folder); the inputs that reached new
code stay in --corpus. To keep one for good, put it into tests/fuzz/corpus/PARSER/.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
MOST_SECONDS = 2.0
"""Of one input, in processor time."""
_MOST_MEGABYTES = 2048


def main() -> None:
    """Run libFuzzer on a target until the time is over, or something is found."""
    import atheris

    with atheris.instrument_imports(include=["streammap"]):
        from tests.fuzz.targets import TARGETS

    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target", choices=sorted(TARGETS))
    options.add_argument("--seconds", type=int, default=600)
    options.add_argument("--found", type=Path, default=Path("fuzz-found"))
    options.add_argument("--corpus", type=Path)
    given = options.parse_args()
    target = TARGETS[given.target]
    scratch = Path(tempfile.mkdtemp(prefix="fuzz-"))
    corpus = given.corpus or scratch / "corpus"
    for folder in (corpus, given.found):
        folder.mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(target.seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    work = scratch / "work"

    def once(data: bytes) -> None:
        started = time.process_time()
        target.run(data, work)
        took = time.process_time() - started
        if took > MOST_SECONDS:
            raise TimeoutError(f"{took:.1f} s of processor time")

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if chance.random() < 0.2:
            return bytes(atheris.Mutate(data, max_size))
        return target.mutate(data, chance)[:max_size]

    places = [str(corpus), *(str(p) for p in [CORPUS / given.target] if p.is_dir())]
    atheris.Setup(
        [
            sys.argv[0],
            *places,
            f"-max_total_time={given.seconds}",
            "-max_len=20000",
            "-timeout=60",
            f"-rss_limit_mb={_MOST_MEGABYTES}",
            f"-artifact_prefix={given.found}/",
            "-print_final_stats=1",
        ],
        once,
        custom_mutator=mutator,
    )
    for seed in target.seeds():  # so that imports and caches count for no input
        target.run(seed, work)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
