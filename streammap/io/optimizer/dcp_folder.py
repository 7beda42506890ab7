"""A state in a folder of torch.distributed.checkpoint, as torch's get_optimizer_state_dict has it.

optim.state.<parameter>.exp_avg           a tensor, in chunks
optim.param_groups.0.lr                   a value; .params are the names of the parameters
optim.param_groups.<parameter>.lr         instead, where the state dict was flattened
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from streammap.errors import CheckpointError
from streammap.io import key_wrappers, safe_open
from streammap.io.checkpoint import Checkpoint, SourceFile
from streammap.io.dtypes import TensorSpec
from streammap.io.formats import dcp_chunks, dcp_metadata, dcp_stream
from streammap.io.formats.dcp_metadata import Chunk, Metadata
from streammap.io.formats.safetensors_header import Slot
from streammap.io.optimizer import state, torch_file
from streammap.io.optimizer.state import Form, Group, OptimizerFile
from streammap.io.storage.local import LocalFile, LocalStorage

_STATE, _GROUPS = "state", "param_groups"


class _Entry(NamedTuple):
    """A tensor of the state: whose, what, and its flat name."""

    parameter: str
    what: str
    flat: str


def read(folder: Path) -> OptimizerFile | None:
    """The state in a folder; None where it has none.

    Raises:
        CheckpointError: a broken folder, a state that is broken or that has no map.
    """
    metadata = dcp_metadata.read(folder)
    nest, is_flat, found = _found(metadata)
    if not found:
        return None
    plain = key_wrappers.unwrap(dict.fromkeys(entry.parameter for entry in found))
    for first, other, name in plain.clashes:
        raise CheckpointError(f"{folder}: {first} and {other} are both {name}, without wrappers")
    entries: dict[str, dict[str, float | None]] = {}
    tensors: dict[str, tuple[TensorSpec, tuple[Chunk, ...]]] = {}
    for entry in found:
        name = plain.key(entry.parameter)
        entries.setdefault(name, {})[entry.what] = None
        tensors[state.key_of(name, entry.what)] = metadata.tensors[entry.flat]
    files = _Files(folder, hashlib.sha256((folder / dcp_metadata.METADATA).read_bytes()))
    groups = _groups(folder, metadata, nest, plain, entries, files)
    state.check(str(folder), entries, groups)
    return OptimizerFile(files.checkpoint(tensors), entries, groups, Form("dcp", nest, is_flat))


def _found(metadata: Metadata) -> tuple[str, bool, list[_Entry]]:
    """What the state stands under, whether it was flattened, and its tensors."""
    nest, is_flat, found = "", False, []
    for flat in metadata.tensors:
        text = ".".join(map(str, metadata.paths[flat]))
        before, mark, rest = f".{text}".partition(f".{_STATE}.")
        parameter, _, what = rest.rpartition(".")
        is_state = mark and parameter and (not before or "optim" in before.lower())
        if is_state:
            nest = before.removeprefix(".")
            is_flat = len(metadata.paths[flat]) == 1 + bool(nest)
            found.append(_Entry(parameter, what, flat))
    return nest, is_flat, found


def _groups(
    folder: Path,
    metadata: Metadata,
    nest: str,
    plain: key_wrappers.PlainKeys,
    entries: Mapping[str, object],
    files: "_Files",
) -> tuple[Group, ...]:
    """The groups of parameters; all in one without options where there are none."""
    prefix = f"{nest}.{_GROUPS}" if nest else _GROUPS
    tables: dict[str, dict[object, object]] = {}
    for flat, chunk in metadata.objects.items():
        text = ".".join(map(str, metadata.paths[flat]))
        if text == prefix:
            listed = files.value(flat, chunk)
            for i, one in enumerate(listed if isinstance(listed, list) else ()):
                tables[str(i)] = one if isinstance(one, dict) else {}
        elif text.startswith(f"{prefix}."):
            owner, _, option = text.removeprefix(f"{prefix}.").rpartition(".")
            tables.setdefault(owner, {})[option] = files.value(flat, chunk)
    where = str(folder)
    if all(isinstance(table.get("params"), list) for table in tables.values()) and tables:
        made = []
        for number in sorted(tables, key=lambda one: (len(one), one)):
            table = tables[number]
            names = table.pop("params")
            assert isinstance(names, list)
            called = tuple(plain.key(name) for name in names if isinstance(name, str))
            made.append(Group(called, torch_file.options(where, table)))
        return tuple(made)
    alike: dict[str, tuple[list[str], dict[str, object]]] = {}
    own = {plain.key(stored): table for stored, table in tables.items()}
    for name in entries:
        options = torch_file.options(where, own.get(name, {}))
        alike.setdefault(repr(sorted(options.items())), ([], options))[0].append(name)
    return tuple(Group(tuple(names), options) for names, options in alike.values())


class _Files:
    """The files of a folder, each opened once."""

    def __init__(self, folder: Path, digest: "hashlib._Hash") -> None:
        self._folder, self._digest = folder, digest.hexdigest()
        self._storage = LocalStorage(folder)
        self._opened: dict[str, LocalFile] = {}
        self._sources: dict[str, SourceFile] = {}

    def value(self, name: str, chunk: Chunk) -> object:
        """An entry that is no tensor."""
        return dcp_stream.value(name, chunk, self._open(chunk.file))

    def checkpoint(self, tensors: Mapping[str, tuple[TensorSpec, tuple[Chunk, ...]]]) -> Checkpoint:
        """The tensors as a checkpoint."""
        names = sorted({chunk.file for _, chunks in tensors.values() for chunk in chunks})
        opened = {name: self._open(name) for name in names}
        return Checkpoint(
            self._folder,
            tuple(self._sources[name] for name in names),
            {key: Slot(key, spec, 0) for key, (spec, _) in tensors.items()},
            {key: chunks[0].file for key, (_, chunks) in tensors.items() if chunks},
            None,
            place=self._storage,
            _opened=dict(opened),
            reader=dcp_chunks.Chunks(tensors, opened),
        )

    def _open(self, name: str) -> LocalFile:
        if name not in self._opened:
            if not safe_open.is_plain_name(name) or not (self._folder / name).is_file():
                raise CheckpointError(
                    f"{self._folder / name}: no such file", hint="copy all ranks' files"
                )
            stat = self._storage.stat(name)
            self._sources[name] = SourceFile.of(name, stat, self._digest)
            self._opened[name] = LocalFile(self._folder / name, stat.nbytes, stat.mtime_ns)
        return self._opened[name]
