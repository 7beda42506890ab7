"""Pickles of torch files: what is read, what is refused by name, and what would have no end."""

import contextlib
import pickle
import subprocess
import sys
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import streammap
from streammap.errors import CheckpointError
from streammap.io.dtypes import to_torch
from streammap.io.formats import torch_pickle, torch_zip
from streammap.io.formats.safe_pickle import Skipped
from streammap.io.formats.torch_pickle import Storage, StoredTensor, UnsupportedTensor
from tests.support import tiny

BEGIN = b"\x80\x02"
STORAGE = b"((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpuK\x10tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def _read(content: bytes) -> object:
    return torch_pickle.read(BEGIN + content + b".", file="x.pth")


def _tensor(offset: bytes, shape: bytes, strides: bytes) -> bytes:
    """A call that makes a view of a storage."""
    rest = b"\x89" + b"ccollections\nOrderedDict\n)R" + b"tR"
    return TENSOR + STORAGE + offset + shape + strides + rest


def test_plain_values_are_what_pickle_reads() -> None:
    value = {
        "a": [1, -1, 255, 65535, -(2**31), 2**40, -(2**100), 1.5, True, False, None],
        3: ("x", (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        "é漢": [[], {}, {"b": {}}],
        2.5: "same",
        None: "same",
    }
    assert torch_pickle.read(pickle.dumps(value, protocol=2), file="x") == value


ATOMS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9)


@given(
    st.recursive(
        ATOMS,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(ATOMS, inner, max_size=4)
            | st.tuples(inner, inner)
        ),
        max_leaves=20,
    )
)
def test_any_plain_value_is_what_pickle_reads(value: object) -> None:
    assert torch_pickle.read(pickle.dumps(value, protocol=2), file="x") == value


def test_a_tensor_is_a_view_of_a_storage() -> None:
    expected = StoredTensor(Storage("0", "F32"), "F32", 1, (2, 3), (3, 1))
    assert _read(_tensor(b"K\x01", b"K\x02K\x03\x86", b"K\x03K\x01\x86")) == expected


def test_what_training_scripts_keep_beside_a_model_is_not_made(tmp_path: Path) -> None:
    content = {
        "model": {"a": torch.zeros(2)},
        "set": {1},
        "counter": Counter("a"),
        "bytes": b"abc",
        "array": bytearray(b"abc"),
        "complex": 1j,
        "device": torch.device("cpu"),
        "dtype": torch.float64,
        "size": torch.Size([2]),
        "ordered": OrderedDict(a=1),
        "layout": torch.strided,
        "sparse": torch.eye(2).to_sparse(),
    }
    torch.save(content, tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "x.pth") as file:
        found = torch_pickle.read(file.read("x/data.pkl"), file="x.pth")
    assert isinstance(found, dict)
    assert {name for name, value in found.items() if value == Skipped()} >= {
        "set",
        "counter",
        "bytes",
        "array",
        "complex",
        "device",
        "size",
    }
    assert found["ordered"] == {"a": 1}
    assert found["sparse"] == UnsupportedTensor()
    assert streammap.open(tmp_path / "x.pth").keys() == ("a",)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (defaultdict(list), "collections.defaultdict"),
        (Path("x"), "pathlib.PosixPath"),
        (range(3), "range"),
        (torch.Generator, "Generator"),
        (sys.exit, "sys.exit"),
    ],
)
def test_any_other_name_in_a_pickle_is_refused(value: object, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"x.pth: .* more than tensors: .*{name}\n  hint: o"):
        torch_pickle.read(pickle.dumps({"a": value}, protocol=2), file="x.pth")


