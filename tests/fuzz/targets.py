"""What is fuzzed: each target takes bytes, and lets out nothing but the project's own errors."""

import base64
import contextlib
import json
import os
import random
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from unittest import mock

import streammap
from streammap.analysis import inspection, verification
from streammap.api import LazyCheckpoint
from streammap.architectures import expression as expressions
from streammap.architectures import key_pattern, registry
from streammap.common import strict_json
from streammap.errors import ArchitectureError, StreammapError
from streammap.io.checkpoint import Checkpoint, open_checkpoint
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import dcp_chunks, dcp_metadata, pickle_writer, safetensors_header
from streammap.io.formats.safetensors_header import Slot
from streammap.io.optimizer import torch_file as optimizer_file
from streammap.operators import request_json
from streammap.operators.recipes import mergekit
from streammap.output import journal
from streammap.output.fingerprint import Fingerprint
from streammap.planning import (
    axis_maps,
    coupled_axes,
    head_dim,
    map_file,
    plan,
    planner,
    requests,
    scheme,
)
from streammap.planning.maps import BlockMap
from tests.architectures.test_labels import cases
from tests.fuzz import mutate

LINKS = ("/dev/zero", "/proc/self/maps", "..", "a.safetensors", "nowhere", "self")
MODELS = ("bert", "llama", "mixtral", "deepseek_v3", "t5", "gemma3", "mamba2", "gpt_neo", "jamba")
_READ_NBYTES = 100_000
_MOST_TENSORS = 2_000
_MOST_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class Target:
    """One parser."""

    run: Callable[[bytes, Path], None]
    """Takes an input and a folder to work in, which need not be there."""
    seeds: Callable[[], list[bytes]]
    mutate: mutate.Bytes


