"""A source: a folder or file of weights. Headers and config are read now, tensors when used.

    folder   model.safetensors | model.safetensors.index.json + shards | *.safetensors (one)
             pytorch_model.bin | pytorch_model.bin.index.json + shards
             a whole set of numbered shards (NAME-00001-of-00003.safetensors ...)
             .metadata + *.distcp (torch.distributed.checkpoint)
    file     *.safetensors | *.pth, *.pt, *.bin (a state dict, or one under "model"/"state_dict")

It may be on this machine, on the Hub or at a URL: see resolve.py.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, final

from streammap.errors import CheckpointError
from streammap.io import json_files, key_wrappers, model_files, safe_open, weight_files
from streammap.io.dtypes import TensorSpec
from streammap.io.formats.safetensors_header import Slot
from streammap.io.problems import Finding, Problems, Strict
from streammap.io.storage import resolve
from streammap.io.storage.base import Network, OpenFile, Reader, Reading, Stat, Storage
from streammap.io.storage.local import LocalFile
from streammap.io.storage.prefetch import AheadFile, Window
from streammap.io.tensor_readers import FileTensors, TensorReader

if TYPE_CHECKING:
    from torch import Tensor

    from streammap.io.storage.mapping import MappedPart


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a source, as it was when it was opened."""

    name: str
    nbytes: int
    mtime_ns: int
    header_digest: str
    """sha256 of its header, or of what else locates its tensors."""
    version: str = ""
    """The storage's name for its content, if it is not on this machine."""

    @classmethod
    def of(cls, name: str, stat: Stat, header_digest: str) -> "SourceFile":
        """A file as its storage describes it."""
        return cls(name, stat.nbytes, stat.mtime_ns, header_digest, stat.version)

    def as_json(self) -> dict[str, object]:
        """Its entry in records; without the time, which only means something here."""
        entry = {"name": self.name, "nbytes": self.nbytes, "header_sha256": self.header_digest}
        return {**entry, **({"version": self.version} if self.version else {})}