def test_a_name_that_a_terminal_would_obey_is_printed_as_escapes() -> None:
    with pytest.raises(CheckpointError, match=r"more than tensors: os\\x1b\[2J\.system"):
        _read(b"cos\x1b[2J\nsystem\n")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", r"instruction|IndexError"),
        (b"i", r"instruction b'i' at byte 2"),
        (b"\x93", "IndexError"),
        (b"N\x8c\x01a\x93", "a name that is not text"),
        (b"\x95\x01", "it ends early"),
        (b"\x8f", r"instruction b'\\x8f' at byte 2"),
        (b"h\x05", "KeyError 5"),
        (b"R", "IndexError"),
        (b"NR", "IndexError"),
        (b"N)R", "a call of NoneType"),
        (b"ccollections\nOrderedDict\nNR", "a call of Name"),
        (b"NQ", "a reference to something that is not a storage"),
        (b"(X\x06\0\0\0modulectorch\nFloatStorage\nNNK\x00tQ", "not a storage"),
        (b"Na", "IndexError"),
        (b"}Na", "dict where a list is expected"),
        (b"]NNs", "list where a dict is expected"),
        (b"}(Nu", "dict where a dict is expected"),
        (b"t", "IndexError"),
        (b"\x86", "nothing to make a tuple of"),
        (b"X\xff\xff\xff\xffa", "it ends early"),
        (b"X\x01\0\0\0\xff", "UnicodeDecodeError"),
        (b"\x8a\xff", "it ends early"),
        (b"c" + b"a" * 2_000, "not found"),
        (b"NNb", "state for what has none"),
        (b"\x80\x09", "protocol 9"),
        (TENSOR + b")R", "missing 4 required positional arguments"),
        (b"ctorch._utils\n_rebuild_parameter\n(NNNtR", "a parameter that is not a tensor"),
        (_tensor(b"J\xff\xff\xff\xff", b"K\x02\x85", b"K\x01\x85"), "negative sizes or strides"),
        (_tensor(b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "negative sizes or strides"),
        (_tensor(b"K\x00", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"), "negative sizes or strides"),
        (_tensor(b"K\x00", b"\x88\x85", b"K\x01\x85"), "negative sizes or strides"),
        (_tensor(b"K\x00", b"K\x02\x85", b")"), "1 sizes and 0 strides"),
        (_tensor(b"N", b"K\x02\x85", b"K\x01\x85"), "not a view of a storage"),
    ],
    ids=range(33),
)
def test_a_broken_pickle_is_refused(content: bytes, expected: str) -> None:
    with pytest.raises(CheckpointError, match=f"x.pth: not a torch checkpoint: .*({expected})"):
        _read(content)


def test_a_pickle_that_calls_itself_is_refused() -> None:
    inner = b"ctorch._tensor\n_rebuild_from_type_v2\nq\x00"
    with pytest.raises(CheckpointError, match="_rebuild_from_type_v2 of itself"):
        _read(inner + b"(h\x00h\x00)NtR")


@pytest.mark.parametrize(
    "bomb",
    [
        # Tuples of tuples, as a key: hashing it would take 2^60 steps.
        b"}" + b")" + b"q\x00h\x00\x86" * 60 + b"Ns",
        # A bytearray of 10 GB, and a storage as large.
        b"cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R",
        b"ctorch\nFloatStorage\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R",
        # A memo that would be sized by its highest index.
        b"Nr\xff\xff\xff\x7f",
        # A list that holds itself.
        b"]q\x00h\x00a",
    ],
    ids=["key", "bytearray", "storage", "memo", "list"],
)
def test_a_small_pickle_takes_little_time_and_memory(tmp_path: Path, bomb: bytes) -> None:
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("x/data.pkl", BEGIN + bomb + b".")
    started = time.process_time()
    with pytest.raises(CheckpointError, match="no state dict"):
        streammap.open(tiny.file(tmp_path / "x.pth", file.getvalue()))
    assert time.process_time() - started < 0.5


def test_a_pickle_is_read_up_to_a_number_of_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "_MAX_STEPS", 100)
    with pytest.raises(CheckpointError, match="more than 100 instructions"):
        _read(b"N" * 100)
    monkeypatch.setattr(torch_pickle, "MAX_NBYTES", 10)
    with pytest.raises(CheckpointError, match="a pickle of 11 bytes, at most 10 are read"):
        _read(b"N" * 8)


