"""Files that mean harm: what would wait for ever, fill the memory, or write on a terminal.

What is wrong in a file's own form is tested with its parser; here is what the form allows.
"""

import json
import math
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import streammap
from streammap import errors
from streammap.analysis import verification
from streammap.architectures import key_pattern, parser, registry
from streammap.common import strict_json
from streammap.errors import (
    ArchitectureError,
    CheckpointError,
    PlanError,
    SchemeError,
    StreammapError,
)
from streammap.io import safe_open
from streammap.io.checkpoint import open_checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import dcp_metadata, safetensors_header
from streammap.io.storage import disk
from streammap.output import side_files
from streammap.output.files import Output
from streammap.planning import map_file, scheme
from tests.architectures.test_labels import cases
from tests.support import tiny, typed

SIZES = tiny.Sizes()
HEAD = safetensors_header.encode([("a", TensorSpec("F32", (2,)))], {}) + bytes(8)


@contextmanager
def quickly(seconds: float = 1.0) -> Iterator[None]:
    started = time.process_time()
    yield
    assert time.process_time() - started < seconds


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    return tiny.write(folder, tiny.bert(SIZES), tiny.bert_config(SIZES))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "source", tiny.bert(SIZES), tiny.bert_config(SIZES))


# What is shown.


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 漢", "plain é 漢"),
        ("\x1b[2J", r"\x1b[2J"),
        ("a\nerror: b\r", r"a\nerror: b\r"),
        ("\x9b1m\x7f", r"\x9b1m\x7f"),
        ("\u202eevil", r"\u202eevil"),
        ("\ud800", r"\ud800"),
    ],
)
def test_a_message_holds_nothing_that_a_terminal_obeys(text: str, shown: str) -> None:
    error = StreammapError(f"{text}: wrong", hint=text)
    assert str(error) == f"{shown}: wrong\n  hint: {shown}"
    assert error.message.isprintable()


def test_a_message_has_an_end() -> None:
    error = StreammapError("x" * 1_000_000)
    assert len(error.message) < 3_000
    assert "(998000 more letters)" in error.message
    assert errors.printable("x" * 10_000) == "x" * 10_000


def test_a_terminal_gets_no_escapes_of_a_checkpoint(source: Path) -> None:
    config = {**cases()["gemma3_text"].config, "layer_types": ["\x1b[31mred\x07\n", "b"] * 5}
    assert "\x1b" not in typed.run("inspect", source / "\x1b[2J.safetensors").output
    folder = tiny.write(source / "gemma", tiny.random({}), None)
    (folder / "model.safetensors").unlink()
    _write_sparse(folder / "model.safetensors", cases()["gemma3_text"].specs)
    (folder / "config.json").write_text(json.dumps(config))
    told = typed.ok("inspect", folder)
    assert "\\x1b[31mred" in told
    assert all(letter.isprintable() for letter in told.replace("\n", ""))


def test_a_terminal_gets_no_escapes_of_a_record(source: Path) -> None:
    tensors = {"\x1b[2J": {"file": "\x1b[2J\nok.safetensors", "crc32": "cbf43926"}}
    record = {"files": {"\x1b[2J.safetensors": 3}, "tensors": tensors}
    (source / "streammap.json").write_text(json.dumps(record))
    told = typed.run("verify", source).output
    assert r"\x1b[2J" in told
    assert all(letter.isprintable() for letter in told.replace("\n", ""))


def _write_sparse(path: Path, specs: dict[str, TensorSpec]) -> None:
    """A file of zeros that take no room."""
    head = safetensors_header.encode(list(specs.items()), {})
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(spec.nbytes for spec in specs.values()))


# What is no regular file.


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _folder(path: Path) -> None:
    path.mkdir()


SPECIAL = pytest.mark.parametrize(
    ("make", "kind"),
    [(_pipe, "a pipe"), (_device, "a device"), (_folder, "Is a directory"), (_socket, "")],
)