@final
@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened source."""

    path: Path
    """The folder or file as given; the storage's own name, if it is not on this machine."""
    files: tuple[SourceFile, ...]
    slots: Mapping[str, Slot]
    """In the order of files and bytes."""
    file_of: Mapping[str, str]
    """Key -> name of its file."""
    config: Mapping[str, object] | None
    """config.json; None if there is none."""
    config_text: bytes | None = None
    """The file's own bytes."""
    nest: str | None = None
    """The entry of a torch file that its state dict is nested under."""
    others: tuple[str, ...] = ()
    """Other entries of a torch file; they are not read."""
    wrappers: tuple[str, ...] = ()
    """What wrappers wrote into the keys of its files, and is left out of its own."""
    notes: tuple[str, ...] = ()
    """What was wrong with its files, and does not keep loaders from reading it."""
    place: Storage | None = None
    """Where the files are; None for a checkpoint without files."""
    _opened: dict[str, OpenFile] = field(default_factory=dict, repr=False)
    reader: TensorReader = field(default_factory=lambda: FileTensors({}, {}, {}), repr=False)
    """Reads its tensors."""
    stored: "Checkpoint | None" = field(default=None, repr=False)
    """The same checkpoint as it is stored, if some of its tensors are decoded."""
    parts_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    """Key of a decoded tensor -> the stored tensors that it is made of, its codes first."""

    @property
    def name(self) -> str:
        """The folder's or file's name."""
        return self.path.resolve().name if self.place is None else self.place.name

    @property
    def label(self) -> str:
        """Its full name: a path, a repository and commit, or a URL."""
        return str(self.path if self.place is None else self.place)

    @property
    def address(self) -> str:
        """What opens it again: an absolute path, hf:// with the commit, or a URL."""
        return str(self.path.absolute()) if self.place is None else self.place.address

    @property
    def origin(self) -> Mapping[str, str]:
        """Where it is, for records; {} on this machine."""
        return {} if self.place is None else self.place.origin

    @property
    def is_local(self) -> bool:
        """Whether all of it is on this machine."""
        return not self.origin

    @property
    def is_streamed(self) -> bool:
        """Whether each read goes over a network."""
        return self.place is not None and self.place.is_streamed

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def paths(self) -> tuple[Path, ...]:
        """The folder or file as given, and its weight files; only if they are on this machine."""
        if not self.is_local:
            return ()
        return (self.path, *(self.folder / file.name for file in self.files))

    @property
    def network(self) -> Network:
        """How its bytes come over a network: by ranges, as files, or not at all."""
        if self.is_streamed:
            return "ranges"
        is_here = all(isinstance(opened, LocalFile) for opened in self._opened.values())
        return "none" if is_here else "files"

    def spec(self, key: str) -> TensorSpec:
        """Dtype and shape of a tensor."""
        return self.slots[key].spec

    def files_of(self, key: str) -> tuple[str, ...]:
        """Names of the files that hold a tensor: several, if it is decoded from several."""
        if self.stored is not None and key in self.parts_of:
            names = [self.stored.file_of.get(part) for part in self.parts_of[key]]
        else:
            names = [self.file_of.get(key)]
        # A tensor without bytes may be in none.
        return tuple(dict.fromkeys(name for name in names if name is not None))

    def stretches(self, key: str, start: int, end: int) -> Iterator[tuple[OpenFile, int, int]]:
        """Where in files bytes `start` to `end` of a tensor are, as far as that is known."""
        return self.reader.stretches(key, start, end)

    def read_into(self, key: str, start: int, view: memoryview) -> None:
        """Fill `view` with a tensor's bytes, row by row, from its byte `start` on.

        Raises:
            CheckpointError: the file ends before, or can't be read.
        """
        self.reader.read_into(key, start, view)

    def map_into(self, key: str, start: int, end: int, part: "MappedPart", reader: Reader) -> bool:
        """Map bytes `start` to `end` of a tensor; gives False if they are to be read instead.

        Raises:
            CheckpointError: the file can't be opened, or can't be mapped and has to be.
        """
        return self.reader.map_into(key, start, end, part, reader)

    def readings(self, reader: Reader) -> tuple[Reading, ...]:
        """How its files are read, each way once.

        Raises:
            CheckpointError: one can't be opened.
        """
        return tuple(dict.fromkeys(file.reading(reader) for file in self._opened.values()))

    def tensor(self, key: str) -> "Tensor":
        """A whole tensor, where possible a view of the file's mapping. Do not write to it."""
        return self.reader.tensor(key)

    def release(self) -> None:
        """Give mapped pages back."""
        for opened in self._opened.values():
            opened.release()

    def expect(self, names: tuple[str, ...]) -> None:
        """Announce the files that will be read, in this order; they may be fetched ahead."""
        if self.place is not None:
            self.place.expect(names)

    def window(self, window: Window | None) -> None:
        """Let reads over a network use what `window` has fetched."""
        for opened in self._opened.values():
            if isinstance(opened, AheadFile):
                opened.window = window

    def cancel(self) -> None:
        """Let reads that wait for a network end in an error."""
        for opened in self._opened.values():
            opened.cancel()

    def check_unchanged(self) -> None:
        """Check that no file was written to since it was opened.

        Raises:
            CheckpointError: one was; names it.
        """
        for opened in self._opened.values():
            opened.check_unchanged()

    def close(self) -> None:
        """Close all files."""
        for opened in self._opened.values():
            opened.close()


def open_checkpoint(
    path: str | Path, *, config: str | Path | None = None, stream: bool = False
) -> Checkpoint:
    """Open a folder or file of weights: headers, index and config.json; no tensor is read.

    Args:
        path: A path, "org/name" on the Hub, or a URL; see resolve.py.
        config: A config.json, or a folder with one; by default the one beside the weights.
        stream: Whether to read from the Hub as needed, instead of through its cache.

    Raises:
        CheckpointError: it does not exist, or a file is broken.
    """
    try:
        storage = resolve.locate(path, stream=stream)
        opened = _open(storage, resolve.local_path(str(storage) if storage.origin else path))
        content, text = _find_config(storage, config)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}", hint="check the path") from error
    return replace(opened, config=content, config_text=text)


def _open(storage: Storage, path: Path) -> Checkpoint:
    if storage.file is not None:
        return open_files(storage, path, (storage.file,), None, problems=Strict(storage))
    if storage.has(weight_files.DCP_METADATA):
        from streammap.io.formats import dcp_metadata

        if not storage.origin and dcp_metadata.is_folder(path):
            return _open_chunked(storage, path)
        if storage.origin and any(n.endswith(weight_files.DCP_SUFFIX) for n in storage.names()):
            raise CheckpointError(
                f"{storage}: torch.distributed.checkpoint folders can only be read on this machine",
                hint="download the folder first",
            )
    problems = Strict(storage)
    names, weight_map = model_files.choose(storage, problems)
    opened = open_files(storage, path, names, weight_map, problems=problems)
    return replace(opened, notes=tuple(problems.notes))