def _file(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def _lazy(name: str, config: Mapping[str, object] | None = None, arch: str = "") -> LazyCheckpoint:
    """A tiny model that has no files, with its config.json or another one."""
    case = cases()[name]
    slots = {key: Slot(key, spec, 0) for key, spec in case.specs.items()}
    source = Checkpoint(
        Path(name), (), slots, dict.fromkeys(slots, ""), case.config if config is None else config
    )
    return LazyCheckpoint(plan.from_checkpoint(source, (), architecture=arch or case.arch))


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """The project's errors; and results are small, so that a slow plan is a finding."""
    with ExitStack() as lowered:
        lowered.enter_context(mock.patch.object(planner, "_MAX_TENSORS", _MOST_TENSORS))
        for module in (axis_maps, head_dim, coupled_axes):
            lowered.enter_context(mock.patch.object(module, "MAX_PARTS", _MOST_PARTS))
        with contextlib.suppress(StreammapError):
            yield


@cache
def _known(name: str) -> LazyCheckpoint:
    return _lazy(name)


def _planned(lazy: LazyCheckpoint, chance: int) -> None:
    """What a user might do first: a look, and one of some requests."""
    with contextlib.suppress(StreammapError):
        str(inspection.inspect(lazy.plan))
    steps: tuple[Callable[[], object], ...] = (
        lambda: str(lazy.coalesce(width=2).summary(device="cpu")),
        lambda: lazy.coalesce(depth=2),
        lambda: str(lazy.decoalesce(width=2, depth=2).summary(device="cpu")),
        lambda: lazy.decoalesce(hidden="=96", head_dim=32),
    )
    with _refused():
        steps[chance % len(steps)]()


# Headers, folders.


def _header(data: bytes, folder: Path) -> None:
    with contextlib.suppress(StreammapError):
        safetensors_header.read(_file(folder, "x.safetensors", data))


def _header_seeds() -> list[bytes]:
    specs = [("a.0.weight", TensorSpec("F32", (2, 3))), ("b", TensorSpec("BF16", ()))]
    head = safetensors_header.encode([*specs, ("c", TensorSpec("U8", (0, 5)))], {"format": "pt"})
    return [head + bytes(26), safetensors_header.encode([], {}), b"\x02\0\0\0\0\0\0\0{}"]


def _mutated_header(data: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.3 or len(data) < 8:
        return mutate.raw(data, chance)
    n = int.from_bytes(data[:8], "little")
    text = mutate.json_text(data[8 : 8 + n], chance)
    return len(text).to_bytes(8, "little") + text + data[8 + n :]


def _index(data: bytes, folder: Path) -> None:
    """A folder, as a JSON object: name -> text, header, or what else there is."""
    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items() if isinstance(files, dict) else ():
        with contextlib.suppress(OSError, ValueError):
            _make(folder, name, content)
    with contextlib.suppress(StreammapError):
        found = open_checkpoint(folder)
        str(LazyCheckpoint(plan.from_checkpoint(found, ())).summary(device="cpu"))
        found.close()


def _make(folder: Path, name: str, content: object) -> None:
    if "/" in name or name in ("", ".", ".."):
        return
    match content:
        case str():
            (folder / name).write_bytes(content.encode("utf-8", "surrogatepass"))
        case {"header": head, "nbytes": int(nbytes)}:
            text = json.dumps(head).encode()
            room = bytes(max(0, min(nbytes, 4096)))
            (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + room)
        case {"json": value}:
            (folder / name).write_text(json.dumps(value))
        case ["link", target] if target in LINKS:
            (folder / name).symlink_to(target)
        case ["pipe"]:
            os.mkfifo(folder / name)
        case ["folder"]:
            (folder / name).mkdir()
        case _:
            (folder / name).write_text(json.dumps(content))


def _index_seeds() -> list[bytes]:
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    a, b = {"header": {"a": entry}, "nbytes": 8}, {"header": {"b": entry}, "nbytes": 8}
    index = {"json": {"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}}
    config = {"json": {"model_type": "bert"}}
    name, first = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
    second = "model-00002-of-00002.safetensors"
    lora = {"json": {"peft_type": "LORA", "base_model_name_or_path": "x"}}
    found: list[object] = [
        {name: index, "a.safetensors": a, "b.safetensors": b, "config.json": config},
        {name: index, "a.safetensors": a, "b.safetensors": ["link", "/dev/zero"]},
        {name: index, "a.safetensors": a, "b.safetensors": ["pipe"]},
        {"model.safetensors": a, "config.json": ["folder"]},
        {"model.safetensors": ["link", "self"]},
        {first: a, second: b, "config.json": config},
        {name: index, first: a, second: b, "a.safetensors": a},
        {"adapter_config.json": lora, "adapter_model.safetensors": a},
    ]
    return [json.dumps(one).encode() for one in found]


# config.json, schemes, requests.


def _config(data: bytes, folder: Path) -> None:
    """{"model": one of the tiny models, "config": its config.json, changed}."""
    del folder
    try:
        doc = json.loads(data)
    except (ValueError, RecursionError):
        return
    match doc:
        case {"model": str(name), "config": dict(config)} if name in cases():
            lazy = _lazy(name, config)
            _planned(lazy, len(data))


def _config_seeds() -> list[bytes]:
    found = [{"model": name, "config": dict(cases()[name].config)} for name in MODELS]
    return [json.dumps(one).encode() for one in found]


_RECIPE_WORDS = (
    *("merge_method: linear", "models:", "- model: a", "slices:", "- sources:", "base_model: b"),
    *("  parameters: {weight: [0, 1]}", "    layer_range: [0, 2]", "dtype: bfloat16", "&a [*a]"),
    *("? [1]", "!!python/name:os.system", "1e999", "{filter: mlp, value: 0.5}", "true", "- ", ": "),
)


def _recipe(data: bytes, folder: Path) -> None:
    with contextlib.suppress(StreammapError):
        recipe = mergekit.read(_file(folder, "recipe.yml", data))
        plans = [_known("llama") for _ in (*recipe.models, recipe.base)]
        base = None if recipe.base is None else plans.pop()
        with _refused():
            plans[0].apply(recipe.operator(plans[1 : len(recipe.models)], base))


def _recipe_seeds() -> list[bytes]:
    weights = {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]}
    found: list[object] = [
        {"merge_method": "linear", "models": [{"model": m, "parameters": weights} for m in "ab"]},
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}] * 2,
            "dtype": "bfloat16",
        },
        {
            "merge_method": "task_arithmetic",
            "base_model": "b",
            "models": [{"model": "a", "parameters": {"weight": 0.5}}],
            "parameters": {"lambda": 0.7, "normalize": True},
        },
    ]
    return [json.dumps(one, indent=1).encode() for one in found]