@SPECIAL
def test_only_regular_files_are_opened(
    tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    make(tmp_path / "x")
    with pytest.raises(CheckpointError, match=f"x: {kind}"):
        safe_open.open_file(tmp_path / "x")


@SPECIAL
@pytest.mark.parametrize("name", ["two.safetensors", "two.bin"])
def test_a_shard_that_is_no_file_is_refused_without_waiting(
    tmp_path: Path, make: Callable[[Path], None], kind: str, name: str
) -> None:
    tiny.file(tmp_path / "one.safetensors", HEAD)
    tiny.write_index(tmp_path, {"a": "one.safetensors", "b": name})
    make(tmp_path / name)
    with quickly(), pytest.raises(CheckpointError, match=f"{name}: {kind}"):
        streammap.open(tmp_path)


def test_a_pipe_alone_in_a_folder_is_refused(tmp_path: Path) -> None:
    _pipe(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no weights: expected one of"):
        streammap.open(tmp_path)


@SPECIAL
def test_a_config_that_is_no_file_is_refused_without_waiting(
    source: Path, make: Callable[[Path], None], kind: str
) -> None:
    make(source / "other.json")
    expected = "No such file" if make is _folder else f"other.json: {kind}"
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(source, config=source / "other.json")


def test_a_file_of_the_kernels_is_not_read(tmp_path: Path) -> None:
    """It says that it has no bytes, may have any number, and reading it may wait for ever."""
    assert safe_open.content(Path("/proc/self/maps"), limit=1000) == b""
    (tmp_path / "x.safetensors").symlink_to("/proc/self/maps")
    with pytest.raises(CheckpointError, match="0 bytes, a safetensors file has at least 8"):
        streammap.open(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not JSON"):
        open_checkpoint(source_with(tmp_path), config=Path("/proc/self/maps"))


def source_with(folder: Path) -> Path:
    return tiny.file(folder / "whole.safetensors", HEAD)


def test_weights_may_be_links(tmp_path: Path) -> None:
    """On clusters they are, to a shared store: only their bytes as tensors can come of it."""
    tiny.file(tmp_path / "store", HEAD)
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to("../store")
    assert streammap.open(folder).keys() == ("a",)


def test_a_config_that_is_a_link_out_of_the_folder_is_taken_by_name_only(
    source: Path, tmp_path: Path
) -> None:
    """What it links to would be written out with the result."""
    (source / "config.json").rename(tmp_path / "secret.json")
    (source / "config.json").symlink_to("../secret.json")
    expected = rf"config\.json: a link out of the checkpoint, to {tmp_path}/secret\.json"
    with pytest.raises(CheckpointError, match=expected):
        streammap.open(source)
    assert streammap.open(source, config=source / "config.json").sizes["heads"] == 4
    (source / "config.json").unlink()
    (tmp_path / "secret.json").rename(source / "other.json")
    (source / "config.json").symlink_to("other.json")
    assert streammap.open(source).sizes["heads"] == 4


def test_a_file_that_becomes_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    opened = open_checkpoint(source_with(tmp_path))
    (tmp_path / "whole.safetensors").unlink()
    _pipe(tmp_path / "whole.safetensors")
    with pytest.raises(CheckpointError, match="a pipe"):
        opened.read_into("a", 0, memoryview(bytearray(8)))


def test_a_scheme_may_come_through_a_pipe(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.write(write, b'{"width_scheme": [[0, 1]]}')
    os.close(write)
    assert scheme.load_scheme(f"/dev/fd/{read}").width == ((0, 1),)
    os.close(read)
    with quickly(3), pytest.raises(SchemeError, match="zero: more than 100000000 bytes"):
        scheme.load_scheme("/dev/zero")
    (tmp_path / "x.toml").symlink_to("/dev/zero")
    with quickly(3), pytest.raises(ArchitectureError, match="more than 1000000 letters"):
        registry.load(str(tmp_path / "x.toml"))


# Sizes of files.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_without_an_end_is_refused_unread(source: Path, name: str) -> None:
    if name != "config.json":
        (source / "model.safetensors").unlink()
    (source / name).touch()
    os.truncate(source / name, 2**40)
    with pytest.raises(CheckpointError, match=f"{name}: {2**40} bytes, at most 100000000 are read"):
        streammap.open(source)


def test_json_of_too_many_values_is_refused_unread() -> None:
    with quickly(), pytest.raises(ValueError, match="about 12000002 values, at most 10000000"):
        strict_json.loads(b"[" + b"[]," * 6_000_000 + b"[]]")


@pytest.mark.parametrize("kind", ["list", "object"])
def test_json_is_nested_as_deep_as_it_can_be_written_again(source: Path, kind: str) -> None:
    """What Python's parser takes, what copies and writes it might not: a RecursionError."""

    def nested(depth: int) -> str:
        if kind == "list":
            return "[" * depth + "]" * depth
        return '{"a":' * depth + "0" + "}" * depth

    config = tiny.bert_config(SIZES)
    text = json.dumps(config)[:-1] + ', "extra": '
    (source / "config.json").write_text(text + nested(63) + "}")
    assert streammap.open(source).coalesce(width=2).config
    for depth in (64, 300, 100_000):
        (source / "config.json").write_text(text + nested(depth) + "}")
        with pytest.raises(CheckpointError, match="not JSON: nested too deeply"):
            streammap.open(source)


@pytest.mark.parametrize("text", ["9" * 5_000, "-" + "9" * 5_000])
def test_a_number_of_thousands_of_digits_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="digits"):
        strict_json.loads(text.encode())


# Keys.


def _key(key: str, shape: tuple[int, ...] = (2,)) -> bytes:
    text = json.dumps({key: {"dtype": "F32", "shape": shape, "data_offsets": [0, 8]}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize("key", ["\x1b[2J", "a\nb", "a\u202eb", "\x7f", "\x85", "a\u2028"])
def test_a_key_that_can_not_be_shown_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match="a key with unprintable characters") as caught:
        safetensors_header.read(tiny.file(tmp_path / "x.safetensors", _key(key)))
    assert caught.value.message.isprintable()
    torch.save({key: torch.zeros(2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a key with unprintable characters"):
        streammap.open(tmp_path / "x.pth")
    tiny.write_index(tmp_path, {key: "x.safetensors"})
    with pytest.raises(CheckpointError, match="a key with unprintable characters"):
        streammap.open(tmp_path)


def test_a_key_without_an_end_is_refused(tmp_path: Path) -> None:
    file = tiny.file(tmp_path / "x.safetensors", _key("k" * 1025))
    with pytest.raises(CheckpointError, match="a key of 1025 characters, at most 1024"):
        safetensors_header.read(file)
    assert safetensors_header.read(tiny.file(file, _key("k" * 1024)))


def test_a_tensor_of_too_many_dimensions_is_refused(tmp_path: Path) -> None:
    file = tiny.file(tmp_path / "x.safetensors", _key("a", (2, *[1] * 64)))
    with pytest.raises(CheckpointError, match="a: 65 dimensions, at most 64 are read"):
        safetensors_header.read(file)
    torch.save({"a": torch.zeros([1] * 65)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a: 65 dimensions, at most 64 are read"):
        streammap.open(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["a\nb.safetensors", "\x1b[2J.safetensors"])
def test_an_index_names_files_that_can_be_shown(tmp_path: Path, name: str) -> None:
    tiny.write_index(tmp_path, {"a": name})
    with pytest.raises(CheckpointError, match="expected a file of the same folder"):
        streammap.open(tmp_path)


def test_a_digit_that_is_no_number_may_stand_in_a_key(source: Path) -> None:
    """ "²".isdigit(), and int("²") is an error."""
    state = {"².a": torch.zeros(2), "²": torch.zeros(2)}
    tiny.write(source / "x", state, None)
    assert set(streammap.open(source / "x").keys()) == set(state)
    assert sorted(("²", "a.10", "a.9", "²3"), key=key_pattern.natural) == ["a.9", "a.10", "²", "²3"]


# Sizes that config.json and requests ask for.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "layer is 1000000000, at most 10000 layers are read"),
        ({"num_hidden_layers": 10_001}, "layer is 10001, at most 10000"),
        ({"num_hidden_layers": 10_000}, "missing"),
        ({"num_hidden_layers": 2**41}, "num_hidden_layers is 2199023255552, expected a size"),
        ({"num_hidden_layers": 10**4000}, "expected a size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a size"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a size"),
        ({"hidden_size": 8.0}, r"hidden_size is 8\.0, expected a size"),
        ({"num_attention_heads": 10**9}, "is not|not a whole number|does not hold"),
        ({"num_attention_heads": 0}, "not a whole number"),
        ({"hidden_size": 2**39, "intermediate_size": 2**39}, "is not"),
        ({"model_type": ["bert"]}, "no architecture spec serves"),
        ({"model_type": "x" * 10**6}, "no architecture spec serves"),
    ],
)
def test_a_config_of_absurd_sizes_is_refused_quickly(
    bert: Path, fields: dict[str, object], expected: str
) -> None:
    config = {**tiny.bert_config(SIZES), **fields}
    with quickly(), pytest.raises(StreammapError, match=expected):
        _ = streammap.open(bert, config=config).plan.model


@pytest.mark.parametrize("operation", ["coalesce", "decoalesce"])
@pytest.mark.parametrize(
    "request_",
    [
        {"width": 10**9},
        {"depth": 10**9},
        {"hidden": f"={10**9}"},
        {"heads": f"={10**9}"},
        {"heads": 10**9},
        {"mlp": f"={10**12}"},
        {"mlp": 2**40},
        {"layers": 10**9},
        {"layers": "=10001"},
        {"hidden": "=200001"},
        {"head_dim": 10**9},
        {"scheme": {"heads": 10**9}},
        {"scheme": {"mlp": {"size": 10**12}}},
        {"scheme": {"axes": {"embed": 10**9}}},
        {"scheme": {"width": 10**8}},
        {"scheme": {"depth_scheme": [[0], [1], [2], [10**6]]}},
    ],
    ids=str,
)
def test_a_request_of_absurd_sizes_is_refused_quickly(
    bert: Path, operation: str, request_: dict[str, object]
) -> None:
    source = streammap.open(bert)
    _ = source.plan.model
    with quickly(), pytest.raises(StreammapError, match=r"."):
        getattr(source, operation)(**request_)


def test_a_result_of_too_many_tensors_is_refused_quickly(
    bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = streammap.open(bert)
    monkeypatch.setattr("streammap.planning.planner._MAX_TENSORS", 1000)
    source.decoalesce(layers=2)
    with pytest.raises(PlanError, match="would have about 6407 tensors, at most 1000 are planned"):
        source.decoalesce(layers="x100")


def test_a_scheme_without_an_end_is_refused_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    with quickly(), pytest.raises(SchemeError, match="member 7 is listed twice"):
        scheme.load_scheme({"width_scheme": [[*range(300_000), 7]]})
    monkeypatch.setattr("streammap.planning.requests._MAX_GROUPS", 3)
    with pytest.raises(SchemeError, match="width_scheme: 4 groups, at most 3"):
        scheme.load_scheme({"width_scheme": [[0], [1], [2], [3]]})


def test_patterns_of_layers_have_an_end() -> None:
    case = cases()["gpt_neo"]
    types = [[["global", "local"] * 10, 5_000]] * 3
    config = {**case.config, "attention_types": types}
    source = streammap.open(_sparse("gpt_neo"), config=config)
    with quickly(), pytest.raises(PlanError, match="a pattern of more than 100000 layers"):
        source.decoalesce(layers=2)


_FOLDERS: dict[str, Path] = {}


@pytest.fixture(scope="module", autouse=True)
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    _FOLDERS["root"] = tmp_path_factory.mktemp("sparse")
    yield
    _FOLDERS.clear()


def _sparse(name: str) -> Path:
    """A tiny checkpoint of zeros."""
    folder = _FOLDERS["root"] / name
    folder.mkdir(exist_ok=True)
    _write_sparse(folder / "model.safetensors", cases()[name].specs)
    (folder / "config.json").write_text(json.dumps(cases()[name].config))
    return folder


# Map files.


def _saved_map(folder: Path, change: Callable[[dict[str, int]], None]) -> Path:
    made = {"small": 1, "large": 2, "block": 1}
    entry: dict[str, object] = {"axes": {"embed": made}, "sizes": {"embed": [1, 2]}}
    change(made)
    entry["sizes"] = {"embed": [made["large"], made["small"]]}
    about = json.dumps({"version": 1, "levels": [entry]})
    specs = [
        ("0.embed.values", TensorSpec("F64", (1,))),
        ("0.embed.places", TensorSpec("I32", (1, 2))),
    ]
    head = safetensors_header.encode(specs, {"streammap": about})
    return tiny.file(folder / "x.map.safetensors", head + b"\0" * 6 + b"\xf0\x3f" + bytes(8))


@pytest.mark.parametrize("side", ["small", "large"])
def test_a_small_map_file_can_not_ask_for_all_memory_on_either_side(
    tmp_path: Path, side: str
) -> None:
    file = _saved_map(tmp_path, lambda made: made.update({side: 2**40}))
    with quickly(), pytest.raises(SchemeError, match=f"{2**40} (rows|columns) of which at most 1"):
        map_file.load(file)
    assert map_file.load(_saved_map(tmp_path, lambda _: None))


@pytest.mark.parametrize("number", [math.inf, math.nan])
def test_a_matrix_of_infinite_numbers_is_refused(tmp_path: Path, number: float) -> None:
    torch.save({"R": torch.tensor([[number, 0.0]])}, tmp_path / "MapMatrix.bin")
    with pytest.raises(SchemeError, match="expected a matrix of 1 x 2 finite numbers"):
        map_file.load(tmp_path)


def test_a_matrix_that_repeats_a_few_bytes_is_refused(tmp_path: Path) -> None:
    torch.save({"R": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "MapMatrix.bin")
    with quickly(), pytest.raises(SchemeError, match="R is not a matrix"):
        map_file.load(tmp_path)


# Specs.


SPEC = """
schema = 1
model_types = ["mine"]
[axes]
embed = ["n"]
layer = ["n_layer"]
[axis_kind]
layer = "depth"
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[alias]\na = "a"', r"\[alias\] a: more than 16 aliases within one another"),
        ('[alias]\na = "b*2"\nb = "embed+a"', "more than 16 aliases within one another"),
        (
            "[alias]\na0 = 'embed'\n" + "\n".join(f"a{i + 1} = 'a{i}*a{i}'" for i in range(10)),
            r"\[alias\] a\d+: stands for more than 200 names",
        ),
        (
            "[alias]\na0 = 'embed'\n" + "\n".join(f"a{i + 1} = 'a{i}'" for i in range(2_000)[::-1]),
            "more than 16 aliases within one another",
        ),
        (f"[alias]\na = '{'9' * 30}'", f"a number of more than {2**63 - 1}"),
        ("[norm]\noffset = nan", r"norm\.offset: expected a number up to 1000000, found nan"),
        ("[norm]\noffset = inf", "found inf"),
        ("[norm]\noffset = " + "9" * 5_000, "mine.toml: Exceeds the limit"),
        ("x = " + "[" * 100_000, "mine.toml: "),
        ("[forward_scale]\n'a' = 'embed**1e999'", "expected an exponent up to 4, found '1e999'"),
        ("[forward_scale]\n'a' = 'embed**nan'", "expected an exponent up to 4, found 'nan'"),
        ("#" + " " * 1_000_000, "mine.toml: more than 1000000 letters"),
        ("[tensors]\n'{p:a|aa}{p:a|aa}" + "{p:a|aa}" * 30 + "' = ''", "could be matched in"),
        ("[tensors]\n'*a*b*c' = ''", "matched in 1000000000 ways, at most 10000000"),
        ("[tensors]\n'{a}{b}{c}{d}{e}{f}{g}{h}{i}' = ''", "could be matched in 43046721 ways"),
    ],
    ids=range(15),
)
def test_a_spec_that_has_no_end_is_refused_quickly(text: str, expected: str) -> None:
    whole = f"{text}\n{SPEC}" if text.startswith("x =") else f"{SPEC}\n{text}"
    with quickly(), pytest.raises(ArchitectureError, match=expected):
        registry.parse(whole, name="mine", config={"n": 3, "n_layer": 1})


def test_aliases_may_stand_for_others() -> None:
    text = "[alias]\na = 'b*embed'\nb = 'embed+embed'"
    assert registry.parse(f"{SPEC}\n{text}", name="mine").aliases.keys() == {"a", "b"}


def test_specs_that_include_one_another_are_read_once() -> None:
    tables = parser.merged(parser.read(SPEC, name="mine"), lambda _: {})
    include = {"include": [{"spec": "mine", "as": "inner"}]}
    specs = parser.Specs(lambda _: {**tables, **include}, lambda _: None)
    found = parser.build("mine", {**tables, **include}, {}, specs)
    assert set(found.axes) == {"embed", "layer", "inner.embed", "inner.layer"}


def test_the_slowest_pattern_that_is_allowed_has_an_end() -> None:
    (compiled,) = key_pattern.compile_patterns("*a*{p:a|b|aa|aaa}", {})
    with quickly():
        assert compiled.match("a" * safetensors_header.MAX_KEY_LETTERS + "c") is None


@pytest.mark.parametrize(
    "variables",
    [
        {"a": ["{a}"]},
        {"a": ["{i}", "{a}"]},
        {"a": ["{i}{b}"], "b": ["{a}", "x"]},
        {"a": ["{b}", "{i}"], "b": ["{b}x"]},
        {f"a{i}" if i else "a": [f"{{a{i + 1}}}" * 100] for i in range(8)} | {"a8": ["x"]},
        {f"a{i}" if i else "a": [f"{{a{i + 1}}}"] * 100 for i in range(8)} | {"a8": ["x", "{i}"]},
    ],
    ids=range(6),
)
def test_variables_that_have_no_end_are_refused_quickly(variables: dict[str, list[str]]) -> None:
    with quickly(), pytest.raises(ArchitectureError, match=r"expand without an end|matched in"):
        key_pattern.compile_patterns("{a}", variables)


def test_a_sample_may_hold_brackets() -> None:
    """ "{p:a(b|c}" is the texts a(b and c."""
    (compiled,) = key_pattern.compile_patterns("{p:a(b|c}.{i}*", {})
    assert key_pattern.sample(compiled) == "a(b.0*"


# Records, and folders of torch.distributed.checkpoint.


def test_a_record_names_files_that_can_be(source: Path) -> None:
    tensors = {"a": {"file": "x" * 3000, "crc32": "cbf43926"}}
    opened = {"operator": "open", "path": "y" * 3000, "arch": "z" * 3000}
    for maps in ("", {"sha256": ["ab"]}):
        request_ = {**opened, "maps": maps}
        (source / "streammap.json").write_text(
            json.dumps({"tensors": tensors, "request": request_})
        )
        told = [str(finding) for finding in verification.verify(source).findings]
        assert any("no name of a file of this folder" in one for one in told)
        with pytest.raises(StreammapError, match="File name too long"):
            streammap.open_request(source)
    with pytest.raises(ArchitectureError, match="no architecture"):
        _ = streammap.open(source, arch="z" * 3000).plan.model


TUPLES = b")" + b"\x94h\0\x86" * 1 + b"".join(b"\x94h%c\x86" % i for i in range(1, 60))
"""A tuple that holds itself 2^60 times."""


@pytest.mark.parametrize(
    "content",
    [
        b"\x96" + (10**11).to_bytes(8, "little"),
        b"\x8f(" + TUPLES + b"\x90",
        b"cpathlib\nPosixPath\n" + TUPLES + b"\x85R",
        b"ctorch.serialization\n_get_layout\n" + TUPLES + b"\x85R",
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n}X\x01\0\0\0aNsb",
        b"ctorch\nSize\n}X\x01\0\0\0aNsb",
    ],
    ids=["bytearray", "set", "path", "layout", "class", "function"],
)
def test_metadata_that_has_no_end_is_refused_quickly(tmp_path: Path, content: bytes) -> None:
    tiny.file(tmp_path / ".metadata", b"\x80\x04" + content + b".")
    with quickly(), pytest.raises(CheckpointError, match=r"\.metadata"):
        dcp_metadata.read(tmp_path)


def test_chunks_that_make_too_many_pieces_are_refused_quickly() -> None:
    n = 1_100
    bars = [((i, i + 1), (i, i + 1)) for i in range(n)]
    chunks = [dcp_metadata.Chunk(at, "x", 0, 0) for at in bars]
    with quickly(), pytest.raises(CheckpointError, match="make 1210000 pieces, at most 1000000"):
        dcp_metadata._check_cover("a", (n, n), chunks)


# Files beside the weights.


def test_a_file_whose_name_can_not_be_shown_is_not_copied(source: Path) -> None:
    (source / "a\nb.txt").touch()
    with pytest.raises(CheckpointError, match=r"'a\\nb.txt': a file name with letters that can't"):
        list(side_files.of_source(open_checkpoint(source)))
    (source / "a\nb.txt").rename(source / os.fsdecode(b"\xff\xfe.txt"))
    with pytest.raises(CheckpointError, match="a file name with letters that can't be shown"):
        list(side_files.of_source(open_checkpoint(source)))


def test_files_beside_the_weights_have_an_end(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        (source / f"{i}.txt").write_text("x" * 100)
    assert len(list(side_files.of_source(open_checkpoint(source)))) == 4
    monkeypatch.setattr("streammap.output.side_files._MAX_TOTAL_NBYTES", 399)
    with pytest.raises(CheckpointError, match="4 files beside the weights, 400 bytes, at most"):
        list(side_files.of_source(open_checkpoint(source)))
    monkeypatch.setattr("streammap.output.side_files._MAX_FILES", 2)
    with pytest.raises(
        CheckpointError, match="3 files beside the weights, 300 bytes, at most 2 and"
    ):
        list(side_files.of_source(open_checkpoint(source)))


def test_a_side_file_that_becomes_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    _pipe(tmp_path / "x")
    out = tmp_path / "out"
    with (
        pytest.raises(CheckpointError, match="x: a pipe, expected a regular file"),
        Output(out, out, disk=disk.current(), fsync=False) as output,
    ):
        output.copy("x", tmp_path / "x")
