"""A source: a folder or file of weights, opened lazily. Headers and config now, bytes when used.

    folder   model.safetensors | model.safetensors.index.json + shards | *.safetensors (one)
             pytorch_model.bin | pytorch_model.bin.index.json + shards
             .metadata + *.distcp (torch.distributed.checkpoint)
    file     *.safetensors | *.pth, *.pt, *.bin (a state dict, or one under "model"/"state_dict")

An index maps keys to files of the same folder: {"weight_map": {"wte.weight": "model-...-of-..."}}
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, final

from streammap import (
    dcpmeta,
    dcpsource,
    header,
    reading,
    strictjson,
    torchfile,
    workfolder,
)  # fmt: skip
from streammap.dcpsource import Chunks
from streammap.errors import CheckpointError, some
from streammap.header import Slot
from streammap.spec import TensorSpec
from streammap.storage.local import LocalFile

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


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened source. Its bytes are read through `tensor` while it is open."""

    path: Path
    """The folder or file, as given."""
    files: tuple[SourceFile, ...]
    slots: Mapping[str, Slot]
    """In the order of files and bytes."""
    file_of: Mapping[str, str]
    """Key -> name of its file."""
    config: Mapping[str, object] | None
    """config.json, or None where there is none."""
    config_path: Path | None = None
    """Where that was read."""
    nest: str | None = None
    """The entry of a torch file that its state dict is nested under."""
    others: tuple[str, ...] = ()
    """What a torch file holds beside its state dict; not read."""
    _opened: dict[str, LocalFile] = field(default_factory=dict, repr=False)
    chunks: Chunks | None = field(default=None, repr=False)
    """What reads tensors that lie in chunks."""

    @property
    def name(self) -> str:
        """The folder's or file's name."""
        return self.path.resolve().name

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folder or file as given, and each file that is read."""
        return (self.path, *(self.folder / file.name for file in self.files))

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.slots[key].spec

    def file(self, key: str) -> LocalFile:
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
        if self.chunks is not None:
            self.chunks.read_into(key, start, view, mapped=mapped)
        elif slot.strides is None:
            self.file(key).read_into(slot.start + start, view, mapped=mapped)
        else:
            self._gather_into(key, start, view)

    def _gather_into(self, key: str, start: int, view: memoryview) -> None:
        """For a tensor of a torch file that is stored in another order than row by row."""
        import torch

        self.file(key).check_unchanged()  # a page past the end of a file ends the process
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
        whole = self.file(key).bytes()
        end = slot.end
        if slot.strides is not None:
            reach = sum((n - 1) * s for n, s in zip(slot.spec.shape, slot.strides, strict=True))
            end = slot.start + (reach + 1) * dtype.itemsize
        part = whole[slot.start : end]
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


def open_checkpoint(path: str | Path, *, config: str | Path | None = None) -> Checkpoint:
    """Open a folder or file of weights: headers, index and config.json; no tensor is read.

    Args:
        config: config.json, or a folder with one; by default the one beside the weights.

    Raises:
        CheckpointError: nothing there, or any file that is not what it says.
    """
    path = Path(path)
    try:
        return _open(path, config)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the path") from error


def _open(path: Path, config: str | Path | None) -> Checkpoint:
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder or file", hint="check the path")
    if dcpmeta.is_folder(path):
        return _open_chunked(path, config)
    folder = path if path.is_dir() else path.parent
    names, weight_map = _names_in(path) if path.is_dir() else ((path.name,), None)
    files: list[SourceFile] = []
    slots: dict[str, Slot] = {}
    file_of: dict[str, str] = {}
    nest: str | None = None
    others: tuple[str, ...] = ()
    for name in names:
        found, digest, nest, others = _read_file(folder / name)
        for slot in found:
            if slot.key in slots:
                raise CheckpointError(
                    f"{slot.key} is in {file_of[slot.key]} and in {name}",
                    hint="keep one of the two files",
                )
            slots[slot.key] = slot
            file_of[slot.key] = name
        stat = (folder / name).stat()
        files.append(SourceFile(name, stat.st_size, stat.st_mtime_ns, digest))
    if weight_map is not None:
        _check_index(path.name, weight_map, file_of)
    opened = {f.name: LocalFile(folder / f.name, f.nbytes, f.mtime_ns) for f in files}
    config_path = _find_config(folder, config)
    found_config = None if config_path is None else read_json(config_path)
    return Checkpoint(
        path, tuple(files), slots, file_of, found_config, config_path, nest, others, opened
    )


def _open_chunked(folder: Path, config: str | Path | None) -> Checkpoint:
    """A folder of torch.distributed.checkpoint."""
    both = [name for name in (*SINGLES, *INDEXES) if (folder / name).is_file()]
    if both:
        raise CheckpointError(
            f"{folder}: has {both[0]} and {dcpmeta.METADATA}, which may differ",
            hint="remove the stale one, or name the file",
        )
    found = dcpmeta.read(folder)
    chosen = dcpsource.select(found, folder=str(folder))
    tensors = {key: found.tensors[name] for key, name in chosen.keys.items()}
    digest = hashlib.sha256((folder / dcpmeta.METADATA).read_bytes()).hexdigest()
    files, opened = [], {}
    for name in sorted({chunk.file for _, chunks in tensors.values() for chunk in chunks}):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file", hint="copy all ranks' files")
        stat = (folder / name).stat()
        files.append(SourceFile(name, stat.st_size, stat.st_mtime_ns, digest))
        opened[name] = LocalFile(folder / name, stat.st_size, stat.st_mtime_ns)
    slots = {key: Slot(key, spec, 0) for key, (spec, _) in tensors.items()}
    file_of = {key: chunks[0].file for key, (_, chunks) in tensors.items() if chunks}
    path = _find_config(folder, config)
    return Checkpoint(
        folder, tuple(files), slots, file_of, None if path is None else read_json(path), path,
        chosen.nest, chosen.others, opened, Chunks(tensors, opened),
    )  # fmt: skip


def read_json(path: Path) -> Mapping[str, object]:
    """A JSON object from a file.

    Raises:
        CheckpointError: too large, unreadable, not JSON, or not an object.
    """
    try:
        content = strictjson.loads(reading.content(path, limit=MAX_JSON_NBYTES))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}", hint="mend the file") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def _names_in(folder: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    if (folder / workfolder.SUFFIX / workfolder.MARK).exists():
        raise CheckpointError(
            f"{folder}: a run that was putting its result here was stopped",
            hint="run its command again, which finishes it",
        )
    for single, index in zip(SINGLES, INDEXES, strict=True):
        has_single, has_index = (folder / single).is_file(), (folder / index).is_file()
        if has_single and has_index:
            raise CheckpointError(
                f"{folder}: has {single} and {index}, which may differ",
                hint="remove the stale one, or name the file",
            )
        if has_single:
            return (single,), None
        if has_index:
            weight_map = _weight_map(folder / index)
            return tuple(sorted(set(weight_map.values()))), weight_map
    loose = sorted(file.name for file in folder.glob("*.safetensors"))
    loose = [name for name in loose if not name.startswith(".") and ".map." not in name]
    loose = loose or sorted(
        file.name for suffix in TORCH_SUFFIXES for file in folder.glob(f"*{suffix}")
        if file.name not in ("training_args.bin", "MapMatrix.bin", "optimizer.pt", "scheduler.pt")
    )  # fmt: skip
    if len(loose) == 1:
        return (loose[0],), None
    if loose:
        raise CheckpointError(
            f"{folder}: {len(loose)} weight files and no index: {some(loose)}",
            hint=f"name one of them, {folder / loose[0]}",
        )
    raise CheckpointError(
        f"{folder}: no weights: expected one of {', '.join((*SINGLES, *INDEXES))}",
        hint="name a checkpoint folder, a .safetensors or a .pth file",
    )


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map", hint="download the index again")
    for key, name in weight_map.items():
        header.check_key(index.name, key)
        if not _is_plain_name(name):
            raise CheckpointError(
                f"{index}: {key} is said to be in {name!r}, expected a file of the same folder",
                hint="do not use this checkpoint: a wrong index can point anywhere",
            )
    return weight_map


def _is_plain_name(name: object) -> bool:
    """Whether an index' entry is the name of a file, and of nothing outside the folder."""
    if not isinstance(name, str) or name in ("", ".", ".."):
        return False
    return name.isprintable() and "/" not in name and "\\" not in name


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