def _scheme(data: bytes, folder: Path) -> None:
    path = _file(folder, "scheme.json", data)
    for name in ("llama", "mixtral"):
        with _refused():
            _known(name).coalesce(scheme=path)
        with _refused():
            _known(name).decoalesce(scheme=path)
    with contextlib.suppress(StreammapError):
        scheme.load_scheme(path).as_text()


def _scheme_seeds() -> list[bytes]:
    found: list[object] = [
        {"width_scheme": [[0, 3], [1, 4], [2, 5]], "depth_scheme": [[0, 1], [2], [3, 4]]},
        {
            "width": 3,
            "layers": [[0], [1, 2], [3], [4]],
            "mlp": {"factor": 2, "grouping": "adjacent"},
        },
        {"kv_heads": "=1", "axes": {"mlp": "=46"}, "hidden": {"size": 96}, "reserved_heads": 1},
        {"heads": {"groups": [{"members": [0, 1], "weights": [0.7, 0.3]}, [2, 3], [4, 5]]}},
        {"experts": 2, "hidden": 2},
    ]
    return [json.dumps(one).encode() for one in found]


def _request(data: bytes, folder: Path) -> None:
    """The first line names an axis; the rest is the request."""
    del folder
    space, _, text = data.decode("utf-8", "replace").partition("\n")
    with contextlib.suppress(StreammapError):
        requests.parse_request(text, space)
    for name in ("llama", "mixtral"):
        with _refused():
            _known(name).coalesce(axes={space: text})
        with _refused():
            _known(name).decoalesce(axes={space: text})


def _request_seeds() -> list[bytes]:
    axes = ("embed", "heads", "kv_heads", "mlp", "layer", "expert")
    texts = ("2", "=96", "[[0, 1], [2, 3]]", '{"factor": 2, "grouping": "adjacent"}', "=12345678")
    return [f"{axis}\n{text}".encode() for axis in axes for text in texts]


# Map files, torch files.


def _map(data: bytes, folder: Path) -> None:
    path = _file(folder, "x.map.safetensors", data)
    with contextlib.suppress(StreammapError):
        for level in map_file.load(path):
            assert level.digest
        for step in (_known("llama").coalesce, _known("llama").decoalesce):
            with _refused():
                step(map=path)


def _map_seeds() -> list[bytes]:
    lazy = _known("llama").decoalesce(width=2)
    half = BlockMap((((0, 0.5), (1, 0.5)),), 2, 24)
    level = map_file.MapLevel({"embed": half}, frozenset({"embed"}))
    filled = _known("llama").decoalesce(hidden="=60")
    return [map_file.encode(p.plan.levels) for p in (lazy, filled)] + [map_file.encode((level,))]


