"""The map file, which is saved with a result and used to grow it again.

`streammap.map.safetensors` holds the levels of a chain, largest model first. Level i has, for each
axis, its merging map F (small x large): as non-zeros ("i.heads.places" [n, 2] and "i.heads.values"
[n], over blocks of metadata's "block" units), or as a matrix ("i.heads.matrix"). The names of axes
are the architecture spec's; "mlp@layer.3" is the map of an axis in one layer of the small model,
where each layer has another. The format's own library writes and reads it, and a CRC-32 of all that
it says is in its metadata: a damaged map is refused. Matrices stay in the file, and are read
from it a block at a time.

A file of the original tools is read too (`MapMatrix.bin`, with embed_F, qk_F, v_F, inter_F and R):
its axes become "embed", "qk", "v", "mlp" and "layer".
"""

import hashlib
import itertools
import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from streammap.architectures.axis_facts import Layer
from streammap.common import strict_json
from streammap.errors import CheckpointError, SchemeError
from streammap.io import safe_open
from streammap.io.dtypes import DTYPE_BITS, TensorSpec
from streammap.io.formats import safetensors_header
from streammap.io.formats.safetensors_header import Slot
from streammap.io.storage import resolve
from streammap.io.storage.base import Storage
from streammap.io.storage.local import LocalFile
from streammap.io.tensor_readers import FileTensors
from streammap.planning import maps
from streammap.planning.dense import stored
from streammap.planning.dense.matrix import PART, Matrix
from streammap.planning.maps import AxisMap, BlockMap, DenseMap

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".map.safetensors"
NAME = f"streammap{SUFFIX}"
ORIGINAL = "MapMatrix.bin"
NAMES = (NAME, ORIGINAL)
_ABOUT = "streammap"
"""Entry of the header's metadata."""
_ORIGINAL_AXES = {"embed_F": "embed", "qk_F": "qk", "v_F": "v", "inter_F": "mlp"}
_MAX_MEMBERS = 2**26
_MAX_UNITS = 2**40
_MAX_EMPTY_ROWS = 2**20
_PIECE_NBYTES = 2**20
_LAYERED = re.compile(r"([^@]+)@([^@]+)\.(0|[1-9][0-9]{0,5})")
"""A map of an axis in one layer: axis, depth axis, number."""


