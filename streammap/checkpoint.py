"""A source: a folder or file of weights, opened lazily. Headers and config now, bytes when used.

    folder   model.safetensors | model.safetensors.index.json + shards | *.safetensors (one)
             pytorch_model.bin | pytorch_model.bin.index.json + shards
    file     *.safetensors | *.pth, *.pt, *.bin (a state dict, or one under "model"/"state_dict")

It may be on this machine, on the Hub or at any URL: places.py.

An index maps keys to files of the same folder: {"weight_map": {"wte.weight": "model-...-of-..."}}
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from streammap import header, places, strictjson, torchfile, workfolder
from streammap.errors import CheckpointError, some
from streammap.header import Slot
from streammap.spec import TensorSpec
from streammap.storage.ahead import AheadFile, Window
from streammap.storage.place import OpenFile, Place, Stat
from streammap.storage.spans import SpanReader

if TYPE_CHECKING:
    from torch import Tensor

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLES = ("model.safetensors", "pytorch_model.bin")
TORCH_SUFFIXES = (".pth", ".pt", ".bin")
MAX_JSON_NBYTES = 100_000_000
_STRIP = 64


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, as it was when it was opened."""

    name: str
    nbytes: int
    mtime_ns: int
    header_digest: str
    """sha256 of what says where its tensors are."""
    version: str = ""
    """What its place calls its content, where that isn't on this machine."""


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened source. Its bytes are read through `tensor` while it is open."""

    path: Path
    """The folder or file, as given; a name only, where it isn't on this machine."""
    files: tuple[SourceFile, ...]
    slots: Mapping[str, Slot]
    """In the order of files and bytes."""
    file_of: Mapping[str, str]
    """Key -> name of its file."""
    config: Mapping[str, object] | None
    """config.json, or None where there is none."""
    config_text: bytes | None = None
    """The file's own bytes."""
    nest: str | None = None
    """The entry of a torch file that its state dict is nested under."""
    others: tuple[str, ...] = ()
    """What a torch file holds beside its state dict; not read."""
    place: Place | None = None
    """Where the files are; None for a checkpoint without any."""
    _opened: dict[str, OpenFile] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The folder's or file's name."""
        return self.path.resolve().name if self.place is None else self.place.name

    @property
    def label(self) -> str:
        """What to call it in full: its path, its repository and commit, its URL."""
        return str(self.path if self.place is None else self.place)

    @property
    def address(self) -> str:
        """What opens it again: an absolute path, hf:// with the commit, or a URL."""
        return str(self.path.absolute()) if self.place is None else self.place.address

    @property
    def origin(self) -> Mapping[str, str]:
        """Where it is, if not on this machine."""
        return {} if self.place is None else self.place.origin

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine, and not just some of it."""
        return not self.origin

    @property
    def is_streamed(self) -> bool:
        """Whether each read goes over a network."""
        return self.place is not None and self.place.is_streamed

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folder or file as given, and each file that is read; of this machine only."""
        if not self.is_local:
            return ()
        return (self.path, *(self.folder / file.name for file in self.files))

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.slots[key].spec

    def file(self, key: str) -> OpenFile:
        """The opened file that holds `key`."""
        return self._opened[self.file_of[key]]

    def read_into(self, key: str, start: int, view: memoryview, *, mapped: bool) -> None:
        """Fill `view` with a tensor's bytes, row by row, from its byte `start` on.

        Args:
            mapped: Whether to read through a mapping.

        Raises:
            CheckpointError: the file ends before, or can't be read.
        """
        slot = self.slots[key]
        if slot.strides is None:
            self.file(key).read_into(slot.start + start, view, mapped=mapped)
        else:
            self._gather_into(key, start, view)

    def _gather_into(self, key: str, start: int, view: memoryview) -> None:
        """For a tensor of a torch file that is stored in another order than row by row."""
        import torch

        whole = self.tensor(key)
        item = whole.element_size()
        out = torch.frombuffer(view, dtype=whole.dtype)
        inner = whole[0].numel() if whole.dim() else 1
        at = start // item
        while len(out):
            row, column = divmod(at, inner)
            n = min(len(out), inner - column)
            if n == inner and whole.dim() > 1:
                n = len(out) // inner * inner
                _copy_strips(whole[row : row + n // inner], out[:n], self.release)
            else:
                flat = whole[row].reshape(-1) if whole.dim() else whole.reshape(-1)
                out[:n].copy_(flat[column : column + n])
                self.release()
            out, at = out[n:], at + n

    def tensor(self, key: str) -> "Tensor":
        """A tensor over the file's mapping; nothing is read until it is used. Do not write to it.

        Where its bytes are not aligned to its dtype, a copy.
        """
        from streammap.dtypes import to_torch

        slot = self.slots[key]
        dtype = to_torch(slot.spec.dtype)
        if slot.spec.n_elements == 0:
            import torch

            return torch.empty(slot.spec.shape, dtype=dtype)
        end = slot.end
        if slot.strides is not None:
            reach = sum((n - 1) * s for n, s in zip(slot.spec.shape, slot.strides, strict=True))
            end = slot.start + (reach + 1) * dtype.itemsize
        part = self.file(key).part(slot.start, end)
        if slot.start % dtype.itemsize:
            part = part.clone()
        typed = part.view(dtype)
        if slot.strides is not None:
            return typed.as_strided(slot.spec.shape, slot.strides)
        return typed.view(slot.spec.shape)

    def release(self) -> None:
        """Give back the memory of mapped pages."""
        for opened in self._opened.values():
            opened.release()

    def expect(self, names: tuple[str, ...]) -> None:
        """Be told that these files will be read, in this order; they may be fetched ahead."""
        if self.place is not None:
            self.place.expect(names)

    def window(self, window: Window | None) -> None:
        """Let reads over a network take from what `window` fetched ahead."""
        for opened in self._opened.values():
            if isinstance(opened, AheadFile):
                opened.window = window

    def cancel(self) -> None:
        """Let reads that wait for a network end in an error."""
        for opened in self._opened.values():
            opened.cancel()

    def check_unchanged(self) -> None:
        """Refuse to go on with files that were written to since they were opened.

        Raises:
            CheckpointError: naming the file.
        """
        for opened in self._opened.values():
            opened.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        for opened in self._opened.values():
            opened.close()


def _copy_strips(rows: "Tensor", out: "Tensor", release: Callable[[], None]) -> None:
    """Copy rows, a few columns at a time: of a transposed tensor each column is a page or more."""
    to = out.view(rows.shape)
    for start in range(0, rows.shape[1], _STRIP):
        to[:, start : start + _STRIP].copy_(rows[:, start : start + _STRIP])
        release()


def open_checkpoint(
    path: str | Path, *, config: str | Path | None = None, stream: bool = False
) -> Checkpoint:
    """Open a folder or file of weights: headers, index and config.json; no tensor is read.

    Args:
        path: On this machine, "org/name" on the Hub, or a URL; see places.py.
        config: config.json, or a folder with one; by default the one beside the weights.
        stream: Whether to read from the Hub as needed, instead of through its cache.

    Raises:
        CheckpointError: nothing there, or any file that is not what it says.
    """
    try:
        return _open(places.locate(path, stream=stream), Path(path), config)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the path") from error


def _open(place: Place, path: Path, config: str | Path | None) -> Checkpoint:
    names, weight_map = _names_in(place) if place.file is None else ((place.file,), None)
    files: list[SourceFile] = []
    slots: dict[str, Slot] = {}
    file_of: dict[str, str] = {}
    opened: dict[str, OpenFile] = {}
    nest: str | None = None
    others: tuple[str, ...] = ()
    for name, (stat, found, digest, nest, others) in _read_files(place, names):  # noqa: B007
        for slot in found:
            if slot.key in slots:
                raise CheckpointError(
                    f"{slot.key} is in {file_of[slot.key]} and in {name}",
                    hint="keep one of the two files",
                )
            slots[slot.key] = slot
            file_of[slot.key] = name
        files.append(SourceFile(name, stat.nbytes, stat.mtime_ns, digest, stat.version))
        opened[name] = place.open(name, stat)
    if weight_map is not None:
        _check_index(place.name, weight_map, file_of)
    found_config, text = _find_config(place, config)
    return Checkpoint(
        path, tuple(files), slots, file_of, found_config, text, nest, others, place, opened
    )


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: too large, unreadable, not JSON, or not an object.
    """
    return parse_json(_json_text(path), str(path))


def parse_json(text: bytes, where: str) -> Mapping[str, object]:
    """A JSON object from its text.

    Raises:
        CheckpointError: not JSON, or not an object.
    """
    try:
        content = strictjson.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{where}: not JSON: {error}", hint="mend the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, found {type(content).__name__}")
    return content


def _json_text(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_JSON_NBYTES:
            raise CheckpointError(f"{path}: {size} bytes of JSON, at most {MAX_JSON_NBYTES}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the path") from error


def _json_in(place: Place, name: str) -> tuple[Mapping[str, object], bytes]:
    """A JSON object from a file of a place, and its text."""
    path = place.path(name)
    text = place.read(name, limit=MAX_JSON_NBYTES) if path is None else _json_text(path)
    return parse_json(text, place.where(name)), text


def _names_in(place: Place) -> tuple[tuple[str, ...], dict[str, str] | None]:
    if place.has(f"{workfolder.SUFFIX}/{workfolder.MARK}"):
        raise CheckpointError(
            f"{place}: a run that was putting its result here was stopped",
            hint="run its command again, which finishes it",
        )
    for single, index in zip(SINGLES, INDEXES, strict=True):
        has_single, has_index = place.has(single), place.has(index)
        if has_single and has_index:
            raise CheckpointError(
                f"{place}: has {single} and {index}, which may differ",
                hint="remove the stale one, or name the file",
            )
        if has_single:
            return (single,), None
        if has_index:
            weight_map = _weight_map(place, index)
            return tuple(sorted(set(weight_map.values()))), weight_map
    names = sorted(name for name in place.names() if "/" not in name)
    loose = [name for name in names if name.endswith(".safetensors")]
    loose = [name for name in loose if not name.startswith(".") and ".map." not in name]
    loose = loose or [
        name for suffix in TORCH_SUFFIXES for name in names if name.endswith(suffix)
        if name not in ("training_args.bin", "MapMatrix.bin", "optimizer.pt", "scheduler.pt")
    ]  # fmt: skip
    if len(loose) == 1:
        return (loose[0],), None
    if loose:
        raise CheckpointError(
            f"{place}: {len(loose)} weight files and no index: {some(sorted(loose))}",
            hint=f"name one of them, {place.where(sorted(loose)[0])}",
        )
    raise CheckpointError(
        f"{place}: no weights: expected one of {', '.join((*SINGLES, *INDEXES))}",
        hint="name a checkpoint folder, a .safetensors or a .pth file",
    )


def _weight_map(place: Place, name: str) -> dict[str, str]:
    weight_map, index = _json_in(place, name)[0].get("weight_map"), place.where(name)
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map", hint="download the index again")
    for key, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise CheckpointError(
                f"{index}: {key} is said to be in {file!r}, expected a file of the same folder",
                hint="do not use this checkpoint: a wrong index can point anywhere",
            )
    return weight_map


def _check_index(folder: str, weight_map: Mapping[str, str], file_of: Mapping[str, str]) -> None:
    wrong = [key for key, name in weight_map.items() if file_of.get(key) != name]
    if wrong:
        key = wrong[0]
        where = f"it is in {file_of[key]}" if key in file_of else "no shard has it"
        raise CheckpointError(
            f"{folder}: the index says {key} is in {weight_map[key]}, {where}"
            f" ({len(wrong)} such keys)",
            hint="download the index and shards again",
        )
    surplus = [key for key in file_of if key not in weight_map]
    if surplus:
        raise CheckpointError(
            f"{folder}: the shards have {len(surplus)} tensors that the index lacks: "
            f"{some(surplus)}",
            hint="download the index and shards again",
        )


_Read = tuple[Stat, tuple[Slot, ...], str, str | None, tuple[str, ...]]
"""What a file is, its slots, their digest, and what a torch file is beside that."""


def _read_files(place: Place, names: tuple[str, ...]) -> Iterator[tuple[str, _Read]]:
    """Each file's header; several at once where that is faster."""
    if place.n_at_once == 1 or len(names) == 1:
        for name in names:
            yield name, _read_file(place, name)
        return
    with ThreadPoolExecutor(place.n_at_once) as pool:
        yield from zip(names, pool.map(lambda name: _read_file(place, name), names), strict=True)


def _read_file(place: Place, name: str) -> _Read:
    where = place.where(name)
    if not place.has(name):
        raise CheckpointError(f"{where}: no such file", hint="download the missing shard")
    path, is_torch = place.path(name), name.endswith(TORCH_SUFFIXES)
    if not is_torch and not name.endswith(".safetensors"):
        raise CheckpointError(
            f"{where}: a {Path(name).suffix or 'file without ending'} is no weight file",
            hint=f"expected .safetensors, {', '.join(TORCH_SUFFIXES)}",
        )
    if is_torch:
        content = torchfile.read(Path(name), path or _spans(place, name))
        if place.is_streamed and any(slot.strides is not None for slot in content.slots):
            raise CheckpointError(
                f"{where}: holds transposed tensors, which can't be read over a network",
                hint="use it without --stream, or download the file first",
            )
        text = repr([(slot.key, slot.spec, slot.start) for slot in content.slots]).encode()
        digest = hashlib.sha256(text).hexdigest()
        return place.stat(name), content.slots, digest, content.nest, content.others
    slots, text = header.read(path) if path else header.read_from(name, _spans(place, name))
    return place.stat(name), slots, hashlib.sha256(text).hexdigest(), None, ()


def _spans(place: Place, name: str) -> SpanReader:
    """A file elsewhere, to look at its beginning and end."""
    return SpanReader(place.peek(name), place.stat(name).nbytes, n_at_once=place.n_at_once)


def _find_config(
    place: Place, given: str | Path | None
) -> tuple[Mapping[str, object] | None, bytes | None]:
    if given is not None:
        return _config_at(given)
    return _json_in(place, "config.json") if place.has("config.json") else (None, None)


def _config_at(source: str | Path) -> tuple[Mapping[str, object], bytes]:
    path = Path(source)
    if not places.is_elsewhere(source):
        text = _json_text(path / "config.json" if path.is_dir() else path)
        return parse_json(text, str(path / "config.json" if path.is_dir() else path)), text
    place = places.locate(source, stream=False)
    return _json_in(place, place.file or "config.json")


def read_config(path: str | Path) -> Mapping[str, object]:
    """The config.json at `path`, or in the folder `path`, or on the Hub, or at a URL."""
    return _config_at(path)[0]