def test_opening_a_torch_file_needs_no_torch(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.pth")
    script = (
        "import sys; from streammap.io.checkpoint import open_checkpoint; "
        f"open_checkpoint({str(tmp_path / 'x.pth')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# torch's own reader, which loads no bytes under FakeTensorMode, says the same.


def _state() -> dict[str, object]:
    base = torch.arange(60.0).view(3, 4, 5)
    return {
        "plain": base,
        "half": base.to(torch.bfloat16),
        "bytes": base.to(torch.uint8),
        "float8": base.to(torch.float8_e4m3fn),
        "turned": base[0].T,
        "permuted": base.permute(2, 0, 1),
        "cut": base[1:, 2:, 3:],
        "row": base[2, 1],
        "expanded": torch.ones(1).expand(7, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.zeros(2, 2)),
    }


@pytest.mark.parametrize("nest", [None, "model", "state_dict"])
def test_torch_says_the_same_of_a_file(tmp_path: Path, nest: str | None) -> None:
    path = tmp_path / "x.pth"
    torch.save(_state() if nest is None else {nest: _state(), "epoch": 3}, path)
    with FakeTensorMode():
        loaded = torch.load(path, weights_only=True)
    expected = loaded if nest is None else loaded[nest]
    slots = {slot.key: slot for slot in torch_zip.read(path).slots}
    assert slots.keys() == expected.keys()
    for key, x in expected.items():
        slot = slots[key]
        assert to_torch(slot.spec.dtype) == x.dtype
        assert slot.spec.shape == tuple(x.shape)
        if x.numel():
            begin = x.untyped_storage()._checkpoint_offset
            assert slot.start == begin + x.storage_offset() * x.element_size(), key
            assert (slot.strides is None) == x.is_contiguous()
            assert slot.strides in (None, x.stride())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_file_of_any_protocol_is_read(tmp_path: Path, protocol: int) -> None:
    torch.save(_state(), tmp_path / "new.pth", pickle_protocol=protocol)
    torch.save(_state(), tmp_path / "old.pth")
    old, new = (streammap.open(tmp_path / f"{name}.pth") for name in ("old", "new"))
    assert old.keys() == new.keys()
    assert all(tiny.bits(old.read(key)) == tiny.bits(new.read(key)) for key in old.keys())  # noqa: SIM118


# The zip file around it.


def _zipped(path: Path, entries: list[tuple[str, bytes]]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in entries:
            file.writestr(name, content)
    return path


PICKLE = BEGIN + b"}X\x01\0\0\0a" + _tensor(b"K\x00", b"K\x02\x85", b"K\x01\x85") + b"s."


def test_what_the_refusals_change_is_a_torch_file(tmp_path: Path) -> None:
    file = _zipped(tmp_path / "x.pth", [("x/data.pkl", PICKLE), ("x/data/0", bytes(8))])
    tiny.assert_same(tiny.opened(file), {"a": torch.zeros(2)})


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ([("x/data/0", bytes(8))], "a zip file without a data.pkl"),
        ([("x/data.pkl", PICKLE)], "a needs 8 bytes of storage 0, there are 0"),
        ([("x/data.pkl", PICKLE), ("x/data/0", bytes(7))], "a needs 8 bytes .* there are 7"),
        ([("x/data.pkl", PICKLE), ("y/data/0", bytes(8))], "a needs 8 bytes .* there are 0"),
        ([("x/byteorder", b"big")], "written on a big-endian machine"),
    ],
    ids=range(5),
)
def test_a_zip_file_of_other_entries_is_refused(
    tmp_path: Path, entries: list[tuple[str, bytes]], expected: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"x.pth: .*{expected}"):
        streammap.open(_zipped(tmp_path / "x.pth", entries))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    entries = [("x/data.pkl", PICKLE), ("x/data/0", bytes(8)), ("x/data/0", bytes(8))]
    with pytest.raises(CheckpointError, match="two entries x/data/0"):
        streammap.open(_zipped(tmp_path / "x.pth", entries))


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    content = bytearray(
        _zipped(tmp_path / "x.pth", [("x/data.pkl", PICKLE), ("x/data/0", bytes(8))]).read_bytes()
    )
    directory = content.index(b"PK\x01\x02")
    for at in (20, 24):  # both sizes of the first entry, in the directory
        content[directory + at] += 1
    with pytest.raises(CheckpointError, match=r"x\.pth: entries that overlap"):
        streammap.open(tiny.file(tmp_path / "x.pth", bytes(content)))


def test_a_directory_without_an_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _zipped(tmp_path / "x.pth", [("x/data.pkl", PICKLE), ("x/data/0", bytes(8))])
    monkeypatch.setattr(torch_zip, "_MAX_DIRECTORY_NBYTES", 100)
    with pytest.raises(CheckpointError, match=r"a directory of \d+ bytes, at most 100 are read"):
        streammap.open(file)


def test_an_expanded_tensor_is_read_a_part_at_a_time(tmp_path: Path) -> None:
    """4 bytes stand for 4 TB: it is planned with, and refused where it doesn't fit the disk."""
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "x.pth")
    source = streammap.open(tmp_path / "x.pth")
    assert source.spec("a").nbytes == 4 * 10**12
    with contextlib.suppress(streammap.OutputError):
        source.summary()