@dataclass(frozen=True, slots=True)
class MapLevel:
    """The merging maps between one model and the next smaller one."""

    merging: Mapping[str, AxisMap]
    """Axis or alias -> F (small x large)."""
    filled: frozenset[str] = frozenset()
    """Axes whose unmapped new units are zero, for which norms are compensated."""
    where: str = field(default="", compare=False)
    """The file that it was read from, for messages."""
    by_layer: Mapping[str, Mapping[Layer, AxisMap]] = field(default_factory=dict)
    """Axis -> layer of the small model -> F, of one size in all; not in `merging`."""

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Axis -> its size in the large and in the small model."""
        first = {axis: next(iter(layers.values())) for axis, layers in self.by_layer.items()}
        return {name: (m.n_in, m.n_out) for name, m in {**self.merging, **first}.items()}

    @property
    def named(self) -> dict[str, AxisMap]:
        """All maps by their names in a file, in order."""
        layered = {
            f"{axis}@{depth}.{number}": m
            for axis, layers in self.by_layer.items()
            for (depth, number), m in layers.items()
        }
        return dict(sorted({**self.merging, **layered}.items()))

    @property
    def digest(self) -> str:
        """sha256 of the maps."""
        digest = hashlib.sha256()
        for name, axis_map in self.named.items():
            digest.update(f"{name} {axis_map.n_out} {axis_map.n_in} ".encode())
            for part in _parts_of(axis_map):
                for piece in part.pieces():
                    digest.update(piece)
        if self.filled:
            digest.update(" ".join(sorted(self.filled)).encode())
        return digest.hexdigest()


def beside(file: Path) -> Path:
    """The path of the map file for a checkpoint that is one file."""
    return file.with_suffix(SUFFIX)


def find(storage: Storage) -> tuple[MapLevel, ...]:
    """The levels saved with a folder or file of weights, by this or the original tool.

    Raises:
        SchemeError: the map file is broken.
        CheckpointError: it can't be fetched.
    """
    own = () if storage.file is None else (beside(Path(storage.file)).name,)
    name = next((name for name in (*own, *NAMES) if storage.has(name)), None)
    return () if name is None else _load(storage, name)


def load(source: str | Path) -> tuple[MapLevel, ...]:
    """The levels of a map file, or of a folder that has one, here or elsewhere.

    Raises:
        SchemeError: there is no map file, or it is broken.
        CheckpointError: it can't be fetched.
    """
    try:
        storage = resolve.locate(source, stream=False)
    except CheckpointError as error:
        message = error.message.replace("no such folder or file", "no such map file")
        raise SchemeError(message, hint=error.hint) from error
    if storage.file is not None:
        return _load(storage, storage.file)
    levels = find(storage)
    if not levels:
        raise SchemeError(f"{storage}: no {NAME} and no {ORIGINAL} in it")
    return levels


def _load(storage: Storage, name: str) -> tuple[MapLevel, ...]:
    path = storage.path(name)
    if path is None:
        import tempfile

        # Matrices keep the file open, and so there, once its folder is gone.
        with tempfile.TemporaryDirectory(prefix="streammap-") as folder:
            path = Path(folder) / name
            _fetch(storage, name, path)
            levels = _load_path(path)
    else:
        levels = _load_path(path)
    return tuple(replace(level, where=storage.where(name)) for level in levels)


def _fetch(storage: Storage, name: str, path: Path) -> None:
    """Copy a file from elsewhere, piece by piece."""
    stat = storage.stat(name)
    there, piece = storage.open(name, stat), memoryview(bytearray(_PIECE_NBYTES))
    with path.open("wb") as file:
        for start in range(0, stat.nbytes, _PIECE_NBYTES):
            view = piece[: min(_PIECE_NBYTES, stat.nbytes - start)]
            there.read_into(start, view)
            file.write(view)


def _load_path(path: Path) -> tuple[MapLevel, ...]:
    try:
        return _load_ours(path) if path.suffix == ".safetensors" else (_load_original(path),)
    except CheckpointError as error:
        raise SchemeError(f"map file {error.message}", hint=error.hint) from error


def encode(levels: tuple[MapLevel, ...]) -> bytes:
    """The bytes of a map file, for maps that are small; see `pieces`."""
    return b"".join(pieces(levels))


def pieces(levels: tuple[MapLevel, ...]) -> Iterator[bytes]:
    """The bytes of a map file, a piece at a time: matrices may be larger than the memory."""
    parts: list[_Part] = []
    levels_: list[object] = []
    for i, level in enumerate(levels):
        axes: dict[str, dict[str, int]] = {}
        for name, axis_map in level.named.items():
            axes[name] = {"small": axis_map.n_out, "large": axis_map.n_in}
            if isinstance(axis_map, BlockMap):
                axes[name]["block"] = axis_map.block
            at = f"{i}.{name}."
            parts += (replace(part, key=f"{at}{part.key}") for part in _parts_of(axis_map))
        sizes = {name: list(pair) for name, pair in sorted(level.sizes.items())}
        entry: dict[str, object] = {"axes": axes, "sizes": sizes}
        levels_.append({**entry, "filled": sorted(level.filled)} if level.filled else entry)
    about: dict[str, object] = {"version": 1, "levels": levels_}
    about["crc32"] = _sum(about, parts)
    # Widest first, as the format's own library does it: then all are aligned.
    parts.sort(key=lambda part: (-DTYPE_BITS[part.spec.dtype], part.key))
    specs = [(part.key, part.spec) for part in parts]
    yield safetensors_header.encode(specs, {_ABOUT: json.dumps(about)})
    for part in parts:
        yield from part.pieces()


def dense_nbytes(levels: Iterable[MapLevel]) -> int:
    """Bytes of all matrices; what is sparse takes little."""
    found = (m for level in levels for m in level.named.values())
    return sum(m.matrix.nbytes for m in found if isinstance(m, DenseMap))


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of a map file."""

    key: str
    spec: TensorSpec
    pieces: Callable[[], Iterable[bytes]]
    """Its bytes."""


def _sum(about: Mapping[str, object], parts: Iterable[_Part]) -> str:
    """CRC-32 of all that a map file says, however it is laid out."""
    crc = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    for part in sorted(parts, key=lambda part: part.key):
        crc = zlib.crc32(f"{part.key} {part.spec} ".encode(), crc)
        for piece in part.pieces():
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def _parts_of(axis_map: AxisMap) -> list[_Part]:
    if isinstance(axis_map, DenseMap):
        matrix = axis_map.matrix
        return [_Part("matrix", TensorSpec(matrix.dtype, matrix.shape), matrix.pieces)]
    places = [(i, j) for i, row in enumerate(axis_map.rows) for j, _ in row]
    values = [value for row in axis_map.rows for _, value in row]
    n, flat = len(values), itertools.chain.from_iterable(places)
    packed = struct.pack(f"<{n}d", *values), struct.pack(f"<{2 * n}i", *flat)
    return [
        _Part("values", TensorSpec("F64", (n,)), lambda: [packed[0]]),
        _Part("places", TensorSpec("I32", (n, 2)), lambda: [packed[1]]),
    ]


