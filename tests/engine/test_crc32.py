"""The CRC of a whole, from its parts in any order."""

import zlib
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammap.engine import crc32
from streammap.engine.crc32 import FileDigests


@given(st.binary(max_size=300), st.sets(st.integers(0, 300), max_size=8), st.randoms())
def test_a_crc_does_not_depend_on_the_parts_or_their_order(
    content: bytes, cuts: set[int], order: Random
) -> None:
    ends = sorted({cut for cut in cuts if cut < len(content)} | {len(content)})
    parts = list(zip([0, *ends[:-1]], ends, strict=True))
    order.shuffle(parts)
    found = FileDigests([len(content), 3])
    whole = [
        found.add(0, start, end - start, crc32.crc32(content[start:end]))
        for start, end in parts
        if end > start
    ]
    assert found.is_whole(0)
    assert found.crc(0) == zlib.crc32(content)
    assert whole == ([False] * (len(whole) - 1) + [True] if content else [])
    assert found.left_nbytes == 3
    assert not found.is_whole(1)


@given(st.integers(0, 2**32 - 1), st.one_of(st.integers(0, 5000), st.integers(0, 2**44)))
def test_both_ways_to_shift_are_one(crc: int, nbytes: int) -> None:
    assert crc32.shifted(crc, nbytes) == crc32.shifted_here(crc, nbytes)


@given(st.binary(max_size=50), st.binary(max_size=5000))
def test_a_shift_is_what_zlib_says(first: bytes, second: bytes) -> None:
    both = crc32.shifted_here(zlib.crc32(first), len(second)) ^ zlib.crc32(second)
    assert both == zlib.crc32(first + second)


@given(st.binary(max_size=5000))
def test_the_fast_crc_is_zlibs(content: bytes) -> None:
    assert crc32.crc32(memoryview(content)) == zlib.crc32(content)


def test_empty_tensors_are_whole_and_take_no_bytes_of_others() -> None:
    found = FileDigests([0, 4, 0, 2, 0])
    assert [found.is_whole(i) for i in range(5)] == [True, False, True, False, True]
    assert found.add(3, 0, 2, zlib.crc32(b"xy"))
    assert found.add(1, 0, 4, zlib.crc32(b"abcd"))
    assert [found.crc(i) for i in range(5)] == [0, zlib.crc32(b"abcd"), 0, zlib.crc32(b"xy"), 0]
    assert found.left_nbytes == 0


def test_what_was_whole_before_is_restored() -> None:
    found = FileDigests([4, 4])
    found.restore(1, 7)
    assert (found.crc(1), found.left_nbytes, found.is_whole(1)) == (7, 4, True)


@pytest.mark.parametrize("nbytes", [0, 1, 255, 256, 65_536, 2**40])
def test_nothing_shifts_to_nothing(nbytes: int) -> None:
    assert crc32.shifted_here(0, nbytes) == 0
