"""safetensors headers: golden bytes, the real library both ways, and every way to lie."""

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from streammap.errors import CheckpointError
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot
from tests.support import tiny

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
SIZES = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**63, 2**64, 10**30])
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*DTYPE_BITS, "F128", ""]) | JSON,
        "shape": st.lists(SIZES, max_size=4) | JSON,
        "data_offsets": st.lists(SIZES, min_size=2, max_size=2) | JSON,
    },
    optional={"more": JSON},
)
HEADERS = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRIES | JSON, max_size=4)


def _decode(entries: object, nbytes: int = 8) -> tuple[safetensors_header.Slot, ...]:
    """The slots of a header (a value, or its text) in a file with `nbytes` after it."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return safetensors_header.decode(text, file="x.safetensors", file_nbytes=8 + len(text) + nbytes)


def _with(**change: object) -> dict[str, object]:
    return {"a": {**F32, **change}}


def test_a_header_has_these_bytes() -> None:
    specs = [("wte.weight", TensorSpec("F32", (8, 4))), ("é", TensorSpec("BF16", ()))]
    assert safetensors_header.encode(specs, {"format": "pt"}) == (
        b"\xa0\x00\x00\x00\x00\x00\x00\x00"
        b'{"__metadata__":{"format":"pt"},'
        b'"wte.weight":{"dtype":"F32","shape":[8,4],"data_offsets":[0,128]},'
        b'"\xc3\xa9":{"dtype":"BF16","shape":[],"data_offsets":[128,130]}}    '
    )


def test_a_header_of_nothing_is_whole() -> None:
    head = safetensors_header.encode([], {})
    assert head == b"\x18\0\0\0\0\0\0\0" + b'{"__metadata__":{}}     '
    assert safetensors_header.decode(head[8:], file="x", file_nbytes=len(head)) == ()


def test_slots_come_in_the_order_of_their_bytes() -> None:
    second = {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}
    text = json.dumps({"b": second, "a": F32}).encode()
    slots = safetensors_header.decode(text, file="x", file_nbytes=8 + len(text) + 11)
    assert [slot.key for slot in slots] == ["a", "b"]
    assert slots[0] == safetensors_header.Slot("a", TensorSpec("F32", (2,)), 8 + len(text))
    assert (slots[1].start, slots[1].end) == (16 + len(text), 19 + len(text))


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    state = {
        "f32": torch.randn(3, 5),
        "bf16": torch.randn(7).bfloat16(),
        "f64": torch.randn(2, 0, 3).double(),
        "i64": torch.arange(4),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "f8": torch.randn(5).to(torch.float8_e4m3fn),
    }
    file = tmp_path / "model.safetensors"
    save_file(state, file, metadata={"made by": "a test"})
    slots, text = safetensors_header.read(file)
    content = file.read_bytes()
    assert content[8 : 8 + len(text)] == text
    assert {slot.key for slot in slots} == set(state)
    for slot in slots:
        assert slot.spec.shape == tuple(state[slot.key].shape)
        assert content[slot.start : slot.end] == tiny.bits(state[slot.key])


def test_the_safetensors_library_reads_ours(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 5),
        "ü.b": torch.randn(7).half(),
        "c": torch.tensor([True, False]),
        "d": torch.tensor(3),
        "e": torch.empty(0, 4),
    }
    dtypes = {"a": "F32", "ü.b": "F16", "c": "BOOL", "d": "I64", "e": "F32"}
    specs = [(key, TensorSpec(dtypes[key], tuple(x.shape))) for key, x in state.items()]
    file = tmp_path / "ours.safetensors"
    head = safetensors_header.encode(specs, {"format": "pt", "note": '"quoted"\n'})
    file.write_bytes(head + b"".join(map(tiny.bits, state.values())))
    tiny.assert_same(load_file(file), state)
    with safe_open(file, framework="pt") as found:
        assert found.metadata() == {"format": "pt", "note": '"quoted"\n'}


def test_what_is_encoded_decodes_to_itself() -> None:
    specs = [(dtype, TensorSpec(dtype, (2, 4, 3))) for dtype in DTYPE_BITS]
    head = safetensors_header.encode(specs, {})
    total = len(head) + sum(spec.nbytes for _, spec in specs)
    slots = safetensors_header.decode(head[8:], file="x", file_nbytes=total)
    assert [(slot.key, slot.spec) for slot in slots] == specs
    assert slots[0].start == len(head)
    assert slots[-1].end == total


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_metadata_may_be_null_empty_or_strings(metadata: Mapping[str, str] | None) -> None:
    (slot,) = _decode({"__metadata__": metadata, "a": F32})
    assert (slot.key, slot.spec) == ("a", TensorSpec("F32", (2,)))


def test_scalars_and_empty_tensors_are_tensors() -> None:
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
    empty = {"dtype": "F32", "shape": [0, 5], "data_offsets": [4, 4]}
    first = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    slots = _decode({"s": scalar, "e": empty, "f": first}, 4)
    assert {slot.key: slot.spec.n_elements for slot in slots} == {"s": 1, "e": 0, "f": 0}


def test_tensors_need_no_alignment() -> None:
    odd = {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}
    wide = {"dtype": "F64", "shape": [1], "data_offsets": [3, 11]}
    text = b" " + json.dumps({"odd": odd, "wide": wide}).encode() + b" "
    slots = safetensors_header.decode(text, file="x", file_nbytes=8 + len(text) + 11)
    assert slots[1].start == 8 + len(text) + 3


@pytest.mark.parametrize("nbytes", range(8))
def test_a_file_shorter_than_its_length_is_refused(tmp_path: Path, nbytes: int) -> None:
    file = tiny.file(tmp_path / "x.safetensors", bytes(nbytes))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: {nbytes} bytes, .* at least 8"):
        safetensors_header.read(file)


@pytest.mark.parametrize("n", [safetensors_header.MAX_HEADER_NBYTES + 1, 2**63, 2**64 - 1])
def test_a_huge_header_is_refused_unread(tmp_path: Path, n: int) -> None:
    file = tiny.file(tmp_path / "x.safetensors", n.to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=f"its header has {n} bytes, at most 100000000"):
        safetensors_header.read(file)


def test_a_header_past_the_end_of_its_file_is_refused(tmp_path: Path) -> None:
    file = tiny.file(tmp_path / "x.safetensors", (3).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated: 10 bytes, its header alone needs 11"):
        safetensors_header.read(file)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: No such file"):
        safetensors_header.read(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="Is a directory"):
        safetensors_header.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"\xff\xfe{}", b'{"a":\xe9}', b"\xef\xbb\xbf{}", b"{}{}", b'{"a":01}', b"\0" * 9],
)
def test_what_is_not_json_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its header is not"):
        _decode(text)


@pytest.mark.parametrize("value", [[], None, 3, "text", True])
def test_json_that_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="not a JSON object"):
        _decode(value)


def test_nesting_of_any_depth_is_refused() -> None:
    for depth in (10, 100, *range(900, 1000, 7), 5_000, 2_000_000):
        text = b'{"a":{"dtype":"F32","data_offsets":[0,8],"shape":%s}}'
        with pytest.raises(CheckpointError, match=r"its header is not|not a list of sizes"):
            _decode(text % (b"[" * depth + b"]" * depth))


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":{},"a":{}}',
        b'{"__metadata__":{},"__metadata__":{}}',
        b'{"__metadata__":{"a":"b","a":"b"}}',
        b'{"b":{"a":"F32","a":"F32","shape":[2],"data_offsets":[0,8]}}',
    ],
)
def test_a_key_that_stands_twice_is_refused(text: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"'(a|__metadata__)' twice"):
        _decode(text)


def test_a_repeated_key_among_many_is_found_fast() -> None:
    pairs = [f'"k{i}":0' for i in range(20_000)]
    text = "{" + ",".join([*pairs, '"last":0', '"last":0']) + "}"
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match="'last' twice"):
        _decode(text.encode())
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize("dtype", ["F128", "f32", "", None, 3, ["F32"], {}])
def test_an_unknown_dtype_is_refused(dtype: object) -> None:
    with pytest.raises(CheckpointError, match="a: unknown dtype"):
        _decode(_with(dtype=dtype))


@pytest.mark.parametrize(
    "shape",
    [[-2], [True], [2.0], ["2"], [None], [[2]], [2**63], [10**30], 2, None, {"0": 2}, "2"],
)
def test_a_shape_of_anything_but_sizes_is_refused(shape: object) -> None:
    with pytest.raises(CheckpointError, match=r"a: shape .* is not a list of sizes"):
        _decode(_with(shape=shape))


@pytest.mark.parametrize(
    "offsets",
    [
        [8, 0],
        [-8, 0],
        [0],
        [0, 8, 8],
        [],
        [False, 8],
        [0.0, 8.0],
        ["0", "8"],
        [0, 2**63],
        None,
        8,
        {"0": 8},
    ],
)
def test_offsets_that_are_no_range_are_refused(offsets: object) -> None:
    with pytest.raises(CheckpointError, match=r"a: data_offsets .* are not a range"):
        _decode(_with(data_offsets=offsets))


@pytest.mark.parametrize("shape", [[2**32, 2**32], [2**62, 2], [3, 2**62, 1], [2**62, 2**62, 0]])
def test_a_shape_that_overflows_is_refused(shape: list[int]) -> None:
    with pytest.raises(CheckpointError, match=r"a: shape .* overflows"):
        _decode(_with(shape=shape))


@pytest.mark.parametrize("n", [2**63 - 1, 2**61, 2**61 + 2])
def test_a_byte_count_that_would_wrap_is_refused(n: int) -> None:
    with pytest.raises(CheckpointError, match=f"needs {4 * n} bytes, its header gives it 8"):
        _decode(_with(shape=[n]))


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"), [("F32", [3], 12), ("F16", [2], 4), ("F4", [3], 1)]
)
def test_a_shape_that_does_not_fit_its_bytes_is_refused(
    dtype: str, shape: list[int], nbytes: int
) -> None:
    with pytest.raises(CheckpointError, match=rf"a: {dtype} \[.\] needs {nbytes} bytes"):
        _decode(_with(dtype=dtype, shape=shape))


def test_an_overlap_is_refused() -> None:
    other = {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}
    with pytest.raises(CheckpointError, match=r"b begins at byte .* overlaps the tensor before"):
        _decode({"a": F32, "b": other}, 12)
    with pytest.raises(CheckpointError, match=r"b begins at byte .* overlaps the tensor before"):
        _decode({"a": F32, "b": F32})


def test_a_hole_is_refused() -> None:
    other = {"dtype": "F32", "shape": [2], "data_offsets": [12, 20]}
    with pytest.raises(CheckpointError, match=r"b begins at byte .* leaves a hole before it"):
        _decode({"a": F32, "b": other}, 20)
    with pytest.raises(CheckpointError, match="leaves a hole"):
        _decode(_with(data_offsets=[1, 9]), 9)
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [4, 4]}
    with pytest.raises(CheckpointError, match=r"a hole|overlaps"):
        _decode({"a": F32, "e": empty})


@pytest.mark.parametrize("nbytes", [0, 7])
def test_missing_bytes_are_refused(nbytes: int) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: truncated: \d+ bytes, its header"):
        _decode({"a": F32}, nbytes)


def test_surplus_bytes_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"longer than its header says: .* needs"):
        _decode({"a": F32}, 9)
    with pytest.raises(CheckpointError, match="longer than its header says"):
        _decode({}, 1)


@pytest.mark.parametrize("metadata", [{"n": 1}, {"n": None}, [], "pt", 0, {"n": {}}, False])
def test_metadata_of_anything_but_strings_is_refused(metadata: object) -> None:
    with pytest.raises(CheckpointError, match="__metadata__ is not a table of strings"):
        _decode({"__metadata__": metadata, "a": F32})


@pytest.mark.parametrize(
    "entry",
    [
        {**F32, "more": 1},
        {"dtype": "F32", "shape": [2]},
        {"dtype": "F32", "data_offsets": [0, 8]},
        {},
        [],
        None,
        "F32",
    ],
)
def test_missing_and_surplus_fields_are_refused(entry: object) -> None:
    with pytest.raises(CheckpointError, match="a: expected dtype, shape and data_offsets, no more"):
        _decode({"a": entry})


def test_a_key_that_no_file_can_hold_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"x.safetensors"):
        _decode(b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}')


@given(st.binary(max_size=200))
def test_random_bytes_are_read_or_refused(scratch: Path, content: bytes) -> None:
    file = tiny.file(scratch / "random.safetensors", content)
    with contextlib.suppress(CheckpointError):
        safetensors_header.read(file)


@given(HEADERS, st.integers(0, 40))
def test_random_headers_are_read_or_refused(entries: object, nbytes: int) -> None:
    try:
        slots = _decode(entries, nbytes)
    except CheckpointError:
        return
    assert sum(slot.spec.nbytes for slot in slots) == nbytes


@given(st.data())
def test_a_mutated_header_is_read_or_refused(data: st.DataObject) -> None:
    specs = [("a", TensorSpec("F32", (2, 3))), ("b.c", TensorSpec("BF16", (4,)))]
    content = bytearray(safetensors_header.encode(specs, {"format": "pt"}) + bytes(32))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(8, len(content) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 9))]
            case _:
                content[at:at] = data.draw(
                    st.sampled_from([b"0", b"9" * 30, b"-", b'"', b"[", b","])
                )
        if len(content) < 9:
            break
    n = min(int.from_bytes(content[:8], "little"), len(content) - 8)
    try:
        slots = safetensors_header.decode(
            bytes(content[8 : 8 + n]), file="x", file_nbytes=len(content)
        )
    except CheckpointError:
        return
    assert all(slot.end <= len(content) for slot in slots)


@pytest.mark.parametrize(
    ("shape", "strides", "nbytes"),
    [
        ((2, 3), None, 24),
        ((2, 3), (1, 2), 24),
        ((2, 3), (10, 1), 52),
        ((4, 3), (0, 0), 4),
        ((0, 3), (1, 1), 0),
        ((), (), 4),
    ],
)
def test_a_slot_ends_where_its_last_element_does(
    shape: tuple[int, ...], strides: tuple[int, ...] | None, nbytes: int
) -> None:
    assert Slot("a", TensorSpec("F32", shape), 10, strides).end == 10 + nbytes