def _load_ours(path: Path) -> tuple[MapLevel, ...]:
    slots, text = safetensors_header.read(path)  # within bounds; the library takes any header
    import safetensors

    try:
        about = strict_json.loads(json.loads(text)["__metadata__"][_ABOUT].encode())
        entries = _checked(path, slots, about)
        found = {slot.key: slot for slot in slots}
        stat = path.stat()
        file = LocalFile(path, stat.st_size, stat.st_mtime_ns)
        with safetensors.safe_open(path, framework="pt") as tensors:
            return tuple(_level(found, file, tensors, i, entry) for i, entry in enumerate(entries))
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        OverflowError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        raise SchemeError(
            f"{path.name}: not a map file of streammap: {type(error).__name__} {error}",
            hint="remove the file, and give a scheme",
        ) from error


def _checked(path: Path, slots: Sequence[Slot], about: Any) -> Any:
    """The levels' entries of a map file that is what was written.

    Raises:
        SchemeError: another version, or a file that was damaged.
    """
    if about["version"] != 1:
        raise SchemeError(f"{path.name}: version {about['version']}, expected 1")
    unknown = [name for name in about if name not in ("version", "levels", "crc32")]
    if unknown:
        raise ValueError(f"unknown entry {unknown[0]!r}")
    if "crc32" not in about:  # of version 0.1, or made by hand
        return about["levels"]
    written = about.pop("crc32")
    with os.fdopen(safe_open.open_file(path), "rb") as file:
        parts = (_Part(slot.key, slot.spec, partial(_bytes_of, file, slot)) for slot in slots)
        found = _sum(about, parts)
    if found != written:
        raise SchemeError(
            f"{path.name}: damaged: crc32 {found}, {str(written)[:8]} was written",
            hint="copy the file again from where it was made, or give a scheme",
        )
    return about["levels"]


def _bytes_of(file: BinaryIO, slot: Slot) -> Iterator[bytes]:
    file.seek(slot.start)
    for start in range(0, slot.spec.nbytes, _PIECE_NBYTES):
        yield file.read(min(_PIECE_NBYTES, slot.spec.nbytes - start))