def _mutated_map(data: bytes, chance: random.Random) -> bytes:
    """The description inside the header, the header, or the numbers."""
    n = int.from_bytes(data[:8], "little")
    if chance.random() < 0.4 or len(data) < 8 + n:
        return _mutated_header(data, chance)
    try:
        entries = json.loads(data[8 : 8 + n])
        about = json.loads(entries["__metadata__"]["streammap"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return _mutated_header(data, chance)
    rest = bytearray(data[8 + n :])
    if chance.random() < 0.4 and len(rest) > 8:
        at = chance.randrange(len(rest) - 7) // 4 * 4
        number = chance.choice((float("nan"), float("inf"), -1.0, 1e300, 0.0))
        whole = struct.pack("<i", chance.choice((-1, 0, 1, 2**31 - 1, 7)))
        new = chance.choice((struct.pack("<d", number), whole))
        rest[at : at + len(new)] = new
    else:
        about = mutate.json_value(about, chance)
    entries["__metadata__"]["streammap"] = json.dumps(about)
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + bytes(rest)


def _torch(data: bytes, folder: Path) -> None:
    path = _file(folder, "x.pth", data)
    with contextlib.suppress(StreammapError):
        found = open_checkpoint(path)
        for key in found.slots:
            if found.spec(key).nbytes <= _READ_NBYTES:
                with contextlib.suppress(StreammapError):
                    found.tensor(key).clone()
        found.close()


def _torch_seeds() -> list[bytes]:
    import torch

    contents: list[object] = [
        {"a": torch.zeros(4, 4).T, "b": torch.ones(3)[1:], "c": torch.tensor(1.0)},
        {"model": {"a": torch.nn.Parameter(torch.zeros(2))}, "epoch": 3, "args": {"lr": 0.1}},
        {"a": torch.zeros(2).to(torch.float8_e5m2), "b": torch.zeros(0, 3)},
        torch.nn.BatchNorm1d(2).state_dict(),
    ]
    found = []
    for content in contents:
        file = BytesIO()
        torch.save(content, file)
        found.append(_pickle_of(file.getvalue()))
    return found


def _optimizer(data: bytes, folder: Path) -> None:
    path = _file(folder, "optimizer.pt", data)
    with contextlib.suppress(StreammapError):
        found = optimizer_file.read(path)
        for group in () if found is None else found.groups:
            pickle_writer.value(list(group.options.values()))
        for key in () if found is None else found.checkpoint.slots:
            if found is not None and found.checkpoint.spec(key).nbytes <= _READ_NBYTES:
                with contextlib.suppress(StreammapError):
                    found.checkpoint.tensor(key).clone()


def _optimizer_seeds() -> list[bytes]:
    import torch

    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    found = []
    for named in (False, True):
        pairs = list(zip(("a.weight", "b"), parameters, strict=True))
        adam = torch.optim.AdamW(pairs if named else parameters, lr=0.1)
        sum(x.sum() for x in parameters).backward()  # type: ignore[union-attr]
        adam.step()
        content = adam.state_dict()
        file = BytesIO()
        torch.save({"model": {}, "optimizer": content} if named else content, file)
        found.append(_pickle_of(file.getvalue()))
    return found


def _pickle_of(data: bytes) -> bytes:
    """A torch file with small entries only."""
    out = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            if entry.filename.endswith(("data.pkl", "byteorder")) or "/data/" in entry.filename:
                new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry))
    return out.getvalue()


def _mutated_torch(data: bytes, chance: random.Random) -> bytes:
    """Its pickle changed and zipped again, or the zip file itself."""
    if chance.random() < 0.3:
        return mutate.raw(data, chance)
    out = BytesIO()
    try:
        with zipfile.ZipFile(BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
            for entry in old.infolist():
                content = old.read(entry)
                if entry.filename.endswith("data.pkl"):
                    content = _mutated_pickle(content, chance)
                elif chance.random() < 0.05:
                    content = content[: chance.randrange(len(content) + 1)]
                new.writestr(zipfile.ZipInfo(entry.filename), content)
    except Exception:  # whatever zipfile makes of it
        return mutate.raw(data, chance)
    return out.getvalue()


def _mutated_pickle(content: bytes, chance: random.Random) -> bytes:
    pieces = (
        b"K\xff",
        b"J\xff\xff\xff\xff",
        b"\x8a\x08" + b"\xff" * 7 + b"\x7f",
        b"N",
        b"}",
        b"]",
        b")",
        b"(",
        b"t",
        b"\x85",
        b"R",
        b"b",
        b"s",
        b"u",
        b"h\x00",
        b"h\x05",
        b"q\x05",
        b"Q",
        b"\x81",
        b"ccollections\nOrderedDict\n",
        b"cbuiltins\nbytearray\n",
        b"ctorch\nFloatStorage\n",
        b"cos\nsystem\n",
        b"\x94",
        b"j\0\0\0\0",
        b"\x86" * 9,
        b"cpathlib\nPosixPath\n",
        b"\x8f",
        b"X\x01\0\0\0a",
        b"X\xff\xff\xff\xff",
        b"\x88",
        b"G" + b"\x7f" * 8,
    )
    out = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(out) + 1)
        if chance.random() < 0.5:
            out[at:at] = chance.choice(pieces)
        else:
            out = bytearray(mutate.raw(bytes(out), chance))
    return bytes(out)


# What streammap writes, and reads again.


def _journal(data: bytes, folder: Path) -> None:
    path = _file(folder, journal.NAME, data)
    with contextlib.suppress(StreammapError):
        journal.read(path.parent, _ASKED, ("a", "b.0"))


_ASKED = Fingerprint(
    {"sources": [{"name": "big", "nbytes": 8}], "steps": ["x"], "seed": None}, "ab"
)