def _read_file(path: Path) -> tuple[tuple[Slot, ...], str, str | None, tuple[str, ...]]:
    if not path.exists():
        raise CheckpointError(f"{path}: no such file", hint="download the missing shard")
    if path.suffix in TORCH_SUFFIXES:
        content = torchfile.read(path)
        text = repr([(slot.key, slot.spec, slot.start) for slot in content.slots]).encode()
        return content.slots, hashlib.sha256(text).hexdigest(), content.nest, content.others
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: a {path.suffix or 'file without ending'} is no weight file",
            hint=f"expected .safetensors, {', '.join(TORCH_SUFFIXES)}",
        )
    slots, text = header.read(path)
    return slots, hashlib.sha256(text).hexdigest(), None, ()


def _find_config(folder: Path, given: str | Path | None) -> Path | None:
    if given is not None:
        return _config_at(Path(given))
    path = folder / "config.json"
    if not path.is_file():
        return None
    if not reading.is_own(folder, path):
        # It is written out again: what it links to could be anyone's secret.
        raise CheckpointError(
            f"{path}: a link out of the checkpoint, to {path.resolve()}",
            hint=f"if it is meant, give it by name: --config {path}",
        )
    return path


def _config_at(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def read_config(path: str | Path) -> Mapping[str, object]:
    """The config.json at `path`, or in the folder `path`."""
    return read_json(_config_at(Path(path)))