def open_files(
    storage: Storage,
    path: Path,
    names: Iterable[str],
    weight_map: Mapping[str, str] | None,
    *,
    problems: Problems,
) -> Checkpoint:
    """Open weight files of a folder, without a config.json.

    Args:
        storage: The folder, or the file.
        path: The checkpoint's path as given.
        names: The files.
        weight_map: The index, to be compared with the files; None if there is none.
        problems: Takes the problems; a file that can't be read is left out.
    """
    contents = list(weight_files.read_files(storage, tuple(names), problems))
    slots: dict[str, Slot] = {}
    file_of: dict[str, str] = {}
    for content in contents:
        repeated = [
            Finding("error", "key", f"it is in {file_of[slot.key]} too", slot.key, content.name)
            for slot in content.slots
            if slot.key in slots
        ]
        hint = "download both again; if one of the files is the whole model, name that one"
        problems.report(repeated, hint=hint)
        for slot in content.slots:
            slots.setdefault(slot.key, slot)
            file_of.setdefault(slot.key, content.name)
    if weight_map is not None:
        read = {content.name for content in contents}
        weight_files.check_index(weight_map, file_of, read, problems)
    names_of = key_wrappers.unwrap(slots.keys())
    _report_clashes(names_of, problems)
    if names_of.plain:
        slots = {names_of.key(k): replace(slot, key=names_of.key(k)) for k, slot in slots.items()}
        file_of = {names_of.key(key): name for key, name in file_of.items()}
    opened = {content.name: storage.open(content.name, content.stat) for content in contents}
    return Checkpoint(
        path,
        tuple(SourceFile.of(content.name, content.stat, content.digest) for content in contents),
        slots,
        file_of,
        None,
        nest=contents[-1].nest if contents else None,
        others=contents[-1].others if contents else (),
        wrappers=names_of.wrappers,
        place=storage,
        _opened=opened,
        reader=FileTensors(slots, file_of, opened),
    )


def _open_chunked(storage: Storage, folder: Path) -> Checkpoint:
    """A folder of torch.distributed.checkpoint."""
    from streammap.io.formats import dcp_chunks, dcp_metadata

    both = [
        name for name in (*weight_files.SINGLES, *weight_files.INDEXES) if (folder / name).is_file()
    ]
    if both:
        raise CheckpointError(
            f"{folder}: has {both[0]} and {dcp_metadata.METADATA}, which may differ",
            hint="remove the stale one, or name the file",
        )
    metadata = dcp_metadata.read(folder)
    chosen = dcp_chunks.select(metadata, folder=str(folder))
    names_of = key_wrappers.unwrap(chosen.keys.keys())
    _report_clashes(names_of, Strict(storage))
    tensors = {names_of.key(key): metadata.tensors[name] for key, name in chosen.keys.items()}
    digest = hashlib.sha256((folder / dcp_metadata.METADATA).read_bytes()).hexdigest()
    files: list[SourceFile] = []
    opened: dict[str, LocalFile] = {}
    for name in sorted({chunk.file for _, chunks in tensors.values() for chunk in chunks}):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: no such file", hint="copy all ranks' files")
        stat = storage.stat(name)
        files.append(SourceFile.of(name, stat, digest))
        opened[name] = LocalFile(folder / name, stat.nbytes, stat.mtime_ns)
    return Checkpoint(
        folder,
        tuple(files),
        {key: Slot(key, spec, 0) for key, (spec, _) in tensors.items()},
        {key: chunks[0].file for key, (_, chunks) in tensors.items() if chunks},
        None,
        nest=chosen.nest,
        others=chosen.others,
        wrappers=names_of.wrappers,
        place=storage,
        _opened=dict(opened),
        reader=dcp_chunks.Chunks(tensors, opened),
    )


def _report_clashes(names_of: key_wrappers.PlainKeys, problems: Problems) -> None:
    """Two tensors may not be one without what wrappers wrote into their keys."""
    wrappers = " and ".join(names_of.wrappers)
    clashes = [
        Finding("error", "key", f"it and {other} are both {plain}, without {wrappers}", key)
        for other, key, plain in names_of.clashes
    ]
    problems.report(clashes, hint="keep one of the two tensors")


def _find_config(
    storage: Storage, given: str | Path | None
) -> tuple[Mapping[str, object] | None, bytes | None]:
    if given is not None:
        return json_files.load_config(given)
    if not storage.has("config.json"):
        return None, None
    path = storage.path("config.json")
    if path is not None and not storage.origin and not safe_open.is_own(path.parent, path):
        # It is copied to results: a link could lead to a secret of this machine.
        raise CheckpointError(
            f"{path}: a link out of the checkpoint, to {path.resolve()}",
            hint=f"if this is intended, name it: --config {path}",
        )
    return json_files.read_stored(storage, "config.json")