def _journal_seeds() -> list[bytes]:
    head = journal.first_line(_ASKED)
    other = Fingerprint({**_ASKED.content, "steps": ["y", {"z": [1]}]}, "ab")
    tensors = b'{"tensors": {"a": "cbf43926"}}\n{"tensors": {"b.0": "00000000", "a": "cbf43926"}}\n'
    return [head + tensors, journal.first_line(other) + tensors, head]


def _mutated_lines(data: bytes, chance: random.Random) -> bytes:
    """One line of JSON changed, or the bytes."""
    lines = data.split(b"\n")
    if chance.random() < 0.3:
        return mutate.raw(data, chance)
    at = chance.randrange(len(lines))
    lines[at] = mutate.json_text(lines[at], chance)
    if chance.random() < 0.1:
        lines.insert(at, chance.choice(lines))
    return b"\n".join(lines)


def _record(data: bytes, folder: Path) -> None:
    """A folder's streammap.json, verified, and made again from a source that isn't there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(_header_seeds()[0])
    path = _file(folder, "streammap.json", data)
    with contextlib.suppress(StreammapError):
        str(verification.verify(folder, recompute=1))
    with contextlib.suppress(StreammapError, ValueError):
        content = strict_json.loads(data)
        request_json.as_json(
            request_json.parse(content.get("request") if isinstance(content, dict) else 0)
        )
    with _refused():
        streammap.open_request(path, sources=folder)


def _record_seeds() -> list[bytes]:
    grown = _known("llama").decoalesce(width=2)
    opened = {"operator": "open", "path": "gone", "config": {"hidden_size": 8}}
    maps = base64.b64encode(zlib.compress(map_file.encode(grown.plan.levels))).decode()
    resized = {"operator": "decoalesce", "width": 2, "mlp": "=9", "source": opened, "maps": maps}
    asked = {"operator": "interpolate", "alpha": 0.5, "source": resized, "target": opened}
    tensors = {key: {"file": "model.safetensors", "crc32": "cbf43926"} for key in ("a", "b", "c")}
    content = {"streammap": "0.1", "format": 1, "digest": "ab", "steps": [], "sources": []}
    found: list[object] = [
        {**content, "files": {"model.safetensors": 24}, "tensors": tensors, "request": asked},
        {**content, "request": {**opened, "maps": {"sha256": ["ab"]}, "id": 0}},
        {**content, "request": {"operator": "configure", "config": {}, "source": opened}},
    ]
    return [json.dumps(one).encode() for one in found]


# Folders of torch.distributed.checkpoint.


def _dcp(data: bytes, folder: Path) -> None:
    """Its .metadata."""
    _file(folder, dcp_metadata.METADATA, data)
    with contextlib.suppress(StreammapError):
        str(dcp_chunks.select(dcp_metadata.read(folder), folder="x"))


def _dcp_seeds() -> list[bytes]:
    """Not made here: torch.distributed takes seconds to import."""
    return [path.read_bytes() for path in corpus("dcp") if path.name.startswith("saved-")]


def _mutated_dcp(data: bytes, chance: random.Random) -> bytes:
    return mutate.raw(data, chance) if chance.random() < 0.3 else _mutated_pickle(data, chance)


# Specs.


def _spec(data: bytes, folder: Path) -> None:
    """A spec file; "# model" in its first line names the tiny model that it is tried on."""
    path = _file(folder, "mine.toml", data)
    with contextlib.suppress(StreammapError):
        for rule in registry.load(str(path)).rules:
            assert key_pattern.sample(rule.pattern) is not None
    first = data.split(b"\n", 1)[0].decode("utf-8", "replace").removeprefix("# ").strip()
    _planned(_lazy(first if first in cases() else "llama", arch=str(path)), len(data))


def _spec_seeds() -> list[bytes]:
    shipped = Path(registry.__file__).parent / "specs"
    served = {"bert": "bert", "llama": "llama", "mixtral": "mixtral", "t5": "t5", "llava": "llava"}
    return [
        f"# {model}\n".encode() + (shipped / f"{name}.toml").read_bytes()
        for model, name in served.items()
        if (shipped / f"{name}.toml").is_file()
    ]


def _words() -> tuple[str, ...]:
    found = [
        '"{L}*"',
        '"*.weight"',
        '"{a:b|c}"',
        '"{layer}{layer}"',
        '"{L}{L}"',
        '"=embed/0"',
        "[axes]",
        '"=q"',
        '"q*q"',
        '"2*2*2"',
        "[alias]",
        "[depth.layer]",
        "nan",
        "inf",
        "-1",
        "99999999999",
        "true",
        "[]",
        "{}",
        '""',
        '"linear',
        'embed"',
        "->",
        '"norm',
        '"=count(*)"',
        "[head]",
        '"embed**-0.5"',
        '"embed**99"',
        'extends = "llama"',
        'extends = "mine"',
        "[[include]]",
        '"=shape(lm_head.weight,0)"',
        "[constraints]",
        '["embed == 0"]',
        '["embed % 0 == 0"]',
        "[drop]",
        "keys",
        "=",
        '"default"',
        "[same_axis]",
        "[rope]",
        "[norm]",
        '"embed:in"',
        "_",
    ]
    return tuple(found)


def _pattern(data: bytes, folder: Path) -> None:
    """Lines: a key pattern, a key, an expression, and alternatives of the variables L and n."""
    del folder
    text, key, expression, *rest = [*data.decode("utf-8", "replace").split("\n"), "", "", ""]
    variables = {name: line.split("|") for name, line in zip("Ln", rest, strict=False)}
    with contextlib.suppress(StreammapError):
        compiled = key_pattern.compile_patterns(text, variables)
        key_pattern.first_match(compiled, key[: safetensors_header.MAX_KEY_LETTERS])
        for one in compiled:
            assert isinstance(key_pattern.sample(one), str)
            one.loose.fullmatch(key[: safetensors_header.MAX_KEY_LETTERS])
    with contextlib.suppress(StreammapError):
        tree = expressions.parse_expression(expression)
        assert list(expressions.names(tree)) is not None
        expressions.evaluate(expressions.scoped(tree, "a.", {}), lambda _: 2**20, _no_call)


def _no_call(function: str, arguments: tuple[str, ...]) -> int:
    raise ArchitectureError(f"{function} {arguments}")


def _pattern_seeds() -> list[bytes]:
    found = (
        ("{L}attention.{p:query|key}.weight", "h.3.attention.key.weight", "3*q", "h.{layer}.|x."),
        ("*.{i}.{n}*", "a.1.b.c", "q+2*(kv-1)/3", "", "b|{e}"),
        ("{head@kv*2}.{layer=last}", "1.2", "f(a, b.*)+q"),
        ("{p:a|aa}{p:a|aa}{p:a|aa}{p:a|aa}{p:a|aa}b", "a" * 30, "99*99*99*99*99*99*99*99*99*99*99"),
    )
    return ["\n".join(lines).encode() for lines in found]


_PATTERN_WORDS = (
    "{a:b|c}",
    "*",
    "**",
    "{i}",
    "{L}",
    "{n}",
    "{x@2*y}",
    "{x=last}",
    "(",
    ")",
    "|",
    "a.0.b",
    "{p:a|aa}" * 9,
    "{i}{j}{k}{l}",
    "q*q*q",
    "1/0",
    "9" * 99,
    "²",
    "\\",
)

TARGETS = {
    "header": Target(_header, _header_seeds, _mutated_header),
    "index": Target(_index, _index_seeds, mutate.json_text),
    "config": Target(_config, _config_seeds, mutate.json_text),
    "recipe": Target(_recipe, _recipe_seeds, mutate.lines(_RECIPE_WORDS)),
    "scheme": Target(_scheme, _scheme_seeds, mutate.json_text),
    "request": Target(_request, _request_seeds, mutate.raw),
    "map": Target(_map, _map_seeds, _mutated_map),
    "torch": Target(_torch, _torch_seeds, _mutated_torch),
    "optimizer": Target(_optimizer, _optimizer_seeds, _mutated_torch),
    "dcp": Target(_dcp, _dcp_seeds, _mutated_dcp),
    "spec": Target(_spec, _spec_seeds, mutate.lines(_words())),
    "journal": Target(_journal, _journal_seeds, _mutated_lines),
    "record": Target(_record, _record_seeds, mutate.json_text),
    "pattern": Target(_pattern, _pattern_seeds, mutate.lines(_PATTERN_WORDS)),
}


def corpus(target: str) -> Iterator[Path]:
    """The kept inputs of a target."""
    yield from sorted((Path(__file__).parent / "corpus" / target).glob("*"))