def _level(
    slots: Mapping[str, Slot],
    file: LocalFile,
    tensors: Any,
    i: int,
    entry: Mapping[str, Mapping[str, Mapping[str, int]]],
) -> MapLevel:
    merging: dict[str, AxisMap] = {}
    for name, axis in entry["axes"].items():
        small, large = _count(axis["small"]), _count(axis["large"])
        slot = slots.get(f"{i}.{name}.matrix")
        if slot is not None:
            merging[name] = DenseMap(_matrix(stored.of_slot(file, slot), small, large))
            continue
        block = _count(axis["block"])
        if small % block or large % block:
            raise ValueError(f"blocks of {block} in {small} and {large}")
        places, values = (tensors.get_tensor(f"{i}.{name}.{part}") for part in ("places", "values"))
        merging[name] = _block_map(places, values, small // block, large // block, block)
    sizes = {name: (_count(a), _count(b)) for name, (a, b) in entry["sizes"].items()}
    filled: object = entry.get("filled", [])
    known = {name.partition("@")[0] for name in merging}
    if not isinstance(filled, list) or not known.issuperset(filled):
        raise ValueError(f"filled axes {filled!r} have no maps")
    everywhere, by_layer = _by_layer(merging)
    level = MapLevel(everywhere, frozenset(filled), by_layer=by_layer)
    if sizes != level.sizes:
        raise ValueError(f"sizes {sizes} are not those of the maps, {level.sizes}")
    return level


def _by_layer(
    found: Mapping[str, AxisMap],
) -> tuple[dict[str, AxisMap], dict[str, dict[Layer, AxisMap]]]:
    """Maps by their names -> those of axes, and those of axes in single layers."""
    everywhere: dict[str, AxisMap] = {}
    by_layer: dict[str, dict[Layer, AxisMap]] = {}
    one: dict[AxisMap, AxisMap] = {}
    for name, m in found.items():
        if "@" not in name:
            everywhere[name] = m
            continue
        place = _LAYERED.fullmatch(name)
        if place is None:
            raise ValueError(f"{name[:60]!r} is no layer's map")
        by_layer.setdefault(place[1], {})[place[2], int(place[3])] = one.setdefault(m, m)
    for axis, layers in by_layer.items():
        sizes = {(m.n_in, m.n_out) for m in layers.values()}
        if axis in everywhere or len(sizes) != 1:
            raise ValueError(f"{axis[:60]}: maps of layers beside one for all, or of other sizes")
        by_layer[axis] = dict(sorted(layers.items()))
    return everywhere, by_layer


def _count(value: object) -> int:
    if type(value) is not int or not 0 < value <= _MAX_UNITS:
        raise ValueError(f"{value!r} is not a size")
    return value


def _matrix(matrix: Matrix | None, small: int, large: int) -> Matrix:
    """The matrix, if it is what a map of these sizes can be."""
    if matrix is None or matrix.shape != (small, large) or not matrix.is_finite():
        raise ValueError(f"expected a matrix of {small} x {large} finite numbers")
    return matrix


def _block_map(places: "Tensor", values: "Tensor", n_out: int, n_in: int, block: int) -> BlockMap:
    n = int(values.numel())
    if places.shape != (n, 2) or values.shape != (n,) or not values.is_floating_point():
        raise ValueError("expected places of [n, 2] and values of [n]")
    if n > _MAX_MEMBERS:
        raise ValueError(f"{n} members, at most {_MAX_MEMBERS}")
    if places.is_floating_point() or not bool(values.isfinite().all()):
        raise ValueError("expected integer places and finite values")
    for size, word in ((n_out, "rows"), (n_in, "columns")):
        if size > _MAX_EMPTY_ROWS + n:
            raise ValueError(f"{size} {word} of which at most {n} are not empty")
    rows: list[list[tuple[int, float]]] = [[] for _ in range(n_out)]
    for (i, j), value in zip(places.tolist(), values.tolist(), strict=True):
        if i < 0:
            raise IndexError(i)
        rows[i].append((j, value))
    return BlockMap(tuple(tuple(row) for row in rows), n_in, block)


def _load_original(path: Path) -> MapLevel:
    from streammap.io.formats import torch_zip

    try:
        content = torch_zip.table(path)
    except CheckpointError as error:
        raise SchemeError(
            f"{path}: not a MapMatrix of tensors: {error.message}",
            hint="remove the file, and give a scheme",
        ) from error
    names = (*_ORIGINAL_AXES, "R")
    if not any(name in content for name in names):
        raise SchemeError(f"{path}: expected a dict of {', '.join(names)}")
    merging: dict[str, AxisMap] = {}
    stat = path.stat()
    file = LocalFile(path, stat.st_size, stat.st_mtime_ns)
    slots = {name: slot for name, slot in content.items() if slot is not None}
    tensors = FileTensors(slots, dict.fromkeys(slots, path.name), {path.name: file})
    for name, axis in (*_ORIGINAL_AXES.items(), ("R", "layer")):
        if name not in content:
            continue
        # A view with zero strides can repeat a few bytes endlessly.
        shape = slots[name].spec.shape if name in slots else ()
        if len(shape) != 2 or slots[name].spec.nbytes > stat.st_size:
            raise SchemeError(f"{path}: {name} is not a matrix")
        try:
            matrix = _original(slots.get(name), file, tensors)
            merging[axis] = maps.from_matrix(_matrix(matrix, shape[0], shape[1]))
        except ValueError as error:
            raise SchemeError(f"{path}: {name}: {error}", hint="give a scheme") from error
    return MapLevel(merging)


def _original(slot: Slot | None, file: LocalFile, tensors: FileTensors) -> Matrix | None:
    """A matrix of a torch file; one that does not lie row by row is copied."""
    if slot is None or slot.strides is None:
        return None if slot is None else stored.of_slot(file, slot)
    if not slot.spec.is_float:
        return None
    n_rows, n_columns = slot.spec.shape
    tensor, step = tensors.tensor(slot.key), max(1, PART // max(1, n_columns))
    strips = (tensor[start : start + step] for start in range(0, n_rows, step))
    return stored.kept(strips, (n_rows, n_columns), "F64" if slot.spec.dtype == "F64" else "F32")
