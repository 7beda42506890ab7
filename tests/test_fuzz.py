"""What fuzzing kept, replayed; and random changes of valid files, without a fuzzer."""

import contextlib
import json
import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.architectures import limits
from streammap.errors import CheckpointError, SchemeError, StreammapError
from streammap.io.checkpoint import open_checkpoint
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header
from streammap.planning import requests, scheme
from tests.fuzz import mutate
from tests.fuzz.run import MOST_SECONDS
from tests.fuzz.targets import TARGETS, Target, corpus
from tests.support import tiny

_MOST_NBYTES = 150_000


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """So that imports and caches count for no input."""
    for name, target in TARGETS.items():
        target.run(target.seeds()[0], tmp_path_factory.mktemp(name))


@pytest.mark.parametrize("name", TARGETS)
def test_what_was_kept_gets_the_projects_errors_only(name: str, tmp_path: Path) -> None:
    inputs = {path.name: path.read_bytes() for path in corpus(name)}
    assert inputs
    for kept, data in inputs.items():
        started = time.process_time()
        TARGETS[name].run(data, tmp_path / "work")
        assert time.process_time() - started < MOST_SECONDS, kept


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_are_what_they_say_and_their_changes_are_refused(name: str, tmp_path: Path) -> None:
    target, chance = TARGETS[name], random.Random(name)
    seeds = target.seeds()
    for _ in range(40):
        data = target.mutate(chance.choice(seeds), chance)
        target.run(data, tmp_path / "work")


def test_the_corpus_stays_small() -> None:
    sizes = [path.stat().st_size for name in TARGETS for path in corpus(name)]
    assert sum(sizes) < _MOST_NBYTES


def test_a_target_lets_out_what_is_not_the_projects(tmp_path: Path) -> None:
    """What a fuzzer looks for would be seen."""

    def wrong(data: bytes, folder: Path) -> None:
        with contextlib.suppress(StreammapError):
            raise ZeroDivisionError(folder, data)

    target = Target(wrong, lambda: [b""], mutate.raw)
    with pytest.raises(ZeroDivisionError):
        target.run(b"", tmp_path)


# Headers.

KEYS = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=8).filter(
    lambda key: key.isprintable() and key != "__metadata__"
)
SPECS = st.builds(
    TensorSpec,
    st.sampled_from(sorted(DTYPE_BITS)),
    st.lists(st.sampled_from((0, 1, 2, 3, 4, 8)), max_size=4).map(tuple),
).filter(lambda spec: spec.n_elements * DTYPE_BITS[spec.dtype] % 8 == 0)
TENSORS = st.dictionaries(KEYS, SPECS, max_size=6)
METADATA = st.dictionaries(KEYS, st.text(st.characters(codec="utf-8"), max_size=8), max_size=3)


@given(TENSORS, METADATA)
def test_what_is_encoded_is_read_again(
    tensors: dict[str, TensorSpec], metadata: dict[str, str]
) -> None:
    head = safetensors_header.encode(list(tensors.items()), metadata)
    size = len(head) + sum(spec.nbytes for spec in tensors.values())
    slots = safetensors_header.decode(head[8:], file="x", file_nbytes=size)
    assert {slot.key: slot.spec for slot in slots} == tensors
    assert sum(slot.end - slot.start for slot in slots) == size - len(head)
    assert json.loads(head[8:])["__metadata__"] == metadata


@given(TENSORS.filter(bool), st.randoms(use_true_random=False), st.integers(0, 40))
def test_a_header_of_one_changed_value_is_read_whole_or_refused(
    tensors: dict[str, TensorSpec], chance: random.Random, more: int
) -> None:
    entries = mutate.json_value(
        json.loads(safetensors_header.encode(list(tensors.items()), {})[8:]), chance
    )
    text = json.dumps(entries).encode()
    size = 8 + len(text) + chance.choice((more, sum(spec.nbytes for spec in tensors.values())))
    with contextlib.suppress(CheckpointError):
        at = 8 + len(text)
        for slot in safetensors_header.decode(text, file="x", file_nbytes=size):
            assert slot.start == at
            at = slot.end
        assert at == size


# Indexes, schemes, requests.


@given(
    st.dictionaries(
        st.sampled_from(("a", "b", "c", "a\n")),
        st.sampled_from(("1.safetensors", "2.safetensors", "3.safetensors", "../x", "", 3, None)),
    )
)
def test_an_index_is_read_as_its_shards_are_or_refused(
    scratch: Path, weight_map: dict[str, object]
) -> None:
    true = {"a": "1.safetensors", "b": "2.safetensors"}
    for key, name in true.items():
        content = safetensors_header.encode([(key, TensorSpec("U8", (1,)))], {}) + b"\0"
        tiny.file(scratch / name, content)
    tiny.write_index(scratch, weight_map)
    named = set(weight_map.values())
    try:
        found = open_checkpoint(scratch)
    except CheckpointError:
        assert not named or not named <= set(true.values()) or "a\n" in weight_map
        return
    assert found.file_of == {key: name for key, name in true.items() if name in named}
    assert found.notes or found.file_of == weight_map


NUMBERS = st.integers(-2, 12) | st.sampled_from((2**40, 2**63, 10**30)) | st.floats() | st.none()
GROUPS = st.lists(
    st.lists(NUMBERS, max_size=4)
    | st.fixed_dictionaries(
        {"members": st.lists(NUMBERS, max_size=3), "weights": st.lists(NUMBERS, max_size=3)}
    ),
    max_size=4,
)
REQUESTS = (
    NUMBERS
    | GROUPS
    | st.fixed_dictionaries(
        {}, optional={"factor": NUMBERS, "size": NUMBERS, "groups": GROUPS, "grouping": st.text()}
    )
    | st.from_regex(r"=?[0-9]{1,20}", fullmatch=True)
)


@given(REQUESTS)
def test_a_request_is_within_its_bounds_or_refused(value: object) -> None:
    try:
        found = requests.parse_request(value, "mlp")
    except SchemeError:
        return
    given = [found.factor, found.size, found.groups]
    assert sum(one is not None for one in given) == 1
    assert all(1 <= one <= limits.MAX_SIZE for one in (found.factor, found.size) if one)
    for group in found.groups or ():
        assert len(set(group)) == len(group) > 0
        assert all(0 <= member <= 1_000_000 for member in group)
    for weights in found.weights or ():
        assert sum(weights) == pytest.approx(1)


@given(
    st.dictionaries(st.sampled_from((*scheme.SPACES, "width_scheme", "x")), REQUESTS, max_size=3)
)
def test_a_scheme_is_its_requests_or_refused(content: dict[str, object]) -> None:
    try:
        found = scheme.load_scheme(content)
    except SchemeError:
        return
    assert set(found.spaces) == set(content) - {"width_scheme"}
